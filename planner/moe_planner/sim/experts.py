"""Expert load over time: how far the busiest rank is above the mean, how that drifts, and what capacity takes off.

Popularity is a Zipf law over the experts in random order; it wanders (a random walk of its logarithm) and is drawn
anew when the topic of the traffic switches. A token takes k of E experts without repetition: `moe_planner.experts` says
how often each. Experts lie on ranks in order, as vLLM places them without EPLB. The ups and downs of single steps are
left out: at the batches where a rank's load matters they are small beside the skew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np

from moe_core.wire import ExpertKnobs, Overflow
from moe_planner.experts import picked
from moe_planner.sim.invalid import Invalid
from moe_planner.sim.workload import Floats

MOST_EXPERTS, MOST_ZIPF, MOST_SIGMA = 16_384, 10, 10


class ExpertsInvalid(Invalid):
    """Expert figures that cannot be."""


@dataclass(frozen=True)
class Drift:
    """How popularity changes."""

    sigma_per_min: float = 0.0
    topics_per_hour: float = 0.0
    topic_zipf: tuple[float, float] = (0.0, 0.0)
    every_s: float = 15.0  # the walk moves in steps of this

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_per_min <= MOST_SIGMA:
            raise ExpertsInvalid("sigma_per_min", f"{self.sigma_per_min:g}", f"it must lie in [0, {MOST_SIGMA}]")
        if not 0 <= self.topics_per_hour <= 3600:
            raise ExpertsInvalid("topics_per_hour", f"{self.topics_per_hour:g}", "it must lie in [0, 3600]")
        if not (0 <= self.topic_zipf[0] <= self.topic_zipf[1] <= MOST_ZIPF):
            remedy = f"0 ≤ from ≤ to ≤ {MOST_ZIPF} is wanted"
            raise ExpertsInvalid("topic_zipf", f"{list(self.topic_zipf)}", remedy)
        if not self.every_s > 0:
            raise ExpertsInvalid("every_s", f"{self.every_s}", "it must be above 0")


@dataclass(frozen=True)
class Experts:
    """The experts of one model as a replica's ranks hold them."""

    experts: int
    top_k: int
    ranks: int
    zipf: float = 0.0
    drift: Drift = Drift()
    prefill_share: float = 0.6  # of prefill time that is expert time when ranks are even
    decode_share: float = 0.35  # of decode time, at a full batch

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ExpertsInvalid("top_k", f"{self.top_k} of {self.experts} experts", "1 ≤ top_k ≤ experts is wanted")
        if self.ranks < 1 or self.experts % self.ranks:
            raise ExpertsInvalid("ranks", f"{self.ranks} do not share {self.experts} experts evenly", "give a divisor")
        if not 0 <= self.zipf <= MOST_ZIPF:
            raise ExpertsInvalid("gate_zipf", f"{self.zipf:g}", f"it must lie in [0, {MOST_ZIPF}]")
        if self.experts > MOST_EXPERTS:
            raise ExpertsInvalid("experts", f"{self.experts}", f"{MOST_EXPERTS:,} are the most")


@dataclass(frozen=True)
class Balance:
    """Rank load max/mean before and after capacity, and the share of slots that capacity moved or dropped."""

    demand: float
    prefill: float
    decode: float
    moved: float


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """Shares of slots by expert over time: `shares[i]` holds from `from_s[i]` on."""

    of: Experts
    from_s: Floats
    shares: Floats
    _cache: dict[tuple[int, ExpertKnobs | None], Balance] = field(default_factory=dict, repr=False)

    def balance(self, place: int, knobs: ExpertKnobs | None = None) -> Balance:
        """Balance in the spell `place` under these knobs."""
        shares = self.shares[place]
        ranks = self.of.ranks
        demand = _max_over_mean(shares, ranks)
        if knobs is None or knobs.overflow is Overflow.UNLIMITED:
            return Balance(demand, demand, demand, 0.0)
        prefill, moved = self._capped(shares, knobs.capacity_factor_prefill, knobs.overflow)
        decode, _ = self._capped(shares, knobs.capacity_factor_decode, knobs.overflow)
        return Balance(demand, prefill, decode, moved)

    def _capped(self, shares: Floats, gamma: Decimal | None, overflow: Overflow) -> tuple[float, float]:
        """(max/mean of rank load, share of slots over capacity) with a factor γ."""
        if gamma is None:
            return _max_over_mean(shares, self.of.ranks), 0.0
        limit = float(gamma) / self.of.experts
        kept = np.minimum(shares, limit)
        over = float(shares.sum() - kept.sum())
        if overflow is not Overflow.DROP:
            kept = _fill(kept, shares, limit, over)
        load = kept.reshape(self.of.ranks, -1).sum(axis=1)
        # Against the mean of the demand: what is dropped saves its time.
        return float(load.max() * self.of.ranks / shares.sum()), over


def load_over_time(experts: Experts, seconds: float, seed: int) -> ExpertLoad:
    """Draw the load of `seconds`."""
    rng = np.random.default_rng([seed, 7])
    drift, size = experts.drift, experts.experts
    switches = np.sort(rng.uniform(0.0, seconds, rng.poisson(drift.topics_per_hour * seconds / 3600.0)))
    walk = np.arange(0.0, seconds, drift.every_s) if drift.sigma_per_min else np.zeros(1)
    moments = np.unique(np.concatenate([[0.0], walk, switches]))
    log = _zipf(experts.zipf, size, rng)
    rows, last = [], 0.0
    new_topic = set(switches.tolist())
    for moment in moments.tolist():
        if moment in new_topic:
            log = _zipf(float(rng.uniform(*drift.topic_zipf)), size, rng)
        elif moment > last:
            log = log + drift.sigma_per_min * np.sqrt((moment - last) / 60.0) * rng.standard_normal(size)
        last = moment
        rows.append(slot_shares(np.exp(log - log.max()), experts.top_k))
    return ExpertLoad(experts, moments, np.array(rows))


def slot_shares(popularity: Floats, top_k: int) -> Floats:
    """Share of all slots that each expert gets, where every token takes `top_k` different ones."""
    taken = np.array(picked(popularity.tolist(), top_k))
    return np.asarray(taken / taken.sum())


def _zipf(exponent: float, size: int, rng: np.random.Generator) -> Floats:
    """Logarithm of popularity: 1/rank^exponent, in random order."""
    return np.asarray(-exponent * np.log(1.0 + rng.permutation(size)))


def _fill(kept: Floats, wanted: Floats, limit: float, over: float) -> Floats:
    """Put what is over capacity on experts with room, in proportion to how much they are wanted."""
    for _ in range(len(kept)):
        room = limit - kept
        open_to = room > 1e-15
        if over <= 1e-12 or not open_to.any():
            break
        weight = np.where(open_to, np.maximum(wanted, 1e-12), 0.0)
        given = np.minimum(room, over * weight / weight.sum())
        given = np.where(open_to, given, 0.0)
        kept = kept + given
        over -= float(given.sum())
    return kept


def _max_over_mean(shares: Floats, ranks: int) -> float:
    load = shares.reshape(ranks, -1).sum(axis=1)
    return float(load.max() / load.mean())
