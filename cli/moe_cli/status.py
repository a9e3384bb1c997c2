"""What a running stack does now: asked from its gateway, its board and its tuner, and put into one report."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from pydantic import TypeAdapter, ValidationError

from moe_api.base import Model
from moe_cli.documents import PartState, Phase, StackState, read_token
from moe_cli.showing import of_stack
from moe_core.forecasts import ForecastReport, together
from moe_core.http import HttpError, call_json
from moe_core.wire import GatewayDigest, ReplicaDigest

WINDOW_S = 10
DECISIONS = 3
ASK_S = 1.0

T = TypeVar("T")


class PartHealth(Model):
    """One process: whether it lives, and whether it answers."""

    name: str
    pid: int | None = None
    alive: bool = False
    answers: bool | None = None  # None: it has nothing to ask
    url: str | None = None
    log: str = ""


class Figures(Model):
    """Live numbers of a stack over the last seconds; None where nobody says."""

    rps: float | None = None
    in_flight: int | None = None
    failed: int | None = None
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    itl_p95_s: float | None = None
    slo_attained: float | None = None
    spill_share: float | None = None
    forecast_brier: float | None = None  # of P(miss), over all revisions
    forecast_skill: float | None = None  # 1 − Brier over that of the base rate
    would_have_spilled: int | None = None  # in shadow mode
    would_have_cost_usd: Decimal | None = None
    imbalance: float | None = None  # max/mean of load by EP rank, worst layer
    expert_imbalance: float | None = None  # max/mean of demand by expert, worst layer
    capacity_factor: str | None = None  # γ in force by phase
    overflow: str | None = None
    max_active_seqs: int | None = None
    running: int | None = None
    waiting: int | None = None
    knobs_version: int | None = None
    exploring: str | None = None
    decisions: tuple[str, ...] = ()


class Report(Model):
    """`moectl status`."""

    running: bool
    deployment: str | None = None
    model: str | None = None
    phase: str | None = None
    url: str | None = None
    supervisor_pid: int | None = None
    supervised: bool = False
    parts: tuple[PartHealth, ...] = ()
    figures: Figures = Figures()
    state_dir: str = ""


async def gather(client: aiohttp.ClientSession, state: StackState, folder: Path) -> tuple[Figures, dict[str, bool]]:
    """Figures of a stack and, for each part that can be asked, whether it answered. `folder`: of its key and tokens."""
    token, shown = read_token(folder), of_stack(folder, state.deployment)
    gateway, board, tuner = urls(state).get("gateway"), state.fact("serving", "boardUrl"), urls(state).get("tuner")
    prometheus = state.fact("prometheus", "url")
    digest, forecasts, replicas, report, ready = await asyncio.gather(
        _ask(client, gateway and f"{gateway}/v1/digest?window={WINDOW_S}", shown),
        _ask(client, gateway and f"{gateway}/v1/forecasts", shown),
        _ask(client, board and f"{board}/v1/digests", shown),
        _ask(client, tuner and f"{tuner}/v1/status", token),
        _ready(client, prometheus and f"{prometheus}/-/ready"),
    )
    answers = {
        name: found
        for name, url, found in (
            ("gateway", gateway, digest is not None),
            ("serving", board, replicas is not None),
            ("tuner", tuner, report is not None),
            ("prometheus", prometheus, ready),
        )
        if url is not None
    }
    return figures(digest, replicas, report, forecasts), answers


def urls(state: StackState) -> dict[str, str]:
    """Where each part is asked how it is."""
    found: dict[str, str] = {}
    for name, part, fact in (("gateway", "gateway", "adminPort"), ("tuner", "tuner", "port")):
        if (port := state.fact(part, fact)) is not None:
            found[name] = f"http://127.0.0.1:{port}"
    for name, part, fact in (("serving", "serving", "url"), ("prometheus", "prometheus", "url")):
        if (url := state.fact(part, fact)) is not None:
            found[name] = url
    return found


def figures(digest: Any, replicas: Any, report: Any, forecasts: Any = None) -> Figures:
    """One set of figures from what gateway, board and tuner answered (parsed JSON, or None)."""
    values: dict[str, Any] = {}
    traffic = _parse(GatewayDigest, digest)
    if traffic is not None:
        values |= {
            "rps": traffic.arrivals / traffic.window_s,
            "in_flight": traffic.in_flight,
            "failed": traffic.failed,
            "ttft_p50_s": traffic.ttft_p50_s,
            "ttft_p95_s": traffic.ttft_p95_s,
            "itl_p95_s": traffic.itl_p95_s,
            "slo_attained": traffic.slo_attained,
            # Spills count as they end: those of a burst outnumber what has come since.
            "spill_share": min(1.0, traffic.spilled / traffic.arrivals) if traffic.arrivals else 0.0,
        }
    foretold = _parse(ForecastReport, forecasts)
    if foretold is not None:
        values |= _forecast_figures(foretold)
    engines = _parse(tuple[ReplicaDigest, ...], replicas)
    if engines:
        values |= _engine_figures(engines)
    if isinstance(report, dict):
        values["exploring"] = str(report.get("exploringReason") or "") or None
        rows = report.get("decisions") or ()
        values["decisions"] = tuple(decision_text(row) for row in rows[:DECISIONS] if isinstance(row, dict))
    return Figures.model_validate(values)


def _forecast_figures(told: ForecastReport) -> dict[str, Any]:
    """Of all revisions together: their sums are one calibration."""
    alike = [revision.model_copy(update={"name": ""}) for revision in told.revisions]
    parts = [told.model_copy(update={"revisions": (revision,)}) for revision in alike]
    values: dict[str, Any] = {}
    for whole in together(parts, told.gateway).revisions:
        values = {"forecast_brier": whole.brier, "forecast_skill": whole.skill}
    if told.shadow:
        values |= {"would_have_spilled": told.would_have_spilled, "would_have_cost_usd": told.would_have_cost_usd}
    return values


def _engine_figures(engines: tuple[ReplicaDigest, ...]) -> dict[str, Any]:
    layers = [layer for engine in engines for layer in engine.layers]
    by_rank = [layer.rank_max_over_mean for layer in layers if layer.rank_max_over_mean is not None]
    by_expert = [layer.expert_max_over_mean for layer in layers if layer.expert_max_over_mean is not None]
    knobs = engines[0].knobs
    gammas = [
        f"{phase} {factor:f}"
        for phase, factor in (("prefill", knobs.capacity_factor_prefill), ("decode", knobs.capacity_factor_decode))
        if factor is not None
    ]
    return {
        "imbalance": max(by_rank, default=None),
        "expert_imbalance": max(by_expert, default=None),
        "capacity_factor": ", ".join(gammas) or "uncapped",
        "overflow": knobs.overflow.value,
        "max_active_seqs": min(engine.engine.max_active_seqs for engine in engines),
        "running": sum(engine.engine.running for engine in engines),
        "waiting": sum(engine.engine.waiting for engine in engines),
        "knobs_version": min(engine.knobs_version for engine in engines),
    }


def decision_text(row: dict[str, Any]) -> str:
    """One decision of the tuner in a line: loop, action and why."""
    version = f" → version {row['version']}" if row.get("version") is not None else ""
    return f"{row.get('loop', '?')} loop: {row.get('action', '?')}{version}: {row.get('reason', '')}"


def part_health(part: PartState, url: str | None, answers: bool | None) -> PartHealth:
    alive = part.proc is not None and part.phase in (Phase.STARTING, Phase.UP) and part.proc.alive()
    pid = part.proc.pid if part.proc is not None else None
    return PartHealth(name=part.name, pid=pid, alive=alive, answers=answers, url=url, log=part.log)


async def report(client: aiohttp.ClientSession, state: StackState | None, state_dir: str) -> Report:
    """Everything that `moectl status` says."""
    if state is None or state.ended:
        return Report(running=False, state_dir=state_dir, phase=None if state is None else state.phase.value)
    found, answers = await gather(client, state, Path(state_dir))
    where = urls(state)
    parts = tuple(
        part_health(part, where.get(part.name), answers.get(part.name))
        for part in state.parts
        if part.phase is not Phase.DONE
    )
    supervised = state.supervisor.alive()
    return Report(
        running=supervised or any(part.alive for part in parts),
        deployment=state.deployment,
        model=state.model,
        phase=state.phase.value,
        url=state.gateway_url,
        supervisor_pid=state.supervisor.pid,
        supervised=supervised,
        parts=parts,
        figures=found,
        state_dir=state_dir,
    )


async def _ask(client: aiohttp.ClientSession, url: str | None, token: str | None = None) -> Any:
    if url is None:
        return None
    try:
        return await call_json(client, "GET", url, total_s=ASK_S, token=token)
    except HttpError:
        return None


async def _ready(client: aiohttp.ClientSession, url: str | None) -> bool:
    if url is None:
        return False
    try:
        async with client.get(url, timeout=aiohttp.ClientTimeout(total=ASK_S)) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def _parse(kind: type[T], value: Any) -> T | None:
    if value is None:
        return None
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return None
