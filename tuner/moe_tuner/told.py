"""Decisions that a person should notice, as Events. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_tuner.report import DecisionRecord

BURST, REFILL_S = 10, 120.0
"""Events of one MoEDeployment at once, and then one each so many seconds: a spike takes a dozen moves."""
_REASONS = {
    "Move": "KnobsMoved",
    "Undo": "KnobsReturned",
    "Guard": "QualityGuarded",
    "Pin": "KnobsPinned",
    "Adopt": "KnobsAdopted",
    "Restore": "KnobsRestored",
    "Refused": "KnobsRefused",
    "Try": "TrialStarted",
    "Promote": "TrialPromoted",
    "RollBack": "TrialRolledBack",
}
"""Not told: what the simulator foresees, and blocks of a trial that begin and end as they should."""
_WARN = ("KnobsRefused", "TrialRolledBack")


@dataclass(frozen=True)
class Told:
    """One Event."""

    type: Literal["Normal", "Warning"]
    reason: str
    note: str


def event_of(record: DecisionRecord) -> Told | None:
    """The Event of a decision; None where it is not worth one."""
    if record.mode == "Recommend" and record.action in ("Move", "Undo", "Guard") and not record.sent:
        return Told("Normal", "KnobsRecommended", f"{_after(record)}: {record.reason}")
    reason = _REASONS.get(record.action)
    if reason is None:
        return None
    if not record.sent and record.action not in ("Adopt", "Promote"):
        return Told("Warning", "KnobsNotSent", f"{_after(record)}: {record.note or record.reason}")
    type_: Literal["Normal", "Warning"] = "Warning" if reason in _WARN else "Normal"
    version = "" if record.version is None else f"version {record.version}: "
    return Told(type_, reason, f"{version}{_after(record)}: {record.reason}")


def _after(record: DecisionRecord) -> str:
    return (record.after or record.before).text()
