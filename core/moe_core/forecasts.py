"""What a gateway says of its forecasts: how P(miss) came true at each revision, and what shadow mode would have done.

The sums are told, and not their ratios, so that those of several workers add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from pydantic import Field

from moe_api.base import Model
from moe_core.calibration import BINS, Bin, Calibration, score


class ForecastBin(Model):
    """Decayed sums over requests whose P(miss) was in one tenth of [0, 1]."""

    requests: float = 0.0
    foretold: float = Field(default=0.0, description="sum of P(miss)")
    missed: float = 0.0
    squared: float = Field(default=0.0, description="sum of (P(miss) − missed)²")


class RevisionForecasts(Model):
    """How P(miss) came true at a revision, for the streams that it answered. `brier` is of 0 to 1, less is better;
    `skill` 1 − brier over that of always foretelling the base rate; `reliability` the bins' mean squared distance from
    the diagonal. Requests that were spilled are not in it: nobody knows whether they would have missed."""

    name: str
    bins: tuple[ForecastBin, ...]
    requests: float
    base_rate: float
    brier: float
    skill: float | None = None
    reliability: float


class ForecastReport(Model):
    """GET /v1/forecasts of a gateway's admin port."""

    gateway: str
    shadow: bool = Field(default=False, description="whether what would be spilled is told and not done")
    revisions: tuple[RevisionForecasts, ...] = ()
    would_have_spilled: int = Field(default=0, description="requests that shadow mode kept, since the process started")
    would_have_cost_usd: Decimal = Decimal(0)


def scored(name: str, calibration: Calibration, now_s: float) -> RevisionForecasts | None:
    """A calibration as it stands at a moment; None where nothing was observed."""
    found = score(calibration, now_s)
    if found is None:
        return None
    bins = [each.at(now_s) for each in calibration]
    told = tuple(ForecastBin(requests=b.weight, foretold=b.foretold, missed=b.seen, squared=b.squared) for b in bins)
    return RevisionForecasts(
        name=name,
        bins=told,
        requests=found.requests,
        base_rate=found.base_rate,
        brier=found.brier,
        skill=found.skill,
        reliability=found.reliability,
    )


def together(parts: Sequence[ForecastReport], gateway: str) -> ForecastReport:
    """What several workers say, as one."""
    names = dict.fromkeys(revision.name for part in parts for revision in part.revisions)
    revisions = []
    for name in names:
        rows = [revision.bins for part in parts for revision in part.revisions if revision.name == name]
        summed = tuple(_summed([row[index] for row in rows]) for index in range(BINS))
        found = scored(name, summed, 0.0)
        revisions += [] if found is None else [found]
    return ForecastReport(
        gateway=gateway,
        shadow=any(part.shadow for part in parts),
        revisions=tuple(revisions),
        would_have_spilled=sum(part.would_have_spilled for part in parts),
        would_have_cost_usd=sum((part.would_have_cost_usd for part in parts), Decimal(0)),
    )


def _summed(bins: Sequence[ForecastBin]) -> Bin:
    return Bin(
        sum(each.requests for each in bins),
        sum(each.foretold for each in bins),
        sum(each.missed for each in bins),
        sum(each.squared for each in bins),
        0.0,
    )
