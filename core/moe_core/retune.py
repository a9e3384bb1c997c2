"""The fast loop: what the hot knobs should be this second, from what replicas and gateways report.

`decide` is a pure function of a frozen context and a state. It moves three knobs away from their home setting while
the SLO is in danger, cheapest remedy first (expert capacity and batch size before spill to a paid API), and takes them
home when the cause has gone. A change that takes risk always leaves one change of the hourly budget for its undoing.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

from pydantic import Field

from moe_api.base import Model
from moe_core.config import KnobBounds, SloConfig
from moe_core.contexts import Table, cell_of, foreseen, relieved
from moe_core.remedies import (
    CALM_QUEUE,
    Move,
    Pressure,
    active_seqs,
    foreseen_lost,
    pressure_of,
    quality_guard,
    spill,
    tighten_capacity,
)
from moe_core.setting import CAPACITY, Setting, Signals
from moe_core.traffic import TrafficState, causes, outside_change, receded, watch

HOUR_S = 3600.0
PRESSED_FOR_S = 2.0
"""Pressure with a queue must last this long before a knob moves, unless a detector has seen the traffic rise.

Without a queue it must outlast the window too: a percentile over 10 s remembers one slow request for 10 s."""
COOL_DOWN_S = 4.0
"""Between two moves: the time in which one shows its effect."""
UNDO_WAIT_S = 10.0
"""Calm that must last before knobs go home; doubled each time the pressure comes straight back."""
UNDO_WAIT_MAX_S = 600.0
RELAPSE_S = 120.0
"""Pressure that returns within this time of an undo is the same spike."""
RECURRING_S, RECURRENCES = 900.0, 2
"""Pressure that returns so soon, so often, while the traffic has not risen, is no spike: see `_settled`."""
RETURN_S = 4 * HOUR_S
"""Ample slack that must last (a night) before a settled home gives way to the one that a person or a trial set."""
GUARD_HOLD_S = 120.0
"""After the quality guard acted, capacity is not tightened for this long."""
SLACK_FACTOR = 3.0
"""Where no cause in the traffic was seen, ample slack must last this many undo waits instead."""


class Action(StrEnum):
    """What a fast decision does."""

    HOLD = "Hold"
    MOVE = "Move"
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

    home: Setting | None = None
    traffic: TrafficState = TrafficState()
    cause: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="signal → (level before the spike, highest level in it)"
    )
    pressed_since_s: float | None = None
    calm_since_s: float | None = None
    slack_since_s: float | None = None
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
    recurred: int = Field(default=0, description="times that pressure came back without a rise of the traffic")
    origin: Setting | None = Field(default=None, description="home before the policy settled on another threshold")
    capped_at_s: float | None = Field(default=None, description="when capacity was moved last")


class RetuneDecision(Model):
    """The policy's answer. `setting` is None where nothing changes."""

    action: Action
    reason: str
    setting: Setting | None = None
    changed: tuple[str, ...] = ()
    spike: bool = Field(default=False, description="no exploration now")
    outside: str | None = Field(default=None, description="a change of the traffic itself: it censors a trial")
    breach: str | None = Field(default=None, description="SLO or quality broken now: it fails a trial")


def decide(context: RetuneContext, state: RetuneState) -> tuple[RetuneDecision, RetuneState]:
    """One tick. Deterministic; never raises for missing signals, never leaves the bounds, never moves a pinned knob."""
    pressure = pressure_of(context.signals, context.slo)
    state = _remember(context, state, pressure)
    decision, state = _choose(context, state, pressure)
    outside = outside_change(context.signals, state.traffic)
    breach = _breach(context, state, pressure)
    displaced = not context.trial and context.setting != state.home
    spike = displaced or outside is not None or pressure.pressed or breach is not None
    return decision.model_copy(update={"spike": spike, "outside": outside, "breach": breach}), state


def budget_left(state: RetuneState, now_s: float, changes_per_hour: int) -> int:
    """Changes that are still allowed within the hour that ends now."""
    return changes_per_hour - sum(1 for at_s in state.changes_at_s if at_s > now_s - HOUR_S)


def spend(state: RetuneState, now_s: float) -> RetuneState:
    """Count a change made by somebody else (the slow loop) against the same budget."""
    return state.model_copy(update={"changes_at_s": (*state.changes_at_s, now_s)})


def rebase(state: RetuneState, home: Setting) -> RetuneState:
    """Make another setting the home: a promoted candidate, or knobs that a person set."""
    return state.model_copy(
        update={"home": home, "cause": {}, "table": {}, "cell": None, "met": False, "recurred": 0, "origin": None}
    )


def resume(state: RetuneState, *, saved_at_s: float, elapsed_s: float, now_s: float) -> RetuneState:
    """A state that another process saved at its `saved_at_s`, `elapsed_s` ago, on this process's clock (`now_s`).

    Home, budget, the context table and the patience learned from flapping survive; traffic is watched anew.
    """
    shift = now_s - max(0.0, elapsed_s) - saved_at_s
    return RetuneState(
        home=state.home,
        undo_wait_s=state.undo_wait_s,
        changes_at_s=tuple(at_s + shift for at_s in state.changes_at_s),
        table=state.table,
        origin=state.origin,
    )


def _remember(context: RetuneContext, state: RetuneState, pressure: Pressure) -> RetuneState:
    now_s = context.now_s
    # A pinned knob is a person's: whatever it is now is its home, or pinning one in a spike would end in a false undo.
    home = (state.home or context.setting).keeping_pins(context.setting, context.bounds)
    displaced = context.setting != home and not context.trial
    traffic = watch(context.signals, state.traffic)
    cause = state.cause
    if displaced:
        levels = traffic.levels(context.signals)
        cause = {name: (before, max(peak, levels.get(name, peak))) for name, (before, peak) in cause.items()}
    return state.model_copy(
        update={
            "home": home,
            "traffic": traffic,
            "cause": cause,
            "pressed_since_s": _since(state.pressed_since_s, pressure.pressed, now_s),
            "calm_since_s": _since(state.calm_since_s, pressure.calm, now_s),
            "slack_since_s": _since(state.slack_since_s, pressure.slack, now_s),
            "changes_at_s": tuple(at_s for at_s in state.changes_at_s if at_s > now_s - HOUR_S),
        }
    )


def _choose(context: RetuneContext, state: RetuneState, pressure: Pressure) -> tuple[RetuneDecision, RetuneState]:
    if context.mode == "Off":
        return _hold("mode is Off: nothing is tuned"), state
    if context.paused:
        return _hold("paused: knobs stay as they are"), state
    if context.trial:
        return _hold("a trial is in force: the slow loop answers for it"), state
    guarded = _guard(context, state)
    if guarded is not None:
        return guarded
    met = _meet(context, state, pressure)
    if met is not None:
        return met
    if pressure.pressed:
        return _relieve(context, state, pressure)
    if context.setting != state.home:
        return _go_home(context, state, pressure)
    if state.origin is not None:
        returned = _return(context, state, state.origin)
        if returned is not None:
            return returned
    return _hold(f"nothing presses: {pressure.text}"), state


def _guard(context: RetuneContext, state: RetuneState) -> tuple[RetuneDecision, RetuneState] | None:
    home = state.home or context.setting
    lost, now_s = context.signals.lost_gate_mass, context.now_s
    if lost is None or lost <= context.max_lost_gate_mass:
        return None
    just_acted = state.guard_until_s is not None and now_s < state.guard_until_s - GUARD_HOLD_S + context.signals.lag_s
    if just_acted:
        return _hold("the quality guard has just acted: its effect is not in the signals yet"), state
    why = f"lost gate mass per token {lost:.4f} > {context.max_lost_gate_mass:g}"
    move = quality_guard(context.setting, home, context.bounds)
    if isinstance(move, str):
        return _hold(f"{why}, but {move}"), state
    if budget_left(state, now_s, context.changes_per_hour) < 1:
        return _hold(f"{why}, but the budget of {context.changes_per_hour} changes an hour is spent"), state
    state = _changed(context, state).model_copy(update={"guard_until_s": now_s + GUARD_HOLD_S})
    if home.prefill_cap is not None and context.mode == "Auto":
        # The home itself may be what breaks quality: going back to it would only start the breach again.
        state = state.model_copy(update={"home": home.with_capacity(move.setting)})
    return _decision(context, state, Action.GUARD, f"{why}: {move.why}", to=move.setting, changed=(move.knob,)), state


def _meet(context: RetuneContext, state: RetuneState, pressure: Pressure) -> tuple[RetuneDecision, RetuneState] | None:
    """Feed-forward: as the traffic rises into a context that was relieved before, put in force what relieved it."""
    home, now_s = state.home or context.setting, context.now_s
    if context.setting != home or not (state.traffic.rising or pressure.pressed):
        return None
    if not pressure.pressed and state.undone_at_s is not None and now_s - state.undone_at_s < RELAPSE_S:
        return None  # the rise that has just been undone
    cell = cell_of(context.signals)
    setting = foreseen(state.table, cell, home, context.bounds)
    if setting is None or budget_left(state, now_s, context.changes_per_hour) < 2:
        return None
    held = state.guard_until_s is not None and now_s < state.guard_until_s
    if held or not _keeps_quality(context, setting):
        setting = setting.with_capacity(home)
    if not context.signals.can_spill or context.signals.api_failing:
        setting = setting.with_miss_probability(home.fallback.miss_probability)
    changed = setting.differences(context.setting)
    if not changed:
        return None
    state = _changed(context, _begin_spike(context, state)).model_copy(update={"met": True, "cell": cell})
    reason = f"this traffic ({cell}) was relieved before by {setting.text()}: {pressure.text}"
    return _decision(context, state, Action.MOVE, reason, to=setting, changed=changed), state


def _keeps_quality(context: RetuneContext, setting: Setting) -> bool:
    cap, spread = setting.prefill_cap, context.signals.expert_cv
    return cap is None or spread is None or foreseen_lost(spread, float(cap)) <= context.max_lost_gate_mass


def _relieve(context: RetuneContext, state: RetuneState, pressure: Pressure) -> tuple[RetuneDecision, RetuneState]:
    now_s = context.now_s
    since_s = now_s if state.pressed_since_s is None else state.pressed_since_s
    needed_s = _needed_s(context, pressure)
    if now_s - since_s < needed_s and not state.traffic.rising:
        return _hold(f"pressed for {now_s - since_s:.0f} s, not yet {needed_s:g} s: {pressure.text}"), state
    if state.moved_at_s is not None and now_s - state.moved_at_s < COOL_DOWN_S:
        return _hold(f"waiting {COOL_DOWN_S:g} s for the last change to show: {pressure.text}"), state
    if budget_left(state, now_s, context.changes_per_hour) < 2:
        limit = f"the budget of {context.changes_per_hour} changes an hour leaves none to spare"
        return _hold(f"{limit} (one is kept for undoing): {pressure.text}"), state
    setting, moves, refusals = _remedies(context, state, pressure)
    if not moves:
        return _hold(f"{pressure.text}, and nothing left to move: {'; '.join(refusals)}"), state
    if context.setting == state.home:
        state = _begin_spike(context, state)
    reason = f"{pressure.text}: {'; '.join(move.why for move in moves)}"
    update: dict[str, object] = {"too_many_seqs": _too_many(context, state, setting), "met": False}
    if context.mode == "Auto" and any(move.knob == CAPACITY for move in moves):
        update["capped_at_s"] = now_s
    state = _changed(context, state).model_copy(update=update)
    changed = tuple(move.knob for move in moves)
    return _decision(context, state, Action.MOVE, reason, to=setting, changed=changed), state


def _remedies(
    context: RetuneContext, state: RetuneState, pressure: Pressure
) -> tuple[Setting, tuple[Move, ...], tuple[str, ...]]:
    """Every remedy that helps now, in the order of price; spill only where the cheaper ones do not suffice."""
    signals, bounds = context.signals, context.bounds
    held = state.guard_until_s is not None and context.now_s < state.guard_until_s
    setting, moves, refusals = context.setting, list[Move](), list[str]()

    def take(remedy: Move | str) -> None:
        nonlocal setting
        if isinstance(remedy, str):
            refusals.append(remedy)
        else:
            setting = remedy.setting
            moves.append(remedy)

    if held:
        refusals.append("capacity factor: held by the quality guard")
    elif state.capped_at_s is not None and context.now_s - state.capped_at_s < signals.lag_s:
        refusals.append("capacity factor: what the last step cost is not in the signals yet")
    else:
        take(tighten_capacity(setting, signals, bounds, pressure, context.max_lost_gate_mass))
    take(active_seqs(setting, signals, bounds, pressure, too_many=state.too_many_seqs))
    take(spill(setting, signals, bounds, pressure, cheaper_left=bool(moves)))
    return setting, tuple(moves), tuple(refusals)


def _go_home(context: RetuneContext, state: RetuneState, pressure: Pressure) -> tuple[RetuneDecision, RetuneState]:
    home, now_s = state.home or context.setting, context.now_s
    calm_s = 0.0 if state.calm_since_s is None else now_s - state.calm_since_s
    slack_s = 0.0 if state.slack_since_s is None else now_s - state.slack_since_s
    levels = state.traffic.levels(context.signals)
    gone = receded(state.cause, levels)
    by_cause = gone is not None and calm_s >= state.undo_wait_s
    by_slack = slack_s >= SLACK_FACTOR * state.undo_wait_s
    if not by_cause and not by_slack:
        waits = "its cause is still there" if gone is None else f"calm for {calm_s:.0f} of {state.undo_wait_s:.0f} s"
        return _hold(f"knobs stay away from home: {waits}: {pressure.text}"), state
    if budget_left(state, now_s, context.changes_per_hour) < 1:
        return _hold(f"the budget of {context.changes_per_hour} changes an hour is spent: undoing waits"), state
    if state.recurred >= RECURRENCES:
        state = _settled(state, context.setting)
        home = state.home or home
        if home == context.setting:
            return _hold(f"pressure keeps coming back in the same traffic: {home.text()} is home now"), state
    why = f"{gone}, calm for {calm_s:.0f} s" if gone is not None and by_cause else f"ample slack for {slack_s:.0f} s"
    changed = home.differences(context.setting)
    learned = relieved(state.table, state.cell, context.setting, home, pressed=not state.met)
    over = {"undone_at_s": now_s, "cause": {}, "too_many_seqs": None, "table": learned, "cell": None, "met": False}
    state = _changed(context, state).model_copy(update=over)
    return _decision(context, state, Action.UNDO, f"{why}: back to {home.text()}", to=home, changed=changed), state


def _settled(state: RetuneState, setting: Setting) -> RetuneState:
    """Make the spill threshold that relieves a pressure which always comes back part of the home.

    Undoing it again and again would be oscillation. Only money is settled on: capacity and batch size go home.
    """
    home = state.home or setting
    settled = home.with_miss_probability(setting.fallback.miss_probability)
    return state.model_copy(update={"home": settled, "origin": state.origin or home, "recurred": 0})


def _return(context: RetuneContext, state: RetuneState, origin: Setting) -> tuple[RetuneDecision, RetuneState] | None:
    """From a settled home back to the one before it, once there has been ample slack for long."""
    slack_s = 0.0 if state.slack_since_s is None else context.now_s - state.slack_since_s
    if slack_s < RETURN_S or budget_left(state, context.now_s, context.changes_per_hour) < 1:
        return None
    home = origin.keeping_pins(context.setting, context.bounds)
    changed = home.differences(context.setting)
    state = state.model_copy(update={"home": home, "origin": None})
    if not changed:
        return _hold("the settled threshold is pinned, or is what it was before"), state
    state = _changed(context, state)
    reason = f"ample slack for {slack_s:.0f} s: back to {home.text()}, which was home before"
    return _decision(context, state, Action.UNDO, reason, to=home, changed=changed), state


def _begin_spike(context: RetuneContext, state: RetuneState) -> RetuneState:
    since_s = math.inf if state.undone_at_s is None else context.now_s - state.undone_at_s
    relapsed = since_s < RELAPSE_S + state.undo_wait_s
    recurred = 0 if since_s > RECURRING_S or state.traffic.rising else state.recurred + 1
    wait_s = min(UNDO_WAIT_MAX_S, 2 * state.undo_wait_s) if relapsed else UNDO_WAIT_S
    cause = causes(context.signals, state.traffic)
    cell = cell_of(context.signals)
    return state.model_copy(update={"undo_wait_s": wait_s, "cause": cause, "cell": cell, "recurred": recurred})


def _too_many(context: RetuneContext, state: RetuneState, to: Setting) -> int | None:
    """A limit that had to be lowered is not tried again before the spike is over: that would be hunting."""
    was = context.setting.engine.max_active_seqs or context.signals.active_limit
    now = to.engine.max_active_seqs
    return was if was is not None and now is not None and now < was else state.too_many_seqs


def _changed(context: RetuneContext, state: RetuneState) -> RetuneState:
    update: dict[str, object] = {"moved_at_s": context.now_s}
    if context.mode == "Auto":
        update["changes_at_s"] = (*state.changes_at_s, context.now_s)
    return state.model_copy(update=update)


def _breach(context: RetuneContext, state: RetuneState, pressure: Pressure) -> str | None:
    lost = context.signals.lost_gate_mass
    if lost is not None and lost > context.max_lost_gate_mass:
        return f"lost gate mass per token {lost:.4f} > {context.max_lost_gate_mass:g}"
    lasting = state.pressed_since_s is not None and context.now_s - state.pressed_since_s >= _needed_s(
        context, pressure
    )
    return pressure.text if lasting else None


def _needed_s(context: RetuneContext, pressure: Pressure) -> float:
    return PRESSED_FOR_S if (pressure.queue or 0.0) > CALM_QUEUE else PRESSED_FOR_S + context.signals.window_s


def _since(since_s: float | None, holds: bool, now_s: float) -> float | None:
    if not holds:
        return None
    return now_s if since_s is None else since_s


def _hold(reason: str) -> RetuneDecision:
    return RetuneDecision(action=Action.HOLD, reason=reason)


def _decision(
    context: RetuneContext, state: RetuneState, action: Action, reason: str, *, to: Setting, changed: tuple[str, ...]
) -> RetuneDecision:
    left = budget_left(state, context.now_s, context.changes_per_hour)
    tail = f" ({left} of {context.changes_per_hour} changes left this hour)" if context.mode == "Auto" else ""
    return RetuneDecision(action=action, reason=f"{reason}{tail}", setting=to, changed=changed)
