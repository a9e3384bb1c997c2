"""The fast loop: what the hot knobs should be this second, from what replicas and gateways report.

`decide` is a pure function of a frozen context and a state. It moves three knobs away from their home setting while
the SLO is in danger, cheapest remedy first (expert capacity and batch size before spill to a paid API), and takes them
home when the cause has gone. A change that takes risk always leaves one change of the hourly budget for its undoing.
"""

from __future__ import annotations

import math
from decimal import Decimal

from moe_core.contexts import cell_of, foreseen, inside, relieved, without_capacity
from moe_core.remedies import (
    CALM_QUEUE,
    QUALITY_SPARE,
    Move,
    Pressure,
    active_seqs,
    foreseen_lost,
    loosen_capacity,
    pressure_of,
    quality_guard,
    spill,
    tighten_capacity,
)
from moe_core.retune_state import HOUR_S, UNDO_WAIT_S, Action, RetuneContext, RetuneDecision, RetuneState, budget_left
from moe_core.setting import CAPACITY, Setting
from moe_core.settling import STOOD_S, adopted, left, long_away, needed_s, new, returned, settled, slack_s, weighed
from moe_core.traffic import SUDDEN, causes, outside_change, peaks, receded, rises, watch

PRESSED_FOR_S = 2.0
"""Pressure with a queue must last this long before a knob moves, unless a detector has seen the traffic rise.

Without a queue it must outlast the window too: a percentile over 10 s remembers one slow request for 10 s."""
COOL_DOWN_S = 4.0
"""Between two moves: the time in which one shows its effect."""
UNDO_WAIT_MAX_S = 600.0
RELAPSE_S = 120.0
"""Pressure that returns within this time of an undo is the same spike."""
GUARD_HOLD_S = 120.0
"""After the quality guard acted, capacity is not tightened for this long."""
SLACK_FACTOR = 3.0
"""Where no cause in the traffic was seen, ample slack must last this many undo waits instead."""
GUARD_SURE, GUARD_AFTER_S = 1.5, 2.0
"""Lost gate mass beyond its bound by this factor is acted on at once, less than that once it has lasted."""
SPENT_S, QUALITY_AIM = 30.0, 0.35
"""Seconds for which a young γ may cost most of what quality allows, and the share of it that is aimed at then."""
LOSSY_S = 24 * 3600.0
"""A γ under which quality broke is not put in force again for a day."""


def decide(context: RetuneContext, state: RetuneState) -> tuple[RetuneDecision, RetuneState]:
    """One tick. Deterministic; never raises for missing signals, never leaves the bounds, never moves a pinned knob."""
    pressure = pressure_of(context.signals, context.slo)
    state, risen = _remember(context, state, pressure)
    decision, state = _choose(context, state, pressure, risen)
    outside = outside_change(context.signals, state.traffic)
    breach = _breach(context, state, pressure)
    displaced = not context.trial and context.setting != state.home
    spike = displaced or outside is not None or pressure.pressed or breach is not None
    return decision.model_copy(update={"spike": spike, "outside": outside, "breach": breach}), state


def _remember(context: RetuneContext, state: RetuneState, pressure: Pressure) -> tuple[RetuneState, frozenset[str]]:
    """The state with this tick in it, and what of the traffic has risen."""
    now_s, signals = context.now_s, context.signals
    # A pinned knob is a person's: whatever it is now is its home, or pinning one in a spike would end in a false undo.
    home = (state.home or context.setting).keeping_pins(context.setting, context.bounds)
    displaced = context.setting != home and not context.trial
    traffic = watch(signals, state.traffic)
    risen = rises(signals, traffic)
    lost = signals.lost_gate_mass
    breached = lost is not None and lost > context.max_lost_gate_mass
    spent = lost is not None and lost > QUALITY_SPARE * context.max_lost_gate_mass
    lossy = state.lossy_at_s is None or now_s - state.lossy_at_s < LOSSY_S
    state = state.model_copy(
        update={
            "home": home,
            "traffic": traffic,
            "cause": peaks(state.cause, signals, traffic) if displaced else state.cause,
            "pressed_since_s": _since(state.pressed_since_s, pressure.pressed, now_s),
            "calm_since_s": _since(state.calm_since_s, pressure.calm, now_s),
            "slack_since_s": _since(state.slack_since_s, pressure.slack, now_s),
            "breached_since_s": _since(state.breached_since_s, breached, now_s),
            "spent_since_s": _since(state.spent_since_s, spent, now_s),
            "changes_at_s": tuple(at_s for at_s in state.changes_at_s if at_s > now_s - HOUR_S),
            "lossy_factor": state.lossy_factor if lossy else None,
        }
    )
    explained = bool(risen) or displaced or context.trial or signals.api_failing
    return weighed(state, now_s, pressure, explained=explained), risen


def _choose(
    context: RetuneContext, state: RetuneState, pressure: Pressure, risen: frozenset[str]
) -> tuple[RetuneDecision, RetuneState]:
    if context.mode == "Off":
        return _hold("mode is Off: nothing is tuned"), state
    if context.paused:
        return _hold("paused: knobs stay as they are"), state
    if context.trial:
        return _hold("a trial is in force: the slow loop answers for it"), state
    guarded = _guard(context, state)
    if guarded is not None:
        return guarded
    displaced = context.setting != state.home
    met = None if displaced else _meet(context, state, pressure, risen)
    if met is not None:
        return met
    if displaced and not risen and context.mode == "Auto" and long_away(state, context.now_s):
        state = adopted(state, context.setting, context.now_s)
        return _hold(f"away from home for an hour: {context.setting.text()} is home now"), state
    if pressure.pressed and (displaced or risen or context.signals.api_failing or new(state, context.now_s)):
        return _relieve(context, state, pressure, risen)
    if displaced:
        return _go_home(context, state, pressure)
    if state.origin is not None:
        eased = _ease(context, state, state.origin) or _return(context, state, state.origin)
        if eased is not None:
            return eased
    if pressure.pressed:
        return _settle(context, state, pressure)
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
    lasting_s = now_s - (now_s if state.breached_since_s is None else state.breached_since_s)
    if lost <= GUARD_SURE * context.max_lost_gate_mass and lasting_s < GUARD_AFTER_S:
        return _hold(f"{why}, for {lasting_s:.0f} s: not yet {GUARD_AFTER_S:g} s"), state
    move = quality_guard(context.setting, home, context.bounds)
    if isinstance(move, str):
        return _hold(f"{why}, but {move}"), state
    if budget_left(state, now_s, context.changes_per_hour) < 1:
        return _hold(f"{why}, but the budget of {context.changes_per_hour} changes an hour is spent"), state
    state = _changed(context, state).model_copy(update={"guard_until_s": now_s + GUARD_HOLD_S})
    cap = context.setting.prefill_cap
    if cap is not None and context.mode == "Auto":
        lossy = cap if state.lossy_factor is None else max(cap, state.lossy_factor)
        kept = without_capacity(state.table, lossy, move.setting)
        state = state.model_copy(update={"lossy_factor": lossy, "lossy_at_s": now_s, "table": kept})
    if home.prefill_cap is not None and context.mode == "Auto":
        # The home itself may be what breaks quality: going back to it would only start the breach again.
        state = state.model_copy(update={"home": home.with_capacity(move.setting)})
    return _decision(context, state, Action.GUARD, f"{why}: {move.why}", to=move.setting, changed=(move.knob,)), state


def _meet(
    context: RetuneContext, state: RetuneState, pressure: Pressure, risen: frozenset[str]
) -> tuple[RetuneDecision, RetuneState] | None:
    """Feed-forward: as the traffic rises into a context that was relieved before, put in force what relieved it."""
    home, now_s = state.home or context.setting, context.now_s
    if not (risen if pressure.pressed else risen & SUDDEN):
        return None
    if not pressure.pressed and state.undone_at_s is not None and now_s - state.undone_at_s < RELAPSE_S:
        return None  # the rise that has just been undone
    cell = cell_of(context.signals)
    setting = foreseen(state.table, cell, home, context.bounds)
    if setting is None or budget_left(state, now_s, context.changes_per_hour) < 2:
        return None
    held = state.guard_until_s is not None and now_s < state.guard_until_s
    if held or not _keeps_quality(context, setting, state.lossy_factor):
        setting = setting.with_capacity(home)
    if not context.signals.can_spill or context.signals.api_failing:
        setting = setting.with_miss_probability(home.fallback.miss_probability)
    changed = setting.differences(context.setting)
    if not changed:
        return None
    state = _changed(context, _begin_spike(context, state)).model_copy(update={"met": True, "cell": cell})
    reason = f"this traffic ({cell}) was relieved before by {setting.text()}: {pressure.text}"
    return _decision(context, state, Action.MOVE, reason, to=setting, changed=changed), state


def _keeps_quality(context: RetuneContext, setting: Setting, lossy: Decimal | None) -> bool:
    cap, spread = setting.prefill_cap, context.signals.expert_cv
    if cap is not None and lossy is not None and cap <= lossy:
        return False
    return cap is None or spread is None or foreseen_lost(spread, float(cap)) <= context.max_lost_gate_mass


def _relieve(
    context: RetuneContext, state: RetuneState, pressure: Pressure, risen: frozenset[str]
) -> tuple[RetuneDecision, RetuneState]:
    now_s = context.now_s
    since_s = now_s if state.pressed_since_s is None else state.pressed_since_s
    needed_s = _needed_s(context, pressure)
    if now_s - since_s < needed_s and not risen & SUDDEN:
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
    state = _changed(context, _moved(context, state, setting, moves)).model_copy(update={"met": False})
    changed = tuple(move.knob for move in moves)
    return _decision(context, state, Action.MOVE, reason, to=setting, changed=changed), state


def _remedies(
    context: RetuneContext, state: RetuneState, pressure: Pressure, *, lasting: bool = False
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
        most, lossy = context.max_lost_gate_mass, state.lossy_factor
        take(tighten_capacity(setting, signals, bounds, pressure, most, lossy=lossy, lasting=lasting))
    take(active_seqs(setting, signals, bounds, pressure, too_many=state.too_many_seqs))
    take(spill(setting, signals, bounds, pressure, cheaper_left=bool(moves)))
    return setting, tuple(moves), tuple(refusals)


def _go_home(context: RetuneContext, state: RetuneState, pressure: Pressure) -> tuple[RetuneDecision, RetuneState]:
    home, now_s = state.home or context.setting, context.now_s
    calm_s = 0.0 if state.calm_since_s is None else now_s - state.calm_since_s
    ample_s = slack_s(state, now_s)
    levels = state.traffic.levels(context.signals)
    gone = receded(state.cause, levels)
    by_cause = gone is not None and calm_s >= state.undo_wait_s
    by_slack = ample_s >= SLACK_FACTOR * state.undo_wait_s
    if not by_cause and not by_slack:
        waits = "its cause is still there" if gone is None else f"calm for {calm_s:.0f} of {state.undo_wait_s:.0f} s"
        return _hold(f"knobs stay away from home: {waits}: {pressure.text}"), state
    if budget_left(state, now_s, context.changes_per_hour) < 1:
        return _hold(f"the budget of {context.changes_per_hour} changes an hour is spent: undoing waits"), state
    why = f"{gone}, calm for {calm_s:.0f} s" if gone is not None and by_cause else f"ample slack for {ample_s:.0f} s"
    changed = home.differences(context.setting)
    learned = relieved(state.table, state.cell, context.setting, home, pressed=not state.met)
    over = {"undone_at_s": now_s, "cause": {}, "too_many_seqs": None, "table": learned, "cell": None, "met": False}
    state = _changed(context, state).model_copy(update=over)
    return _decision(context, state, Action.UNDO, f"{why}: back to {home.text()}", to=home, changed=changed), state


def _settle(context: RetuneContext, state: RetuneState, pressure: Pressure) -> tuple[RetuneDecision, RetuneState]:
    """Pressure that no rise explains: once it has lasted, one step of relief, which is home from then on."""
    now_s, lasting_s, enough_s = context.now_s, state.lasting_s, needed_s(state, context.now_s)
    if lasting_s < enough_s:
        return _hold(f"pressed for {lasting_s:.0f} of {enough_s:g} s, the traffic as ever: {pressure.text}"), state
    if budget_left(state, now_s, context.changes_per_hour) < 2:
        limit = f"the budget of {context.changes_per_hour} changes an hour leaves none to spare"
        return _hold(f"{limit} (one is kept for undoing): {pressure.text}"), state
    relief = left(state, now_s)
    if relief is not None:
        again = _again(context, state, relief)
        if again is not None:
            return again
    setting, moves, refusals = _remedies(context, state, pressure, lasting=True)
    if not moves:
        state = state.model_copy(update={"lasting_s": 0.0})
        return _hold(f"{pressure.text}, and nothing left to move: {'; '.join(refusals)}"), state
    reason = f"{pressure.text}, {lasting_s:.0f} s of it in the same traffic: {'; '.join(move.why for move in moves)}"
    state = _changed(context, _moved(context, state, setting, moves))
    state = settled(state, setting, now_s) if context.mode == "Auto" else state
    changed = tuple(move.knob for move in moves)
    return _decision(context, state, Action.SETTLE, f"{reason}: home now", to=setting, changed=changed), state


def _again(context: RetuneContext, state: RetuneState, relief: Setting) -> tuple[RetuneDecision, RetuneState] | None:
    """Back to the settled home that was left too soon, in one change; None where it may not be in force as it was."""
    to = inside(relief, context.setting, context.bounds)
    changed = to.differences(context.setting)
    if not changed or not _keeps_quality(context, to, state.lossy_factor):
        return None
    if to.fallback != context.setting.fallback and (not context.signals.can_spill or context.signals.api_failing):
        return None
    state = _changed(context, state)
    state = settled(state, to, context.now_s) if context.mode == "Auto" else state
    reason = f"pressure came back within an hour of leaving {to.text()}: home again"
    return _decision(context, state, Action.SETTLE, reason, to=to, changed=changed), state


def _ease(context: RetuneContext, state: RetuneState, origin: Setting) -> tuple[RetuneDecision, RetuneState] | None:
    """A settled γ that costs most of what quality allows leaves too little for other topics: it is loosened while it
    is young, and not left to the guard of some later day."""
    now_s, since_s, cap = context.now_s, state.spent_since_s, context.setting.prefill_cap
    young = state.capped_at_s is not None and now_s - state.capped_at_s < STOOD_S
    if cap is None or origin.prefill_cap == cap or not young:
        return None
    if since_s is None or now_s - since_s < SPENT_S or budget_left(state, now_s, context.changes_per_hour) < 2:
        return None
    allowed = QUALITY_AIM * context.max_lost_gate_mass
    move = loosen_capacity(context.setting, origin, context.signals, context.bounds, allowed)
    if isinstance(move, str):
        return None
    state = _changed(context, state)
    if context.mode == "Auto":
        lossy = {"lossy_factor": cap, "lossy_at_s": now_s, "capped_at_s": now_s, "spent_since_s": None}
        state = settled(state, move.setting, now_s).model_copy(update=lossy)
    reason = f"{context.signals.lost_gate_mass:.4f} of gate mass lost is most of {context.max_lost_gate_mass:g}"
    reason = f"{reason}: {move.why}"
    return _decision(context, state, Action.SETTLE, reason, to=move.setting, changed=(move.knob,)), state


def _return(context: RetuneContext, state: RetuneState, origin: Setting) -> tuple[RetuneDecision, RetuneState] | None:
    """From a settled home back to the one before it, once there has been ample slack for long."""
    now_s = context.now_s
    ample_s = slack_s(state, now_s)
    if ample_s < state.return_wait_s or budget_left(state, now_s, context.changes_per_hour) < 1:
        return None
    home = origin.keeping_pins(context.setting, context.bounds)
    changed = home.differences(context.setting)
    if context.mode == "Auto" or not changed:
        state = returned(state, home, now_s)
    if not changed:
        return _hold("the settled knobs are pinned, or are what they were before"), state
    state = _changed(context, state)
    reason = f"ample slack for {ample_s:.0f} s: back to {home.text()}, which was home before"
    return _decision(context, state, Action.UNDO, reason, to=home, changed=changed), state


def _begin_spike(context: RetuneContext, state: RetuneState) -> RetuneState:
    since_s = math.inf if state.undone_at_s is None else context.now_s - state.undone_at_s
    relapsed = since_s < RELAPSE_S + state.undo_wait_s
    wait_s = min(UNDO_WAIT_MAX_S, 2 * state.undo_wait_s) if relapsed else UNDO_WAIT_S
    cause = causes(context.signals, state.traffic)
    cell = cell_of(context.signals)
    return state.model_copy(update={"undo_wait_s": wait_s, "cause": cause, "cell": cell})


def _moved(context: RetuneContext, state: RetuneState, to: Setting, moves: tuple[Move, ...]) -> RetuneState:
    update: dict[str, object] = {"too_many_seqs": _too_many(context, state, to)}
    if context.mode == "Auto" and any(move.knob == CAPACITY for move in moves):
        update["capped_at_s"] = context.now_s
    return state.model_copy(update=update)


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
