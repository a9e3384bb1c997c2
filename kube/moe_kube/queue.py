"""Which objects to look at next: a queue of keys that waits, forgets duplicates and never hands one key out twice.

The contract is that of client-go's workqueue: a key added many times is handed out once; one that is being worked on is
held back, and handed out again after `done` if it was added meanwhile; of several delayed adds the earliest counts.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from moe_core.clock import Clock
from moe_core.retry import Backoff
from moe_kube.throttle import TokenBucket
from moe_kube.waits import INSTANT_S, at_most

K = TypeVar("K", bound=Hashable)


class QueueClosed(Exception):
    """`get` after `close`: the worker should end."""


class WorkQueue(Generic[K]):
    """Used from one event loop, by any number of workers: `key = await get()`, work, `done(key)`.

    `add_rate_limited` is for a key whose work failed: its own exponential back-off (half to all of the bound, so that
    a crowd spreads) and the queue's common bucket of `retry_qps`; `forget` it when the work succeeds.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        backoff: Backoff = Backoff(initial_s=0.05, max_s=300.0),  # noqa: B008 - frozen
        retry_qps: float = 10.0,
        retry_burst: int = 100,
        rng: random.Random | None = None,
    ) -> None:
        self._clock = clock
        self._backoff = backoff
        self._bucket = TokenBucket(retry_qps, retry_burst, clock)
        self._rng = rng or random.Random()
        self._ready: OrderedDict[K, float] = OrderedDict()
        self._working: dict[K, float] = {}
        self._again: dict[K, float] = {}
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = 0
        self._failures: dict[K, int] = {}
        self._getters: deque[asyncio.Future[None]] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._earlier = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self.adds_total = 0
        self.retries_total = 0

    def __len__(self) -> int:
        """Keys that wait for a worker now (depth); delayed ones and those being worked on do not count."""
        return len(self._ready)

    @property
    def delayed(self) -> int:
        return len(self._due)

    @property
    def working(self) -> int:
        return len(self._working)

    def oldest_age_s(self) -> float:
        """How long the key that waits longest has waited for a worker; 0 for an empty queue."""
        return self._clock.monotonic() - next(iter(self._ready.values())) if self._ready else 0.0

    def longest_work_s(self) -> float:
        """How long the key that is being worked on longest has been; a hung worker shows here."""
        return self._clock.monotonic() - min(self._working.values()) if self._working else 0.0

    def failures(self, key: K) -> int:
        """How often `add_rate_limited` was called since the last `forget`."""
        return self._failures.get(key, 0)

    def add(self, key: K) -> None:
        """Hand it out as soon as a worker is free, once."""
        if self._closed:
            return
        if key in self._working:
            if key not in self._again:
                self.adds_total += 1
                self._again[key] = self._clock.monotonic()
        elif key not in self._ready:
            self.adds_total += 1
            self._ready[key] = self._clock.monotonic()
            self._wake()

    def add_after(self, key: K, seconds: float) -> None:
        """`add` it then, unless an earlier one is due for it."""
        if self._closed:
            return
        if seconds <= 0:
            self.add(key)
            return
        due = self._clock.monotonic() + seconds
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        self._order += 1
        heapq.heappush(self._heap, (due, self._order, key))
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._deliver())
        elif self._heap[0][0] == due:
            self._earlier.set()

    def unschedule(self, key: K) -> None:
        """Forget its delayed `add`: whoever looks at it now decides anew when the next look is."""
        if self._due.pop(key, None) is not None and len(self._heap) > 2 * len(self._due) + 64:
            # What was unscheduled lies in the heap until its time; more than half of it is too much.
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)

    def add_rate_limited(self, key: K, *, at_least_s: float = 0.0) -> float:
        """`add` it after its back-off, and not before `at_least_s` (a Retry-After). Returns the wait in seconds."""
        failures = self._failures.get(key, 0) + 1
        self._failures[key] = failures
        self.retries_total += 1
        own_s = self._backoff.bound_s(failures) * self._rng.uniform(0.5, 1.0)
        wait_s = max(own_s, self._bucket.take(), at_least_s)
        self.add_after(key, wait_s)
        return wait_s

    def forget(self, key: K) -> None:
        """The next failure of this key is its first one again."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The next key, for this worker alone until it calls `done`. Raises QueueClosed."""
        while not self._ready:
            if self._closed:
                raise QueueClosed
            getter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._getters.append(getter)
            try:
                await getter
            except asyncio.CancelledError:
                if getter.done() and not getter.cancelled():
                    self._wake()  # This worker was chosen and will not come: choose another.
                raise
        if self._closed:
            raise QueueClosed
        key, _ = self._ready.popitem(last=False)
        self._working[key] = self._clock.monotonic()
        self._idle.clear()
        return key

    def done(self, key: K) -> None:
        """The worker has finished with it, whatever came of it."""
        del self._working[key]
        added = self._again.pop(key, None)
        if added is not None and not self._closed:
            self._ready[key] = added
            self._ready.move_to_end(key)
            self._wake()
        if not self._working:
            self._idle.set()

    def close(self) -> None:
        """No more work: waiting workers get QueueClosed; running ones finish (`join`). What waits is dropped."""
        self._closed = True
        self._ready.clear()
        self._again.clear()
        self._due.clear()
        self._heap.clear()
        if self._pump is not None:
            self._pump.cancel()
            self._pump = None
        while self._getters:
            getter = self._getters.popleft()
            if not getter.done():
                getter.set_result(None)

    async def join(self) -> None:
        """Wait until nothing is being worked on."""
        await self._idle.wait()

    def _wake(self) -> None:
        if not self._ready:
            return
        while self._getters:
            getter = self._getters.popleft()
            if not getter.done():
                getter.set_result(None)
                return

    async def _deliver(self) -> None:
        """Move delayed keys into the queue when they fall due; ends when there are none."""
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) != due:
                heapq.heappop(self._heap)  # An earlier one took its place.
                continue
            wait_s = due - self._clock.monotonic()
            if wait_s > INSTANT_S:
                self._earlier.clear()
                await at_most(self._clock, self._earlier.wait(), wait_s)
                continue
            heapq.heappop(self._heap)
            del self._due[key]
            self.add(key)
        self._pump = None
