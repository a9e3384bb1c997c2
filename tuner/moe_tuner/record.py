"""`status.tuning`: the record that outlives every process of the tuner, from a report and back. Pure."""

from __future__ import annotations

import re
from typing import Any

from moe_api.status import Decision, KnobsInForce, TrafficContext, TuningStatus
from moe_core.contexts import cell_of
from moe_core.moments import rfc3339, unix_s
from moe_core.retune_state import RetuneState
from moe_core.setting import Setting, Signals
from moe_core.wire import Knobs
from moe_tuner.journal import Kept, Saved
from moe_tuner.report import DecisionRecord, TuningReport
from moe_tuner.resource import Wanted

SENTENCE, WORD = 1024, 128
CRASHED_KEPT = 8
"""In the record, which is small: the newest."""
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


def status_of(
    wanted: Wanted, report: TuningReport | None, before: TuningStatus | None, *, writer: str, problem: str | None
) -> TuningStatus | None:
    """What `status.tuning` should say; None while there is nothing to say.

    `problem` tells why nobody tunes it. Until its tuner knows what is in force, what was recorded stays, with the name
    of who recorded it.
    """
    waits = wanted.problem or problem
    if report is None or report.home is None or report.knobs is None:
        if before is None and (wanted.config is None and not wanted.problem):
            return None
        base = before or TuningStatus()
        mode = base.mode if wanted.config is None else wanted.config.mode
        why = waits or (None if report is None else report.exploring_reason) or "nothing serves yet"
        told = {"mode": mode, "exploring": False, "not_exploring_because": _cut(why, SENTENCE)}
        return base.model_copy(update={**told, "pauses": wanted.pauses, "pins": wanted.pins})
    version = max(1, report.version)
    decision = next(iter(report.decisions), None)
    return TuningStatus(
        written_by=_cut(writer, WORD),
        mode=report.mode,
        knobs=_in_force(report.knobs, report.deployment, version),
        on_trial=report.on_trial,
        safe=_safe(report.home, report.deployment, version),
        crashed=tuple(_in_force(one, report.deployment, 1) for one in report.crashed[-CRASHED_KEPT:]),
        auto_since=None if report.auto_since_s is None else rfc3339(report.auto_since_s),
        acknowledged=report.acknowledged,
        context=_context(report.signals),
        last_decision=(before.last_decision if before else None) if decision is None else _decision(decision),
        pauses=wanted.pauses,
        pins=wanted.pins,
        exploring=report.exploring,
        not_exploring_because=None if report.exploring else _cut(waits or report.exploring_reason, SENTENCE),
    )


def worth_writing(before: TuningStatus | None, after: TuningStatus) -> bool:
    """Whether a person, or a new start, would miss it. Traffic and the figures in a reason change all the time."""
    return before is None or _kept_of(before) != _kept_of(after)


def document(status: TuningStatus) -> dict[str, Any]:
    """The status as JSON without what is empty: nobody would own that."""
    return {key: value for key, value in status.to_json().items() if value not in ([], {}, None)}


def kept_of(status: TuningStatus | None, *, writer: str, now_s: float, now_monotonic_s: float) -> Kept | None:
    """What a new start takes from the record; None where it knows no safe setting."""
    if status is None or status.safe is None:
        return None
    knobs = None if status.knobs is None else _setting(status.knobs)
    since = unix_s(status.auto_since)
    saved = Saved(
        saved_at_s=now_s,
        saved_monotonic_s=now_monotonic_s,
        state=RetuneState(home=_setting(status.safe)),
        ours=() if knobs is None else (knobs,),
        trial=knobs if status.on_trial else None,
        crashed=tuple(_setting(one) for one in status.crashed),
        auto_since_s=None if since is None else float(since),
        version=0 if status.knobs is None else status.knobs.version,
        elsewhere=True,
    )
    return Kept(saved, newer=status.written_by != _cut(writer, WORD))


def _kept_of(status: TuningStatus) -> TuningStatus:
    why = status.not_exploring_because
    update = {"context": None, "not_exploring_because": None if why is None else _NUMBER.sub("#", why)}
    return status.model_copy(update=update)


def _in_force(setting: Setting, deployment: str, version: int) -> KnobsInForce:
    raw = setting.knobs(deployment, version).to_json()
    raw.get("experts", {}).pop("capacityFactorByLayer", None)
    return KnobsInForce.model_validate(raw)


def _safe(home: Setting, deployment: str, version: int) -> KnobsInForce | None:
    """None for a setting that the record cannot hold: factors of single layers have no room in it."""
    return None if home.experts.capacity_factor_by_layer else _in_force(home, deployment, version)


def _setting(knobs: KnobsInForce) -> Setting:
    return Setting.of(Knobs.model_validate(knobs.to_json()))


def _context(signals: Signals) -> TrafficContext | None:
    name = cell_of(signals)
    if name is None:
        return None
    figures = {
        "rps": signals.arrivals_per_s,
        "input_tokens": signals.prompt_tokens,
        "output_tokens": signals.output_tokens,
        "expert_skew": signals.rank_demand,
    }
    known = {key: float(f"{value:.3g}") for key, value in figures.items() if value is not None}
    return TrafficContext.model_validate({"name": name, **known})


def _decision(record: DecisionRecord) -> Decision:
    return Decision(
        at=rfc3339(record.time),
        loop="Fast" if record.loop == "fast" else "Slow",
        action=_cut(record.action, WORD),
        why=_cut(record.reason, SENTENCE),
        to_version=record.version if record.sent else None,
    )


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
