"""How well probabilities foretold came true: Brier score and reliability by bins, decayed. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

BINS = 10
DECAY_S = 600.0
"""Time constant: a forecast counts 1/e after this."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Decayed sums over forecasts of one tenth of [0, 1], as they were at `at_s`."""

    weight: float = 0.0
    foretold: float = 0.0
    """Sum of the probabilities."""
    seen: float = 0.0
    """How many came true."""
    squared: float = 0.0
    """Sum of (probability − what came true)²."""
    at_s: float = -math.inf

    def at(self, now_s: float) -> Bin:
        """The same sums at a later moment."""
        if self.weight <= 0.0 or now_s <= self.at_s:
            return self
        keep = math.exp((self.at_s - now_s) / DECAY_S)
        return Bin(self.weight * keep, self.foretold * keep, self.seen * keep, self.squared * keep, now_s)


Calibration = tuple[Bin, ...]
FRESH: Calibration = (Bin(),) * BINS


def bin_of(probability: float) -> int:
    """The bin of a probability; 1 is in the last one."""
    return min(BINS - 1, max(0, int(probability * BINS)))


def observe(calibration: Calibration, now_s: float, probability: float, came_true: bool) -> Calibration:
    """Count one forecast of which the truth is known. `now_s`: monotonic seconds."""
    index = bin_of(probability)
    old = calibration[index].at(now_s)
    new = replace(
        old,
        weight=old.weight + 1.0,
        foretold=old.foretold + probability,
        seen=old.seen + came_true,
        squared=old.squared + (probability - came_true) ** 2,
        at_s=max(now_s, old.at_s),
    )
    return (*calibration[:index], new, *calibration[index + 1 :])


@dataclass(frozen=True, slots=True)
class Score:
    """What the sums say at a moment. `brier` is the mean squared error; `base_rate` how often it came true;
    `skill` 1 − brier over that of foretelling the base rate, None where that is never wrong; `reliability` Murphy's
    (1973): the mean squared distance of the bins from the diagonal."""

    requests: float
    brier: float
    base_rate: float
    skill: float | None
    reliability: float


def score(calibration: Calibration, now_s: float) -> Score | None:
    """The score at a moment; None where nothing was observed."""
    bins = [each.at(now_s) for each in calibration if each.weight > 0.0]
    total = sum(each.weight for each in bins)
    if total <= 0.0:
        return None
    brier, base = sum(each.squared for each in bins) / total, sum(each.seen for each in bins) / total
    spread = base * (1.0 - base)
    reliability = sum((each.foretold - each.seen) ** 2 / each.weight for each in bins if each.weight > 0.0) / total
    return Score(total, brier, base, None if spread <= 1e-12 else 1.0 - brier / spread, reliability)
