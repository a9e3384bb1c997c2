"""The fast loop as a specification: what it does in steady traffic, in bursts, at its limits, and never."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.config import KnobBounds
from moe_core.retune import decide
from moe_core.retune_state import Action, RetuneState, budget_left, rebase, resume, spend
from moe_core.setting import ACTIVE_SEQS, CAPACITY, SPILL, Setting, Signals, unknown_pins
from moe_core.wire import Overflow
from tests.tuner.tuner_world import BOUNDS, Plant, Traffic, context, run, setting, signals

QUIET = [Traffic()] * 120


@pytest.mark.parametrize("rate", [1.0, 5.0, 9.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_an_hour_of_steady_traffic_changes_nothing(rate: float, seed: int) -> None:
    trace = run(Plant(setting(seqs=32), seed=seed), [Traffic(rate=rate)] * 3600)
    assert trace.changes() == []


def test_a_steady_overload_settles_and_then_changes_nothing_for_an_hour() -> None:
    trace = run(Plant(setting()), [Traffic(rate=30.0, skew=1.5)] * 4200)
    assert trace.changes()
    assert max(at for at, _ in trace.changes()) < 300
    assert trace.state.home == trace.settings[-1] != setting(), "what relieves it is home"


BURSTS = [
    pytest.param(16, Traffic(rate=15, skew=1.8), {CAPACITY}, "down", id="skewed burst: gamma falls from uncapped"),
    pytest.param(64, Traffic(rate=15, output=500), {ACTIVE_SEQS}, "down", id="long outputs: batch shrinks for ITL"),
    pytest.param(16, Traffic(rate=14), {ACTIVE_SEQS}, "up", id="volume with ITL to spare: batch grows"),
    pytest.param(64, Traffic(rate=40), {SPILL}, "down", id="volume beyond the engine: spills sooner"),
]


@pytest.mark.parametrize(("seqs", "burst", "moved", "way"), BURSTS)
def test_a_burst_moves_the_knob_that_helps_within_ten_seconds_and_is_undone_after(
    seqs: int, burst: Traffic, moved: set[str], way: str
) -> None:
    home = setting(seqs=seqs)
    trace = run(Plant(home), [*QUIET, *[burst] * 30, *[Traffic(rate=4)] * 240])
    first = next(at for at, decision in trace.changes() if moved <= set(decision.changed))
    assert 120 <= first < 130
    peak = trace.settings[149]
    if CAPACITY in moved:
        assert peak.prefill_cap is not None
        assert peak.prefill_cap < 2
        assert peak.experts.overflow is Overflow.REROUTE
    if ACTIVE_SEQS in moved:
        limit = peak.engine.max_active_seqs
        assert limit is not None
        assert (limit > seqs) if way == "up" else (limit < seqs)
    if SPILL in moved:
        assert peak.fallback.miss_probability is not None
        assert peak.fallback.miss_probability < 0.5
    assert trace.settings[-1] == home
    assert [decision.action for _, decision in trace.changes()][-1] is Action.UNDO
    assert len(trace.changes(Action.UNDO)) == 1


def test_a_burst_freezes_exploration_and_names_the_outside_change() -> None:
    trace = run(Plant(setting()), [*QUIET, *[Traffic(rate=20)] * 30, *QUIET])
    by_second = dict(trace.decisions)
    assert not any(by_second[at].spike for at in range(20, 120))
    assert all(by_second[at].spike for at in range(125, 150))
    assert any((by_second[at].outside or "").startswith("arrivals/s rose from") for at in range(121, 135))


def test_the_knobs_moved_in_a_burst_beat_leaving_them() -> None:
    load = [*QUIET, *[Traffic(rate=13, skew=1.8)] * 60]

    def worst_wait(**changes: object) -> float:
        plant = Plant(setting())
        run(plant, load, **changes)
        return max(ttft for _, _, ttft in plant.recent)

    assert worst_wait() < 0.5 * worst_wait(mode="Off")


def test_flapping_bursts_are_met_with_few_changes() -> None:
    flapping = ([Traffic()] * 15 + [Traffic(rate=20, skew=1.6)] * 15) * 120
    assert len(run(Plant(setting()), flapping).changes()) <= 12


def test_a_burst_that_comes_back_after_each_undo_is_met_with_ever_more_patience() -> None:
    recurring = ([Traffic()] * 100 + [Traffic(rate=14, skew=1.8)] * 20) * 30
    trace = run(Plant(setting()), recurring)
    undone = [at for at, _ in trace.changes(Action.UNDO)]
    assert len(undone) <= 6
    assert trace.state.undo_wait_s > 10


PINS = [
    pytest.param("experts.capacityFactor.prefill", CAPACITY, id="by name"),
    pytest.param("experts.capacityFactor", CAPACITY, id="by group"),
    pytest.param("experts", CAPACITY, id="by larger group"),
    pytest.param("engine.maxActiveSeqs", ACTIVE_SEQS, id="batch size"),
    pytest.param("fallback.missProbability", SPILL, id="spill"),
    pytest.param("fallback", SPILL, id="spill by group"),
]


@pytest.mark.parametrize(("pin", "knob"), PINS)
def test_a_pinned_knob_stays_while_others_move(pin: str, knob: str) -> None:
    bounds = BOUNDS.model_copy(update={"pinned": (pin,)})
    trace = run(Plant(setting()), [*QUIET, *[Traffic(rate=20, skew=1.8)] * 40], bounds=bounds)
    moved = {name for _, decision in trace.changes() for name in decision.changed}
    assert moved
    assert knob not in moved


def test_a_knob_pinned_in_the_middle_of_a_spike_stays_where_it_is() -> None:
    plant = Plant(setting())
    trace = run(plant, [*QUIET, *[Traffic(rate=15, skew=1.8)] * 30])
    assert plant.setting.prefill_cap is not None
    bounds = BOUNDS.model_copy(update={"pinned": ("experts.capacityFactor",)})
    kept = plant.setting.prefill_cap
    later = run(plant, [Traffic(rate=4)] * 300, trace.state, bounds=bounds)
    assert later.settings[-1].prefill_cap == kept
    assert later.settings[-1].engine.max_active_seqs == 16


def test_a_pin_on_decode_does_not_hold_prefill() -> None:
    bounds = BOUNDS.model_copy(update={"pinned": ("experts.capacityFactor.decode",)})
    trace = run(Plant(setting()), [*QUIET, *[Traffic(rate=15, skew=1.8)] * 10], bounds=bounds)
    assert any(CAPACITY in decision.changed for _, decision in trace.changes())


def test_the_spill_threshold_keeps_to_its_own_bounds() -> None:
    bounds = BOUNDS.model_copy(update={"miss_probability_min": 0.4})
    trace = run(Plant(setting(seqs=64)), [*QUIET, *[Traffic(rate=40)] * 40], bounds=bounds)
    assert {s.fallback.miss_probability for s in trace.settings} == {None, 0.4}


def test_pins_that_name_nothing_are_found() -> None:
    bounds = BOUNDS.model_copy(update={"pinned": ("experts", "gamma", "engine.maxActiveSeqs")})
    assert unknown_pins(bounds) == ("gamma",)


def test_the_quality_guard_loosens_capacity_at_once_and_holds() -> None:
    state = RetuneState(home=setting())
    breached = signals(lost_gate_mass=0.05, rank_demand=1.8, rank_assigned=1.2, ttft_p95_s=1.5, waiting=9)
    decision, state = decide(context(0.0, breached, setting("1")), state)
    assert decision.action is Action.GUARD
    assert decision.setting == setting()
    assert "0.0500 > 0.02" in decision.reason
    assert decision.breach is not None
    # The signal still remembers the breach: nothing more happens, and γ is not lowered again while the guard holds.
    pressed = breached.model_copy(update={"lost_gate_mass": 0.0})
    later = [decide(context(float(now), pressed, setting()), state)[0] for now in range(5, 60, 5)]
    assert all(CAPACITY not in d.changed for d in later)


def test_the_quality_guard_moves_a_home_that_breaks_quality() -> None:
    state = RetuneState(home=setting("1"))
    decision, state = decide(context(0.0, signals(lost_gate_mass=0.05), setting("1")), state)
    assert decision.setting == setting("2")
    assert state.home == setting("2")
    again, _ = decide(context(30.0, signals(lost_gate_mass=0.05), setting("2")), state)
    assert again.action is Action.HOLD
    assert "upper bound 2" in again.reason


def test_the_quality_guard_leaves_a_pinned_factor_and_says_so() -> None:
    bounds = BOUNDS.model_copy(update={"pinned": ("experts.capacityFactor",)})
    decision, _ = decide(context(0.0, signals(lost_gate_mass=0.05), setting("1"), bounds=bounds), RetuneState())
    assert decision.action is Action.HOLD
    assert "unpin it" in decision.reason


def test_capacity_is_not_tightened_when_gate_mass_is_nearly_spent() -> None:
    hot = signals(lost_gate_mass=0.015, rank_demand=1.8, rank_assigned=1.3, ttft_p95_s=1.0)
    state = RetuneState(home=setting("1.5"), pressed_since_s=0.0)
    decision, _ = decide(context(5.0, hot, setting("1.5")), state)
    assert CAPACITY not in decision.changed
    assert decision.setting is None or decision.setting.prefill_cap == Decimal("1.5")


SILENT = [
    pytest.param({"mode": "Off"}, "mode is Off", id="off"),
    pytest.param({"paused": True}, "paused", id="paused"),
    pytest.param({"changes_per_hour": 0}, "budget of 0 changes", id="no budget"),
    pytest.param({"trial": True}, "a trial is in force", id="slow loop's trial"),
]


@pytest.mark.parametrize(("changes", "words"), SILENT)
def test_it_does_nothing_and_says_why(changes: dict[str, object], words: str) -> None:
    trace = run(Plant(setting()), [*QUIET[:30], *[Traffic(rate=30, skew=1.8)] * 30], **changes)
    assert trace.changes() == []
    assert words in trace.decisions[-1][1].reason


def test_unknown_signals_move_nothing() -> None:
    state = RetuneState()
    for now in range(60):
        decision, state = decide(context(float(now), Signals(missing=("board",)), setting()), state)
        assert decision.setting is None
        assert not decision.spike
    assert "no answer from board" in decision.reason


def test_signals_that_vanish_in_a_spike_leave_the_knobs_where_they_are() -> None:
    plant = Plant(setting())
    trace = run(plant, [*QUIET, *[Traffic(rate=15, skew=1.8)] * 30])
    displaced, state = plant.setting, trace.state
    assert displaced != setting()
    for now in range(150, 400):
        decision, state = decide(context(float(now), Signals(), displaced), state)
        assert decision.setting is None


def test_spill_waits_for_cheaper_remedies_and_for_a_target() -> None:
    mild = signals(ttft_p95_s=0.8, rank_demand=1.6, waiting=2)
    state = RetuneState(home=setting(), lasting_s=30.0, began_at_s=-60.0)
    first, _ = decide(context(5.0, mild, setting()), state)
    assert first.changed == (CAPACITY,)
    balanced = mild.model_copy(update={"rank_demand": 1.0})
    paid, _ = decide(context(5.0, balanced, setting()), state)
    assert paid.changed == (SPILL,)
    alone, _ = decide(context(5.0, balanced.model_copy(update={"can_spill": False}), setting()), state)
    assert alone.setting is None
    assert "no closed API is configured" in alone.reason
    failing, _ = decide(context(5.0, balanced.model_copy(update={"api_failing": True}), setting()), state)
    assert failing.setting is None
    assert failing.outside == "a closed API is failing"


def test_spilling_does_not_hide_the_queue_it_comes_from() -> None:
    """The closed API answers 36 of 40 a second within the promise, so the percentile of all of them looks well."""
    flooded = signals(
        arrivals_per_s=40.0, completed_per_s=40.0, local_per_s=4.0, waiting=8, running=16, spill_share=0.9
    )
    state = RetuneState(home=setting(), lasting_s=30.0, began_at_s=-60.0)
    decision, _ = decide(context(5.0, flooded, setting()), state)
    assert "queue wait 2 s" in decision.reason
    assert ACTIVE_SEQS in decision.changed
    few = flooded.model_copy(update={"waiting": 1})
    assert decide(context(5.0, few, setting()), state)[0].setting is None


def test_a_slower_engine_without_a_change_of_traffic_is_relieved_and_undone_by_slack() -> None:
    plant = Plant(setting(seqs=64))
    trace = run(plant, [Traffic(rate=6)] * 120)
    plant.prefill_tokens_per_s = 1700.0
    slow = run(plant, [Traffic(rate=6)] * 60, trace.state)
    assert slow.changes()
    plant.prefill_tokens_per_s = 6000.0
    recovered = run(plant, [Traffic(rate=6)] * 400, slow.state)
    assert recovered.settings[-1] == setting(seqs=64)
    assert "ample slack" in recovered.changes(Action.UNDO)[0][1].reason


def test_a_changed_home_is_where_an_undo_goes() -> None:
    state = rebase(RetuneState(home=setting()), setting("1.5"))
    assert state.home == setting("1.5")


def test_the_budget_survives_a_restart_with_its_age() -> None:
    state = RetuneState(home=setting("1.5"))
    for at_s in (100.0, 200.0, 300.0):
        state = spend(state, at_s)
    resumed = resume(state, saved_at_s=310.0, elapsed_s=60.0, now_s=5.0)
    assert resumed.home == setting("1.5")
    assert resumed.changes_at_s == (-265.0, -165.0, -65.0)
    assert budget_left(resumed, 5.0, 10) == 7
    assert budget_left(resumed, 3600.0 - 164.0, 10) == 9


# Properties.

gammas = st.sampled_from([None, "1", "1.05", "1.3", "1.5", "2"])
settings_in_bounds = st.builds(
    setting, gammas, st.one_of(st.none(), st.integers(4, 64)), st.one_of(st.none(), st.floats(0.05, 0.9))
)
shares = st.one_of(st.none(), st.floats(0, 1))
seconds = st.one_of(st.none(), st.floats(0, 10))
any_signals = st.builds(
    Signals,
    replicas=st.one_of(st.none(), st.integers(0, 3)),
    running=st.one_of(st.none(), st.integers(0, 200)),
    waiting=st.one_of(st.none(), st.integers(0, 200)),
    active_limit=st.one_of(st.none(), st.integers(1, 64)),
    active_ceiling=st.one_of(st.none(), st.integers(1, 128)),
    kv_usage=shares,
    preemptions_per_s=seconds,
    rank_demand=st.one_of(st.none(), st.floats(1, 4)),
    rank_assigned=st.one_of(st.none(), st.floats(1, 4)),
    lost_gate_mass=st.one_of(st.none(), st.floats(0, 0.1)),
    arrivals_per_s=st.one_of(st.none(), st.floats(0, 1000)),
    completed_per_s=st.one_of(st.none(), st.floats(0, 1000)),
    local_per_s=st.one_of(st.none(), st.floats(0, 1000)),
    prompt_tokens=st.one_of(st.none(), st.floats(0, 1e6)),
    output_tokens=st.one_of(st.none(), st.floats(0, 1e6)),
    ttft_p95_s=seconds,
    itl_p95_s=seconds,
    shed_share=shares,
    can_spill=st.booleans(),
    api_failing=st.booleans(),
)
bounds_strategy = st.builds(
    lambda low, width, seqs, more, pins, overflow: KnobBounds(
        capacity_factor_min=Decimal(low) / 20,
        capacity_factor_max=Decimal(low + width) / 20,
        active_seqs_min=seqs,
        active_seqs_max=seqs + more,
        pinned=tuple(sorted(pins)),
        overflow=overflow,
    ),
    st.integers(20, 40),
    st.integers(0, 40),
    st.integers(1, 32),
    st.integers(0, 64),
    st.sets(st.sampled_from(["experts.capacityFactor", "experts.overflow", "experts", ACTIVE_SEQS, SPILL, "fallback"])),
    st.sampled_from(["Reroute", "Drop"]),
)


def pinned_values(value: Setting, pins: tuple[str, ...]) -> tuple[object, ...]:
    kept: list[object] = []
    if {"experts", "experts.capacityFactor"} & set(pins):
        kept.append(value.experts.capacity_factor_prefill)
    if {"experts", "experts.overflow"} & set(pins):
        kept.append(value.experts.overflow)
    if ACTIVE_SEQS in pins:
        kept.append(value.engine.max_active_seqs)
    if {"fallback", SPILL} & set(pins):
        kept.append(value.fallback.miss_probability)
    return tuple(kept)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(any_signals, st.floats(0.5, 400)), min_size=1, max_size=40),
    settings_in_bounds,
    bounds_strategy,
    st.integers(0, 8),
)
def test_never_outside_bounds_never_a_pinned_knob_never_over_budget(
    ticks: list[tuple[Signals, float]], home: Setting, bounds: KnobBounds, budget: int
) -> None:
    state, in_force, now, changed_at = RetuneState(), home, 0.0, list[float]()
    for read, wait in ticks:
        now += wait
        tick = context(now, read, in_force, bounds=bounds, changes_per_hour=budget)
        decision, after = decide(tick, state)
        again, after_again = decide(tick, state)
        assert (decision, after) == (again, after_again), "the same input gives the same answer"
        assert RetuneState.model_validate_json(after.model_dump_json()) == after, "the state survives JSON"
        assert decision.reason
        state = after
        if decision.setting is None:
            continue
        value = decision.setting
        assert value != in_force
        cap, limit, miss = value.prefill_cap, value.engine.max_active_seqs, value.fallback.miss_probability
        if cap is not None and cap != home.prefill_cap:
            assert bounds.capacity_factor_min <= cap <= bounds.capacity_factor_max
        if limit is not None and limit != home.engine.max_active_seqs:
            assert bounds.active_seqs_min <= limit <= bounds.active_seqs_max
        assert miss is None or miss == home.fallback.miss_probability or 0.05 <= miss <= 0.9
        assert pinned_values(value, bounds.pinned) == pinned_values(home, bounds.pinned)
        in_force = value
        changed_at.append(now)
        assert sum(1 for at in changed_at if at > now - 3600.0) <= budget
