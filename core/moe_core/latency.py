"""What an upstream's latency has been, decayed and robust: the measured half of the spill decision.

TTFT is modelled as base + work/rate, where work is the prompt tokens ahead of a request and its own, plus a wait for a
free place in the batch. The line is fitted by decayed least squares with a ridge towards a prior slope, so that it is
defined from the first observation on; outliers are clipped before they enter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY_S = 30.0
"""Time constant: an observation counts 1/e after this."""
WEIGHT_MAX = 50.0
"""Effective observations kept at most, so that a change shows within as many requests however fast they come."""
CLIP = 4.0
"""An observation further than this factor from the prediction enters at this factor."""
BASE_PRIOR_S = 0.05
SLOPE_PRIOR_S = 1.0 / 5000.0
_RIDGE = 2.0 * 500.0**2  # two observations, 500 tokens apart from the mean
_BASE_MIN_S = 0.001
_SIGMA_PRIOR = 0.6
_SIGMA_MIN = 0.15
_SIGMA_PRIOR_WEIGHT = 5.0
_MEAN_TO_SIGMA = math.sqrt(math.pi / 2)  # mean absolute deviation → standard deviation, normal law


@dataclass(frozen=True, slots=True)
class LatencyEstimate:
    """Decayed sums over observed requests of one upstream. Start from `UNKNOWN`, move with `observe_*`."""

    at_s: float = -math.inf
    weight: float = 0.0
    sum_x: float = 0.0
    sum_y: float = 0.0
    sum_xx: float = 0.0
    sum_xy: float = 0.0
    sum_log_error: float = 0.0
    base_prior_s: float = BASE_PRIOR_S
    slope_prior_s: float = SLOPE_PRIOR_S
    itl_s: float = 0.03
    output_tokens: float = 200.0
    prompt_tokens: float = 500.0

    @property
    def line(self) -> tuple[float, float]:
        """(base in seconds, seconds per prompt token)."""
        if self.weight <= 0:
            return self.base_prior_s, self.slope_prior_s
        mean_x, mean_y = self.sum_x / self.weight, self.sum_y / self.weight
        variance = max(0.0, self.sum_xx - self.weight * mean_x**2)
        covariance = self.sum_xy - self.weight * mean_x * mean_y
        slope = max(0.0, (covariance + _RIDGE * self.slope_prior_s) / (variance + _RIDGE))
        base = mean_y - slope * mean_x
        if base < _BASE_MIN_S:
            # Faster than the prior slope allows, and the lengths seen do not tell base and slope apart: half each.
            base = mean_y / 2
            slope = base / mean_x if mean_x > 0 else slope
        return base, slope

    @property
    def sigma(self) -> float:
        """Standard deviation of ln(TTFT) around the prediction."""
        total = self.sum_log_error + _SIGMA_PRIOR_WEIGHT * _SIGMA_PRIOR / _MEAN_TO_SIGMA
        return max(_SIGMA_MIN, _MEAN_TO_SIGMA * total / (self.weight + _SIGMA_PRIOR_WEIGHT))

    @property
    def prefill_tokens_per_s(self) -> float:
        slope = self.line[1]
        return 1.0 / slope if slope > 0 else math.inf

    @property
    def service_s(self) -> float:
        """Mean time that a request holds its place in the batch."""
        return self.itl_s * self.output_tokens


UNKNOWN = LatencyEstimate()
"""Nothing observed yet."""


def predict_ttft_s(estimate: LatencyEstimate, work_tokens: float, slot_wait_s: float = 0.0) -> float:
    """Median TTFT of a request with so many prompt tokens ahead of it and in it. Never falls as either grows."""
    base, slope = estimate.line
    return base + slope * max(0.0, work_tokens) + max(0.0, slot_wait_s)


def observe_ttft(
    estimate: LatencyEstimate,
    now_s: float,
    *,
    work_tokens: float,
    prompt_tokens: float,
    slot_wait_s: float,
    ttft_s: float,
) -> LatencyEstimate:
    """Learn from one first token. `work_tokens` and `slot_wait_s` are those that its prediction was made from."""
    predicted = predict_ttft_s(estimate, work_tokens, slot_wait_s)
    log_error = min(abs(math.log(max(ttft_s, 1e-4) / max(predicted, 1e-4))), math.log(CLIP))
    robust = ttft_s if estimate.weight < 3 else min(max(ttft_s, predicted / CLIP), predicted * CLIP)
    y = max(_BASE_MIN_S, robust - slot_wait_s)
    keep = _keep(estimate, now_s)
    share = 0.1
    return LatencyEstimate(  # built by hand: `replace` costs three times as much, and this runs for every request
        at_s=max(now_s, estimate.at_s),
        weight=estimate.weight * keep + 1.0,
        sum_x=estimate.sum_x * keep + work_tokens,
        sum_y=estimate.sum_y * keep + y,
        sum_xx=estimate.sum_xx * keep + work_tokens**2,
        sum_xy=estimate.sum_xy * keep + work_tokens * y,
        sum_log_error=estimate.sum_log_error * keep + log_error,
        prompt_tokens=estimate.prompt_tokens + share * (prompt_tokens - estimate.prompt_tokens),
        base_prior_s=estimate.base_prior_s,
        slope_prior_s=estimate.slope_prior_s,
        itl_s=estimate.itl_s,
        output_tokens=estimate.output_tokens,
    )


def observe_decode(estimate: LatencyEstimate, *, itl_s: float | None, output_tokens: int) -> LatencyEstimate:
    """Learn from one finished request: its mean ITL (None where it has no two tokens) and its output."""
    share = 0.1
    itl = estimate.itl_s
    if itl_s is not None and itl_s > 0:
        itl += share * (min(itl_s, CLIP * itl) - itl)
    tokens = estimate.output_tokens + share * (output_tokens - estimate.output_tokens)
    return LatencyEstimate(
        estimate.at_s,
        estimate.weight,
        estimate.sum_x,
        estimate.sum_y,
        estimate.sum_xx,
        estimate.sum_xy,
        estimate.sum_log_error,
        estimate.base_prior_s,
        estimate.slope_prior_s,
        itl,
        tokens,
        estimate.prompt_tokens,
    )


def _keep(estimate: LatencyEstimate, now_s: float) -> float:
    if estimate.weight <= 0:
        return 0.0
    by_time = math.exp(-max(0.0, now_s - estimate.at_s) / DECAY_S)
    return min(by_time, (WEIGHT_MAX - 1.0) / max(estimate.weight, WEIGHT_MAX - 1.0))
