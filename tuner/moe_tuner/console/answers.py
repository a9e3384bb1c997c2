"""What the console's endpoints say, as types; each list and each text in them has a limit. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Literal, TypeVar

from pydantic import Field

from moe_api.base import Model
from moe_core.config import KnobBounds, PlanRow, SloConfig, TunerConfig
from moe_core.costs import CostReport, CostRow, TargetPriceRow, forecast, rent
from moe_core.expert_load import Of, binned, grid
from moe_core.setting import KNOBS, Signals
from moe_core.wire import ExpertMatrix, GatewayDigest, ReplicaDigest
from moe_planner.measured import break_evens
from moe_tuner.live import HELD_AT
from moe_tuner.report import DecisionRecord, DeploymentSummary, Effect, TuningReport

T = TypeVar("T", str, str | None)
TEXT, LIST, ROWS, DEPLOYMENTS, CELLS, REPLICAS = 400, 20, 50, 200, 65_536, 64


class DeploymentRow(Model):
    """One deployment in the list."""

    deployment: str
    tuned: bool
    problem: str | None = None
    mode: Literal["Off", "Recommend", "Auto"] | None = None
    paused: bool | None = None
    displaced: bool | None = None
    version: int | None = None
    slo_attained: float | None = None
    spill_share: float | None = None
    arrivals_per_s: float | None = None
    usd_today: Decimal | None = Field(default=None, description="of closed APIs; None: no gateway said")
    doing: str | None = None


class Deployments(Model):
    """`GET deployments`."""

    at_s: float
    rows: tuple[DeploymentRow, ...]
    more: int = Field(default=0, description="deployments beyond the limit of this list")


class Detail(Model):
    """`GET status`: the report, and what it may do."""

    at_s: float
    report: TuningReport
    in_force: str | None = None
    home: str | None = None
    would_set: str | None = None
    slo: SloConfig
    bounds: KnobBounds
    max_lost_gate_mass: float
    knobs: tuple[str, ...] = Field(default=KNOBS, description="names that a pin takes")
    held_at: tuple[str, ...] = Field(default=HELD_AT, description="those of them that it takes with a value")
    plan: tuple[PlanRow, ...] = ()
    newest_decision_s: float | None = Field(default=None, description="unix seconds: whether `decisions` has more")


class SeriesAnswer(Model):
    """`GET series`: `columns` names what stands in a row after its time (unix seconds)."""

    at_s: float
    step_s: float
    columns: tuple[str, ...]
    rows: list[list[float | None]]


class DecisionRow(Model):
    """One decision with its why."""

    time: float
    loop: str
    action: str
    reason: str
    mode: str
    sent: bool
    version: int | None = None
    before: str
    after: str | None = None
    changed: tuple[str, ...] = ()
    signals: Signals
    ack_seconds: float | None = None
    faults: tuple[str, ...] = ()
    note: str | None = None
    predicted: Effect | None = None
    measured: Effect | None = None


class Decisions(Model):
    """`GET decisions`: newest first."""

    rows: tuple[DecisionRow, ...]


class HeatRow(Model):
    """One layer; `cells` are hundredths of the layer's mean."""

    layer: int
    hooked: bool
    cells: tuple[int, ...] | None = None
    hottest: int | None = Field(default=None, description="expert, or EP rank")
    max_over_mean: float | None = None
    ranks_before: float | None = None
    ranks_after: float | None = None
    dropped_share: float = 0.0
    rerouted_share: float = 0.0


class Heat(Model):
    """`GET experts`: one replica's load."""

    at_s: float
    window_s: float
    since_start: bool = Field(description="False: of the last seconds")
    of: Of
    replica: str
    replicas: tuple[str, ...]
    model: str
    ranks: int
    tokens: int
    columns: int
    group: int = Field(description="so many neighbours share a cell, which shows the hottest of them")
    rows: tuple[HeatRow, ...]


class EvenRow(Model):
    """Own GPUs cost what a target does from this volume on."""

    target: str
    usd_per_m_tokens: float
    tokens_per_month: float


class RentRow(Model):
    """Own GPUs since their replicas started."""

    prefill_usd: float
    decode_usd: float
    idle_usd: float
    usd_per_m_tokens: float | None = None


class Costs(Model):
    """`GET costs`."""

    at_s: float
    today: tuple[CostRow, ...]
    month: tuple[CostRow, ...]
    rows_left_out: int = 0
    today_usd: Decimal
    month_usd: Decimal
    forecast_day_usd: float
    forecast_month_usd: float
    held_usd: Decimal
    usd_per_day: Decimal | None = None
    usd_per_month: Decimal | None = None
    store_error: str | None = None
    prices: tuple[TargetPriceRow, ...] = ()
    rent: RentRow | None = None
    break_even: tuple[EvenRow, ...] = ()
    break_even_missing: str | None = Field(default=None, description="why there is none")


def deployment_row(summary: DeploymentSummary, signals: Signals | None, usd_today: Decimal | None) -> DeploymentRow:
    seen = signals or Signals()
    return DeploymentRow(
        deployment=clip(summary.deployment),
        tuned=summary.tuned,
        problem=clip(summary.problem),
        mode=summary.mode,
        paused=summary.paused,
        displaced=summary.displaced,
        version=summary.version,
        slo_attained=seen.slo_attained,
        spill_share=seen.spill_share,
        arrivals_per_s=seen.arrivals_per_s,
        usd_today=usd_today,
        doing=clip(summary.fast_reason),
    )


def detail(report: TuningReport, config: TunerConfig, plan: Iterable[PlanRow], at_s: float) -> Detail:
    would = report.recommendation
    shown = report.model_copy(
        update={
            "decisions": (),
            "recommendation": None,
            "fast_reason": clip(report.fast_reason),
            "exploring_reason": clip(report.exploring_reason),
            "signals": report.signals.model_copy(update={"missing": clips(report.signals.missing)}),
        }
    )
    return Detail(
        at_s=at_s,
        report=shown,
        in_force=None if report.knobs is None else report.knobs.text(),
        home=None if report.home is None else report.home.text(),
        would_set=None if would is None or would.after is None else clip(f"{would.after.text()}: {would.reason}"),
        slo=config.slo,
        bounds=config.bounds,
        max_lost_gate_mass=config.max_lost_gate_mass,
        plan=tuple(row for row in plan if row.deployment == config.deployment)[:ROWS],
        newest_decision_s=report.decisions[0].time if report.decisions else None,
    )


def decision(record: DecisionRecord) -> DecisionRow:
    """A record without the inputs of the policy, which are for a replay."""
    after = record.after
    return DecisionRow(
        time=record.time,
        loop=record.loop,
        action=clip(record.action),
        reason=clip(record.reason),
        mode=record.mode,
        sent=record.sent,
        version=record.version,
        before=record.before.text(),
        after=None if after is None else after.text(),
        changed=() if after is None else record.before.differences(after),
        signals=record.signals.model_copy(update={"missing": clips(record.signals.missing)}),
        ack_seconds=record.ack_seconds,
        faults=clips((*record.ack_missing, *record.ack_errors)),
        note=clip(record.note),
        predicted=record.predicted,
        measured=record.measured,
    )


def heat(matrix: ExpertMatrix, replicas: Sequence[str], of: Of, *, since_start: bool) -> Heat:
    """The map of one matrix, at most CELLS of it: narrower where there are more."""
    drawn = grid(matrix, of)
    width = max(1, CELLS // max(1, len(drawn.rows)))
    rows, group = [], 1
    for row in drawn.rows:
        cells, group_of_row = ((), 1) if row.cells is None else binned(row.cells, width)
        group = max(group, group_of_row)
        known = row.cells is not None
        rows.append(
            HeatRow(
                layer=row.layer,
                hooked=row.hooked,
                cells=tuple(round(100 * cell) for cell in cells) if known else None,
                hottest=row.cells.index(max(row.cells)) if row.cells else None,
                max_over_mean=_short(row.max_over_mean),
                ranks_before=_short(row.ranks_before),
                ranks_after=_short(row.ranks_after),
                dropped_share=round(row.dropped_share, 4),
                rerouted_share=round(row.rerouted_share, 4),
            )
        )
    return Heat(
        at_s=matrix.at_s,
        window_s=round(max(0.0, matrix.at_s - matrix.started_at_s), 1),
        since_start=since_start,
        of=of,
        replica=clip(matrix.replica),
        replicas=tuple(clip(name) for name in replicas[:REPLICAS]),
        model=clip(matrix.model),
        ranks=matrix.ranks,
        tokens=max((layer.tokens for layer in matrix.layers), default=0),
        columns=drawn.columns,
        group=group,
        rows=tuple(rows),
    )


def costs(
    report: CostReport,
    digest: GatewayDigest | None,
    replicas: Sequence[ReplicaDigest],
    usd_per_gpu_hour: float | None,
) -> Costs:
    """Spend, forecast and break-even, by the functions of `moectl costs`."""
    ahead = forecast(report)
    spent = None if usd_per_gpu_hour is None else rent(replicas, usd_per_gpu_hour)
    even = break_evens(report, digest, sum(replica.ranks for replica in replicas), usd_per_gpu_hour)
    missing = None
    if not even:
        completed = 0 if digest is None else digest.completed
        missing = (
            "the rent of a GPU is not configured (console.usdPerGpuHour)"
            if not usd_per_gpu_hour
            else "no request ended in the last minutes"
            if not completed
            else "no replica answers"
            if not replicas
            else "no target has a price"
        )
    return Costs(
        at_s=report.at_s,
        today=report.today[:ROWS],
        month=report.month[:ROWS],
        rows_left_out=max(0, len(report.today) - ROWS) + max(0, len(report.month) - ROWS),
        today_usd=sum((row.usd for row in report.today), Decimal(0)),
        month_usd=sum((row.usd for row in report.month), Decimal(0)),
        forecast_day_usd=round(ahead.day_usd, 6),
        forecast_month_usd=round(ahead.month_usd, 6),
        held_usd=report.held_usd,
        usd_per_day=report.usd_per_day,
        usd_per_month=report.usd_per_month,
        store_error=clip(report.store_error),
        prices=report.prices[:ROWS],
        rent=None
        if spent is None
        else RentRow(
            prefill_usd=spent.prefill_usd,
            decode_usd=spent.decode_usd,
            idle_usd=spent.idle_usd,
            usd_per_m_tokens=spent.usd_per_m_tokens,
        ),
        break_even=tuple(
            EvenRow(target=row.api, usd_per_m_tokens=row.api_usd_per_m, tokens_per_month=row.unlimited) for row in even
        )[:ROWS],
        break_even_missing=missing,
    )


def clip(text: T) -> T:
    """A text of limited length."""
    return text if text is None or len(text) <= TEXT else f"{text[: TEXT - 1]}…"


def clips(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(clip(text) for text in texts[:LIST])


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
