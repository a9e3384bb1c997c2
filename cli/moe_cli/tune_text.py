"""What `moectl tune` says in words. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from moe_cli.tune_replay import Again
from moe_core.wire import TuningOrders
from moe_tuner.report import DecisionRecord, DeploymentSummary, Effect, TuningReport


@dataclass(frozen=True)
class OrderChange:
    """What a person wants changed. `paused` None: as it is."""

    paused: bool | None = None
    pins: dict[str, Decimal | None] = field(default_factory=dict)
    unpin: tuple[str, ...] = ()


def summary_lines(rows: Sequence[DeploymentSummary]) -> list[str]:
    """A row for each deployment."""
    if not rows:
        return ["no deployment is tuned here"]
    width = max(len(row.deployment) for row in rows)
    return [f"{row.deployment:{width}}  {_row(row)}" for row in rows]


def _row(row: DeploymentSummary) -> str:
    if not row.tuned:
        return f"not tuned: {row.problem}"
    held = ", paused" if row.paused else ""
    away = ", away from home" if row.displaced else ""
    problem = f"; {row.problem}" if row.problem else ""
    return f"{row.mode}{held}, version {row.version}{away}: {row.fast_reason}; {row.exploring_reason}{problem}"


def status_lines(report: TuningReport) -> list[str]:
    held = ", paused" if report.paused else ""
    lines = [f"{report.deployment}: {report.mode}{held}"]
    in_force = "not known yet" if report.knobs is None else report.knobs.text()
    lines.append(f"  in force   version {report.version}: {in_force}")
    if report.displaced and report.home is not None:
        lines.append(f"  home       {report.home.text()}")
    if report.pins:
        lines.append(f"  pinned     {', '.join(report.pins)}")
    if report.orders is not None:
        lines.append(f"  ordered    {_ordered(report.orders)}")
    if report.acks is not None and not report.acks.complete:
        missing = ", ".join((*report.acks.missing, *report.acks.errors)) or "waiting"
        lines.append(f"  acks       {missing}")
    lines += now_lines(report)
    lines.append(f"  changes    {report.budget.used} of {report.budget.per_hour} this hour")
    lines.append(
        f"  trials     {report.trials_today} of {report.trials_per_day} today, {report.study_size} in the study"
    )
    if report.best_trial is not None and report.best_trial.cost is not None:
        best = report.best_trial
        lines.append(f"  best       trial {best.number}: {best.cost:.3f} of the first incumbent's cost")
    if report.recommendation is not None and report.recommendation.after is not None:
        lines.append(f"  would set  {report.recommendation.after.text()}: {report.recommendation.reason}")
    if report.signals.missing:
        lines.append(f"  missing    {', '.join(report.signals.missing)}")
    if report.decisions:
        lines.append("  last decisions")
        lines += [f"    {decision_line(record)}" for record in report.decisions[:5]]
    return lines


def now_lines(report: TuningReport) -> list[str]:
    """What both loops do at this moment."""
    return [f"  fast loop  {report.fast_reason}", f"  slow loop  {report.exploring_reason}"]


def decision_line(record: DecisionRecord) -> str:
    version = "" if record.version is None else f" version {record.version}"
    sent = "" if record.sent else " (not sent)"
    return f"{_clock(record.time)} {record.loop} {record.action}{version}{sent}: {record.reason}"


def why_lines(record: DecisionRecord, report: TuningReport) -> list[str]:
    """One decision in full: what was seen, chosen, foreseen and measured."""
    lines = [decision_line(record), f"  before     {record.before.text()}"]
    if record.after is not None:
        changed = ", ".join(record.before.differences(record.after)) or "nothing"
        lines.append(f"  after      {record.after.text()} (changed: {changed})")
    seen = {
        name: value
        for name, value in record.signals.to_json().items()
        if name not in ("lagS", "windowS", "missing", "canSpill", "apiFailing") and value is not None
    }
    lines.append(f"  signals    {', '.join(f'{name} {_number(value)}' for name, value in seen.items())}")
    if record.signals.missing:
        lines.append(f"  missing    {', '.join(record.signals.missing)}")
    if record.predicted is not None:
        lines.append(f"  predicted  {effect_text(record.predicted)}")
    if record.measured is not None:
        lines.append(f"  measured   {effect_text(record.measured)}")
    if record.ack_seconds is not None:
        lines.append(f"  in force   on every rank after {record.ack_seconds:.2f} s")
    for name, values in (("not from", record.ack_missing), ("refused", record.ack_errors)):
        if values:
            lines.append(f"  {name:10} {', '.join(values)}")
    if record.note:
        lines.append(f"  note       {record.note}")
    return [*lines, "now", *now_lines(report)]


def effect_text(effect: Effect) -> str:
    text = f"{effect.ratio:.3f} of the incumbent's cost"
    if effect.low is not None and effect.high is not None:
        text += f" (95 % interval {effect.low:.3f} to {effect.high:.3f}, {effect.pairs} pairs)"
    return f"{text}, evidence {effect.evidence:.1f}" if effect.pairs else text


def order_lines(orders: TuningOrders, report: TuningReport) -> list[str]:
    """What is ordered now, and what the resource itself adds."""
    lines = [f"{orders.deployment}: {_ordered(orders)}"]
    if report.paused and not orders.paused and (report.orders is None or not report.orders.paused):
        lines.append("  it stays paused: spec.tuning.paused of the resource says so")
    return lines


def replay_lines(again: Sequence[Again]) -> list[str]:
    known = [row for row in again if row.same is not None]
    lines = []
    for row in again:
        mark = {True: "same", False: "DIFFERS", None: "unknown"}[row.same]
        now = "" if row.same is not False else f": now {'nothing' if row.now is None else row.now.text()} ({row.why})"
        lines.append(
            f"{_clock(row.time)} {row.loop} {row.action}: {mark}{now or (f': {row.why}' if row.same is None else '')}"
        )
    same = sum(row.same is True for row in known)
    return [*lines, f"{same} of {len(known)} decisions come out the same; {len(again) - len(known)} cannot be replayed"]


def _ordered(orders: TuningOrders) -> str:
    parts = ["paused"] if orders.paused else []
    parts += [name if value is None else f"{name} at {value}" for name, value in orders.pins.items()]
    return ", ".join(parts) or "nothing is held"


def _clock(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
