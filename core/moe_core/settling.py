"""When pressure that no rise of the traffic explains makes another setting the home, and when that gives way again.

A spike is met at once and undone. Steady traffic that is now and then too much must not be: each undo would bring the
pressure back. So pressure without a rise is weighed over minutes (a one-sided CUSUM of the share of time in danger,
Page, Biometrika 1954), what relieves it stays, and a home that has stood for an hour is left only for much more.
"""

from __future__ import annotations

from moe_core.remedies import Pressure
from moe_core.retune_state import RetuneState
from moe_core.setting import Setting

LASTING_S = 30.0
"""Seconds of pressure, less what is tolerated, that make another home. A stall of 3 s is felt for about 15."""
TOLERATED = 0.02
"""Share of time in danger that is no reason to move: a percentile over seconds is crossed by chance, too."""
STOOD_S = 3600.0
LASTING_ONCE_STOOD_S, TOLERATED_ONCE_STOOD = 120.0, 0.2
"""The same once a home has stood for `STOOD_S` in traffic that did not rise: what it held then is no news, and stalls
that come close together are no overload."""
RISEN_COSTS = 60.0
"""Seconds of standing that one second of risen traffic takes away: a burst takes it all, a rise by chance does not."""
NEW_S = 30.0
"""For so long a tuner without a past knows nothing of what is usual: it may have begun in the middle of a spike."""
TICK_MOST_S = 5.0
"""Longest time that one tick speaks for."""
WRONG_S = 3600.0
"""Pressure that makes another home so soon after a return says that the return was wrong."""
RETURN_WAIT_AGAIN_S, RETURN_WAIT_MAX_S = 4 * 3600.0, 24 * 3600.0
"""Ample slack that is asked for then (a night), doubled each time up to a day."""


def weighed(state: RetuneState, now_s: float, pressure: Pressure, *, explained: bool) -> RetuneState:
    """Add this tick to the pressure that lasts. `explained`: the traffic has risen: that tells nothing of home."""
    since_s = 0.0 if state.ticked_at_s is None else min(TICK_MOST_S, max(0.0, now_s - state.ticked_at_s))
    lasting_s = state.lasting_s
    if not explained:
        share = TOLERATED_ONCE_STOOD if has_stood(state, now_s) else TOLERATED
        lasting_s += since_s if pressure.pressed else -since_s * share / (1.0 - share)
    lost_s = RISEN_COSTS * since_s if explained else 0.0
    stood_since_s = now_s if state.stood_since_s is None else min(now_s, state.stood_since_s + lost_s)
    return state.model_copy(
        update={
            "began_at_s": now_s if state.began_at_s is None else state.began_at_s,
            "ticked_at_s": now_s,
            "lasting_s": max(0.0, lasting_s),
            "stood_since_s": stood_since_s,
        }
    )


def new(state: RetuneState, now_s: float) -> bool:
    return state.began_at_s is None or now_s - state.began_at_s < NEW_S


def has_stood(state: RetuneState, now_s: float) -> bool:
    return state.stood_since_s is not None and now_s - state.stood_since_s >= STOOD_S


def needed_s(state: RetuneState, now_s: float) -> float:
    """Seconds of lasting pressure that make another home now."""
    return LASTING_ONCE_STOOD_S if has_stood(state, now_s) else LASTING_S


def left(state: RetuneState, now_s: float) -> Setting | None:
    """The settled home that was left so lately that pressure now says: wrongly. None where there is none."""
    wrong = state.returned_at_s is not None and now_s - state.returned_at_s < WRONG_S
    return state.relief if wrong else None


def settled(state: RetuneState, setting: Setting, now_s: float) -> RetuneState:
    """`setting` is home from now on. Soon after a return that means that returning was wrong: it has to wait longer."""
    again_s = min(RETURN_WAIT_MAX_S, max(RETURN_WAIT_AGAIN_S, 2 * state.return_wait_s))
    return state.model_copy(
        update={
            "home": setting,
            "origin": state.origin or state.home,
            "lasting_s": 0.0,
            "stood_since_s": now_s,
            "return_wait_s": again_s if left(state, now_s) else state.return_wait_s,
            "returned_at_s": None,
            "relief": None,
        }
    )


def long_away(state: RetuneState, now_s: float) -> bool:
    """Whether the last move was an hour ago: what rose then is the traffic now."""
    return state.moved_at_s is not None and now_s - state.moved_at_s >= STOOD_S


def adopted(state: RetuneState, setting: Setting, now_s: float) -> RetuneState:
    """What a spike that never ended left in force is home."""
    over: dict[str, object] = {"cause": {}, "too_many_seqs": None, "cell": None, "met": False}
    return settled(state, setting, now_s).model_copy(update=over)


def returned(state: RetuneState, home: Setting, now_s: float) -> RetuneState:
    """The origin, as it may be now, is home again."""
    over = {"origin": None, "lasting_s": 0.0, "stood_since_s": now_s, "returned_at_s": now_s, "relief": state.home}
    return state.model_copy(update={**over, "home": home})


def slack_s(state: RetuneState, now_s: float) -> float:
    """Seconds of ample slack until now."""
    return 0.0 if state.slack_since_s is None else now_s - state.slack_since_s
