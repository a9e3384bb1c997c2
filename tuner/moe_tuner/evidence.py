"""Whether pairs of blocks show that a candidate is cheaper: an anytime-valid test, and an interval for how much.

Each pair measures the incumbent and the candidate in an order drawn by a fair coin. Where the candidate changes
nothing, the two blocks would have read the same under the other order, so the difference d of their log costs has a
random sign whatever the load does: E[exp(λd)/cosh(λd) | past] = 1 for every λ (given |d|, the mean over both signs is
1). The product over pairs is therefore a non-negative martingale that starts at 1, so is a mean of such products, and
by Ville's inequality it ever reaches 1/α with probability α at most, however often one looks and whenever one stops.
Under a candidate that is dearer it only becomes smaller. J. Ville, Étude critique de la notion de collectif, 1939;
Howard, Ramdas, McAuliffe, Sekhon, Time-uniform Chernoff bounds via nonnegative supermartingales, Probability Surveys
17, 2020; the design: Bojinov, Simchi-Levi, Zhao, Design and analysis of switchback experiments, Management Science 69,
2023.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from moe_api.base import Model
from moe_tuner.report import Effect

LAMBDAS = (5.0, 20.0, 80.0)
"""Bets that suit log-cost differences of about 20 %, 5 % and 1 %."""
RESAMPLES = 400
INTERVAL = 0.95


class Pair(Model):
    """Costs of one pair of blocks, in the same unit."""

    incumbent: float
    candidate: float

    @property
    def gain(self) -> float:
        """Log of how many times the incumbent costs the candidate's; positive: the candidate is cheaper."""
        return math.log(self.incumbent / self.candidate)


def candidate_first(seed: str, trial: int, pair: int) -> bool:
    """The coin of a pair. Of the trial's own numbers alone, so that a replay throws the same."""
    return random.Random(f"{seed}/{trial}/{pair}").random() < 0.5


def e_value(pairs: Sequence[Pair]) -> float:
    """Evidence that the candidate is cheaper; 1/α is enough at level α, at any time."""
    products = (math.exp(sum(_log_factor(rate * pair.gain) for pair in pairs)) for rate in LAMBDAS)
    return sum(products) / len(LAMBDAS)


def effect(pairs: Sequence[Pair]) -> Effect:
    """The candidate's cost over the incumbent's, with a bootstrap interval that draws whole pairs: blocks are long, so
    what the load does within one stays together."""
    if not pairs:
        return Effect(ratio=1.0)
    gains = [pair.gain for pair in pairs]
    ratio = math.exp(-sum(gains) / len(gains))
    rng = random.Random(len(gains))
    means = sorted(sum(rng.choices(gains, k=len(gains))) / len(gains) for _ in range(RESAMPLES))
    cut = round((1.0 - INTERVAL) / 2.0 * RESAMPLES)
    low, high = math.exp(-means[-cut - 1]), math.exp(-means[cut])
    return Effect(ratio=ratio, low=low, high=high, pairs=len(pairs), evidence=e_value(pairs))


def pairs_needed(alpha: float) -> int:
    """The fewest pairs that can show anything: each at most doubles the evidence."""
    return math.ceil(math.log2(1.0 / alpha) - 1e-9)


def _log_factor(x: float) -> float:
    """ln(exp(x)/cosh(x)) = ln 2 − ln(1 + exp(−2x)), without overflow."""
    return math.log(2.0) - (math.log1p(math.exp(-2.0 * x)) if x > -300 else -2.0 * x)
