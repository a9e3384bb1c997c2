"""What a decision of the fast loop looks at, what it remembers between ticks, and what it answers."""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, model_validator

from moe_api.base import Model
from moe_core.config import KnobBounds, SloConfig
from moe_core.contexts import Table
from moe_core.setting import Setting, Signals
from moe_core.traffic import TrafficState

HOUR_S = 3600.0
UNDO_WAIT_S = 10.0
"""Calm that must last before knobs go home; doubled each time the pressure comes straight back."""
RETURN_WAIT_S = 300.0
"""Ample slack that must last before a settled home gives way, the first time."""
STATE_VERSION = 2
RETIRED = ("recurred",)
"""Fields of version 1 that are read and forgotten."""


class Action(StrEnum):
    """What a fast decision does."""

    HOLD = "Hold"
    MOVE = "Move"
    SETTLE = "Settle"
    UNDO = "Undo"
    GUARD = "Guard"


class RetuneContext(Model):
    """All that one decision may look at."""

    now_s: float = Field(description="monotonic seconds")
    signals: Signals
    setting: Setting = Field(description="knobs in force")
    slo: SloConfig
    bounds: KnobBounds
    max_lost_gate_mass: float = Field(ge=0)
    changes_per_hour: int = Field(ge=0)
    mode: Literal["Off", "Recommend", "Auto"] = "Auto"
    paused: bool = False
    trial: bool = Field(default=False, description="a candidate of the slow loop is in force")


class RetuneState(Model):
    """What the policy remembers between ticks. `home` is the setting that stands while nothing presses."""

    version: int = Field(default=STATE_VERSION, ge=1, le=STATE_VERSION)
    home: Setting | None = None
    traffic: TrafficState = TrafficState()
    cause: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="signal → (level before the spike, highest level in it)"
    )
    pressed_since_s: float | None = None
    calm_since_s: float | None = None
    slack_since_s: float | None = None
    breached_since_s: float | None = Field(default=None, description="lost gate mass above its bound since then")
    spent_since_s: float | None = Field(default=None, description="most of what quality allows is lost since then")
    moved_at_s: float | None = None
    undone_at_s: float | None = None
    undo_wait_s: float = UNDO_WAIT_S
    guard_until_s: float | None = None
    too_many_seqs: int | None = Field(
        default=None, description="maxActiveSeqs that cost the ITL objective in this spike"
    )
    changes_at_s: tuple[float, ...] = Field(default=(), description="changes of the last hour, oldest first")
    table: Table = Field(default_factory=dict, description="which knobs relieved which traffic")
    cell: str | None = Field(default=None, description="context of the spike that knobs are away from home for")
    met: bool = Field(default=False, description="the spike was met from the table, and nothing has pressed since")
    origin: Setting | None = Field(default=None, description="home before the policy settled on another one")
    capped_at_s: float | None = Field(default=None, description="when capacity was moved last")
    began_at_s: float | None = Field(default=None, description="the first tick of all, over restarts")
    ticked_at_s: float | None = Field(default=None, description="when the last tick was")
    lasting_s: float = Field(
        default=0.0,
        ge=0,
        description="seconds of pressure that no rise of the traffic explains, less what is tolerated",
    )
    stood_since_s: float | None = Field(
        default=None, description="home has stood since then, less what risen traffic took away"
    )
    return_wait_s: float = Field(default=RETURN_WAIT_S, description="ample slack before the origin is home again")
    returned_at_s: float | None = Field(default=None, description="the origin is home again since then")
    relief: Setting | None = Field(default=None, description="the settled home that the return left")
    lossy_factor: Decimal | None = Field(default=None, description="highest γ that has cost too much gate mass")
    lossy_at_s: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_older_release(cls, data: Any) -> Any:
        """A state of version 1 has no version, and counted what came back instead of how long it pressed."""
        if isinstance(data, dict) and "version" not in data:
            return {name: value for name, value in data.items() if name not in RETIRED}
        return data


class RetuneDecision(Model):
    """The policy's answer. `setting` is None where nothing changes."""

    action: Action
    reason: str
    setting: Setting | None = None
    changed: tuple[str, ...] = ()
    spike: bool = Field(default=False, description="no exploration now")
    outside: str | None = Field(default=None, description="a change of the traffic itself: it censors a trial")
    breach: str | None = Field(default=None, description="SLO or quality broken now: it fails a trial")


def budget_left(state: RetuneState, now_s: float, changes_per_hour: int) -> int:
    """Changes that are still allowed within the hour that ends now."""
    return changes_per_hour - sum(1 for at_s in state.changes_at_s if at_s > now_s - HOUR_S)


def spend(state: RetuneState, now_s: float) -> RetuneState:
    """Count a change made by somebody else (the slow loop) against the same budget."""
    return state.model_copy(update={"changes_at_s": (*state.changes_at_s, now_s)})


def rebase(state: RetuneState, home: Setting) -> RetuneState:
    """Make another setting the home: a promoted candidate, or knobs that a person set."""
    fresh: dict[str, object] = {"cause": {}, "table": {}, "cell": None, "met": False, "origin": None, "relief": None}
    settling = {"lasting_s": 0.0, "stood_since_s": None, "return_wait_s": RETURN_WAIT_S}
    return state.model_copy(update={"home": home, **fresh, **settling})


def resume(state: RetuneState, *, saved_at_s: float, elapsed_s: float, now_s: float) -> RetuneState:
    """A state that another process saved at its `saved_at_s`, `elapsed_s` ago, on this process's clock (`now_s`).

    Home, budget, the context table, what broke quality and the patience learned survive; traffic is watched anew.
    """
    shift = now_s - max(0.0, elapsed_s) - saved_at_s

    def shifted(at_s: float | None) -> float | None:
        return None if at_s is None else at_s + shift

    return RetuneState(
        home=state.home,
        undo_wait_s=state.undo_wait_s,
        changes_at_s=tuple(at_s + shift for at_s in state.changes_at_s),
        table=state.table,
        origin=state.origin,
        began_at_s=shifted(state.began_at_s),
        stood_since_s=shifted(state.stood_since_s),
        return_wait_s=state.return_wait_s,
        returned_at_s=shifted(state.returned_at_s),
        relief=state.relief,
        lossy_factor=state.lossy_factor,
        lossy_at_s=shifted(state.lossy_at_s),
    )
