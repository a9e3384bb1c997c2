"""The event loop: requests, engines, failures and what else happens, in order of time, from one seed."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from moe_core.forecast import Failure, SpillContext
from moe_core.latency import Ended, First
from moe_core.spill import Action, Decision
from moe_planner.sim.books import Snapshot, books
from moe_planner.sim.closed import ClosedApis
from moe_planner.sim.gateway import gateways
from moe_planner.sim.knobs import Knobs
from moe_planner.sim.policy import Policy, always_local
from moe_planner.sim.replica import Replica
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.workload import Workload
from moe_planner.sim.world import LOCAL, World

NAN = math.nan
_NOTHING: frozenset[str] = frozenset()
_PROGRESS_EVERY = 2048


def simulate(
    workload: Workload,
    world: World,
    policy: Policy | None = None,
    *,
    seed: int = 0,
    progress: Callable[[float], bool | None] | None = None,
    probe: Callable[[Snapshot], None] | None = None,
) -> Result:
    """Run a workload through a world until its last request has ended. The same arguments give the same result.

    `progress` hears now and then the share of arrivals that are done with; where it returns True the run ends there,
    and the result holds the requests that had ended by then. `probe` sees the books after every event (slow).
    """
    run = Run(workload, world, policy or Policy(), seed)
    run.loop(progress, probe)
    return run.result()


class Run:
    """Live state of one simulation."""

    def __init__(self, workload: Workload, world: World, policy: Policy, seed: int) -> None:
        self.workload, self.world, self.policy = workload, world, policy
        self.rng = random.Random(seed)
        count = len(workload)
        self.at: list[float] = workload.at_s.tolist()
        self.input: list[int] = workload.input_tokens.tolist()
        self.output: list[int] = workload.output_tokens.tolist()
        self.made = [0] * count
        self.outcome = [-1] * count
        self.where = [-1] * count
        self.sent_s = [0.0] * count
        self.first_s = [NAN] * count
        self.ttft = [NAN] * count
        self.itl = [NAN] * count
        self.e2e = [NAN] * count
        self.usd = [0.0] * count
        self.p_miss = [NAN] * count
        self.work = [0.0] * count
        self.slot_wait = [0.0] * count
        self.beside = [0.0] * count
        self.p_slow, self.foreseen = [0.0] * count, [0.0] * count
        self.gate = [0] * count
        if world.gateways > 1:
            self.gate = [self.rng.randrange(world.gateways) for _ in range(count)]
        self.tier: list[int] = []
        """Place of each request's tier in `world.tiers`, where there are some."""
        if world.tiers:
            shares = np.array([tier.share for tier in world.tiers])
            of = np.random.default_rng([seed, 11]).choice(len(shares), size=count, p=shares / shares.sum())
            self.tier = of.tolist()
        self.deciding = -1
        self.tried: dict[int, frozenset[str]] = {}
        self.replicas = [Replica(world.engine, self.input, self.output, self.made) for _ in range(world.replicas)]
        self.plain = policy.decide is always_local
        self.gates = gateways(world, self._decider(), policy)
        self.arrived = self.ended = 0
        self.held: dict[int, None] = {}
        self.log: list[tuple[float, int]] = []
        """(time, request) of every end, for the signals of a control."""
        self.lost = 0
        self.events: list[tuple[float, int, Callable[[float, Any], None], Any]] = []
        self.order = 0
        self.now = 0.0
        self.turn = 0
        self.preempted = (0, 0.0)
        """Preemptions until a moment: what the signals counted from last."""
        self.wakes = [math.inf] * max(1, len(self.replicas))
        self.closed = ClosedApis(self)
        self.knobs = Knobs(self, seed)
        for outage in world.outages:
            self.push(outage.from_s, self.fail, outage.replica)
            self.push(outage.until_s, self.recover, outage.replica)

    def _decider(self) -> Callable[[SpillContext, Any], tuple[Decision, Any]]:
        """The policy's own decision; requests of tiers that may not spill see no target, as in the gateway."""
        decide, tiers = self.policy.decide, self.world.tiers
        if all(tier.may_spill for tier in tiers):
            return decide

        def by_tier(context: SpillContext, state: Any) -> tuple[Decision, Any]:
            if not tiers[self.tier[self.deciding]].may_spill:
                context = replace(context, targets=())
            return decide(context, state)

        return by_tier

    def push(self, at: float, what: Callable[[float, Any], None], payload: Any) -> None:
        self.order += 1
        heapq.heappush(self.events, (at, self.order, what, payload))

    # The loop

    def loop(self, progress: Callable[[float], bool | None] | None, probe: Callable[[Snapshot], None] | None) -> None:
        at, events, wakes = self.at, self.events, self.wakes
        total, arrived = len(at), 0
        arrival = at[0] if total else math.inf
        while self.ended < total:
            wake = min(wakes)
            event = events[0][0] if events else math.inf
            # At one moment: what happens to the world, then arrivals, then steps: who comes together runs together.
            if wake < arrival and wake < event:
                self.now = wake
                self.step(wakes.index(wake), wake)
            elif event <= arrival:
                when, _, what, payload = heapq.heappop(events)
                self.now = when
                what(when, payload)
            else:
                self.now = arrival
                request = arrived
                arrived += 1
                self.arrived = arrived
                arrival = at[arrived] if arrived < total else math.inf
                self.place(request, self.now, _NOTHING, None)
                if progress is not None and not arrived % _PROGRESS_EVERY and progress(arrived / total):
                    return
            if probe is not None:
                probe(books(self))

    def step(self, index: int, now: float) -> None:
        """A replica's jump has ended: note first tokens and ends, and begin the next."""
        replica = self.replicas[index]
        first, ended = replica.finish()
        plain = self.plain
        for request in first:
            if self.first_s[request] != self.first_s[request]:  # not after a preemption
                self.first_s[request] = now
                overhead = self.world.engine.overhead_s
                self.ttft[request] = now + overhead - self.at[request]
                if not plain:
                    gate = self.gates[self.gate[request]]
                    gate.left_queue(request, now)
                    gate.decoding(1, now)
                    seen = First(
                        self.work[request],
                        self.input[request],
                        self.slot_wait[request],
                        now + overhead - self.sent_s[request],
                        self.beside[request],
                    )
                    gate.learn(LOCAL, seen, now)
        for request in ended:
            tokens, itl = self.output[request], None
            if tokens > 1:
                self.itl[request] = itl = (now - self.first_s[request]) / (tokens - 1)
            if not plain:
                gate = self.gates[self.gate[request]]
                gate.decoding(-1, now)
                gate.learn(LOCAL, Ended(itl, tokens, self.foreseen[request], self.p_slow[request]), now)
            self.end(request, Outcome.LOCAL, now)
        replica.begin(now)
        self.wakes[index] = replica.end
        if self.held:
            for request in list(self.held)[: len(ended)]:  # for each that ends, the one that has waited longest
                self.release(now, request)

    # Requests

    def place(self, request: int, now: float, tried: frozenset[str], failure: Failure | None) -> None:
        """Send a request where the policy says, and again elsewhere where that fails before the first token."""
        if self.plain:
            if not self.to_replica(request, now):
                self.end(request, Outcome.FAILED, now)
            return
        gate = self.gates[self.gate[request]]
        self.deciding = request
        while True:
            elapsed = now - self.at[request]
            left, thresholds = self.closed.budget_left, self.knobs.thresholds
            decision = gate.decide(now, self.input[request], elapsed, thresholds, left, tried, failure)
            if decision.forecast is not None and not tried:
                self.p_miss[request] = decision.forecast.p_miss
            if decision.action is Action.HOLD:
                self.held[request] = None
                self.push(decision.until_s, self.release, request)
                return
            if decision.target is None:
                self.end(request, Outcome.FAILED if tried else Outcome.SHED, now)
                return
            name = decision.target
            gate.sent(name, now)
            self.sent_s[request] = now
            tried = tried | {name}
            if decision.action is Action.LOCAL:
                forecast = decision.forecast
                if forecast is not None:
                    self.work[request], self.slot_wait[request] = forecast.work_tokens, forecast.slot_wait_s
                    self.beside[request] = forecast.running
                    self.p_slow[request], self.foreseen[request] = forecast.p_slow, forecast.itl_s
                if self.to_replica(request, now):
                    gate.queued(request, now, self.input[request])
                    self.tried[request] = tried
                    return
                gate.failed(name, now)
                failure = Failure.FAILED
                continue
            place = gate.names.index(name) - 1
            if self.closed.send(request, place, now, gate):
                return

    def release(self, now: float, request: int) -> None:
        """A request that was held is decided anew, unless it has been."""
        if request in self.held:
            del self.held[request]
            self.place(request, now, _NOTHING, None)

    def to_replica(self, request: int, now: float) -> bool:
        """To the replica with the fewest requests, in turn among equals (HAProxy's leastconn, as Serve has it)."""
        best, least = -1, math.inf
        replicas = self.replicas
        if len(replicas) == 1:
            best = 0 if replicas[0].up else -1
        else:
            count = len(replicas)
            self.turn += 1
            for offset in range(count):
                index = (self.turn + offset) % count
                replica = replicas[index]
                if replica.up and replica.load < least:
                    best, least = index, replica.load
        if best < 0:
            return False
        replica = replicas[best]
        if not replica.fits(request):
            return False
        self.where[request] = best
        replica.add(request, now)
        self.wakes[best] = replica.end
        return True

    def end(self, request: int, outcome: Outcome, now: float) -> None:
        self.outcome[request] = outcome
        self.ended += 1
        if outcome is Outcome.LOCAL:
            self.e2e[request] = now + self.world.engine.overhead_s - self.at[request]
        elif outcome is Outcome.API:
            self.e2e[request] = now - self.at[request]
        else:
            self.lost += self.output[request] - self.made[request]
            if outcome is not Outcome.CUT:
                self.where[request] = -1
        if self.policy.control is not None:
            self.log.append((now, request))

    def recover(self, _: float, index: int) -> None:
        self.replicas[index].up = True

    def fail(self, now: float, index: int) -> None:
        """A replica dies. Requests with a first token are cut; the others are decided anew."""
        replica = self.replicas[index]
        lost = replica.fail(now)
        self.wakes[index] = math.inf
        again = []
        for request in lost:
            if not self.plain:
                gate = self.gates[self.gate[request]]
                if self.first_s[request] == self.first_s[request]:
                    gate.decoding(-1, now)
                else:
                    gate.left_queue(request, now)
                gate.failed(LOCAL, now)
            if self.first_s[request] == self.first_s[request]:
                self.end(request, Outcome.CUT, now)
            else:
                again.append(request)
        for request in again:
            self.place(request, now, self.tried.get(request, _NOTHING), Failure.FAILED)

    # The end

    def result(self) -> Result:
        """Records of the requests that have ended: all of them, unless the run was stopped."""
        outcome = np.array(self.outcome, dtype=np.int8)
        workload, kept = self.workload, slice(None)
        if self.ended < len(workload):
            kept = np.flatnonzero(outcome >= 0)  # type: ignore[assignment]
            workload = Workload(workload.at_s[kept], workload.input_tokens[kept], workload.output_tokens[kept])
        return Result(
            workload,
            self.world,
            outcome[kept],
            np.array(self.where, dtype=np.int16)[kept],
            np.array(self.ttft)[kept],
            np.array(self.itl)[kept],
            np.array(self.e2e)[kept],
            np.array(self.usd)[kept],
            np.array(self.p_miss)[kept],
            self.now,
            tuple(replica.busy_s for replica in self.replicas),
            sum(replica.preemptions for replica in self.replicas),
            tuple(self.knobs.moved),
            np.array(self.tier, dtype=np.int8)[kept] if self.tier else None,
            len(self.workload) - self.ended,
        )
