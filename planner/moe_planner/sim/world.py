"""What a workload meets: replicas, expert load, failures, closed APIs, promises and prices. All of it frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_core.spill import Thresholds
from moe_planner.sim.engine import Engine
from moe_planner.sim.experts import Experts
from moe_planner.sim.workload import Z95

LOCAL = "local"
"""Name of the one revision that the gateway sees; its replicas stand behind a router of their own."""


THRESHOLDS = Thresholds(0.5, 1.0)
"""Those of a resource that names none."""


class WorldInvalid(ValueError):
    """A world that cannot be. Names the field and the remedy."""


@dataclass(frozen=True)
class Slo:
    """A request attains it where its TTFT and its own mean ITL are within."""

    ttft_s: float
    itl_s: float

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s"):
            if not getattr(self, name) > 0:
                raise WorldInvalid(f"slo.{name}: {getattr(self, name)}; it must be above 0")


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
            raise WorldInvalid(f"api.name: {self.name!r} is taken; give another name")
        if not 0 < self.ttft_median_s <= self.ttft_p95_s < math.inf:
            raise WorldInvalid(f"api {self.name}, ttft: 0 < median ≤ p95 is wanted")
        for name in ("itl_s", "usd_per_m_input", "usd_per_m_output"):
            if not 0 <= getattr(self, name) < math.inf:
                raise WorldInvalid(f"api {self.name}, {name}: {getattr(self, name)}; it must be 0 or more")
        if not (self.requests_per_minute > 0 and 0 <= self.p_429_in_burst <= 1):
            raise WorldInvalid(f"api {self.name}: requests_per_minute above 0 and p_429_in_burst in [0, 1] are wanted")

    @property
    def sigma(self) -> float:
        """Standard deviation of ln TTFT."""
        return math.log(self.ttft_p95_s / self.ttft_median_s) / Z95

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        return (input_tokens * self.usd_per_m_input + output_tokens * self.usd_per_m_output) / 1e6

    def down(self, now_s: float) -> bool:
        return any(start <= now_s < until for start, until in self.outages)


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

    def __post_init__(self) -> None:
        if self.replicas < 0:
            raise WorldInvalid(f"replicas: {self.replicas}; it must be 0 or more")
        if self.gateways < 1:
            raise WorldInvalid(f"gateways: {self.gateways}; it must be 1 or more")
        if not (self.report_every_s > 0 and self.report_lag_s >= 0):
            raise WorldInvalid("report_every_s above 0 and report_lag_s of 0 or more are wanted")
        if not (self.budget_usd >= 0 and self.usd_per_hour >= 0):
            raise WorldInvalid("budget_usd, usd_per_hour: neither may be below 0")
        if len({api.name for api in self.apis}) != len(self.apis):
            raise WorldInvalid("apis: two have the same name; give each its own")
        for outage in self.outages:
            if not 0 <= outage.replica < self.replicas:
                raise WorldInvalid(f"replica_down: there is no replica {outage.replica}; there are {self.replicas}")
            if not 0 <= outage.from_s < outage.until_s:
                raise WorldInvalid(f"replica_down: [{outage.from_s}, {outage.until_s}]; from < until is wanted")
