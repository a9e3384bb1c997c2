"""What a tuner would read of a running simulation: `moe_core.setting.Signals` of the last window."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_core.setting import Signals
from moe_planner.sim.result import Outcome

if TYPE_CHECKING:
    from moe_planner.sim.simulate import Run


def observe(run: Run, now: float, window_s: float) -> Signals:
    """Signals at `now`, as board and gateways would report them, without their delay."""
    seconds = min(window_s, now) or window_s
    since = now - seconds
    arrivals = run.arrived - bisect_left(run.at, since, 0, run.arrived)
    ended = [request for _, request in run.log[bisect_left(run.log, (since, -1)) :]]
    local = [request for request in ended if run.outcome[request] == Outcome.LOCAL]
    api = [request for request in ended if run.outcome[request] == Outcome.API]
    shed = sum(run.outcome[request] == Outcome.SHED for request in ended)
    good = [*local, *api]
    attained = [r for r in good if _attained(run, r)]
    up = [replica for replica in run.replicas if replica.up]
    return Signals(
        window_s=seconds,
        replicas=len(up),
        running=sum(replica.running for replica in up),
        waiting=sum(len(replica.queue) for replica in up),
        active_limit=min((replica.active_limit for replica in up), default=None),
        active_ceiling=run.world.engine.max_active,
        kv_usage=max((replica.kv_usage for replica in up), default=None),
        preemptions_per_s=_rate(run, now),
        rank_demand=run.knobs.balance.demand,
        rank_assigned=run.knobs.balance.prefill,
        dropped_share=run.knobs.balance.moved,
        arrivals_per_s=arrivals / seconds,
        completed_per_s=len(good) / seconds,
        local_per_s=len(local) / seconds,
        in_flight=run.arrived - run.ended,
        prompt_tokens=_mean([run.input[r] for r in good]),
        output_tokens=_mean([run.output[r] for r in good]),
        ttft_p95_s=_p95([run.ttft[r] for r in good]),
        itl_p95_s=_p95([run.itl[r] for r in good if not math.isnan(run.itl[r])]),
        slo_attained=len(attained) / len(ended) if ended else None,
        spill_share=min(1.0, len(api) / arrivals) if arrivals else None,
        shed_share=min(1.0, shed / arrivals) if arrivals else None,
        can_spill=bool(run.world.apis),
        api_failing=any(a.down(now) for a in run.world.apis),
    )


def _attained(run: Run, request: int) -> bool:
    slo = run.world.tiers[run.tier[request]].slo if run.tier else run.world.slo
    return run.ttft[request] <= slo.ttft_s and not run.itl[request] > slo.itl_s


def _rate(run: Run, now: float) -> float:
    """Preemptions a second since the last look."""
    total = sum(replica.preemptions for replica in run.replicas)
    (before, at), run.preempted = run.preempted, (total, now)
    return (total - before) / (now - at) if now > at else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _p95(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else None
