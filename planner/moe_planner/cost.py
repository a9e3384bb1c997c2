"""Dollars: what tokens cost on own GPUs and from an API, by workload; and allocations as OpenCost writes them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from moe_planner.prices import Price

HOURS_PER_MONTH = 365 * 24 / 12
"""730: the month of cloud price lists."""
SECONDS_PER_MONTH = HOURS_PER_MONTH * 3600
MILLION = 1e6


class CostInvalid(ValueError):
    """A figure that no cost can have. Names the field and the remedy."""

    def __init__(self, field: str, message: str, remedy: str) -> None:
        self.field, self.message, self.remedy = field, message, remedy
        super().__init__(f"{field}: {message}: {remedy}")


class Tariff(Protocol):
    """Dollars for a million tokens of an API. `cached_usd_per_m` None: cached tokens cost what others do."""

    @property
    def name(self) -> str: ...
    @property
    def input_usd_per_m(self) -> float: ...
    @property
    def output_usd_per_m(self) -> float: ...
    @property
    def cached_usd_per_m(self) -> float | None: ...


@dataclass(frozen=True)
class Workload:
    """Tokens of a mean request. `cached_share`: of the input, read from a prefix cache."""

    name: str
    input_tokens: float
    output_tokens: float
    cached_share: float = 0.0

    def __post_init__(self) -> None:
        for field, value in (("input_tokens", self.input_tokens), ("output_tokens", self.output_tokens)):
            at_least("workload." + field, value, 0.0)
        if self.tokens <= 0:
            raise CostInvalid("workload.output_tokens", "a request without tokens", "set it to at least 1")
        share("workload.cached_share", self.cached_share)

    @property
    def tokens(self) -> float:
        return self.input_tokens + self.output_tokens

    @property
    def output_share(self) -> float:
        """Of all tokens."""
        return self.output_tokens / self.tokens


@dataclass(frozen=True)
class OwnCost:
    """Dollars for a million tokens on own GPUs. `input`, `cached` and `output` share out what `mean` says."""

    mean_usd_per_m: float
    input_usd_per_m: float
    cached_usd_per_m: float
    output_usd_per_m: float


def at_least(field: str, value: float, least: float) -> float:
    """The value. Raises CostInvalid below `least`, and for what is no finite number."""
    if not math.isfinite(value) or value < least:
        raise CostInvalid(field, f"{value:g}", f"set a number of at least {least:g}")
    return value


def share(field: str, value: float) -> float:
    """The value. Raises CostInvalid outside 0 to 1."""
    if not 0.0 <= value <= 1.0:
        raise CostInvalid(field, f"{value:g}", "set a share from 0 to 1")
    return value


def check_tariff(tariff: Tariff) -> None:
    """Raises CostInvalid for a negative price."""
    for field in ("input_usd_per_m", "output_usd_per_m", "cached_usd_per_m"):
        value = getattr(tariff, field)
        if value is not None:
            at_least(f"{tariff.name}.{field}", value, 0.0)


def input_usd_per_m(tariff: Tariff, cached_share: float) -> float:
    """Dollars for a million tokens of input, so much of it read from a prefix cache."""
    cached = tariff.input_usd_per_m if tariff.cached_usd_per_m is None else tariff.cached_usd_per_m
    return tariff.input_usd_per_m * (1 - share("cached_share", cached_share)) + cached * cached_share


def request_usd(tariff: Tariff, workload: Workload) -> float:
    """Dollars of a mean request from an API; a long context may cost more."""
    tariff = tariff.at(workload.input_tokens) if isinstance(tariff, Price) else tariff
    check_tariff(tariff)
    reading = workload.input_tokens * input_usd_per_m(tariff, workload.cached_share)
    return (reading + workload.output_tokens * tariff.output_usd_per_m) / MILLION


def api_usd_per_m(tariff: Tariff, workload: Workload) -> float:
    """Dollars for a million tokens of a workload, input and output counted alike."""
    return request_usd(tariff, workload) * MILLION / workload.tokens


def own_cost(
    usd_per_hour: float,
    prefill_tokens_per_s: float,
    total_tokens_per_s: float,
    workload: Workload,
    utilisation: float = 1.0,
) -> OwnCost:
    """Dollars for a million tokens on GPUs that cost `usd_per_hour`.

    `total_tokens_per_s` is input and output together when the GPUs are full of this workload; `utilisation` is the mean
    load over that. A request occupies the GPUs for tokens/total seconds: reading its input takes fresh/prefill of them,
    writing the rest; what is read from a prefix cache takes none. So the parts add up to the mean.
    """
    at_least("rent", usd_per_hour, 0.0)
    for field, value in (("prefill_tokens_per_s", prefill_tokens_per_s), ("total_tokens_per_s", total_tokens_per_s)):
        if not value > 0:
            raise CostInvalid(field, f"{value:g}", "set a speed above 0")
    if not 0 < utilisation <= 1:
        raise CostInvalid("utilisation", f"{utilisation:g}", "set a share above 0, at most 1")
    usd_per_s = usd_per_hour / 3600 / utilisation
    request_s = workload.tokens / total_tokens_per_s
    fresh = workload.input_tokens * (1 - workload.cached_share)
    reading_s = min(fresh / prefill_tokens_per_s, request_s) if workload.output_tokens else request_s
    writing_s = request_s - reading_s
    return OwnCost(
        mean_usd_per_m=usd_per_s * MILLION / total_tokens_per_s,
        input_usd_per_m=usd_per_s * reading_s / fresh * MILLION if fresh else 0.0,
        cached_usd_per_m=0.0,
        output_usd_per_m=usd_per_s * writing_s / workload.output_tokens * MILLION if workload.output_tokens else 0.0,
    )


def allocation(
    name: str,
    *,
    start: datetime,
    end: datetime,
    gpus: float,
    gpu_usd_per_hour: float,
    external_usd: float = 0.0,
    gpu_busy_share: float | None = None,
    properties: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One allocation in the form of OpenCost's /allocation (opencost.io/docs/integrations/api).

    Only the GPUs are priced here: rents are quoted for a GPU with its share of the host, so cpuCost, ramCost, pvCost
    and networkCost are 0, and totalCost is gpuCost + externalCost. `external_usd`: what closed APIs were paid.
    """
    if end <= start:
        raise CostInvalid("end", f"{end.isoformat()} is not after {start.isoformat()}", "set a later time")
    hours = (end - start).total_seconds() / 3600
    gpu = at_least("gpus", gpus, 0.0) * hours * at_least("rent", gpu_usd_per_hour, 0.0)
    window = {"start": start.isoformat(), "end": end.isoformat()}
    return {
        "name": name,
        "properties": dict(properties or {}),
        "window": window,
        **window,
        "minutes": hours * 60,
        "cpuCores": 0.0,
        "cpuCoreHours": 0.0,
        "cpuCost": 0.0,
        "gpuCount": gpus,
        "gpuHours": gpus * hours,
        "gpuCost": gpu,
        "ramBytes": 0.0,
        "ramByteHours": 0.0,
        "ramCost": 0.0,
        "pvCost": 0.0,
        "networkCost": 0.0,
        "loadBalancerCost": 0.0,
        "sharedCost": 0.0,
        "externalCost": at_least("external_usd", external_usd, 0.0),
        "totalCost": gpu + external_usd,
        **({} if gpu_busy_share is None else {"totalEfficiency": share("gpu_busy_share", gpu_busy_share)}),
    }


def allocation_set(*allocations: Mapping[str, Any]) -> dict[str, Any]:
    """Allocations of one window as OpenCost answers them."""
    return {"code": 200, "data": [{entry["name"]: dict(entry) for entry in allocations}]}
