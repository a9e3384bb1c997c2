"""What the planner's simulator foresees of a candidate, on an engine and a traffic fitted to live windows. Pure.

It refuses a candidate that would break a promise which the incumbent keeps, on the same requests; it never promotes.
What it cannot know it leaves to the live blocks: what more sequences cost a step, while all windows had alike many
(then nothing), and gate mass.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from moe_core.config import SloConfig
from moe_core.setting import Setting, Signals
from moe_planner.sim.engine import Engine
from moe_planner.sim.experts import Experts
from moe_planner.sim.invalid import Invalid
from moe_planner.sim.policy import PLAIN
from moe_planner.sim.result import Result
from moe_planner.sim.simulate import simulate
from moe_planner.sim.workload import Arrivals, Lengths, Workload, generate
from moe_planner.sim.world import Slo, World
from moe_tuner.explore import Predicted
from moe_tuner.measure import Measurement
from moe_tuner.report import Effect

SECONDS, MOST_REQUESTS = 120.0, 3000.0
P99_OVER_MEDIAN = 4.0
"""Of lengths: Azure's code trace has 3.6 for prompts, and a mean close to its median."""
SPREAD = 1.3
"""Ratio of batch sizes between windows from which a step's slope can be told from noise."""
WORSE_BY = 0.05
"""A breach is the candidate's where it is also this much worse than the incumbent: the fit is no better than that."""
UNKNOWN_CACHE_TOKENS = 10**9
PREFILL_SHARE = Experts(experts=1, top_k=1, ranks=1).prefill_share


def predict(
    incumbent: Setting,
    candidate: Setting,
    *,
    windows: Sequence[Measurement],
    signals: Signals,
    slo: SloConfig,
    seed: int = 0,
) -> Predicted | None:
    """The candidate's cost over the incumbent's, and what it would break. None: too little is known to simulate."""
    if not windows:
        return None
    last = windows[-1]
    try:
        workload = _workload(last, seed)
        runs = [
            simulate(
                workload, World(_engine(setting, incumbent, windows, signals), _slo(slo), signals.replicas or 1), PLAIN
            )
            for setting in (incumbent, candidate)
        ]
    except (Invalid, _Unknown):
        return None
    before, after = (_busy_s_per_token(run) for run in runs)
    if not before > 0:
        return None
    effect = Effect(ratio=after / before)
    constraints, refused = dict[str, float](), None
    for name, limit in (("ttft", slo.ttft_p95_s), ("itl", slo.itl_p95_s)):
        old, new = (run.quantile(f"{name}_s", 0.95) for run in runs)
        if math.isnan(old) or math.isnan(new):
            continue
        constraints[name] = new / limit - 1.0
        if new > limit >= old and new > old * (1.0 + WORSE_BY):
            refused = f"{name.upper()} p95 would be {new:.3g} s of {limit:g} s, {old:.3g} s with the incumbent"
    return Predicted(effect=effect, constraints=constraints, refused=refused)


class _Unknown(Exception):
    """The windows do not tell enough."""


def _workload(window: Measurement, seed: int) -> Workload:
    rate = window.requests_per_s * (1.0 - window.spill_share)
    if window.prompt_tokens is None or window.output_tokens is None or rate <= 0:
        raise _Unknown
    inputs, outputs = (
        Lengths(max(1.0, mean), max(1.0, mean) * P99_OVER_MEDIAN)
        for mean in (window.prompt_tokens, window.output_tokens)
    )
    return generate(Arrivals(min(SECONDS, MOST_REQUESTS / rate), rate, inputs, outputs), seed)


def _engine(setting: Setting, incumbent: Setting, windows: Sequence[Measurement], signals: Signals) -> Engine:
    """One replica under a setting. Windows were measured under the incumbent."""
    last = windows[-1]
    if last.decode_step_s is None or last.prefill_s_per_token is None or last.decode_batch is None:
        raise _Unknown
    slope = step_slope(windows)
    ceiling = signals.active_ceiling or signals.active_limit or 64
    active = min(ceiling, setting.engine.max_active_seqs or signals.active_limit or ceiling)
    skew = max(1.0, last.imbalance or 1.0)
    relief = _slowed(skew, setting) / _slowed(skew, incumbent)
    return Engine(
        prefill_token_s=last.prefill_s_per_token * relief,
        decode_s=max(1e-6, last.decode_step_s - slope * last.decode_batch),
        active_s=slope,
        kv_tokens=_cache_tokens(last, signals),
        max_active=active,
        max_batched_tokens=max(2048, active),
    )


def _slowed(skew: float, setting: Setting) -> float:
    """Prefill time over that of even ranks: a rank's load is bounded by γ where experts are."""
    cap = setting.prefill_cap
    rank = skew if cap is None else min(skew, max(1.0, float(cap)))
    return 1.0 + PREFILL_SHARE * (rank - 1.0)


def step_slope(windows: Sequence[Measurement]) -> float:
    """Seconds that one more sequence adds to a decode step, by least squares over windows; 0 where they are alike."""
    points = [
        (window.decode_batch, window.decode_step_s)
        for window in windows
        if window.decode_batch is not None and window.decode_step_s is not None
    ]
    sizes = [size for size, _ in points]
    if len(points) < 3 or max(sizes) < SPREAD * max(1.0, min(sizes)):
        return 0.0
    slope, _ = statistics.linear_regression(sizes, [step for _, step in points])
    return max(0.0, min(slope, *(step / max(1.0, size) for size, step in points)))


def _cache_tokens(window: Measurement, signals: Signals) -> int:
    if not signals.kv_usage or not signals.running or window.prompt_tokens is None or window.output_tokens is None:
        return UNKNOWN_CACHE_TOKENS
    held = signals.running / (signals.replicas or 1) * (window.prompt_tokens + window.output_tokens / 2.0)
    return max(4096, round(held / signals.kv_usage))


def _busy_s_per_token(run: Result) -> float:
    tokens = int((run.workload.input_tokens + run.workload.output_tokens).sum())
    return sum(run.busy_s) / tokens if tokens else 0.0


def _slo(slo: SloConfig) -> Slo:
    return Slo(slo.ttft_p95_s, slo.itl_p95_s)
