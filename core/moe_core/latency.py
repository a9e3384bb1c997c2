"""What an upstream's latency has been, decayed and robust: the measured half of the spill decision.

TTFT is modelled as base + work·(token + crowd·running), where work is the prompt tokens ahead of a request and its
own, and
running the sequences that decode beside them (each step gives them time and tokens first), plus a wait for a free place
in the batch. The plane is fitted by decayed least squares with a ridge towards a prior slope, so that it is defined
from
the first observation on; outliers are clipped before they enter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
_ITL_SIGMA_PRIOR = 0.2
_ITL_RIDGE = 100.0
ITL_WEIGHT_MAX = 100.0
"""Finished requests that the ITL's line is drawn from, about."""
SLOW_FLOOR = 0.1
SLOW_PRIOR = 1.0
"""Requests by which told and seen probabilities of a slow ITL are one before the first observation."""
SHIFT_S = 0.1
"""Errors are relative to the prediction plus this: a step's length more or less says nothing of a TTFT of 10 ms."""
SURE_S = 0.5
"""Scale at which a prediction begins to count for the spread: short waits scatter by a step, long ones hardly."""
CROWD = 100.0
"""Unit of the sequences that decode, so that sums of both regressors are of one size."""
_SIGMA_PRIOR_WEIGHT = 1.0
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
    itl_weight: float = 0.0
    itl_sum_n: float = 0.0
    itl_sum_nn: float = 0.0
    itl_sum_y: float = 0.0
    itl_sum_ny: float = 0.0
    itl_sum_error: float = 0.0
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
    sure = (predicted / (predicted + SURE_S)) ** 2  # what matters is how sure long waits are
    robust = ttft_s if estimate.weight < 3 else min(max(ttft_s, predicted / CLIP), predicted * CLIP)
    y = max(_BASE_MIN_S, robust - slot_wait_s)
    z = work_tokens * running / CROWD
    keep = _keep(estimate, now_s)
    share = 0.1
    weight = estimate.weight * keep + 1.0
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
        estimate.itl_weight,
        estimate.itl_sum_n,
        estimate.itl_sum_nn,
        estimate.itl_sum_y,
        estimate.itl_sum_ny,
        estimate.itl_sum_error,
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
    running: float = 0.0,
    p_slow: float = 0.0,
    slow: bool = False,
) -> LatencyEstimate:
    """Learn from one finished request: its mean ITL (None where it has no two tokens), its output, how many sequences
    decoded beside it when it was sent, the P(ITL > SLO) of its line (`Forecast.p_slow`) and whether it came true."""
    share = 0.1
    itl = estimate.itl_s
    weight, sum_n, sum_nn = estimate.itl_weight, estimate.itl_sum_n, estimate.itl_sum_nn
    told, seen = estimate.slow_told, estimate.slow_seen
    sum_y, sum_ny, sum_error = estimate.itl_sum_y, estimate.itl_sum_ny, estimate.itl_sum_error
    if itl_s is not None and itl_s > 0:
        itl += share * (min(itl_s, CLIP * itl) - itl)
        if weight > 0:
            predicted = predict_itl_s(estimate, running)
            error = min(abs(math.log(itl_s / predicted)), math.log(CLIP))
            itl_s = min(max(itl_s, predicted / CLIP), predicted * CLIP)
        else:
            error = 0.0
        keep = 1.0 - 1.0 / ITL_WEIGHT_MAX
        weight = weight * keep + 1.0
        sum_n, sum_nn = sum_n * keep + running, sum_nn * keep + running * running
        sum_y, sum_ny = sum_y * keep + itl_s, sum_ny * keep + running * itl_s
        sum_error = sum_error * keep + error
        told = told * keep + p_slow + SLOW_PRIOR * (1.0 - keep)
        seen = seen * keep + slow + SLOW_FLOOR * SLOW_PRIOR * (1.0 - keep)
    tokens = estimate.output_tokens + share * (output_tokens - estimate.output_tokens)
    return LatencyEstimate(
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
        weight,
        sum_n,
        sum_nn,
        sum_y,
        sum_ny,
        sum_error,
        told,
        seen,
        estimate.crowd_s,
        estimate.base_prior_s,
        estimate.slope_prior_s,
        itl,
        tokens,
        estimate.prompt_tokens,
    )


def predict_itl_s(estimate: LatencyEstimate, running: float) -> float:
    """Mean ITL of a request that is sent while so many sequences decode. Never falls as they grow.

    By Little's law the sequences that decode are the tokens asked for a second times the ITL, so that their number
    tells
    how long steps have been, and it tells sooner than finished requests do.
    """
    weight = estimate.itl_weight
    if weight <= 0:
        return estimate.itl_s
    mean_n, mean_y = estimate.itl_sum_n / weight, estimate.itl_sum_y / weight
    variance = max(0.0, estimate.itl_sum_nn - weight * mean_n**2) + _ITL_RIDGE
    slope = max(0.0, (estimate.itl_sum_ny - weight * mean_n * mean_y) / variance)
    return max(mean_y / CLIP, mean_y + slope * (running - mean_n))


def itl_sigma(estimate: LatencyEstimate) -> float:
    """Standard deviation of ln(ITL) around the prediction."""
    total = estimate.itl_sum_error + _SIGMA_PRIOR_WEIGHT * _ITL_SIGMA_PRIOR / _MEAN_TO_SIGMA
    return max(_SIGMA_MIN, _MEAN_TO_SIGMA * total / (estimate.itl_weight + _SIGMA_PRIOR_WEIGHT))


def _keep(estimate: LatencyEstimate, now_s: float) -> float:
    if estimate.weight <= 0:
        return 0.0
    by_time = math.exp(-max(0.0, now_s - estimate.at_s) / DECAY_S)
    return min(by_time, (WEIGHT_MAX - 1.0) / max(estimate.weight, WEIGHT_MAX - 1.0))
