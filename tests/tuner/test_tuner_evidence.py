"""The anytime-valid test: its level under the null however one looks, its power, and its interval."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.setting import Setting
from moe_tuner.evidence import Pair, candidate_first, e_value, effect, pairs_needed
from moe_tuner.explore import PAIRS_MAX, Do, End, ExploreContext, ExploreState, Suggestion, step
from tests.tuner.tuner_world import SLO, measured, setting

ALPHA = 0.05
NULLS = 120
LOADS = [
    pytest.param(lambda rng, now: rng.gauss(0.0, 0.05), id="even noise"),
    pytest.param(lambda rng, now: 0.4 * math.sin(now / 37.0), id="a swinging load"),
    pytest.param(lambda rng, now: 0.002 * now, id="a load that grows"),
    pytest.param(lambda rng, now: rng.choice([0.0, 0.0, 0.0, 0.7]), id="rare heavy blocks"),
]


def pairs_under_null(rng: random.Random, number: int, drift: float) -> list[Pair]:
    """Blocks of one and the same setting, ordered by the guard's own coin."""
    made = []
    for index in range(PAIRS_MAX):
        first, second = (math.exp(rng.gauss(drift * place, 0.1)) for place in (2 * index, 2 * index + 1))
        swap = candidate_first("null", number, index)
        made.append(Pair(incumbent=second if swap else first, candidate=first if swap else second))
    return made


@pytest.mark.parametrize("drift", [0.0, 0.03, -0.03])
def test_no_difference_reaches_the_threshold_no_more_often_than_alpha_whenever_one_looks(drift: float) -> None:
    rng, reached = random.Random(1), 0
    trials = 1000
    for number in range(trials):
        pairs = pairs_under_null(rng, number, drift)
        reached += any(e_value(pairs[:count]) >= 1 / ALPHA for count in range(1, PAIRS_MAX + 1))
    # Above this with probability below 0.001 if the level were exactly alpha.
    assert reached / trials <= ALPHA + 3.1 * math.sqrt(ALPHA * (1 - ALPHA) / trials)
    assert reached > 0


@pytest.mark.parametrize("load", LOADS)
def test_the_guard_promotes_candidates_without_effect_no_more_often_than_alpha(load: object) -> None:
    """The whole state machine on a plant where nothing but the load moves the cost."""
    ends = Counter[End]()
    for number in range(NULLS):
        ends[trial(number, lambda _, now, rng: load(rng, now))] += 1  # type: ignore[operator]
    assert ends[End.PROMOTED] <= NULLS * ALPHA + 3.1 * math.sqrt(NULLS * ALPHA * (1 - ALPHA))
    assert sum(ends.values()) == NULLS


def test_a_candidate_that_is_a_fifth_cheaper_is_promoted_nearly_always() -> None:
    def plant(in_force: Setting, _: float, rng: random.Random) -> float:
        return rng.gauss(0.0, 0.03) - (0.22 if in_force.prefill_cap is not None else 0.0)

    ends = Counter(trial(number, plant) for number in range(50))
    assert ends[End.PROMOTED] >= 45


def trial(number: int, log_cost: object) -> End:
    """One trial to its end; `log_cost` of what is in force, the time and a generator."""
    rng, home = random.Random(number), setting(seqs=16)
    proposed = Suggestion(number=number, params={}, setting=setting("1.5", seqs=16))
    in_force, state, answers = home, ExploreState(), dict[str, object]()
    for now in range(0, 6000, 5):
        base = ExploreContext(now_s=float(now), window_s=10.0, home=home, slo=SLO, max_lost_gate_mass=0.02)
        taken, state = step(base.model_copy(update=answers), state)
        answers = {}
        if taken.do is Do.MEASURE:
            cost = 0.3 * math.exp(log_cost(in_force, now, rng))  # type: ignore[operator]
            answers = {"measurement": measured(busy_s_per_ktoken=cost)}
        elif taken.do is Do.ASK:
            answers = {"suggestion": proposed}
        elif taken.do in (Do.APPLY, Do.RETURN):
            assert taken.setting is not None
            in_force = taken.setting
        elif taken.do is Do.FINISH:
            assert taken.end is not None
            return taken.end
    raise AssertionError("the trial never ended")


def test_five_pairs_are_the_fewest_that_promote_at_one_in_twenty() -> None:
    sure = Pair(incumbent=2.0, candidate=1.0)
    assert pairs_needed(0.05) == 5
    assert e_value([sure] * 4) < 20 <= e_value([sure] * 5)
    assert pairs_needed(0.5) == 1


costs = st.floats(0.01, 100)
pairs_of = st.lists(st.builds(Pair, incumbent=costs, candidate=costs), max_size=PAIRS_MAX)


@given(pairs_of)
def test_evidence_is_a_fair_bet_on_every_coin(pairs: list[Pair]) -> None:
    """Whatever was seen before, the mean over both orders of the next pair is what it was: a martingale."""
    for big in (Pair(incumbent=1.3, candidate=1.0), Pair(incumbent=50.0, candidate=1.0)):
        turned = Pair(incumbent=big.candidate, candidate=big.incumbent)
        mean = (e_value([*pairs, big]) + e_value([*pairs, turned])) / 2
        assert mean == pytest.approx(e_value(pairs), rel=1e-9)


@given(pairs_of, st.floats(1.0, 3.0))
def test_a_dearer_candidate_never_has_more_evidence(pairs: list[Pair], factor: float) -> None:
    dearer = [Pair(incumbent=pair.incumbent, candidate=pair.candidate * factor) for pair in pairs]
    assert e_value(dearer) <= e_value(pairs) * (1 + 1e-9)


@given(pairs_of.filter(bool))
def test_the_interval_holds_the_estimate_and_is_the_same_each_time(pairs: list[Pair]) -> None:
    found = effect(pairs)
    assert found == effect(pairs)
    assert found.low is not None
    assert found.high is not None
    gains = [1 / math.exp(pair.gain) for pair in pairs]
    assert min(gains) * (1 - 1e-9) <= found.low <= found.high <= max(gains) * (1 + 1e-9)


def test_the_interval_covers_the_true_effect_about_as_often_as_it_says() -> None:
    rng, covered = random.Random(3), 0
    for _ in range(200):
        pairs = [Pair(incumbent=math.exp(rng.gauss(0, 0.1)), candidate=0.8) for _ in range(12)]
        found = effect(pairs)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.8 <= found.high
    assert covered >= 170  # a percentile bootstrap over 12 pairs is a little too narrow
