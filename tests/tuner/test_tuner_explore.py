"""The slow loop on a synthetic plant: it finds a better setting, takes harmful ones back, and its study outlives it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moe_core.setting import ACTIVE_SEQS, CAPACITY, Setting
from moe_tuner.evidence import pairs_needed
from moe_tuner.explore import Do, End, ExploreContext, ExploreState, Nothing, Phase, Step, Suggestion, step
from moe_tuner.measure import Measurement, Outcome, Unmeasured, judge, noise_of, shifted
from moe_tuner.space import Space, candidate, space_of
from moe_tuner.study import StorageUnreachable, Study, public_storage
from tests.tuner.tuner_world import BOUNDS, SLO, measured, setting

WINDOW_S = 10.0
MAX_LOST = 0.02


@dataclass
class Bench:
    """A study and the state machine on a plant, second by second."""

    study: Study
    plant: Callable[[Setting, random.Random], Measurement | Unmeasured]
    home: Setting = field(default_factory=lambda: setting(seqs=16))
    events: dict[int, dict[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.in_force = self.home
        self.state = ExploreState()
        self.steps: list[tuple[int, Step]] = []
        self.held: dict[str, int] = {}
        self.random = random.Random(5)
        self.measurement: Measurement | Unmeasured | None = None
        self.suggestion: object = None
        self.now = 0

    def run(self, seconds: int) -> Bench:
        for _ in range(seconds):
            self.now += 1
            base = ExploreContext(
                now_s=float(self.now), window_s=WINDOW_S, home=self.home, slo=SLO, max_lost_gate_mass=MAX_LOST
            )
            event = self.events.get(self.now, {})
            update = {"measurement": self.measurement, "suggestion": self.suggestion, **event}
            self.measurement = self.suggestion = None
            taken, self.state = step(base.model_copy(update=update), self.state)
            self._carry_out(taken)
            self.held[self.in_force.text()] = self.held.get(self.in_force.text(), 0) + 1
        return self

    def _carry_out(self, taken: Step) -> None:
        if taken.do is Do.NOTHING:
            return
        self.steps.append((self.now, taken))
        if taken.do is Do.MEASURE:
            self.measurement = self.plant(self.in_force, self.random)
        elif taken.do is Do.ASK:
            self.suggestion = self.study.ask(self.home, space_of(BOUNDS), BOUNDS, 16)
        elif taken.do in (Do.APPLY, Do.RETURN):
            assert taken.setting is not None
            self.in_force = taken.setting
        elif taken.do is Do.FINISH:
            self.study.tell(taken)
            if taken.end is End.PROMOTED:
                assert taken.suggestion is not None
                self.home = taken.suggestion.setting
            elif taken.setting is not None:
                self.in_force = taken.setting

    def ends(self, end: End) -> list[tuple[int, Step]]:
        return [(at, taken) for at, taken in self.steps if taken.end is end]

    def applied(self) -> list[int]:
        return [at for at, taken in self.steps if taken.do is Do.APPLY]


def knee(in_force: Setting, rng: random.Random) -> Measurement:
    """Cheapest at γ 1.3 and 40 sequences; quality breaks below 1.15, ITL above 48 sequences."""
    gamma = 2.2 if in_force.prefill_cap is None else float(in_force.prefill_cap)
    seqs = in_force.engine.max_active_seqs or 16
    cost = 0.2 * (1 + 0.5 * (gamma - 1.0)) * (1 + 0.5 * abs(40 - seqs) / 40)
    return measured(
        requests=200 + rng.gauss(0, 8),
        busy_s_per_ktoken=cost * rng.gauss(1, 0.01),
        lost_gate_mass=0.0 if in_force.prefill_cap is None else 0.02 * max(0.0, 2.3 - gamma) ** 4 / 1.15**4,
        itl_p95_s=0.05 * seqs / 48,
    )


def harmful(in_force: Setting, rng: random.Random) -> Measurement:
    """Any cap costs quality, and any other batch size costs time."""
    capped = in_force.prefill_cap is not None
    dearer = 1.0 if in_force.engine.max_active_seqs == 16 else 1.4
    return measured(busy_s_per_ktoken=0.3 * dearer * rng.gauss(1, 0.01), lost_gate_mass=0.08 if capped else 0.0)


def memory_study(seed: int = 3) -> Study:
    return Study("sqlite://", "default/qwen3", seed=seed)


def test_it_finds_a_cheaper_setting_within_the_promises() -> None:
    bench = Bench(memory_study(), knee).run(2000)
    assert bench.ends(End.PROMOTED)
    rng = random.Random(0)
    start, found = knee(setting(seqs=16), rng), knee(bench.home, rng)
    assert found.busy_s_per_ktoken < 0.75 * start.busy_s_per_ktoken
    assert found.lost_gate_mass is not None
    assert found.lost_gate_mass <= MAX_LOST
    assert found.itl_p95_s is not None
    assert found.itl_p95_s <= SLO.itl_p95_s
    assert bench.study.summary().best is not None
    assert bench.state.incumbent_cost < 0.8


def test_a_promotion_needs_five_pairs_that_all_say_so() -> None:
    bench = Bench(memory_study(), knee).run(1500)
    at, promoted = bench.ends(End.PROMOTED)[0]
    assert promoted.suggestion is not None
    number = promoted.suggestion.number
    trial = [t for when, t in bench.steps if when <= at and t.suggestion and t.suggestion.number == number]
    switches = [t.do for t in trial[:-1]]
    assert switches[0] is Do.APPLY or len(switches) > 1
    assert all(one is not other for one, other in itertools.pairwise(switches))
    assert promoted.measured is not None
    assert promoted.measured.pairs >= pairs_needed(0.05) == 5
    assert promoted.measured.evidence >= 20


def test_a_harmful_candidate_goes_back_after_one_window_and_is_never_promoted() -> None:
    bench = Bench(memory_study(), harmful).run(1500)
    assert len(bench.applied()) >= 5
    assert not bench.ends(End.PROMOTED)
    assert bench.home == setting(seqs=16)
    ends = sorted(at for end in (End.ROLLED_BACK, End.NO_GAIN) for at, _ in bench.ends(end))
    for applied, ended in zip(bench.applied(), ends, strict=False):
        assert ended - applied <= 1.5 * WINDOW_S + 5
    assert all("lost_gate_mass" in taken.reason for _, taken in bench.ends(End.ROLLED_BACK) if "breaks" in taken.reason)


def test_no_point_that_broke_a_promise_is_proposed_again() -> None:
    bench = Bench(memory_study(), harmful).run(1500)
    tried = [t.suggestion.params for _, t in bench.steps if t.do is Do.APPLY and t.suggestion]
    assert len(tried) >= 8
    for index, params in enumerate(tried):
        for earlier in tried[:index]:
            far = abs(params[CAPACITY] - earlier[CAPACITY]) > 0.02
            assert far or abs(params[ACTIVE_SEQS] - earlier[ACTIVE_SEQS]) > 0.02 * earlier[ACTIVE_SEQS]


def first_apply(plant: Callable[[Setting, random.Random], Measurement] = knee) -> int:
    return Bench(memory_study(), plant).run(120).applied()[0]


INTERRUPTIONS = [
    pytest.param({"outside": "arrivals/s rose from 5 to 20"}, End.CENSORED, "the traffic changed", id="spike"),
    pytest.param({"outside": "a closed API is failing"}, End.CENSORED, "a closed API is failing", id="API outage"),
    pytest.param({"breach": "TTFT p95 2 s of 0.8 s"}, End.ROLLED_BACK, "TTFT p95 2 s", id="breach of its own"),
    pytest.param({"restarted": ("r0",)}, End.ROLLED_BACK, "replica r0 died under it", id="crash"),
    pytest.param({"closed": "Prometheus at x does not answer"}, End.CENSORED, "does not answer", id="Prometheus gone"),
    pytest.param({"failed": "a rank refused"}, End.CENSORED, "a rank refused", id="refused by a rank"),
]


@pytest.mark.parametrize(("event", "end", "words"), INTERRUPTIONS)
def test_an_interrupted_trial_goes_back_at_once(event: dict[str, object], end: End, words: str) -> None:
    at = first_apply() + 6
    bench = Bench(memory_study(), knee, events={at: event}).run(at + 1)
    assert bench.in_force == bench.home == setting(seqs=16)
    ended_at, ended = bench.steps[-1]
    assert ended_at == at
    assert ended.end is end
    assert words in ended.reason


def test_a_candidate_that_crashed_an_engine_is_recorded_as_unfit() -> None:
    at = first_apply() + 6
    bench = Bench(memory_study(), knee, events={at: {"restarted": ("r0",)}}).run(at + 1)
    assert bench.steps[-1][1].constraints == {"crash": 1.0}
    assert bench.study.summary().best is None


def test_ranks_that_do_not_acknowledge_end_the_trial() -> None:
    at = first_apply()
    events = {second: {"in_force": False} for second in range(at, at + 40)}
    bench = Bench(memory_study(), knee, events=events).run(at + 20)
    assert bench.in_force == bench.home
    assert "not every rank acknowledged" in bench.ends(End.CENSORED)[0][1].reason


def test_a_closed_gate_explores_nothing_and_says_why() -> None:
    closed = {second: {"closed": "Prometheus at x does not answer: exploring nothing"} for second in range(500)}
    bench = Bench(memory_study(), knee, events=closed).run(400)
    assert bench.steps == []
    assert bench.state.why == "Prometheus at x does not answer: exploring nothing"


def test_too_little_traffic_explores_nothing() -> None:
    bench = Bench(memory_study(), lambda *_: Unmeasured(reason="too little traffic")).run(300)
    assert not bench.applied()
    while bench.state.phase is not Phase.IDLE:
        bench.run(1)
    assert bench.state.why == "too little traffic"


def test_unsteady_traffic_explores_nothing() -> None:
    rates = iter([5, 20] * 1000)

    def unsteady(_: Setting, __: random.Random) -> Measurement:
        rate = next(rates)
        return measured(requests=rate * 10, requests_per_s=rate)

    assert not Bench(memory_study(), unsteady).run(600).applied()


def test_an_incumbent_that_breaks_the_slo_is_left_to_the_fast_loop() -> None:
    bench = Bench(memory_study(), lambda *_: measured(ttft_p95_s=1.5)).run(300)
    assert not bench.applied()


def test_a_shift_between_the_windows_of_a_pair_censors_the_trial() -> None:
    def shifts(in_force: Setting, rng: random.Random) -> Measurement:
        return knee(in_force, rng) if in_force == setting(seqs=16) else measured(requests=900, requests_per_s=90)

    bench = Bench(memory_study(), shifts).run(300)
    assert "arrivals went from" in bench.ends(End.CENSORED)[0][1].reason


def test_a_capped_candidate_without_gate_mass_cannot_be_judged() -> None:
    bench = Bench(memory_study(), lambda *_: measured(lost_gate_mass=None)).run(120)
    assert "lost gate mass is missing" in bench.ends(End.CENSORED)[0][1].reason


VERDICTS = [
    pytest.param({"busy_s_per_ktoken": 0.2}, Outcome.BETTER, id="cheaper"),
    pytest.param({"busy_s_per_ktoken": 0.29}, Outcome.SAME, id="within noise"),
    pytest.param({"busy_s_per_ktoken": 0.4}, Outcome.WORSE, id="dearer"),
    pytest.param({"busy_s_per_ktoken": 0.2, "ttft_p95_s": 0.9}, Outcome.UNFIT, id="cheaper, TTFT broken"),
    pytest.param({"busy_s_per_ktoken": 0.2, "itl_p95_s": 0.06}, Outcome.UNFIT, id="cheaper, ITL broken"),
    pytest.param({"busy_s_per_ktoken": 0.2, "lost_gate_mass": 0.03}, Outcome.UNFIT, id="cheaper, quality broken"),
    pytest.param({"busy_s_per_ktoken": 0.2, "failed_share": 0.05}, Outcome.UNFIT, id="cheaper, requests fail"),
    pytest.param({"busy_s_per_ktoken": 0.2, "itl_p95_s": None}, Outcome.BETTER, id="no ITL in one-token answers"),
]


@pytest.mark.parametrize(("changes", "outcome"), VERDICTS)
def test_promises_come_before_cost_and_cost_before_noise(changes: dict[str, object], outcome: Outcome) -> None:
    verdict = judge(measured(), measured(**changes), slo=SLO, max_lost_gate_mass=MAX_LOST, noise=0.1)
    assert verdict.outcome is outcome


def test_noise_is_learned_from_the_incumbents_own_windows() -> None:
    assert noise_of([0.3]) == 0.10
    assert noise_of([0.3, 0.3, 0.3]) == 0.03
    assert noise_of([0.2, 0.3, 0.4]) == pytest.approx(2 * 0.1 / 0.3)


def test_small_counts_may_differ_without_being_a_shift() -> None:
    few = measured(requests=12, requests_per_s=1.2)
    assert shifted(few, measured(requests=20, requests_per_s=2.0)) is None
    assert shifted(measured(), measured(prompt_tokens=900)) == "prompt tokens of a request went from 300 to 900"


# The study.


def ask(study: Study, space: Space | None = None) -> Suggestion:
    answer = study.ask(setting(seqs=16), space or space_of(BOUNDS), BOUNDS, 16)
    assert isinstance(answer, Suggestion)
    return answer


def tell(study: Study, suggestion: Suggestion, cost: float | None, **constraints: float) -> None:
    end = End.CENSORED if cost is None else End.NO_GAIN
    study.tell(Step(do=Do.FINISH, end=end, suggestion=suggestion, cost=cost, constraints=constraints, reason="test"))


def test_the_study_survives_a_restart_with_its_trials_and_its_scale(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tuner.db'}"
    first = Study(url, "default/qwen3", seed=1)
    for cost in (0.9, 0.8):
        tell(first, ask(first), cost)
    left_running = ask(first)
    first.remember_incumbent(setting("1.5"), 0.8)
    first.close()

    second = Study(url, "default/qwen3", seed=2)
    second.open()
    summary = second.summary()
    assert summary.size == 3
    assert summary.best is not None
    assert summary.best.cost == 0.8
    assert second.incumbent_cost(setting("1.5")) == 0.8
    assert second.incumbent_cost(setting("1.2")) == 1.0
    assert ask(second).number > left_running.number
    second.close()


def test_an_exhausted_space_does_not_fill_the_study_with_refused_proposals() -> None:
    bounds = BOUNDS.model_copy(update={"pinned": ("experts",), "active_seqs_min": 4, "active_seqs_max": 5})
    study = memory_study()
    for _ in range(2):
        answer = study.ask(setting(seqs=16), space_of(bounds), bounds, 16)
        assert isinstance(answer, Suggestion)
        tell(study, answer, 1.0, itl=0.5)
    for _ in range(5):
        assert isinstance(study.ask(setting(seqs=16), space_of(bounds), bounds, 16), Nothing)
    assert study.summary().size == 2


def test_trials_that_win_nothing_become_rare() -> None:
    bench = Bench(memory_study(), lambda *_: measured()).run(6000)
    times = bench.applied()
    assert times[8] - times[0] < 800
    assert times[-1] - times[-2] > 300


def test_deployments_have_studies_of_their_own(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tuner.db'}"
    one, other = Study(url, "default/a"), Study(url, "default/b")
    tell(one, ask(one), 0.9)
    assert (one.summary().size, other.summary().size) == (1, 0)
    one.close()
    other.close()


def test_the_first_candidate_differs_least_from_what_is_in_force() -> None:
    first = ask(memory_study())
    assert first.setting == setting("2", seqs=16)


def test_infeasible_and_censored_trials_are_never_the_best() -> None:
    study = memory_study()
    tell(study, ask(study), 0.5, ttft=0.2)
    tell(study, ask(study), None)
    assert study.summary().best is None
    tell(study, ask(study), 0.9, ttft=-0.2)
    best = study.summary().best
    assert best is not None
    assert best.cost == 0.9


def test_pins_take_a_knob_out_of_the_space() -> None:
    bounds = BOUNDS.model_copy(update={"pinned": ("experts.capacityFactor.prefill",)})
    space = space_of(bounds, ceiling=32)
    assert space == Space(gamma=None, active_seqs=(4, 32))
    assert space_of(bounds.model_copy(update={"pinned": ("experts", "engine")})).empty
    suggestion = ask(memory_study(), space)
    assert suggestion.setting.prefill_cap is None


def test_candidates_are_inside_the_bounds_and_on_the_grain() -> None:
    made = candidate(setting(), {CAPACITY: 1.234, ACTIVE_SEQS: 99.0}, BOUNDS)
    assert made == setting("1.25", seqs=64)


@pytest.mark.parametrize(
    "url",
    ["sqlite:////nowhere/at/all/tuner.db", "postgresql://me:hunter2@127.0.0.1:1/db", "no address"],
    ids=["no folder", "no server or driver", "no address"],
)
def test_a_storage_that_is_gone_is_one_sentence_without_its_password(url: str) -> None:
    study = Study(url, "default/qwen3")
    with pytest.raises(StorageUnreachable) as gone:
        study.open()
    assert "does not answer" in str(gone.value)
    assert "hunter2" not in str(gone.value)
    assert "hunter2" not in public_storage(url)
