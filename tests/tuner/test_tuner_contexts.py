"""The context table: learned from a spike that ended, in force at once at the next, never outside what is allowed."""

from __future__ import annotations

import sys
from decimal import Decimal
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.contexts import MOST_ROWS, Row, Table, cell_of, foreseen, relieved
from moe_core.remedies import foreseen_lost
from moe_core.retune import decide
from moe_core.retune_state import RETURN_WAIT_S, Action, RetuneState, resume
from moe_core.setting import CAPACITY, Signals
from moe_core.settling import RETURN_WAIT_AGAIN_S
from tests.tuner.tuner_world import BOUNDS, Plant, Traffic, context, run, setting, signals

QUIET = [Traffic()] * 150
BURST = [Traffic(rate=40)] * 30
CELL = "rate 8, length 9, skew 0"
AFTER = [Traffic(rate=4)] * 300


def test_a_spike_is_met_in_one_move_where_one_like_it_was_relieved_before() -> None:
    home = setting(seqs=64)
    first = run(Plant(home), [*QUIET, *BURST, *AFTER])
    assert first.state.table
    assert first.settings[-1] == home
    again = run(Plant(home, seed=2), [*QUIET, *BURST, *AFTER])
    # The same loop with what it learned, and without.
    state = RetuneState(table=first.state.table)
    learned = run(Plant(home, seed=2), [*QUIET, *BURST, *AFTER], state)
    at, move = learned.changes()[0]
    assert "was relieved before by" in move.reason
    assert move.setting is not None
    reached = move.setting.fallback.miss_probability
    assert reached is not None
    plain = next(s for s in again.settings if s.fallback.miss_probability is not None)
    assert plain.fallback.miss_probability is not None
    assert reached <= plain.fallback.miss_probability
    assert at < 160
    assert learned.settings[-1] == home


def test_quiet_traffic_is_not_met_whatever_the_table_says() -> None:
    cell = cell_of(signals())
    assert cell is not None
    state = RetuneState(home=setting(), table={cell: Row(setting=setting(miss=0.2))})
    trace = run(Plant(setting()), [Traffic(rate=4.9)] * 300, state)
    assert trace.changes() == []


def test_what_is_foreseen_keeps_bounds_and_pins() -> None:
    wide = setting("1.2", 500, 0.01)
    table: Table = {CELL: Row(setting=wide)}
    bounds = BOUNDS.model_copy(
        update={"capacity_factor_min": Decimal("1.5"), "miss_probability_min": 0.3, "pinned": ("experts",)}
    )
    found = foreseen(table, CELL, setting(), bounds)
    assert found == setting(None, 64, 0.3)
    assert foreseen(table, "rate 30, length 9, skew 0", setting(), bounds) is None
    everything = BOUNDS.model_copy(update={"pinned": ("experts", "engine", "fallback")})
    assert foreseen(table, CELL, setting(), everything) is None


def test_a_row_under_which_nothing_pressed_goes_back_half_of_the_way_home() -> None:
    table = relieved({}, CELL, setting(miss=0.2), setting(), pressed=True)
    assert table[CELL].setting == setting(miss=0.2)
    table = relieved(table, CELL, setting(miss=0.2), setting(), pressed=False)
    assert table[CELL].setting == setting(miss=0.35)
    assert table[CELL].times == 2
    for _ in range(9):
        now = table[CELL].setting if CELL in table else setting()
        table = relieved(table, CELL, now, setting(), pressed=False)
    assert table == {}


def test_the_table_is_bounded_and_keeps_what_helped_most() -> None:
    table: Table = {f"rate {n}, length 0, skew 0": Row(setting=setting(), times=2 + n) for n in range(MOST_ROWS)}
    table = relieved(table, "rate 999, length 0, skew 0", setting(miss=0.2), setting(), pressed=True)
    assert len(table) == MOST_ROWS
    assert "rate 999, length 0, skew 0" not in table
    assert f"rate {MOST_ROWS - 1}, length 0, skew 0" in table


def test_it_survives_a_restart() -> None:
    state = RetuneState(home=setting(), table={CELL: Row(setting=setting(miss=0.2))}, origin=setting())
    later = resume(state, saved_at_s=0.0, elapsed_s=5.0, now_s=9.0)
    assert (later.table, later.origin) == (state.table, state.origin)


def test_a_near_context_tells_and_a_far_one_does_not() -> None:
    table: Table = {CELL: Row(setting=setting(miss=0.2)), "rate 20, length 9, skew 0": Row(setting=setting(miss=0.3))}
    assert foreseen(table, "rate 10, length 9, skew 0", setting(), BOUNDS) == setting(miss=0.2)
    assert foreseen(table, "rate 18, length 9, skew 0", setting(), BOUNDS) == setting(miss=0.3)
    assert foreseen(table, "rate 14, length 9, skew 0", setting(), BOUNDS) is None
    assert foreseen(table, "rate 8, length 9, skew 2", setting(), BOUNDS) is None


def test_unknown_traffic_has_no_context() -> None:
    assert cell_of(Signals()) is None
    assert cell_of(signals(arrivals_per_s=5.0)) == cell_of(signals(arrivals_per_s=5.4))
    assert cell_of(signals(arrivals_per_s=5.0)) != cell_of(signals(arrivals_per_s=20.0))


# Pressure that always comes back.


def test_pressure_that_keeps_coming_back_in_the_same_traffic_ends_in_a_home_that_holds() -> None:
    state, in_force, changed = RetuneState(), setting(), list[tuple[int, Action]]()
    calm = signals(running=2)
    late = signals(ttft_p95_s=0.79, waiting=2, running=9, local_per_s=5.0)
    for now in range(7200):
        relief = in_force.fallback.miss_probability is not None
        pressed = now > 60 and now % 120 < 15 and not relief
        decision, state = decide(context(float(now), late if pressed else calm, in_force), state)
        if decision.setting is not None:
            in_force = decision.setting
            changed.append((now, decision.action))
    assert state.origin == setting()
    assert state.home is not None
    assert state.home.fallback.miss_probability is not None
    assert changed[-1][0] < 3600, "and then an hour without a change"


def test_a_settled_home_gives_way_to_the_old_one_after_slack_and_waits_for_hours_where_that_was_wrong() -> None:
    state = RetuneState(home=setting(miss=0.35), origin=setting())
    late = signals(ttft_p95_s=0.79, waiting=2, running=9, local_per_s=5.0)
    in_force, changed = setting(miss=0.35), list[tuple[int, Action]]()
    for now in range(0, 6 * 3600, 5):
        relief = in_force.fallback.miss_probability is not None
        read = signals(running=1) if relief or now > 3 * 3600 else late
        decision, state = decide(context(float(now), read, in_force), state)
        if decision.setting is not None:
            changed.append((now, decision.action))
            in_force = decision.setting
    assert [action for _, action in changed] == [Action.UNDO, Action.SETTLE, Action.UNDO]
    assert changed[0][0] == RETURN_WAIT_S
    assert changed[1][0] < RETURN_WAIT_S + 60
    assert changed[2][0] >= changed[1][0] + RETURN_WAIT_AGAIN_S
    assert in_force == setting()
    assert state.origin is None


# Quality is foreseen before capacity is moved.


@given(st.floats(0.05, 3), st.floats(1, 4), st.floats(1.01, 2))
def test_a_higher_factor_loses_less_and_more_skew_loses_more(spread: float, factor: float, more: float) -> None:
    assert foreseen_lost(spread, factor * more) <= foreseen_lost(spread, factor) + 1e-12
    assert foreseen_lost(spread * more, factor) >= foreseen_lost(spread, factor) - 1e-12
    assert 0 <= foreseen_lost(spread, factor) < 1


def test_capacity_is_never_put_where_it_is_foreseen_to_break_quality() -> None:
    bounds = BOUNDS.model_copy(update={"capacity_factor_max": Decimal(4)})
    state = RetuneState(home=setting(), lasting_s=30.0, began_at_s=-60.0)
    for spread in (0.1, 0.3, 0.6, 1.0, 1.5, 2.5):
        hot = signals(ttft_p95_s=1.0, waiting=4, rank_demand=1.6, expert_cv=spread)
        decision, _ = decide(context(5.0, hot, setting(), bounds=bounds), state)
        cap = None if decision.setting is None else decision.setting.prefill_cap
        assert cap is None or foreseen_lost(spread, float(cap)) <= 0.005
        assert (cap is None) == (spread > 1.0), "so skewed that even the mildest cap would cost too much"
        assert (CAPACITY in decision.changed) == (cap is not None)


# What a tick costs.


@pytest.mark.parametrize("rows", [0, MOST_ROWS])
def test_a_tick_makes_few_calls_however_much_was_learned(rows: int) -> None:
    """A hundred deployments tick in milliseconds: some hundred calls each, whatever the table holds."""
    table: Table = {f"rate {n}, length 0, skew 0": Row(setting=setting()) for n in range(rows)}
    state, calls = RetuneState(home=setting(), table=table), 0
    for now in range(30):
        _, state = decide(context(float(now), signals(), setting()), state)
    tick = context(30.0, signals(), setting())

    def count(_: FrameType, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        decide(tick, state)
    finally:
        sys.setprofile(before)
    assert calls < 500
