"""What would have become of a request on the own replicas: asked for every request, the spilled and the shed ones too.

When a request goes elsewhere, the replica that the router would have taken is copied as it stands. After the run the
copy
gets that request, then every later arrival that the real replica got, at its moment, under the speeds of that moment.
So
the answer is exact for the smallest change there is: this one request is served here, everything else stays. Where no
step
can last longer than the promised ITL, the copy runs only to the first token, which later arrivals do not delay.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gateway_spill_oracle import speed_of
from moe_planner.sim.closed import ClosedApis
from moe_planner.sim.gateway import Gateway
from moe_planner.sim.policy import Policy
from moe_planner.sim.replica import Replica
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.simulate import Run
from moe_planner.sim.workload import Workload
from moe_planner.sim.world import World

TWINS_MOST = 3000
"""Copies asked for in one run; of more, an even sample, which is then weighted up."""


class TwinRun(Run):
    """A simulation that keeps what its twins need."""

    def __init__(self, workload: Workload, world: World, policy: Policy, seed: int, every: int = 1) -> None:
        self.adds: list[list[tuple[float, int]]] = [[] for _ in range(world.replicas)]
        self.twins: list[tuple[int, float, int, Replica]] = []
        self.decided: list[bool] = [False] * len(workload)
        self.elsewhere: list[int] = []
        self.every = every
        super().__init__(workload, world, policy, seed)
        self.closed = _Watched(self)
        speed = speed_of(world, workload, seed)
        self.speeds = list(zip(speed.from_s.tolist(), speed.prefill.tolist(), speed.active.tolist(), strict=True))

    def to_replica(self, request: int, now: float) -> bool:
        taken = super().to_replica(request, now)
        self.decided[request] = True
        if taken:
            self.adds[self.where[request]].append((now, request))
        return taken

    def end(self, request: int, outcome: Outcome, now: float) -> None:
        if outcome is Outcome.SHED:
            self.keep_twin(request, now)
        super().end(request, outcome, now)

    def keep_twin(self, request: int, now: float) -> None:
        """Copy the replica that would have taken the request. Only its first decision counts."""
        if self.decided[request]:
            return
        self.decided[request] = True
        self.elsewhere.append(request)
        if len(self.elsewhere) % self.every:
            return
        best = min(
            (index for index, replica in enumerate(self.replicas) if replica.up),
            key=lambda index: self.replicas[index].load,
            default=-1,
        )
        if best >= 0:
            self.twins.append((request, now, best, _copied(self.replicas[best])))


class _Watched(ClosedApis):
    def __init__(self, run: TwinRun) -> None:
        super().__init__(run)
        self._twins = run

    def send(self, request: int, place: int, now: float, gate: Gateway) -> bool:
        self._twins.keep_twin(request, now)
        return super().send(request, place, now, gate)


def _copied(replica: Replica) -> Replica:
    twin = copy.copy(replica)
    for name in ("phase", "queue", "joined", "left", "completes"):
        setattr(twin, name, getattr(replica, name).copy())
    inside = [*replica.joined, *replica.completes, *replica.queue]
    if replica.partial >= 0:
        inside.append(replica.partial)
    made: Any = {request: replica.made[request] for request in inside}
    twin.made = made
    return twin


def missed(run: TwinRun, twin: tuple[int, float, int, Replica]) -> bool:
    """Whether a request would have missed its promise on the replica that was copied."""
    request, now, index, replica = twin
    world, made = run.world, replica.made
    later, speeds = run.adds[index], run.speeds
    place = bisect_right(later, (now, 1 << 62))
    speed = bisect_right(speeds, (now, math.inf, math.inf))
    dies = min((o.from_s for o in world.outages if o.replica == index and o.from_s > now), default=math.inf)
    engine = world.engine
    tail = _longest_step(replica) > world.slo.itl_s
    if not replica.fits(request):
        return True
    made[request] = 0
    replica.add(request, now)
    first_s = math.nan
    while True:
        arrival = later[place][0] if place < len(later) else math.inf
        change = speeds[speed][0] if speed < len(speeds) else math.inf
        moment = min(replica.end, arrival, change)
        if moment >= dies or moment == math.inf:
            return True
        if math.isnan(first_s) and moment > run.at[request] + world.slo.ttft_s:
            return True
        if arrival == moment:
            made[later[place][1]] = 0
            replica.add(later[place][1], moment)
            place += 1
        elif change == moment:
            replica.prefill_token_s, replica.active_s = speeds[speed][1:]
            replica.cut(moment)
            speed += 1
        else:
            first, ended = replica.finish()
            if request in first and math.isnan(first_s):
                first_s = moment
                if moment + engine.overhead_s - run.at[request] > world.slo.ttft_s:
                    return True
                if not tail:
                    return False
            if request in ended:
                tokens = run.output[request]
                return tokens > 1 and (moment - first_s) / (tokens - 1) > world.slo.itl_s
            replica.begin(moment)


def _longest_step(replica: Replica) -> float:
    seqs = min(replica.active_limit, replica.token_limit)
    slope = max(0.0, replica.active_s - replica.prefill_token_s)
    engine = replica.engine
    fixed = engine.launch_s + engine.prompt_s + engine.decode_s
    return fixed + replica.token_limit * replica.prefill_token_s + seqs * slope


def judged(
    workload: Workload, world: World, policy: Policy, seed: int, progress: Callable[[float], bool | None] | None = None
) -> tuple[Result, NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """(the run, P(miss) told, whether it would have missed locally, weight) over requests whose local end is known."""
    run = TwinRun(workload, world, policy, seed)
    run.loop(progress, None)
    result = run.result()
    known = np.zeros(len(workload))
    miss = ~result.attained
    stayed = (result.outcome == Outcome.LOCAL) | (result.outcome == Outcome.CUT)
    moved = np.zeros(len(workload), dtype=bool)
    moved[run.elsewhere] = True
    known[stayed & ~moved] = 1.0
    if run.twins:
        chosen = run.twins[:: max(1, math.ceil(len(run.twins) / TWINS_MOST))]
        for twin in chosen:
            miss[twin[0]] = missed(run, twin)
            known[twin[0]] = len(run.twins) / len(chosen)
    seen = (known > 0) & ~np.isnan(result.p_miss)
    return result, result.p_miss[seen], miss[seen], known[seen]
