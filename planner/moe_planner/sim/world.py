"""What a workload meets: replicas, expert load, failures, closed APIs, promises and prices. All of it frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_core.forecast import Thresholds
from moe_planner.sim.engine import Engine
from moe_planner.sim.experts import Experts
from moe_planner.sim.invalid import Invalid
from moe_planner.sim.workload import Z95

LOCAL = "local"
"""Name of the one revision that the gateway sees; its replicas stand behind a router of their own."""


THRESHOLDS = Thresholds(0.5, 1.0)
"""Those of a resource that names none."""


MOST_REPLICAS, MOST_API_S = 10_000, 3600.0


class WorldInvalid(Invalid):
    """A world that cannot be."""


@dataclass(frozen=True)
class Slo:
    """A request attains it where its TTFT and its own mean ITL are within."""

    ttft_s: float
    itl_s: float

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s"):
            if not getattr(self, name) > 0:
                raise WorldInvalid(name, f"{getattr(self, name):g}", "it must be above 0")


@dataclass(frozen=True)
class Api:
    """A closed API: log-normal TTFT, even tokens, a limit of requests a minute, outages as (from, until) seconds."""

    name: str
    ttft_median_s: float
    ttft_p95_s: float
    itl_s: float
    usd_per_m_input: float
    usd_per_m_output: float
    requests_per_minute: float = math.inf
    p_429_in_burst: float = 0.0  # while requests exceed BURST_SHARE of the limit
    outages: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.name == LOCAL or not self.name:
            raise WorldInvalid("name", f"{self.name!r} is taken or empty", "give another name")
        if not 0 < self.ttft_median_s <= self.ttft_p95_s < math.inf:
            raise WorldInvalid(
                "ttft_median_s", f"{self.ttft_median_s:g}, with p95 {self.ttft_p95_s:g}", "0 < median ≤ p95 is wanted"
            )
        for name in ("ttft_p95_s", "itl_s"):
            if getattr(self, name) > MOST_API_S:
                raise WorldInvalid(name, f"{getattr(self, name):g} s", f"{MOST_API_S:,.0f} s are the most")
        for name in ("itl_s", "usd_per_m_input", "usd_per_m_output"):
            if not 0 <= getattr(self, name) < math.inf:
                raise WorldInvalid(name, f"{getattr(self, name)}", "it must be 0 or more")
        if not self.requests_per_minute > 0:
            raise WorldInvalid("requests_per_minute", f"{self.requests_per_minute}", "it must be above 0")
        if not 0 <= self.p_429_in_burst <= 1:
            raise WorldInvalid("p_429_in_burst", f"{self.p_429_in_burst}", "it must lie in [0, 1]")
        for start, until in self.outages:
            if not 0 <= start < until:
                raise WorldInvalid("outages", f"[{start:g}, {until:g}]", "from < until is wanted")

    @property
    def sigma(self) -> float:
        """Standard deviation of ln TTFT."""
        return math.log(self.ttft_p95_s / self.ttft_median_s) / Z95

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        return (input_tokens * self.usd_per_m_input + output_tokens * self.usd_per_m_output) / 1e6

    def down(self, now_s: float) -> bool:
        return any(start <= now_s < until for start, until in self.outages)


@dataclass(frozen=True)
class Tier:
    """A class of tenants: its share of requests, what it is promised, and whether it may spill.

    The gateway decides by the world's own SLO for every tier, as production's does; a tier's counts in attainment.
    """

    name: str
    share: float
    slo: Slo
    may_spill: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise WorldInvalid("share", f"{self.share:g}", "it must lie in [0, 1]")


BURST_SHARE = 0.8
"""Of an API's limit; above it, a request may be answered 429."""


@dataclass(frozen=True)
class Outage:
    """A replica that dies with all that it holds, and comes back empty."""

    replica: int
    from_s: float
    until_s: float


@dataclass(frozen=True)
class World:
    """Everything around a workload."""

    engine: Engine
    slo: Slo
    replicas: int = 1
    apis: tuple[Api, ...] = ()
    experts: Experts | None = None
    outages: tuple[Outage, ...] = ()
    thresholds: Thresholds = THRESHOLDS
    budget_usd: float = math.inf
    usd_per_hour: float = 0.0  # rent of one replica
    gateways: int = 1  # each with its own ledger and estimates; a request comes to one of them at random
    report_every_s: float = 1.0
    report_lag_s: float = 0.0  # from the engines' count to the gateway
    output_bound: int = 4096  # output tokens that a spilled request may cost at most
    tiers: tuple[Tier, ...] = ()  # none: every request is promised `slo` and may spill

    def __post_init__(self) -> None:
        if self.replicas < 0:
            raise WorldInvalid("replicas", f"{self.replicas}", "it must be 0 or more")
        if self.replicas > MOST_REPLICAS:
            raise WorldInvalid("replicas", f"{self.replicas}", f"{MOST_REPLICAS:,} are the most")
        if self.gateways < 1:
            raise WorldInvalid("gateways", f"{self.gateways}", "it must be 1 or more")
        if not (self.report_every_s > 0 and self.report_lag_s >= 0):
            raise WorldInvalid(
                "report_every_s", "it, or report_lag_s, is too small", "above 0, and 0 or more, are wanted"
            )
        for name in ("budget_usd", "usd_per_hour"):
            if not getattr(self, name) >= 0:
                raise WorldInvalid(name, f"{getattr(self, name)}", "it must be 0 or more")
        if len({api.name for api in self.apis}) != len(self.apis):
            raise WorldInvalid("apis", "one is there twice", "name each once")
        for outage in self.outages:
            if not 0 <= outage.replica < self.replicas:
                raise WorldInvalid("outages", f"there is no replica {outage.replica}", f"there are {self.replicas}")
            if not 0 <= outage.from_s < outage.until_s:
                raise WorldInvalid("outages", f"[{outage.from_s:g}, {outage.until_s:g}]", "from < until is wanted")
        if self.tiers and not math.isclose(sum(tier.share for tier in self.tiers), 1.0, abs_tol=1e-6):
            total = sum(tier.share for tier in self.tiers)
            raise WorldInvalid("tiers", f"their shares add up to {total:g}", "make them add up to 1")
        if len({tier.name for tier in self.tiers}) != len(self.tiers):
            raise WorldInvalid("tiers", "two have the same name", "give each its own")
