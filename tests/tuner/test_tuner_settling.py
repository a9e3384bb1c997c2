"""Steady traffic: the fast loop settles, and then changes nothing for an hour; spikes after it are met and undone.

A steady load is a row of named cases: rates from idle to overload, engines slower and faster than planned, stalls,
lengths with heavy tails, gaps in what is read. Nothing here is learned from the benchmark's plant.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.remedies import pressure_of
from moe_core.retune import decide
from moe_core.retune_state import STATE_VERSION, Action, RetuneState, resume
from moe_core.setting import CAPACITY, Setting, Signals
from moe_core.settling import LASTING_S, TOLERATED, has_stood, weighed
from moe_core.traffic import RATE, REPLICAS, TrafficState, rises, watch
from tests.tuner.tuner_world import SLO, Plant, Traffic, context, setting, signals

SETTLING_S, HOUR_S = 7200, 3600
SELDOM = 4
SPIKE_S, MET_WITHIN_S, UNDONE_WITHIN_S = 40, 12, 600


@dataclass
class Steady:
    """A load that is the same at every hour, on an engine that is not what its file says."""

    rate: float = 5.0
    prompt: float = 300.0
    skew: float = 1.1
    tail: float = 0.0  # of prompt lengths: sigma of their logarithm
    speed: float = 1.0  # of the engine
    drift: float = 0.0  # amplitude of a slow swing of the speed
    stalls_per_hour: float = 0.0
    gaps: float = 0.0  # share of ticks without the board
    seed: int = 1
    seqs: int = 32
    stall_left: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def read(self, plant: Plant, now: int, rate: float) -> Signals:
        """A second of the plant under this load."""
        if self.random.random() < self.stalls_per_hour / 3600.0:
            self.stall_left = self.random.randint(1, 3)
        swing = 1.0 + self.drift * math.sin(now / 300.0)
        plant.prefill_tokens_per_s = 6000.0 * self.speed * swing * (0.02 if self.stall_left else 1.0)
        prompt = self.prompt * math.exp(self.tail * self.random.gauss(0.0, 1.0) / math.sqrt(max(1.0, 3 * rate)))
        found = plant.second(Traffic(rate=rate, prompt=prompt, skew=self.skew))
        if self.stall_left:
            self.stall_left -= 1
            found = found.model_copy(update={"itl_p95_s": 1.0})
        if self.random.random() < self.gaps:
            found = found.model_copy(update={"running": None, "waiting": None, "missing": ("board",)})
        return found


CASES = [
    pytest.param(Steady(rate=1.0), id="idle"),
    pytest.param(Steady(rate=9.0, stalls_per_hour=8), id="light, with stalls"),
    pytest.param(Steady(rate=15.0, drift=0.08, stalls_per_hour=4), id="near full, the engine's speed drifts"),
    pytest.param(Steady(rate=15.0, speed=0.8, stalls_per_hour=4), id="full, a fifth slower than planned"),
    pytest.param(Steady(rate=15.0, speed=0.7, drift=0.08, stalls_per_hour=4), id="mild lasting overload"),
    pytest.param(Steady(rate=12.0, skew=1.6, drift=0.05, stalls_per_hour=4), id="skewed experts, near full"),
    pytest.param(Steady(rate=30.0, skew=1.5), id="overload"),
    pytest.param(Steady(rate=12.0, tail=1.5, stalls_per_hour=4), id="prompts with heavy tails"),
    pytest.param(Steady(rate=12.0, gaps=0.05, stalls_per_hour=8), id="gaps in the board's answers"),
    pytest.param(Steady(rate=15.0, seqs=8, stalls_per_hour=4), id="small batch"),
]


@dataclass
class Ran:
    """The loop's changes, by second. Time is an argument of `decide`, and here a count."""

    now: int
    plant: Plant
    state: RetuneState
    changes: list[tuple[int, Action, Setting]]

    def tick(self, load: Steady, rate: float) -> None:
        read = load.read(self.plant, self.now, rate)
        decision, self.state = decide(context(float(self.now), read, self.plant.setting), self.state)
        if decision.setting is not None:
            self.plant.setting = decision.setting
            self.changes.append((self.now, decision.action, decision.setting))
        self.now += 1


def settled(load: Steady) -> Ran:
    ran = Ran(0, Plant(setting(seqs=load.seqs), seed=load.seed), RetuneState(), [])
    for _ in range(SETTLING_S):
        ran.tick(load, load.rate)
    return ran


@pytest.mark.parametrize("load", CASES)
def test_a_steady_load_is_settled_in_two_hours_and_then_nothing_changes_for_an_hour(load: Steady) -> None:
    load = replace(load)
    ran = settled(load)
    assert len(ran.changes) <= 12
    before = len(ran.changes)
    for _ in range(HOUR_S):
        ran.tick(load, load.rate)
    assert ran.changes[before:] == []
    assert ran.plant.setting == ran.state.home
    # And no restart makes it move: what was settled is on the disk.
    saved = RetuneState.model_validate_json(ran.state.model_dump_json())
    ran.state = resume(saved, saved_at_s=float(ran.now), elapsed_s=5.0, now_s=0.0)
    ran.now = 0
    for _ in range(600):
        ran.tick(load, load.rate)
    assert ran.changes[before:] == []


SPIKES = [
    pytest.param(Steady(rate=6.0, stalls_per_hour=4), id="after a light load"),
    pytest.param(Steady(rate=8.0, speed=0.7, drift=0.08, stalls_per_hour=4), id="after a slow engine's load"),
    pytest.param(Steady(rate=6.0, skew=1.6, stalls_per_hour=4), id="with skewed experts"),
]


@pytest.mark.parametrize("load", SPIKES)
def test_a_spike_after_it_is_answered_in_seconds_and_undone(load: Steady) -> None:
    load = replace(load)
    ran = settled(load)
    home, before, start = ran.plant.setting, len(ran.changes), ran.now
    for _ in range(SPIKE_S):
        ran.tick(load, 5 * load.rate)
    first = ran.changes[before]
    assert first[1] is Action.MOVE
    assert first[0] - start <= MET_WITHIN_S
    for _ in range(UNDONE_WITHIN_S):
        ran.tick(load, load.rate)
    assert ran.plant.setting == ran.state.home == home
    assert [action for _, action, _ in ran.changes[before:]].count(Action.UNDO) == 1
    # Quiet again.
    done = len(ran.changes)
    for _ in range(HOUR_S):
        ran.tick(load, load.rate)
    assert ran.changes[done:] == []


YOUNG = [(10, 40, 6.0), (10, 80, 6.0), (8, 60, 5.0), (15, 120, 4.0)]


@pytest.mark.parametrize(("idle_s", "busy_s", "times"), YOUNG)
def test_a_spike_of_a_young_deployment_is_answered_in_seconds(idle_s: int, busy_s: int, times: float) -> None:
    """It began idle, and of so wide a spread the first minutes' sixfold rate is not three standard deviations."""
    load = Steady(rate=5.0)
    ran = Ran(0, Plant(setting(seqs=load.seqs), seed=load.seed), RetuneState(), [])
    for second in range(idle_s + busy_s):
        ran.tick(load, load.rate if second >= idle_s else 0.0)
    before, start = len(ran.changes), ran.now
    for _ in range(SPIKE_S):
        ran.tick(load, times * load.rate)
    assert ran.changes[before][1] is Action.MOVE
    assert ran.changes[before][0] - start <= MET_WITHIN_S


@settings(max_examples=6, deadline=None)
@given(
    st.floats(1.0, 30.0),
    st.floats(0.6, 1.4),
    st.floats(0.0, 0.1),
    st.sampled_from([0.0, 4.0, 8.0]),
    st.sampled_from([1.05, 1.3, 1.8]),
    st.integers(1, 1000),
)
def test_no_steady_load_keeps_the_loop_busy_in_its_third_hour(
    rate: float, speed: float, drift: float, stalls: float, skew: float, seed: int
) -> None:
    """One load in twenty has its home moved once or twice more; none swings to and fro."""
    load = Steady(rate=rate, speed=speed, drift=drift, stalls_per_hour=stalls, skew=skew, seed=seed)
    ran = settled(load)
    before = len(ran.changes)
    for _ in range(HOUR_S):
        ran.tick(load, rate)
    late = [action for _, action, _ in ran.changes[before:]]
    assert len(late) <= SELDOM
    assert late.count(Action.UNDO) <= 1


# The parts.


@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_pressure_is_weighed_by_its_share_of_the_time(pressed: list[bool]) -> None:
    hot = pressure_of(signals(ttft_p95_s=2.0), SLO)
    calm = pressure_of(signals(), SLO)
    state = weighed(RetuneState(), 0.0, calm, explained=False)
    for now, is_pressed in enumerate(pressed, start=1):
        state = weighed(state, float(now), hot if is_pressed else calm, explained=False)
        spike = weighed(state, float(now), hot, explained=True)
        assert spike.lasting_s == state.lasting_s, "what a spike explains says nothing of home"
    assert state.lasting_s >= sum(pressed) - TOLERATED / (1 - TOLERATED) * (len(pressed) - sum(pressed)) - 1e-6
    assert state.lasting_s <= sum(pressed)
    assert (state.lasting_s >= LASTING_S) <= (sum(pressed) >= LASTING_S)


STANDING = [
    pytest.param([2], True, id="a rise by chance"),
    pytest.param([2] * 12, True, id="a few in an hour"),
    pytest.param([20], True, id="one burst of 20 s"),
    pytest.param([20] * 4, False, id="bursts"),
    pytest.param([90], False, id="a spike of a minute and a half"),
]


@pytest.mark.parametrize(("risen_s", "stands"), STANDING)
def test_bursts_take_a_home_s_standing_and_chance_does_not(risen_s: list[int], stands: bool) -> None:
    calm = pressure_of(signals(), SLO)
    risen = {HOUR_S + 140 * place + at for place, length in enumerate(risen_s) for at in range(length)}
    state = RetuneState()
    for now in range(HOUR_S + 1800):
        state = weighed(state, float(now), calm, explained=now in risen)
    assert has_stood(state, HOUR_S + 1800.0) is stands


RISES = [
    pytest.param({"arrivals_per_s": 20.0}, 1, {RATE}, id="a surge is seen in the first second"),
    pytest.param({"arrivals_per_s": 6.5}, 60, set(), id="a third more is noise"),
    pytest.param({"prompt_tokens": 450.0}, 60, set(), id="half as long again may be chance"),
    pytest.param({"replicas": 1}, 1, {REPLICAS}, id="a replica is gone"),
    pytest.param({"replicas": 1}, 700, set(), id="one that stays away is no news"),
    pytest.param({"replicas": None}, 5, set(), id="unknown is not gone"),
]


@pytest.mark.parametrize(("change", "for_s", "risen"), RISES)
def test_what_counts_as_a_rise(change: dict[str, object], for_s: int, risen: set[str]) -> None:
    state, usual = TrafficState(), signals(replicas=2, completed_per_s=5.0)
    for _ in range(300):
        state = watch(usual, state)
    now = usual.model_copy(update=change)
    for _ in range(for_s):
        state = watch(now, state)
    assert rises(now, state) == risen


def test_a_lost_replica_is_met_as_a_spike_and_not_settled_on() -> None:
    state = RetuneState()
    calm = signals(replicas=2)
    for now in range(60):
        _, state = decide(context(float(now), calm, setting()), state)
    late = signals(replicas=1, ttft_p95_s=1.5, waiting=9, running=16, local_per_s=5.0)
    found = []
    for now in range(60, 70):
        decision, state = decide(context(float(now), late, setting()), state)
        found.append(decision.action)
    assert Action.MOVE in found
    assert Action.SETTLE not in found
    assert state.home == setting()


# Quality.


def test_the_guard_waits_out_one_noisy_reading_and_never_goes_back_to_what_broke_quality() -> None:
    home, capped = setting(), setting("1.5")
    state = RetuneState(home=home)
    noisy = signals(lost_gate_mass=0.021)
    decision, state = decide(context(0.0, noisy, capped), state)
    assert decision.setting is None
    decision, state = decide(context(1.0, signals(lost_gate_mass=0.015), capped), state)
    for now in (2.0, 3.0, 4.0):
        decision, state = decide(context(now, noisy, capped), state)
    assert decision.action is Action.GUARD
    assert state.lossy_factor == Decimal("1.5")
    state = resume(state, saved_at_s=4.0, elapsed_s=60.0, now_s=0.0)
    hot = signals(ttft_p95_s=1.0, waiting=4, rank_demand=1.8)
    seen = home
    for now in range(1, 400):
        decision, state = decide(context(float(now), hot, seen), state)
        seen = decision.setting or seen
        assert seen.prefill_cap is None or seen.prefill_cap > Decimal("1.5")
    assert seen.prefill_cap is not None


def test_a_young_factor_that_costs_most_of_the_room_is_loosened_and_an_old_one_left() -> None:
    costly = signals(lost_gate_mass=0.014, expert_cv=0.8)

    def after(capped_at_s: float) -> list[Setting]:
        state = RetuneState(home=setting("1.5"), origin=setting(), capped_at_s=capped_at_s)
        seen, found = setting("1.5"), []
        for now in range(120):
            decision, state = decide(context(float(now), costly, seen), state)
            if decision.setting is not None:
                assert decision.changed == (CAPACITY,)
                seen = decision.setting
                found.append(seen)
        return found

    (looser,) = after(0.0)[:1]
    assert looser.prefill_cap is None or looser.prefill_cap > Decimal("1.5")
    assert after(-2 * HOUR_S) == []


# The state file.


def test_a_state_of_the_release_before_is_read_and_what_it_counted_forgotten() -> None:
    old = json.loads(Path(__file__).with_name("state_v1.json").read_text(encoding="utf-8"))
    state = RetuneState.model_validate(old)
    assert state.version == STATE_VERSION
    assert state.home == setting("1.5")
    assert state.table
    assert RetuneState.model_validate_json(state.model_dump_json(by_alias=True)) == state
    with pytest.raises(ValueError, match="recurred"):
        RetuneState.model_validate({**old, "version": STATE_VERSION})
