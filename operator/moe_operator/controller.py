"""Which MoEDeployment is looked at when: wakes, workers, results, and an end that leaves no write under way.

`follow` keeps the caches at all times, so that a standby knows the cluster when it becomes the leader. Workers run only
between `start` and `stop`, which the election calls. A key is with one worker at a time, and an error of one key costs
the others nothing but its worker's time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Literal

from moe_core.clock import Clock
from moe_core.config import OperatorConfig
from moe_core.log import Log, get_log
from moe_core.retry import Backoff
from moe_kube.api import Api
from moe_kube.errors import ApiError, Conflict, Fenced
from moe_kube.queue import QueueClosed, WorkQueue
from moe_kube.waits import at_most
from moe_operator.caches import Caches
from moe_operator.children import Key
from moe_operator.reconcile import Steps, reconcile
from moe_operator.requests import Outcome
from moe_operator.shell import Fleet, Performer, Teller, run

Result = Literal["settled", "changed", "retried", "failed", "fenced"]
"""How one reconcile ended: nothing to do, something done, lost a race, tried again later, not the leader."""
Reconcile = Callable[[Key, OperatorConfig], Steps]
Observe = Callable[[Result, float], None]

AGAIN_S = 1.0
"""After something was done, whether it is all that was to do: late enough for others to have answered as well."""
BACKOFF = Backoff(initial_s=0.1, max_s=300.0)
SOONEST_S = 0.2
"""No decision brings a key back sooner than this; only a change does."""


class Controller:
    """The workers of one operator process."""

    def __init__(
        self,
        api: Api,
        config: OperatorConfig,
        *,
        clock: Clock,
        fleet: Fleet,
        teller: Teller,
        observe: Observe = lambda result, seconds: None,
        reconcile: Reconcile = reconcile,
        rng: random.Random | None = None,
    ) -> None:
        """`api` refuses writes while this process does not lead (moe_kube.fence); reads pass at all times."""
        self._config = config
        self._clock = clock
        self._observe = observe
        self._reconcile = reconcile
        self._rng = rng or random.Random()
        self.caches = Caches(api, config, clock=clock, wake=self.wake, rng=self._rng)
        self._performer = Performer(api, caches=self.caches, fleet=fleet, teller=teller)
        self._queue: WorkQueue[Key] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._under_way: set[Key] = set()
        self._meanwhile: set[Key] = set()
        self._adds_before = 0
        self._retries_before = 0
        self._log = get_log("operator.controller")

    # -- what is seen from outside

    @property
    def broken(self) -> bool:
        """Whether its workers have ended though it should work: a bug, and only a new process goes on."""
        return self._queue is not None and any(task.done() for task in self._tasks)

    @property
    def depth(self) -> int:
        return len(self._queue) if self._queue is not None else 0

    @property
    def delayed(self) -> int:
        return self._queue.delayed if self._queue is not None else 0

    @property
    def under_way(self) -> int:
        return self._queue.working if self._queue is not None else 0

    def oldest_age_s(self) -> float:
        return self._queue.oldest_age_s() if self._queue is not None else 0.0

    def longest_work_s(self) -> float:
        return self._queue.longest_work_s() if self._queue is not None else 0.0

    @property
    def adds_total(self) -> int:
        return self._adds_before + (self._queue.adds_total if self._queue is not None else 0)

    @property
    def retries_total(self) -> int:
        return self._retries_before + (self._queue.retries_total if self._queue is not None else 0)

    # -- when

    async def follow(self) -> None:
        """Keep the caches, until cancelled."""
        await self.caches.run()

    def wake(self, key: Key) -> None:
        """Look at it as soon as a worker is free. Nothing happens while this process does not lead.

        What changes while a worker is at it is most often that worker's own doing: how it ends says when to look again.
        """
        if key in self._under_way:
            self._meanwhile.add(key)
        elif self._queue is not None:
            self._queue.add(key)

    async def start(self) -> None:
        """Begin to work, as soon as the caches are filled. Returns at once."""
        if self._queue is not None:
            return
        self._queue = WorkQueue(self._clock, backoff=BACKOFF, rng=self._rng)
        self._tasks = [asyncio.create_task(self._term(self._queue), name="operator term")]

    async def stop(self) -> None:
        """Take no more keys and return when no call is under way. By then the fence refuses writes."""
        queue, self._queue = self._queue, None
        if queue is None:
            return
        self._adds_before += queue.adds_total
        self._retries_before += queue.retries_total
        tasks, self._tasks = self._tasks, []
        queue.close()
        # Longer than any call: a write that were cut off here could land after another one leads.
        await at_most(self._clock, queue.join(), self._config.lease_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _term(self, queue: WorkQueue[Key]) -> None:
        """One time of leadership: everything is looked at once, then whatever wakes."""
        await self.caches.wait_synced()
        keys = self.caches.keys()
        self._log.info("working", objects=len(keys), workers=self._config.workers)
        for key in keys:
            queue.add(key)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._config.workers):
                group.create_task(self._work(queue))

    async def _work(self, queue: WorkQueue[Key]) -> None:
        while True:
            try:
                key = await queue.get()
            except QueueClosed:
                return
            self._under_way.add(key)
            try:
                await self._one(key, queue)
            finally:
                self._under_way.discard(key)
                self._meanwhile.discard(key)
                queue.done(key)
            # One that had nothing to do has waited for nothing: thousands of them in a row would keep the loop from
            # everything else, the lease's renewal first.
            await self._clock.sleep(0)

    async def _one(self, key: Key, queue: WorkQueue[Key]) -> None:
        """One reconcile, and when the next one is due. Raises nothing but cancellation."""
        log = self._log.bind(namespace=key[0], name=key[1])
        began = self._clock.monotonic()
        queue.unschedule(key)
        result: Result
        try:
            outcome = await run(self._reconcile(key, self._config), self._performer.perform)
        except Fenced as error:
            log.info("stopped: the lease is not held", reason=str(error))
            queue.add_after(key, AGAIN_S)  # for a lease that is renewed after all; else the queue is closed
            result = "fenced"
        except ApiError as error:
            result = self._later(key, queue, error, log)
        except Exception:
            wait_s = queue.add_rate_limited(key)
            log.exception("the reconcile failed: this is a bug", again_in_s=round(wait_s, 1))
            result = "failed"
        else:
            result = self._ended(key, queue, outcome, log)
        if key in self._meanwhile:
            queue.add_after(key, 0.0 if result == "settled" else AGAIN_S)
        seconds = self._clock.monotonic() - began
        self._observe(result, seconds)
        log.debug("reconciled", result=result, seconds=round(seconds, 4))

    def _later(self, key: Key, queue: WorkQueue[Key], error: ApiError, log: Log) -> Result:
        """Another try, later with each failure; a lost race is no failure of anybody, and begins with a short wait."""
        wait_s = queue.add_rate_limited(key, at_least_s=error.retry_after_s or 0.0)
        if isinstance(error, Conflict):
            log.debug("another writer was there first", reason=str(error), again_in_s=round(wait_s, 1))
            return "retried"
        log.warning("a call failed", reason=str(error), status=error.status, again_in_s=round(wait_s, 1))
        return "failed"

    def _ended(self, key: Key, queue: WorkQueue[Key], outcome: Outcome, log: Log) -> Result:
        if outcome.error:
            wait_s = queue.add_rate_limited(key)
            log.warning("not all could be done", reason=outcome.error, again_in_s=round(wait_s, 1))
        else:
            queue.forget(key)
            if not outcome.settled:
                queue.add_after(key, AGAIN_S)
        if outcome.requeue_s is not None:
            queue.add_after(key, max(outcome.requeue_s, SOONEST_S))
        if self.caches.knows(key):  # what was due before is not: each look decides anew
            queue.add_after(key, self._config.resync_s * self._rng.uniform(0.8, 1.0))
        return "failed" if outcome.error else "settled" if outcome.settled else "changed"
