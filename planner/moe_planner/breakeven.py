"""From which volume own GPUs are cheaper than an API, how that moves, and which assumption a stated one needs. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_planner.cost import (
    HOURS_PER_MONTH,
    MILLION,
    SECONDS_PER_MONTH,
    CostInvalid,
    Tariff,
    Workload,
    api_usd_per_m,
    at_least,
    check_tariff,
    input_usd_per_m,
    share,
)


@dataclass(frozen=True)
class Tariffed:
    """A tariff by its numbers: what a person types, or another one scaled."""

    name: str
    input_usd_per_m: float
    output_usd_per_m: float
    cached_usd_per_m: float | None = None

    def __post_init__(self) -> None:
        check_tariff(self)


@dataclass(frozen=True)
class Own:
    """GPUs that are rented by the hour, whether used or not. `capacity_tokens_per_s`: input and output of one replica
    when it is full; None where it is not known. `utilisation`: the mean load that it may have, of that."""

    gpus: int
    usd_per_gpu_hour: float
    capacity_tokens_per_s: float | None = None
    utilisation: float = 1.0

    def __post_init__(self) -> None:
        at_least("gpus", self.gpus, 1)
        at_least("rent", self.usd_per_gpu_hour, 0.0)
        if not 0 < self.utilisation <= 1:
            raise CostInvalid("utilisation", f"{self.utilisation:g}", "set a share above 0, at most 1")
        if self.capacity_tokens_per_s is not None and not self.capacity_tokens_per_s > 0:
            raise CostInvalid("capacity", f"{self.capacity_tokens_per_s:g}", "set tokens a second above 0")

    @property
    def usd_per_month(self) -> float:
        """Of one replica."""
        return self.gpus * self.usd_per_gpu_hour * HOURS_PER_MONTH

    @property
    def tokens_per_month(self) -> float:
        """That one replica serves at its utilisation; infinite where its speed is not known."""
        if self.capacity_tokens_per_s is None:
            return math.inf
        return self.capacity_tokens_per_s * self.utilisation * SECONDS_PER_MONTH

    def replicas(self, tokens_per_month: float) -> int:
        """Fewest replicas for a volume; one at least."""
        return max(1, math.ceil(tokens_per_month / self.tokens_per_month))

    def usd(self, tokens_per_month: float) -> float:
        """Dollars a month for a volume."""
        return self.replicas(tokens_per_month) * self.usd_per_month


@dataclass(frozen=True)
class BreakEven:
    """`tokens_per_month` at which one replica costs what the API does; None where it cannot serve so many: then each
    further replica loses as the first does, and the API is cheaper at any volume."""

    own: Own
    api: str
    workload: Workload
    api_usd_per_m: float
    tokens_per_month: float | None
    unlimited: float  # the same, if a replica had no limit


def break_even(own: Own, tariff: Tariff, workload: Workload) -> BreakEven:
    """Rent over the API's price of a token: a second replica doubles both sides, so the first one decides."""
    price = api_usd_per_m(tariff, workload)
    volume = own.usd_per_month / price * MILLION if price > 0 else math.inf
    reached = volume if volume <= own.tokens_per_month and math.isfinite(volume) else None
    return BreakEven(own, tariff.name, workload, price, reached, volume)


@dataclass(frozen=True)
class Sensitivity:
    """One input moved both ways, all else as it is: (value, break-even) of each."""

    input: str
    now: float
    low: tuple[float, float | None]
    high: tuple[float, float | None]


def sensitivities(own: Own, tariff: Tariff, workload: Workload, change: float = 0.25) -> tuple[Sensitivity, ...]:
    """How the break-even moves with rent, API price, cached share, input for an output token, and utilisation.

    Rent, price and utilisation by ± `change`; the cached share to 0 and to 0.8; the input to half and double.
    """
    share("change", change)
    price = api_usd_per_m(tariff, workload)

    def volume(o: Own = own, t: Tariff = tariff, w: Workload = workload) -> float | None:
        return break_even(o, t, w).tokens_per_month

    def row(name: str, now: float, ways: Iterator[tuple[float, float | None]]) -> Sensitivity:
        return Sensitivity(name, now, next(ways), next(ways))

    factors = (1 - change, 1 + change)
    ratio = workload.input_tokens / workload.output_tokens if workload.output_tokens else math.inf
    utilised = (own.utilisation * factors[0], min(1.0, own.utilisation * factors[1]))
    rent = own.usd_per_gpu_hour
    return (
        row(
            "rent, USD per GPU-hour",
            rent,
            ((rent * f, volume(replace(own, usd_per_gpu_hour=rent * f))) for f in factors),
        ),
        row("API, USD per 1M tokens", price, ((price * f, volume(t=scaled(tariff, f))) for f in factors)),
        row(
            "cached share of input",
            workload.cached_share,
            ((c, volume(w=replace(workload, cached_share=c))) for c in (0.0, 0.8)),
        ),
        row(
            "input tokens per output token",
            ratio,
            ((ratio * f, volume(w=replace(workload, input_tokens=workload.input_tokens * f))) for f in (0.5, 2.0)),
        ),
        row("utilisation", own.utilisation, ((u, volume(replace(own, utilisation=u))) for u in utilised)),
    )


def scaled(tariff: Tariff, factor: float) -> Tariffed:
    """Every price of a tariff times a factor."""
    cached = None if tariff.cached_usd_per_m is None else tariff.cached_usd_per_m * factor
    return Tariffed(tariff.name, tariff.input_usd_per_m * factor, tariff.output_usd_per_m * factor, cached)


def implied_usd_per_m(usd_per_month: float, tokens_per_month: float) -> float:
    """Price of a million tokens at which a stated break-even holds."""
    return at_least("rent", usd_per_month, 0.0) / at_least("tokens_per_month", tokens_per_month, 1.0) * MILLION


def output_share(tariff: Tariff, usd_per_m: float, cached_share: float = 0.0) -> float | None:
    """Share of output among all tokens at which an API's mean price is `usd_per_m`; None: at no share.

    The mean price is linear in the share, from the price of input (part of it cached) to the price of output.
    """
    check_tariff(tariff)
    low = input_usd_per_m(tariff, cached_share)
    high = tariff.output_usd_per_m
    if high == low:
        return None
    found = (usd_per_m - low) / (high - low)
    return found if 0.0 <= found <= 1.0 else None
