"""The guard's rules: what a block is, when a trial ends and how, and what holds whatever happens in whatever order."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_core.setting import Setting
from moe_tuner.explore import (
    CHANGES_KEPT,
    LINGER_S,
    SPOILT_MAX,
    Do,
    End,
    ExploreContext,
    ExploreState,
    Nothing,
    Phase,
    Predicted,
    Step,
    Suggestion,
    step,
)
from moe_tuner.measure import Measurement, Unmeasured
from moe_tuner.report import Effect
from tests.tuner.tuner_world import SLO, measured, setting

HOME, CANDIDATE = setting(seqs=16), setting("1.5", seqs=16)


@dataclass
class Run:
    """The state machine second by second on a plant that is told what to read."""

    window_s: float = 10.0
    number: int = 1
    read: dict[bool, Measurement | Unmeasured] = field(
        default_factory=lambda: {False: measured(), True: measured(busy_s_per_ktoken=0.2)}
    )
    predicted: Predicted | None = None
    now: int = 0

    def __post_init__(self) -> None:
        self.state, self.in_force = ExploreState(), HOME
        self.steps: list[tuple[int, Step]] = []
        self.answers: dict[str, object] = {}

    def tick(self, **event: object) -> Step:
        self.now += 1
        base = ExploreContext(
            now_s=float(self.now), window_s=self.window_s, home=HOME, slo=SLO, max_lost_gate_mass=0.02
        )
        taken, self.state = step(base.model_copy(update={**self.answers, **event}), self.state)
        self.answers = {}
        if taken.do is Do.MEASURE:
            self.answers = {"measurement": self.read[self.in_force == CANDIDATE]}
        elif taken.do is Do.ASK:
            proposed = Suggestion(number=self.number, params={}, setting=CANDIDATE, predicted=self.predicted)
            self.answers = {"suggestion": proposed}
        elif taken.setting is not None:
            self.in_force = taken.setting
        if taken.do is not Do.NOTHING:
            self.steps.append((self.now, taken))
        return taken

    def until(self, do: Do, limit: int = 1500, **event: object) -> Step:
        for _ in range(limit):
            taken = self.tick(**event)
            if taken.do is do:
                return taken
        raise AssertionError(f"no {do} within {limit} s: {self.state.why}")

    def on_candidate(self, seconds: int = 6) -> Run:
        self.until(Do.APPLY)
        for _ in range(seconds):
            self.tick()
        return self


def test_a_block_is_three_requests_long_after_a_wash_out_of_one() -> None:
    run = Run()
    run.read = {arm: measured(busy_s_per_ktoken=cost, request_p95_s=20.0) for arm, cost in ((False, 0.3), (True, 0.2))}
    run.until(Do.FINISH, 3000)
    blocks = [(at, taken.window_s) for at, taken in run.steps if taken.do is Do.MEASURE and at > run.steps[2][0] + 1]
    assert {window_s for _, window_s in blocks[1:]} == {60.0}
    starts = [at for at, _ in blocks]
    assert all(later - earlier >= 80 for earlier, later in itertools.pairwise(starts[1:]))


def test_requests_that_are_too_long_for_blocks_are_not_tried_on() -> None:
    run = Run(read={False: measured(request_p95_s=400.0), True: measured()})
    for _ in range(300):
        assert run.tick().do in (Do.NOTHING, Do.MEASURE)
    while run.state.phase is not Phase.IDLE:
        run.tick()
    assert "requests of 400 s (p95) would need blocks of 1200 s" in run.state.why


def test_the_coin_orders_pairs_both_ways_and_alike_in_a_replay() -> None:
    def orders(number: int) -> list[Do]:
        run = Run(number=number)
        run.until(Do.FINISH)
        return [taken.do for _, taken in run.steps if taken.do in (Do.APPLY, Do.RETURN)]

    assert orders(1) == orders(1)
    first = set()
    for number in range(8):
        run = Run(number=number)
        run.until(Do.ASK)
        run.tick()
        first.add(run.in_force == CANDIDATE)
    assert first == {True, False}


def test_a_spoilt_pair_is_thrown_away_and_the_third_ends_the_trial() -> None:
    run = Run()
    run.read[True] = measured(requests=900, requests_per_s=90)
    ended = run.until(Do.FINISH)
    assert ended.end is End.CENSORED
    assert "arrivals went from" in ended.reason
    assert sum(taken.do is Do.MEASURE for _, taken in run.steps) == 2 + 2 * SPOILT_MAX


CANDIDATE_READS = [
    pytest.param({"busy_s_per_ktoken": 0.2}, End.PROMOTED, "is promoted", id="cheaper"),
    pytest.param({"busy_s_per_ktoken": 0.299}, End.NO_GAIN, "no difference beyond noise", id="no cheaper"),
    pytest.param({"busy_s_per_ktoken": 0.5}, End.ROLLED_BACK, "66.7% dearer over 1 pairs", id="dearer"),
    pytest.param({"ttft_p95_s": 0.9}, End.ROLLED_BACK, "breaks ttft by 12.5%", id="TTFT"),
    pytest.param({"itl_p95_s": 0.06}, End.ROLLED_BACK, "breaks itl by 20.0%", id="ITL"),
    pytest.param({"lost_gate_mass": 0.03}, End.ROLLED_BACK, "breaks lost_gate_mass", id="quality"),
    pytest.param({"failed_share": 0.05}, End.ROLLED_BACK, "breaks failed", id="failures"),
    pytest.param({"lost_gate_mass": None}, End.CENSORED, "its quality cannot be judged", id="quality unknown"),
]


@pytest.mark.parametrize(("read", "end", "words"), CANDIDATE_READS)
def test_what_the_candidates_blocks_read_ends_its_trial(read: dict[str, object], end: End, words: str) -> None:
    run = Run()
    run.read[True] = measured(**read)
    ended = run.until(Do.FINISH)
    assert ended.end is end
    assert words in ended.reason
    assert ended.setting == (CANDIDATE if end is End.PROMOTED else HOME)


def test_a_breach_just_after_the_candidate_left_is_still_its_own() -> None:
    for wait, end in ((5, End.ROLLED_BACK), (int(LINGER_S) + 5, End.CENSORED)):
        run = Run(window_s=40.0)
        run.until(Do.APPLY)
        run.until(Do.RETURN)
        for _ in range(wait):
            run.tick()
        taken = run.tick(breach="TTFT p95 2 s of 0.8 s")
        assert taken.end is end


def test_a_replica_that_dies_after_the_candidate_was_in_force_is_its_crash() -> None:
    run = Run()
    run.until(Do.APPLY)
    run.until(Do.RETURN)
    run.tick()
    assert run.tick(restarted=("r0",)).constraints == {"crash": 1.0}


def test_a_replica_that_dies_before_the_candidate_was_in_force_is_not() -> None:
    run = next(run for run in (Run(number=number) for number in range(20)) if first_is_home(run))
    taken = run.tick(restarted=("r0",))
    assert (taken.end, taken.constraints) == (End.CENSORED, {})


def first_is_home(run: Run) -> bool:
    run.until(Do.ASK)
    run.tick()
    return run.in_force == HOME


def test_a_trial_leaves_changes_for_the_spike() -> None:
    run = Run()
    taken = run.until(Do.FINISH, changes_left=CHANGES_KEPT)
    assert taken.end is End.CENSORED
    assert f"{CHANGES_KEPT} changes are left this hour" in taken.reason
    assert run.in_force == HOME


REFUSED = Predicted(effect=Effect(ratio=1.4), constraints={"ttft": 0.3}, refused="it would break ttft by 30.0%")
SIMULATED = [
    pytest.param(REFUSED, None, "refused by the simulator: it would break ttft", id="the simulator refuses it"),
    pytest.param(Predicted(effect=Effect(ratio=0.8)), "first day in Auto", "0.800 of the incumbent's", id="first day"),
]


@pytest.mark.parametrize(("predicted", "only", "words"), SIMULATED)
def test_a_candidate_that_only_the_simulator_may_try_is_never_applied(
    predicted: Predicted, only: str | None, words: str
) -> None:
    run = Run(predicted=predicted)
    taken = run.until(Do.FINISH, simulator_only=only)
    assert (taken.end, taken.cost) == (End.SIMULATED, predicted.effect.ratio)
    assert words in taken.reason
    assert all(one.do is not Do.APPLY for _, one in run.steps)


def test_without_a_simulator_the_first_day_tries_nothing() -> None:
    taken = Run().until(Do.FINISH, simulator_only="first day in Auto")
    assert taken.end is End.CENSORED
    assert "the simulator has no word on it" in taken.reason


READS = st.sampled_from(
    [
        measured(),
        measured(busy_s_per_ktoken=0.2),
        measured(busy_s_per_ktoken=0.5),
        measured(ttft_p95_s=2.0),
        measured(requests=900, requests_per_s=90),
        measured(request_p95_s=9.0),
        Unmeasured(reason="too little traffic"),
    ]
)
EVENTS = st.fixed_dictionaries(
    {},
    optional={
        "closed": st.sampled_from(["paused", "the disk is full"]),
        "outside": st.just("arrivals rose"),
        "breach": st.just("TTFT"),
        "restarted": st.just(("r0",)),
        "failed": st.just("a rank refused"),
        "in_force": st.just(False),
        "changes_left": st.integers(0, 10),
        "simulator_only": st.just("first day in Auto"),
        "suggestion": st.sampled_from([Nothing(reason="none"), None]),
    },
)


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ({"outside": "arrivals rose"}, "the traffic changed: arrivals rose"),
        ({"breach": "TTFT"}, "TTFT"),
        ({"restarted": ("r0",)}, "replica r0 died"),
        ({"failed": "a rank refused"}, "a rank refused"),
    ],
)
def test_a_candidate_is_handed_back_where_something_happened_while_the_study_was_asked(
    event: dict[str, object], says: str
) -> None:
    run = Run()
    run.until(Do.ASK)
    taken = run.tick(**event)
    assert (taken.do, taken.end, taken.setting) == (Do.FINISH, End.CENSORED, None)
    assert says in taken.reason
    assert run.in_force == HOME
    run.until(Do.APPLY)


@example(seed=1747603986, rare=[{"outside": "arrivals rose"}], reads=[measured()])
@given(seed=st.integers(0, 2**32), rare=st.lists(EVENTS, min_size=1, max_size=6), reads=st.lists(READS, min_size=1))
@settings(max_examples=25, deadline=None)
def test_whatever_happens_in_whatever_order(
    seed: int, rare: list[dict[str, object]], reads: list[Measurement | Unmeasured]
) -> None:
    """No candidate goes in against a closed door, none stays after a reason to stop, none is promoted on too little."""
    rng, run = random.Random(seed), Run(number=seed % 1000)
    for _ in range(200):
        event = rng.choice(rare) if rng.random() < 0.04 else {}
        run.read = {False: measured(), True: rng.choice(reads)}
        before: Setting = run.in_force
        trial_before = run.state.in_trial
        taken = run.tick(**event)
        reasons = {"closed", "simulator_only", "outside", "breach", "restarted", "failed"} & event.keys()
        if reasons:
            assert run.in_force == HOME
            assert not trial_before or taken.do is Do.FINISH
        if taken.do is Do.APPLY:
            assert before == HOME
            assert not reasons
            assert event.get("changes_left", 1000) > CHANGES_KEPT  # type: ignore[operator]
        if taken.end is End.PROMOTED:
            assert taken.measured is not None
            assert taken.measured.evidence >= 20
            return
        if taken.do is Do.FINISH:
            assert run.in_force == HOME
        assert (run.in_force == CANDIDATE) == run.state.candidate_in_force
