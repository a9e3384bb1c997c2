"""`moectl costs`: what closed APIs and own GPUs have cost, who spent it, where it is going, where they break even."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import TypeAdapter, ValidationError

from moe_cli.documents import StackState, read_state
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_cli.showing import NO_KEY, Key, of_stack, wanted
from moe_core import http
from moe_core.costs import CostReport, CostRow, Forecast, Rent, forecast, rent
from moe_core.http import HttpError, call_json
from moe_core.wire import GatewayDigest, ReplicaDigest
from moe_planner.breakeven import BreakEven
from moe_planner.measured import break_evens

ASK_S = 5.0
WINDOW_S = 300


async def show(
    state_dir: Path, say: Say, *, url: str | None, usd_per_gpu_hour: float | None, as_json: bool, key: Key = NO_KEY
) -> Exit:
    """Ask the gateway (and the board, where rent is given), and print. Raises Refusal."""
    state = read_state(state_dir)
    gateway = url or _admin_url(state)
    if gateway is None:
        raise Refusal(
            Problem(field="costs", message="nothing runs here", remedy="start it with moectl up, or give --url")
        )
    async with http.session(connect_s=2.0, read_s=ASK_S) as client:
        own = None if state is None else of_stack(state_dir, state.deployment)
        shown = own if url is None else key.token()
        report, digest = await _ask(client, gateway.rstrip("/"), shown)
        replicas = await _replicas(client, state, own)
    spent = None if usd_per_gpu_hour is None else rent(replicas, usd_per_gpu_hour)
    gpus = sum(replica.ranks for replica in replicas)
    even = break_evens(report, digest, gpus, usd_per_gpu_hour)
    if as_json:
        say.line(json.dumps(document(report, forecast(report), spent, even)))
    else:
        for line in lines(report, forecast(report), spent, even):
            say.line(line)
    return Exit.OK


def document(report: CostReport, ahead: Forecast, spent: Rent | None, even: tuple[BreakEven, ...]) -> dict[str, Any]:
    """Everything as one JSON document."""
    found: dict[str, Any] = report.to_json()
    found["forecast"] = {"dayUsd": round(ahead.day_usd, 6), "monthUsd": round(ahead.month_usd, 6)}
    if spent is not None:
        found["gpus"] = {
            "prefillUsd": spent.prefill_usd,
            "decodeUsd": spent.decode_usd,
            "idleUsd": spent.idle_usd,
            "usdPerMTokens": spent.usd_per_m_tokens,
        }
    found["breakEven"] = [
        {"target": row.api, "apiUsdPerMTokens": row.api_usd_per_m, "tokensPerMonth": row.unlimited} for row in even
    ]
    return found


def lines(report: CostReport, ahead: Forecast, spent: Rent | None, even: tuple[BreakEven, ...]) -> list[str]:
    """The same for people."""
    out = [f"{report.deployment}: closed APIs"]
    if report.store_error is not None:
        out.append(f"  the budget store cannot be used, so nothing is spent: {report.store_error}")
    for name, rows, end, limit in (
        ("today", report.today, ahead.day_usd, report.usd_per_day),
        ("this month", report.month, ahead.month_usd, report.usd_per_month),
    ):
        bound = "" if limit is None else f" of {usd(limit)}"
        out.append(f"  {name}: {usd(_sum(rows))}{bound}; forecast {usd(end)}")
        keys: tuple[tuple[str, Callable[[CostRow], str]], ...] = (
            ("tenant", lambda row: row.tenant or "(not known)"),
            ("model", lambda row: row.model or "(gone)"),
            ("target", lambda row: row.target),
        )
        for title, key in keys:
            parts = ", ".join(f"{label} {usd(amount)}" for label, amount in by(rows, key))
            if parts:
                out.append(f"    by {title}: {parts}")
    if report.held_usd:
        out.append(f"  held by gateways, spent or not: {usd(report.held_usd)}")
    for price in report.prices:
        cached = "" if price.cached_input_usd_per_m is None else f", cached input ${price.cached_input_usd_per_m:f}"
        dated = f", {price.dated}" if price.dated else ""
        figures = f"input ${price.input_usd_per_m:f}{cached}, output ${price.output_usd_per_m:f} per million tokens"
        out.append(f"  price of {price.target} ({price.model}): {figures} ({price.source}{dated})")
    if spent is not None:
        shares = (("prefill", spent.prefill_usd), ("decode", spent.decode_usd), ("idle", spent.idle_usd))
        told = ", ".join(f"{name} {usd(amount)}" for name, amount in shares)
        per = "" if spent.usd_per_m_tokens is None else f"; {usd(spent.usd_per_m_tokens)} per million tokens"
        out.append(f"own GPUs since they started: {usd(spent.usd)} ({told}){per}")
    out += [
        f"own GPUs cost what {row.api} does from {row.unlimited:,.0f} tokens a month"
        f" (at {usd(row.api_usd_per_m)} per million, {row.workload.input_tokens:.0f} in"
        f" and {row.workload.output_tokens:.0f} out a request)"
        for row in even
    ]
    return out


def by(rows: tuple[CostRow, ...], key: Callable[[CostRow], str]) -> list[tuple[str, Decimal]]:
    """Sums by a label, the largest first."""
    sums: dict[str, Decimal] = {}
    for row in rows:
        sums[key(row)] = sums.get(key(row), Decimal(0)) + row.usd
    return sorted(sums.items(), key=lambda item: (-item[1], item[0]))


def usd(amount: Decimal | float) -> str:
    """Dollars: cents, or as many digits as a small amount needs."""
    number = float(amount)
    return f"${number:,.2f}" if number == 0 or abs(number) >= 1 else f"${number:.6f}".rstrip("0")


def _sum(rows: tuple[CostRow, ...]) -> Decimal:
    return sum((row.usd for row in rows), Decimal(0))


def _admin_url(state: StackState | None) -> str | None:
    port = None if state is None or state.ended else state.fact("gateway", "adminPort")
    return None if port is None else f"http://127.0.0.1:{port}"


async def _ask(client: aiohttp.ClientSession, gateway: str, shown: str | None) -> tuple[CostReport, GatewayDigest]:
    try:
        raw = await call_json(client, "GET", f"{gateway}/v1/costs", total_s=ASK_S, token=shown)
        report = CostReport.model_validate(raw)
        raw = await call_json(client, "GET", f"{gateway}/v1/digest?window={WINDOW_S}", total_s=ASK_S, token=shown)
        return report, GatewayDigest.model_validate(raw)
    except HttpError as error:
        message = f"the gateway at {gateway} does not answer: {error}"
        remedy = wanted(error, "give the address of its admin port")
        raise Refusal(Problem(field="--url", message=message, remedy=remedy)) from None
    except ValidationError:
        message = f"what answers at {gateway} is no gateway of this version"
        raise Refusal(Problem(field="--url", message=message, remedy="give the address of its admin port")) from None


async def _replicas(
    client: aiohttp.ClientSession, state: StackState | None, shown: str | None
) -> tuple[ReplicaDigest, ...]:
    board = None if state is None else state.fact("serving", "boardUrl")
    if board is None:
        return ()
    try:
        raw = await call_json(client, "GET", f"{board}/v1/digests", total_s=ASK_S, token=shown)
        return TypeAdapter(tuple[ReplicaDigest, ...]).validate_python(raw)
    except (HttpError, ValidationError):
        return ()
