"""What decides inside a simulation: functions of frozen contexts, those of production unless others are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_core import spill
from moe_core.forecast import SpillContext
from moe_core.setting import Setting, Signals
from moe_core.spill import Action, Decision, Reason, SpillState
from moe_planner.sim.world import LOCAL

Decide = Callable[[SpillContext, Any], tuple[Decision, Any]]
"""(context, state) → (where the request goes, next state): `moe_core.spill.decide` has this form."""


@dataclass(frozen=True, slots=True)
class ControlContext:
    """What a tick of a tuner sees: the signals of the last window, and the knobs in force."""

    now_s: float
    signals: Signals
    setting: Setting


Control = Callable[[ControlContext, Any], tuple[Setting | None, Any]]
"""(context, state) → (new knobs, or None to leave them, next state)."""


_FRESH, _UNMOVED = SpillState(), Setting()


@dataclass(frozen=True)
class Policy:
    """How requests are placed and how knobs move. States are where each begins."""

    decide: Decide = spill.decide
    state: Any = _FRESH
    control: Control | None = None
    control_state: Any = None
    control_every_s: float = 1.0
    control_delay_s: float = 0.0  # from a decision to its effect
    control_window_s: float = 10.0
    setting: Setting = _UNMOVED
    share_every_s: float | None = 0.01
    """Several gateways tell one another their ledgers so often; None: never, each knows its own requests alone."""


_HERE = Decision(Action.LOCAL, Reason.WITHIN_SLO, LOCAL)


def always_local(_: SpillContext, state: Any) -> tuple[Decision, Any]:
    """Every request to the own replicas: the plain policy. The simulator builds no context for it."""
    return _HERE, state


PLAIN = Policy(decide=always_local, state=None)
