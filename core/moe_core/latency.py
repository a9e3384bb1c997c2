"""What an upstream's latency has been, decayed and robust: the measured half of the spill decision.

TTFT is modelled as base + work·(token + crowd·running), where work is the prompt tokens ahead of a request and its own,
and running the sequences that decode beside them (each step gives them time and tokens first), plus a wait for a free
place in the batch. The plane is fitted by decayed least squares with a ridge towards a prior slope, so that it is
defined from the first observation on; outliers are clipped before they enter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moe_core.steps import ENDS_MOST, RATE_S, UNSEEN, StepEstimate, observe_end, observe_steps

DECAY_S = 60.0
"""Time constant: an observation counts 1/e after this."""
WEIGHT_MAX = 150.0
"""Effective observations kept at most, so that a change shows within as many requests however fast they come."""
CLIP = 4.0
"""An observation further than this factor from the prediction enters at this factor."""
BASE_PRIOR_S = 0.05
SLOPE_PRIOR_S = 1.0 / 5000.0
_RIDGE = 2.0 * 500.0**2  # two observations, 500 tokens apart from the mean
_BASE_MIN_S = 0.001
_SIGMA_PRIOR = 0.4
_SIGMA_MIN = 0.05
SLOW_FLOOR = 0.1
SLOW_PRIOR = 1.0
"""Requests by which told and seen probabilities of a slow ITL are one before the first observation."""
SHIFT_S = 0.1
"""Errors are relative to the prediction plus this: a step's length more or less says nothing of a TTFT of 10 ms."""
SURE_S, SURE_POWER = 0.5, 4.0
"""Where and how fast a prediction begins to count for the spread: short waits scatter by a step, long ones hardly."""
CROWD = 100.0
"""Unit of the sequences that decode, so that sums of both regressors are of one size."""
_SIGMA_PRIOR_WEIGHT = 0.2
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
    sum_log_weight: float = 0.0
    sum_z: float = 0.0
    sum_zz: float = 0.0
    sum_xz: float = 0.0
    sum_zy: float = 0.0
    steps: StepEstimate = UNSEEN
    prompt_rate: float = 0.0
    """Prompt tokens done a second, over the last `RATE_S`, as of `at_s`."""
    slow_told: float = SLOW_PRIOR
    slow_seen: float = SLOW_PRIOR
    crowd_s: float = 0.0
    """Seconds more for a prompt token when CROWD sequences decode: the fit's, kept because decisions read it often."""
    base_prior_s: float = BASE_PRIOR_S
    slope_prior_s: float = SLOPE_PRIOR_S
    itl_s: float = 0.03
    output_tokens: float = 200.0
    prompt_tokens: float = 500.0

    @property
    def line(self) -> tuple[float, float]:
        """(base in seconds, seconds per prompt token with no sequence decoding)."""
        if self.weight <= 0:
            return self.base_prior_s, self.slope_prior_s
        mean_x, mean_y = self.sum_x / self.weight, self.sum_y / self.weight
        mean_z, crowd = self.sum_z / self.weight, self.crowd_s
        variance = max(0.0, self.sum_xx - self.weight * mean_x**2)
        covariance = self.sum_xy - self.weight * mean_x * mean_y - crowd * (self.sum_xz - self.weight * mean_x * mean_z)
        slope = max(0.0, (covariance + _RIDGE * self.slope_prior_s) / (variance + _RIDGE))
        base = mean_y - slope * mean_x - crowd * mean_z
        if base < _BASE_MIN_S:
            # Through the origin, as far as the lengths seen tell base and slope apart; otherwise half each.
            rest = max(_BASE_MIN_S, mean_y - crowd * mean_z)
            told = variance / (variance + _RIDGE)
            through = max(0.0, (self.sum_xy - crowd * self.sum_xz) / max(1e-9, self.sum_xx))
            half = rest / 2 / mean_x if mean_x > 0 else slope
            base, slope = told * _BASE_MIN_S + (1 - told) * rest / 2, told * through + (1 - told) * half
        return base, slope

    @property
    def sigma(self) -> float:
        """Standard deviation of ln(TTFT) around the prediction."""
        total = self.sum_log_error + _SIGMA_PRIOR_WEIGHT * _SIGMA_PRIOR / _MEAN_TO_SIGMA
        return max(_SIGMA_MIN, _MEAN_TO_SIGMA * total / (self.sum_log_weight + _SIGMA_PRIOR_WEIGHT))

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


def predict_ttft_s(
    estimate: LatencyEstimate, work_tokens: float, slot_wait_s: float = 0.0, running: float = 0.0
) -> float:
    """Median TTFT of a request with so many prompt tokens ahead of it and in it, beside so many sequences that decode.

    Never falls as any of them grows.
    """
    base, slope = estimate.line
    return base + (slope + estimate.crowd_s * running / CROWD) * max(0.0, work_tokens) + max(0.0, slot_wait_s)


@dataclass(frozen=True, slots=True)
class First:
    """A first token: from what it was foreseen, and when it came."""

    work_tokens: float
    prompt_tokens: float
    slot_wait_s: float
    ttft_s: float
    running: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended, its mean ITL and what was foreseen of it."""

    itl_s: float | None
    output_tokens: int
    foreseen_s: float = 0.0
    """The ITL that was foreseen of it, 0 where it was not."""
    p_slow: float = 0.0
    itl_slo_s: float | None = None
    """The promise that `p_slow` is about; None: the deployment's."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the streams of the last second showed of a replica: the mean gap between tokens, the sequences that decoded,
    and the prompt tokens done in a step."""

    itl_s: float
    running: float
    prompt_tokens: float


def learned(estimate: LatencyEstimate, seen: First | Ended | Look, now_s: float, itl_slo_s: float) -> LatencyEstimate:
    """An estimate after a measurement, one's own or another worker's. `now_s`: monotonic seconds."""
    if isinstance(seen, First):
        return observe_ttft(
            estimate,
            now_s,
            work_tokens=seen.work_tokens,
            prompt_tokens=seen.prompt_tokens,
            slot_wait_s=seen.slot_wait_s,
            ttft_s=seen.ttft_s,
            running=seen.running,
        )
    if isinstance(seen, Look):
        steps = observe_steps(
            estimate.steps, now_s, itl_s=seen.itl_s, running=seen.running, prompt_tokens=seen.prompt_tokens
        )
        return replace(estimate, steps=steps)
    return observe_decode(
        estimate,
        itl_s=seen.itl_s,
        output_tokens=seen.output_tokens,
        foreseen_s=seen.foreseen_s,
        p_slow=seen.p_slow,
        slow=seen.itl_s is not None and seen.itl_s > (itl_slo_s if seen.itl_slo_s is None else seen.itl_slo_s),
    )


def observe_ttft(
    estimate: LatencyEstimate,
    now_s: float,
    *,
    work_tokens: float,
    prompt_tokens: float,
    slot_wait_s: float,
    ttft_s: float,
    running: float = 0.0,
) -> LatencyEstimate:
    """Learn from one first token. `work_tokens`, `running`, `slot_wait_s` are those that its prediction was made
    from."""
    predicted = predict_ttft_s(estimate, work_tokens, slot_wait_s, running)
    log_error = min(abs(math.log((max(ttft_s, 1e-4) + SHIFT_S) / (predicted + SHIFT_S))), math.log(CLIP))
    sure = (predicted / (predicted + SURE_S)) ** SURE_POWER  # what matters is how sure long waits are
    robust = ttft_s if estimate.weight < 3 else min(max(ttft_s, predicted / CLIP), predicted * CLIP)
    y = max(_BASE_MIN_S, robust - slot_wait_s)
    z = work_tokens * running / CROWD
    keep = _keep(estimate, now_s)
    weight = estimate.weight * keep + 1.0
    share = max(0.02, 1.0 / weight)
    sum_x, sum_y, sum_z = estimate.sum_x * keep + work_tokens, estimate.sum_y * keep + y, estimate.sum_z * keep + z
    sum_xx, sum_xy = estimate.sum_xx * keep + work_tokens**2, estimate.sum_xy * keep + work_tokens * y
    sum_zz, sum_zy = estimate.sum_zz * keep + z * z, estimate.sum_zy * keep + z * y
    sum_xz = estimate.sum_xz * keep + work_tokens * z
    # The crowd's share of the slope, both regressors centred; the ridge draws it to none.
    var_x = sum_xx - sum_x * sum_x / weight + _RIDGE
    var_z = sum_zz - sum_z * sum_z / weight + _RIDGE
    cov_xz = sum_xz - sum_x * sum_z / weight
    with_x = sum_xy - sum_x * sum_y / weight + _RIDGE * estimate.slope_prior_s
    with_z = sum_zy - sum_z * sum_y / weight
    crowd = (var_x * with_z - cov_xz * with_x) / max(1e-9, var_x * var_z - cov_xz * cov_xz)
    slope = (var_z * with_x - cov_xz * with_z) / max(1e-9, var_x * var_z - cov_xz * cov_xz)
    if crowd < 0.0 or slope < 0.0:
        crowd = 0.0 if crowd < 0.0 else max(0.0, with_z / var_z)
    return LatencyEstimate(  # built by hand: `replace` costs three times as much, and this runs for every request
        max(now_s, estimate.at_s),
        weight,
        sum_x,
        sum_y,
        sum_xx,
        sum_xy,
        estimate.sum_log_error * keep + sure * log_error,
        estimate.sum_log_weight * keep + sure,
        sum_z,
        sum_zz,
        sum_xz,
        sum_zy,
        estimate.steps,
        estimate.prompt_rate * math.exp(-max(0.0, now_s - estimate.at_s) / RATE_S) + prompt_tokens / RATE_S,
        estimate.slow_told,
        estimate.slow_seen,
        crowd,
        estimate.base_prior_s,
        estimate.slope_prior_s,
        estimate.itl_s,
        estimate.output_tokens,
        estimate.prompt_tokens + share * (prompt_tokens - estimate.prompt_tokens),
    )


def observe_decode(
    estimate: LatencyEstimate,
    *,
    itl_s: float | None,
    output_tokens: int,
    foreseen_s: float = 0.0,
    p_slow: float = 0.0,
    slow: bool = False,
) -> LatencyEstimate:
    """Learn from one finished request: its mean ITL (None where it has no two tokens), its output, and where its ITL
    was foreseen (0: it was not) the forecast's own error, its P(ITL > SLO) (`Forecast.p_slow`), whether it came true.
    """
    itl, steps = estimate.itl_s, estimate.steps
    told, seen = estimate.slow_told, estimate.slow_seen
    if itl_s is not None and itl_s > 0:
        itl += 0.1 * (min(itl_s, CLIP * itl) - itl)
        if steps.sum_n <= 0:  # no stream was ever looked at: those that ended stand for it
            steps = observe_steps(steps, estimate.at_s, itl_s=itl_s, running=0.0, prompt_tokens=0.0)
        if foreseen_s > 0:
            steps = observe_end(steps, itl_s=itl_s, foreseen_s=foreseen_s)
            keep = 1.0 - 1.0 / ENDS_MOST
            told = told * keep + p_slow + SLOW_PRIOR * (1.0 - keep)
            seen = seen * keep + slow + SLOW_FLOOR * SLOW_PRIOR * (1.0 - keep)
    tokens = estimate.output_tokens + 0.05 * (output_tokens - estimate.output_tokens)
    return LatencyEstimate(  # built by hand, as above
        estimate.at_s,
        estimate.weight,
        estimate.sum_x,
        estimate.sum_y,
        estimate.sum_xx,
        estimate.sum_xy,
        estimate.sum_log_error,
        estimate.sum_log_weight,
        estimate.sum_z,
        estimate.sum_zz,
        estimate.sum_xz,
        estimate.sum_zy,
        steps,
        estimate.prompt_rate,
        told,
        seen,
        estimate.crowd_s,
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
