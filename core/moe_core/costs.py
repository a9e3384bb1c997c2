"""What a deployment has cost and will cost: the report of a gateway, a forecast, and rent split by what GPUs did.

Pure. Money of closed APIs is decimal and exact; rent and forecasts are estimates, and floats.
"""

from __future__ import annotations

import calendar
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from pydantic import Field

from moe_api.base import Model
from moe_core.wire import ReplicaDigest


class CostRow(Model):
    """What one tenant has spent at one target."""

    tenant: str | None = Field(default=None, description="None: nobody knows who asked")
    target: str = Field(description="'lost': held by a gateway that died and left no journal")
    model: str | None = Field(default=None, description="None: the target has left the configuration")
    usd: Decimal


class TargetPriceRow(Model):
    """The price that a target's books are kept by, and whose word it is."""

    target: str
    model: str
    input_usd_per_m: Decimal
    output_usd_per_m: Decimal
    cached_input_usd_per_m: Decimal | None = None
    source: str
    dated: str = ""


class CostReport(Model):
    """Closed APIs of one deployment: all gateways together, as far as they have reported."""

    deployment: str
    at_s: float
    today: tuple[CostRow, ...] = ()
    month: tuple[CostRow, ...] = ()
    held_usd: Decimal = Field(default=Decimal(0), description="held by gateways, spent or not; counts as used today")
    usd_per_day: Decimal | None = None
    usd_per_month: Decimal | None = None
    left_today_usd: Decimal | None = None
    store_error: str | None = Field(default=None, description="why nothing can be spent now")
    prices: tuple[TargetPriceRow, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """Dollars at the end of the day and of the month (UTC), if spending goes on as it has today."""

    day_usd: float
    month_usd: float


def forecast(report: CostReport) -> Forecast:
    """Today at its mean rate so far; the days that follow as today. Neither passes its budget: the gateway would not
    let it. In the first hour of a day its rate is that of an hour."""
    at = datetime.fromtimestamp(report.at_s, UTC)
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    elapsed = max((at - midnight) / timedelta(days=1), 1 / 24)
    today = float(sum((row.usd for row in report.today), Decimal(0)))
    so_far = float(sum((row.usd for row in report.month), Decimal(0)))
    day = today / min(1.0, elapsed)
    if report.usd_per_day is not None:
        day = max(today, min(day, float(report.usd_per_day)))
    days_left = calendar.monthrange(at.year, at.month)[1] - at.day
    month = so_far - today + day * (1 + days_left)
    if report.usd_per_month is not None:
        month = max(so_far, min(month, float(report.usd_per_month)))
    return Forecast(day, month)


@dataclass(frozen=True)
class Rent:
    """Dollars of GPUs since their replicas started, by what they did. They add up to the rent."""

    prefill_usd: float
    decode_usd: float
    idle_usd: float
    prompt_tokens: int
    output_tokens: int

    @property
    def usd(self) -> float:
        return self.prefill_usd + self.decode_usd + self.idle_usd

    @property
    def usd_per_m_tokens(self) -> float | None:
        """Of input and output counted alike, idle time included; None before the first token."""
        tokens = self.prompt_tokens + self.output_tokens
        return self.usd * 1e6 / tokens if tokens else None


def rent(replicas: Iterable[ReplicaDigest], usd_per_gpu_hour: float) -> Rent | None:
    """Rent of replicas split by the measured time of their forward passes: with a prefill token, without one, and the
    rest. None where no replica tells decode passes apart."""
    prefill = decode = idle = 0.0
    prompt = output = 0
    found = False
    for replica in replicas:
        if replica.utilisation is None:
            continue
        found = True
        usd_per_s = usd_per_gpu_hour * replica.ranks / 3600
        elapsed_s = max(0.0, replica.at_s - replica.started_at_s)
        busy_s = min(replica.engine.busy_s_total, elapsed_s)
        decode_s = min(replica.utilisation.decode_busy_s_total, busy_s)
        prefill += (busy_s - decode_s) * usd_per_s
        decode += decode_s * usd_per_s
        idle += (elapsed_s - busy_s) * usd_per_s
        prompt += replica.engine.prompt_tokens_total
        output += replica.engine.generation_tokens_total
    return Rent(prefill, decode, idle, prompt, output) if found else None
