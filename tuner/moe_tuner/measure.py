"""What the slow loop knows of one measurement window, and how two windows compare: pure, shared with the simulator."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from enum import StrEnum

from pydantic import Field

from moe_api.base import Model
from moe_core.config import SloConfig

MIN_REQUESTS = 10
"""Finished requests that make a window worth judging."""
RATE_SHIFT, LENGTH_SHIFT = 1.3, 1.5
"""Ratios between two windows from which the traffic, not the knobs, is the reason of a difference."""
RATE_SIGMA = 4.0
NOISE_FLOOR, NOISE_UNKNOWN = 0.03, 0.10
NOISE_WINDOWS = 3
FAILED_MARGIN = 0.01


class Measurement(Model):
    """One window of a deployment, from Prometheus. Fields that may be None are known to be missing."""

    requests: float = Field(description="finished or refused in the window")
    requests_per_s: float
    prompt_tokens: float | None = Field(default=None, description="per request")
    output_tokens: float | None = Field(default=None, description="per request")
    busy_s_per_ktoken: float = Field(gt=0, description="engine seconds for 1,000 tokens: the cost that is minimised")
    ttft_p95_s: float
    itl_p95_s: float | None = None
    failed_share: float = Field(description="errors, cut streams and shed requests")
    spill_share: float = 0.0
    request_p95_s: float | None = Field(default=None, description="arrival to last byte")
    decode_step_s: float | None = Field(default=None, description="mean pass without a prefill token")
    decode_batch: float | None = Field(default=None, description="mean sequences in such a pass")
    prefill_s_per_token: float | None = Field(default=None, description="of the other passes, a replica's")
    lost_gate_mass: float | None = Field(default=None, description="per token")
    imbalance: float | None = Field(default=None, description="rank max/mean of demand")


class Unmeasured(Model):
    """No measurement, and why. `source_down`: Prometheus itself is gone or stale."""

    reason: str
    source_down: bool = False


class Outcome(StrEnum):
    """How a candidate compares with the incumbent."""

    BETTER = "Better"
    SAME = "Same"
    WORSE = "Worse"
    UNFIT = "Unfit"


class Verdict(Model):
    """A comparison of two windows. `ratio` is the candidate's cost over the incumbent's."""

    outcome: Outcome
    ratio: float
    reason: str
    constraints: dict[str, float] = Field(description="positive: broken, by that share")


def shifted(before: Measurement, after: Measurement) -> str | None:
    """In words, how the traffic differs between two windows; None where it is the same within noise."""
    ratio = _ratio(after.requests_per_s, before.requests_per_s)
    apart = abs(after.requests - before.requests) > RATE_SIGMA * math.sqrt(after.requests + before.requests + 1.0)
    if apart and not 1 / RATE_SHIFT <= ratio <= RATE_SHIFT:
        return f"arrivals went from {before.requests_per_s:.3g} to {after.requests_per_s:.3g} a second"
    for name, old, new in (
        ("prompt tokens", before.prompt_tokens, after.prompt_tokens),
        ("output tokens", before.output_tokens, after.output_tokens),
    ):
        if old is not None and new is not None and not 1 / LENGTH_SHIFT <= _ratio(new, old) <= LENGTH_SHIFT:
            return f"{name} of a request went from {old:.3g} to {new:.3g}"
    return None


def noise_of(costs: Sequence[float]) -> float:
    """Relative difference of cost that means nothing: two standard deviations of the incumbent's own windows."""
    if len(costs) < NOISE_WINDOWS:
        return NOISE_UNKNOWN
    return max(NOISE_FLOOR, 2.0 * statistics.stdev(costs) / statistics.fmean(costs))


def constraints_of(
    window: Measurement, slo: SloConfig, max_lost_gate_mass: float, incumbent: Measurement | None = None
) -> dict[str, float]:
    """How far each promise is broken (positive) or kept, as a share of it."""
    allowed_failed = FAILED_MARGIN + (incumbent.failed_share if incumbent is not None else 0.0)
    broken = {"ttft": window.ttft_p95_s / slo.ttft_p95_s - 1.0, "failed": window.failed_share - allowed_failed}
    if window.itl_p95_s is not None:
        broken["itl"] = window.itl_p95_s / slo.itl_p95_s - 1.0
    if window.lost_gate_mass is not None:
        # Against a limit of zero any loss is a breach, and zero loss is not.
        limit = max(max_lost_gate_mass, 1e-9)
        broken["lost_gate_mass"] = window.lost_gate_mass / limit - 1.0
    return broken


def judge(
    incumbent: Measurement, candidate: Measurement, *, slo: SloConfig, max_lost_gate_mass: float, noise: float
) -> Verdict:
    """Promises first, then cost, then noise."""
    constraints = constraints_of(candidate, slo, max_lost_gate_mass, incumbent)
    ratio = _ratio(candidate.busy_s_per_ktoken, incumbent.busy_s_per_ktoken)
    costs = (
        f"{candidate.busy_s_per_ktoken:.4g} against {incumbent.busy_s_per_ktoken:.4g} engine seconds per 1,000 tokens, "
        f"noise {noise:.1%}"
    )
    broken = {name: by for name, by in constraints.items() if by > 0}
    if broken:
        worst = max(broken, key=lambda name: broken[name])
        reason = f"it breaks {worst} by {broken[worst]:.1%} ({costs})"
        return Verdict(outcome=Outcome.UNFIT, ratio=ratio, reason=reason, constraints=constraints)
    if ratio > 1.0 + noise:
        outcome, words = Outcome.WORSE, f"{ratio - 1:.1%} dearer: {costs}"
    elif ratio < 1.0 - noise:
        outcome, words = Outcome.BETTER, f"{1 - ratio:.1%} cheaper: {costs}"
    else:
        outcome, words = Outcome.SAME, f"no difference beyond noise: {costs}"
    return Verdict(outcome=outcome, ratio=ratio, reason=words, constraints=constraints)


def _ratio(new: float, old: float) -> float:
    if old > 0:
        return new / old
    return 1.0 if new <= 0 else math.inf
