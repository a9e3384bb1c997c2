"""How long the steps of an engine are, learned from the tokens of running streams, and the ITL that follows from it.

A step lasts base + seq·(sequences that decode) + token·(prompt tokens worked on in it). Each second or so the streams
that run show the mean gap between tokens, which is the length of a step, and the ledger how many decoded and how many
prompt tokens were done: three unknowns, by decayed least squares with a ridge. Where prompts come at a rate r, a step
of length t holds r·t of their tokens, so that t = (base + seq·n) / (1 − token·r): the ITL of a request to come, before
any like it has ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY_S = 45.0
"""Time constant of the looks: expert load drifts within minutes."""
RATE_S = 6.0
"""Time constant of the rate at which prompts are done: about the life of a request."""
BASE_PRIOR_S = 0.03
SIGMA_PRIOR = 0.15
SIGMA_MIN = 0.03
ENDS_MOST = 100.0
"""Ended requests that the forecast's error is judged by, about."""
LOAD_MOST = 0.9
"""Share of an engine's time that prompts are taken to fill at most: beyond it the law has no end."""
LIFE_LEAST_S, LIFE_MOST_S = 1.0, 30.0
_RIDGE_N = 2.0 * 5.0**2
_RIDGE_P = 2.0 * 50.0**2
_CLIP = 4.0
_MEAN_TO_SIGMA = math.sqrt(math.pi / 2)


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """Decayed sums over looks at running streams, and over ended requests. Start from `UNSEEN`."""

    at_s: float = -math.inf
    weight: float = 0.0
    sum_n: float = 0.0
    sum_p: float = 0.0
    sum_y: float = 0.0
    sum_nn: float = 0.0
    sum_np: float = 0.0
    sum_pp: float = 0.0
    sum_ny: float = 0.0
    sum_py: float = 0.0
    base_s: float = BASE_PRIOR_S
    seq_s: float = 0.0
    token_s: float = 0.0
    ends: float = 0.0
    sum_bias: float = 0.0
    sum_error: float = 0.0

    @property
    def bias(self) -> float:
        """Mean of ln(ITL / forecast) of those that ended."""
        return self.sum_bias / (self.ends + 1.0)

    @property
    def sigma(self) -> float:
        """Standard deviation of ln ITL around the forecast."""
        total = self.sum_error + 3.0 * SIGMA_PRIOR / _MEAN_TO_SIGMA
        return max(SIGMA_MIN, _MEAN_TO_SIGMA * total / (self.ends + 3.0))


UNSEEN = StepEstimate()


def observe_steps(
    estimate: StepEstimate, now_s: float, *, itl_s: float, running: float, prompt_tokens: float
) -> StepEstimate:
    """Learn from a look at the streams of the last second: mean gap between their tokens, and for a replica the
    sequences that decoded and the prompt tokens done in a step."""
    since_s = now_s - estimate.at_s if math.isfinite(estimate.at_s) and math.isfinite(now_s) else 0.0
    keep = math.exp(-max(0.0, since_s) / DECAY_S)
    n, p, y = running, prompt_tokens, itl_s
    weight = estimate.weight * keep + 1.0
    sum_n, sum_p, sum_y = estimate.sum_n * keep + n, estimate.sum_p * keep + p, estimate.sum_y * keep + y
    sum_nn, sum_np, sum_pp = (
        estimate.sum_nn * keep + n * n,
        estimate.sum_np * keep + n * p,
        estimate.sum_pp * keep + p * p,
    )
    sum_ny, sum_py = estimate.sum_ny * keep + n * y, estimate.sum_py * keep + p * y
    # Centred normal equations of two regressors, each drawn to none by its ridge.
    nn, pp = sum_nn - sum_n * sum_n / weight + _RIDGE_N, sum_pp - sum_p * sum_p / weight + _RIDGE_P
    np_ = sum_np - sum_n * sum_p / weight
    ny, py = sum_ny - sum_n * sum_y / weight, sum_py - sum_p * sum_y / weight
    det = max(1e-9, nn * pp - np_ * np_)
    seq, token = (pp * ny - np_ * py) / det, (nn * py - np_ * ny) / det
    if seq < 0.0:
        seq, token = 0.0, max(0.0, py / pp)
    elif token < 0.0:
        seq, token = max(0.0, ny / nn), 0.0
    base = (sum_y - seq * sum_n - token * sum_p) / weight
    if base <= 0.0:  # through the origin: all in proportion
        fitted = seq * sum_n + token * sum_p
        shrink = sum_y / fitted if fitted > 0 else 0.0
        base, seq, token = 1e-4, seq * shrink, token * shrink
    return StepEstimate(
        max(now_s, estimate.at_s), weight, sum_n, sum_p, sum_y, sum_nn, sum_np, sum_pp, sum_ny, sum_py,
        base, seq, token, estimate.ends, estimate.sum_bias, estimate.sum_error,
    )  # fmt: skip


def observe_end(estimate: StepEstimate, *, itl_s: float, foreseen_s: float) -> StepEstimate:
    """Judge the forecast by a request that has ended: its mean ITL, and the one foreseen."""
    keep, most = 1.0 - 1.0 / ENDS_MOST, math.log(_CLIP)
    error = min(most, max(-most, math.log(itl_s / foreseen_s)))
    return StepEstimate(  # built by hand: `replace` costs three times as much, and this runs for every request
        estimate.at_s,
        estimate.weight,
        estimate.sum_n,
        estimate.sum_p,
        estimate.sum_y,
        estimate.sum_nn,
        estimate.sum_np,
        estimate.sum_pp,
        estimate.sum_ny,
        estimate.sum_py,
        estimate.base_s,
        estimate.seq_s,
        estimate.token_s,
        estimate.ends * keep + 1.0,
        estimate.sum_bias * keep + error + estimate.bias,
        estimate.sum_error * keep + abs(error),
    )


def predict_itl_s(estimate: StepEstimate, running: float, prompt_rate: float, room: float = math.inf) -> float:
    """Mean ITL where so many sequences decode on a replica and so many prompt tokens a second are to be done there.

    `room`: prompt tokens that a step can hold. Never falls as sequences or rate grow.
    """
    load = min(LOAD_MOST, estimate.token_s * max(0.0, prompt_rate))
    decode_s = estimate.base_s + estimate.seq_s * max(0.0, running)
    return min(decode_s / (1.0 - load), decode_s + estimate.token_s * room) * math.exp(estimate.bias)
