"""The spill policy as rules: what must hold for every queue, budget and cap, and a table of named situations."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.forecast import (
    EngineReport,
    Failure,
    RevisionView,
    SpillContext,
    TargetView,
    Thresholds,
    forecast_local,
    foreign_load,
)
from moe_core.latency import UNKNOWN, LatencyEstimate, observe_decode, observe_ttft, predict_ttft_s
from moe_core.spill import Action, Blocked, Decision, Reason, SpillState, decide

SLO_S = 0.8


def estimate(tokens_per_s: float = 10_000.0, base_s: float = 0.05, at_s: float = 99.0) -> LatencyEstimate:
    """An estimate that has seen plenty of requests on this line."""
    known = UNKNOWN
    for work in (100, 1000, 4000, 8000) * 12:
        known = observe_ttft(
            known, at_s, work_tokens=work, prompt_tokens=500, slot_wait_s=0, ttft_s=base_s + work / tokens_per_s
        )
    return known


KNOWN = estimate()
QUICK_API = LatencyEstimate(base_prior_s=0.3, slope_prior_s=0.0)


def report(**more: Any) -> EngineReport:
    return EngineReport(**{"running": 0, "waiting": 0, "kv_usage": 0.1, "active_limit": 64, "age_s": 0.5, **more})


def revision(name: str = "r", **more: Any) -> RevisionView:
    return RevisionView(**{"name": name, "weight": 100, "running": 1, "estimate": KNOWN, "report": report(), **more})


def target(name: str = "api", **more: Any) -> TargetView:
    return TargetView(**{"name": name, "estimate": QUICK_API, **more})


def context(*revisions: RevisionView, **more: Any) -> SpillContext:
    thresholds = Thresholds(more.pop("miss", 0.5), more.pop("cap", 1.0))
    return SpillContext(
        **{
            "now_s": 100.0,
            "prompt_tokens": 500,
            "ttft_slo_s": SLO_S,
            "thresholds": thresholds,
            "revisions": revisions or (revision(),),
            "targets": (target(),),
            **more,
        }
    )


QUEUED = revision(waiting_requests=20, waiting_tokens=20_000.0)
HOPELESS = revision(waiting_requests=200, waiting_tokens=200_000.0)
DOWN = revision(available=False)
UNWEIGHTED = revision("idle", weight=0)
DRAINING = revision(weight=0)
DEAR = target(cost_usd=Decimal("0.02"))


QUICK, SLOW = QUICK_API, LatencyEstimate(base_prior_s=0.6, slope_prior_s=0.0)


def priced(name: str, usd: float, estimate: LatencyEstimate = QUICK, **more: Any) -> TargetView:
    return target(name, estimate=estimate, expected_usd=usd, cost_usd=Decimal(repr(2 * usd)), **more)


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        pytest.param((priced("first", 0.02), priced("cheap", 0.01)), "cheap", id="the cheapest, wherever it stands"),
        pytest.param((priced("first", 0.01), priced("second", 0.01)), "first", id="of equals the first"),
        pytest.param((priced("first", 0.02), priced("late", 0.018, SLOW)), "first", id="a little cheaper, often late"),
        pytest.param((priced("first", 0.02), priced("late", 0.002, SLOW)), "late", id="a tenth of the price"),
        pytest.param(
            (priced("first", 0.02), priced("cheap", 0.01, available=False)), "first", id="the cheapest is down"
        ),
        pytest.param((target("known", cost_usd=Decimal("0.01")), priced("dear", 0.02)), "known", id="its most is less"),
    ],
)
def test_a_spilled_request_goes_where_it_is_cheapest_late_answers_priced_in(
    targets: tuple[TargetView, ...], want: str
) -> None:
    for now in (
        context(QUEUED, targets=targets, budget_left_usd=Decimal(1)),
        context(DOWN, targets=targets, budget_left_usd=Decimal(1)),
    ):
        decision, _ = decide(now, SpillState())
        assert (decision.action, decision.target) == (Action.SPILL, want)


def test_the_next_cheapest_is_next_where_one_has_failed() -> None:
    targets = (priced("a", 0.03), priced("b", 0.01), priced("c", 0.02))
    tried: frozenset[str] = frozenset()
    order = []
    for _ in targets:
        decision, _ = decide(context(DOWN, targets=targets, budget_left_usd=Decimal(1), tried=tried), SpillState())
        assert decision.target is not None
        order.append(decision.target)
        tried |= {decision.target}
    assert order == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("given_context", "want"),
    [
        pytest.param(context(), (Action.LOCAL, Reason.WITHIN_SLO, None), id="short queue"),
        pytest.param(context(QUEUED), (Action.SPILL, Reason.SLO_PREDICTED, None), id="long queue"),
        pytest.param(
            context(QUEUED, miss=1.0), (Action.LOCAL, Reason.WITHIN_SLO, None), id="threshold that never spills"
        ),
        pytest.param(context(QUEUED, targets=()), (Action.LOCAL, Reason.LATE, Blocked.NO_TARGET), id="late, no target"),
        pytest.param(context(QUEUED, cap=0.0), (Action.LOCAL, Reason.LATE, Blocked.SHARE_CAP), id="share cap 0"),
        pytest.param(
            context(QUEUED, targets=(target(available=False),)),
            (Action.LOCAL, Reason.LATE, Blocked.TARGET_DOWN),
            id="target's breaker open",
        ),
        pytest.param(
            context(QUEUED, targets=(target(cost_usd=Decimal("0.02")),), budget_left_usd=Decimal("0.01")),
            (Action.LOCAL, Reason.LATE, Blocked.BUDGET),
            id="budget too small",
        ),
        pytest.param(
            context(QUEUED, targets=(target(estimate=estimate(base_s=9.0)),)),
            (Action.LOCAL, Reason.LATE, Blocked.NO_GAIN),
            id="target slower still",
        ),
        pytest.param(context(HOPELESS, targets=()), (Action.SHED, Reason.OVERLOAD, Blocked.NO_TARGET), id="hopeless"),
        pytest.param(context(DOWN), (Action.SPILL, Reason.LOCAL_DOWN, None), id="breaker open"),
        pytest.param(
            context(DOWN, targets=()),
            (Action.SHED, Reason.UNAVAILABLE, Blocked.NO_TARGET),
            id="breaker open, no target",
        ),
        pytest.param(
            context(tried=frozenset({"r"}), local_failure=Failure.FAILED),
            (Action.SPILL, Reason.LOCAL_FAILED, None),
            id="the attempt failed",
        ),
        pytest.param(
            context(tried=frozenset({"r"}), local_failure=Failure.OVERLOADED, targets=()),
            (Action.SHED, Reason.OVERLOAD, Blocked.NO_TARGET),
            id="the engine refused, no target",
        ),
        pytest.param(
            context(tried=frozenset({"r", "api"}), local_failure=Failure.FAILED),
            (Action.SHED, Reason.UNAVAILABLE, Blocked.TARGET_DOWN),
            id="everything was tried",
        ),
        pytest.param(
            context(revision(running=0, estimate=estimate(base_s=30, at_s=90))),
            (Action.LOCAL, Reason.PROBE, None),
            id="idle, last seen slow",
        ),
        pytest.param(
            context(revision(running=0, estimate=estimate(base_s=30, at_s=99))),
            (Action.SPILL, Reason.SLO_PREDICTED, None),
            id="idle, seen slow just now",
        ),
        pytest.param(
            context(revision(running=64, waiting_requests=20, report=report(active_limit=64))),
            (Action.SPILL, Reason.SLO_PREDICTED, None),
            id="batch full",
        ),
        pytest.param(
            context(revision(running=64, waiting_requests=20, report=report(active_limit=64, age_s=60))),
            (Action.LOCAL, Reason.WITHIN_SLO, None),
            id="batch full by a report too old to count",
        ),
        pytest.param(
            context(revision(report=report(foreign_waiting=40))),
            (Action.SPILL, Reason.SLO_PREDICTED, None),
            id="others queue at the engine",
        ),
        pytest.param(context(DRAINING), (Action.SPILL, Reason.NO_WEIGHT, None), id="no weight anywhere"),
        pytest.param(
            context(DRAINING, UNWEIGHTED, cap=0.0), (Action.SPILL, Reason.NO_WEIGHT, None), id="no weight, share cap 0"
        ),
        pytest.param(
            context(DRAINING, targets=()), (Action.SHED, Reason.NO_WEIGHT, Blocked.NO_TARGET), id="no weight, no target"
        ),
        pytest.param(
            context(DRAINING, targets=(DEAR,), budget_left_usd=Decimal("0.01")),
            (Action.SHED, Reason.NO_WEIGHT, Blocked.BUDGET),
            id="no weight, budget too small",
        ),
        pytest.param(
            context(DRAINING, tried=frozenset({"api"})),
            (Action.SHED, Reason.NO_WEIGHT, Blocked.TARGET_DOWN),
            id="no weight, the target failed",
        ),
        pytest.param(
            context(DOWN, UNWEIGHTED), (Action.LOCAL, Reason.WITHIN_SLO, None), id="one without weight helps out"
        ),
        pytest.param(
            context(DOWN, revision("idle", weight=0, available=False)),
            (Action.SPILL, Reason.LOCAL_DOWN, None),
            id="both down",
        ),
        pytest.param(
            context(revision(), UNWEIGHTED, tried=frozenset({"r"}), local_failure=Failure.FAILED),
            (Action.SPILL, Reason.LOCAL_FAILED, None),
            id="one attempt failed: not down yet",
        ),
    ],
)
def test_what_is_decided(given_context: SpillContext, want: tuple[Action, Reason, Blocked | None]) -> None:
    decision, _ = decide(given_context, SpillState())
    assert (decision.action, decision.reason, decision.blocked) == want
    assert (decision.retry_after_s > 0) == (decision.action is Action.SHED)
    assert (decision.target is None) == (decision.action is Action.SHED)


queues = st.builds(
    revision,
    waiting_requests=st.integers(0, 500),
    waiting_tokens=st.floats(0, 1e6),
    running=st.integers(0, 300),
    available=st.booleans(),
    weight=st.integers(0, 100),
    report=st.none()
    | st.builds(
        report,
        running=st.integers(0, 300),
        kv_usage=st.floats(0, 1),
        active_limit=st.integers(1, 300),
        age_s=st.floats(0, 100),
        foreign_running=st.integers(0, 300),
        foreign_waiting=st.integers(0, 300),
    ),
    estimate=st.builds(estimate, tokens_per_s=st.floats(100, 1e5), base_s=st.floats(0.001, 5), at_s=st.floats(0, 100)),
)
contexts = st.builds(
    lambda queue, cost, left, **more: context(queue, targets=(target(cost_usd=cost),), budget_left_usd=left, **more),
    queues,
    st.decimals(0, 10, places=6),
    st.none() | st.decimals(0, 10, places=6),
    prompt_tokens=st.integers(1, 100_000),
    miss=st.floats(0, 1),
    cap=st.floats(0, 1),
    elapsed_s=st.floats(0, 2),
    tried=st.sets(st.sampled_from(["r", "api"])).map(frozenset),
    local_failure=st.none() | st.sampled_from(Failure),
)
states = st.builds(
    SpillState,
    spilling=st.sets(st.just("r")).map(frozenset),
    arrivals=st.floats(0, 1000),
    spilled=st.floats(0, 1000),
    at_s=st.floats(0, 100),
)


@given(contexts, st.integers(0, 100), st.floats(0, 1e5), st.integers(0, 100))
def test_more_waiting_never_lowers_p_miss(before: SpillContext, more: int, tokens: float, foreign: int) -> None:
    queue = before.revisions[0]
    longer = replace(
        queue, waiting_requests=queue.waiting_requests + more, waiting_tokens=queue.waiting_tokens + tokens
    )
    if longer.report is not None:
        longer = replace(longer, report=replace(longer.report, foreign_waiting=longer.report.foreign_waiting + foreign))
    assert forecast_local(before, longer).p_miss >= forecast_local(before, queue).p_miss


@given(contexts, states)
def test_nothing_is_spilled_without_the_money(before: SpillContext, state: SpillState) -> None:
    decision, _ = decide(before, state)
    cost = before.targets[0].cost_usd
    if decision.action is Action.SPILL and cost > 0:
        assert before.budget_left_usd is not None
        assert before.budget_left_usd >= cost


@given(contexts, states)
def test_nothing_is_spilled_with_share_cap_0(before: SpillContext, state: SpillState) -> None:
    """But where no revision is to take requests at all."""
    none = replace(before, thresholds=Thresholds(before.thresholds.miss_probability, 0.0))
    decision, _ = decide(none, state)
    assert decision.action is not Action.SPILL or before.revisions[0].weight == 0


@given(contexts, states, st.lists(queues, max_size=3))
def test_without_weights_no_revision_takes_a_request(
    before: SpillContext, state: SpillState, others: list[RevisionView]
) -> None:
    """And nothing of it is held against the share cap later."""
    views = (before.revisions[0], *(replace(view, name=f"r{i}") for i, view in enumerate(others)))
    drained = replace(before, revisions=tuple(replace(view, weight=0) for view in views))
    decision, after = decide(drained, state)
    assert decision.action is not Action.LOCAL
    assert after == state


@given(contexts, states, st.lists(queues, max_size=3))
def test_one_without_weight_takes_a_request_only_while_all_others_are_down(
    before: SpillContext, state: SpillState, others: list[RevisionView]
) -> None:
    views = (before.revisions[0], *(replace(view, name=f"r{i}") for i, view in enumerate(others)))
    decision, _ = decide(replace(before, revisions=views), state)
    weight = {view.name: view.weight for view in views}
    if decision.action is Action.LOCAL and decision.target is not None and weight[decision.target] == 0:
        assert any(weight.values())
        assert not any(view.available for view in views if view.weight)


@given(contexts, states)
def test_it_decides_the_same_again_and_never_where_it_was(before: SpillContext, state: SpillState) -> None:
    first = decide(before, state)
    assert decide(before, state) == first
    assert first[0].target not in before.tried


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_the_share_of_spilled_requests_stays_below_its_cap(long_queue: list[bool], cap: float) -> None:
    state, spilled = SpillState(), 0
    for count, queued in enumerate(long_queue, 1):
        decision, state = decide(context(QUEUED if queued else revision(), cap=cap), state)
        spilled += decision.action is Action.SPILL
        assert spilled <= cap * count + 1e-6


@given(st.floats(0, 100), st.floats(0, 10), st.integers(0, 1000))
def test_a_cap_of_1_blocks_nothing_even_long_after_arrival(gap_s: float, elapsed_s: float, before: int) -> None:
    """Everything before was spilled too, and the local attempt took its time to fail."""
    state = SpillState(arrivals=before, spilled=before, at_s=100.0)
    first = context(revision(), now_s=100.0 + gap_s)
    _, state = decide(first, state)
    failed = replace(
        first,
        now_s=first.now_s + elapsed_s,
        elapsed_s=elapsed_s,
        tried=frozenset({"r"}),
        local_failure=Failure.FAILED,
    )
    assert decide(failed, state)[0].action is Action.SPILL


def run(count: int, *views: RevisionView) -> list[Decision]:
    state, decisions = SpillState(), []
    for _ in range(count):
        decision, state = decide(context(*views), state)
        decisions.append(decision)
    return decisions


@given(st.lists(st.integers(0, 100), min_size=1, max_size=5).filter(any))
def test_weights_are_kept_exactly(weights: list[int]) -> None:
    views = [revision(f"r{i}", weight=weight) for i, weight in enumerate(weights)]
    chosen = Counter(decision.target for decision in run(2 * sum(weights), *views))
    assert chosen == {f"r{i}": 2 * weight for i, weight in enumerate(weights) if weight}


def test_a_small_weight_is_spread_not_bunched() -> None:
    decisions = run(100, revision("old", weight=95), revision("new", weight=5))
    at = [index for index, decision in enumerate(decisions) if decision.target == "new"]
    assert {b - a for a, b in pairwise(at)} == {20}


def test_a_revision_that_is_down_leaves_its_share_to_the_others() -> None:
    decisions = run(10, revision("a", weight=50, available=False), revision("b", weight=50))
    assert {decision.target for decision in decisions} == {"b"}


def test_those_without_weight_help_out_in_turn() -> None:
    decisions = run(10, DOWN, revision("a", weight=0), revision("b", weight=0))
    assert Counter(decision.target for decision in decisions) == {"a": 5, "b": 5}


def test_coming_back_takes_more_than_going() -> None:
    """Between 0.8 × threshold and the threshold a revision stays as it was."""
    near = next(
        view
        for tokens in range(0, 20_000, 50)
        if 0.41 < forecast_local(context(), view := revision(waiting_requests=1, waiting_tokens=tokens)).p_miss < 0.49
    )
    assert decide(context(near), SpillState())[0].action is Action.LOCAL
    _, spilling = decide(context(QUEUED), SpillState())
    assert decide(context(near), spilling)[0].action is Action.SPILL
    assert decide(context(QUEUED, miss=1.0), spilling)[0].reason is Reason.WITHIN_SLO
    _, back = decide(context(), spilling)
    assert decide(context(near), back)[0].action is Action.LOCAL


def test_an_old_or_missing_report_only_widens_the_forecast() -> None:
    ages = [forecast_local(context(), revision(report=report(age_s=age))) for age in (0, 5, 9, 60)]
    missing = forecast_local(context(), revision(report=None))
    assert {item.ttft_s for item in (*ages, missing)} == {ages[0].ttft_s}
    widths = [item.p_miss for item in ages]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] == missing.p_miss < 0.5


@pytest.mark.parametrize(
    ("engine", "own", "want"),
    [
        pytest.param((5, 2), (5, 2), (0, 0), id="all ours"),
        pytest.param((8, 4), (5, 2), (3, 2), id="others run and wait"),
        pytest.param((5, 0), (2, 3), (0, 0), id="ours prefill, which the engine calls running"),
        pytest.param((0, 0), (5, 5), (0, 0), id="the report lags"),
        pytest.param((2, 9), (2, 0), (0, 9), id="others wait"),
    ],
)
def test_foreign_load(engine: tuple[int, int], own: tuple[int, int], want: tuple[int, int]) -> None:
    assert foreign_load(*engine, *own) == want


@pytest.mark.parametrize(("rate", "base"), [(500.0, 0.3), (10_000.0, 0.05), (60_000.0, 0.02)])
def test_the_estimate_learns_the_line(rate: float, base: float) -> None:
    known = estimate(rate, base)
    for work in (300, 2000, 6000):
        assert predict_ttft_s(known, work) == pytest.approx(base + work / rate, rel=0.15)


def test_the_estimate_forgets_and_is_not_moved_by_one_outlier() -> None:
    slow = observe_ttft(KNOWN, 100.0, work_tokens=500, prompt_tokens=500, slot_wait_s=0, ttft_s=300.0)
    assert predict_ttft_s(slow, 500) < 1.5 * predict_ttft_s(KNOWN, 500)
    late = KNOWN
    for step in range(10):
        late = observe_ttft(
            late, 400.0 + step, work_tokens=500 * (step + 1), prompt_tokens=500, slot_wait_s=0, ttft_s=2.0
        )
    assert predict_ttft_s(late, 500) == pytest.approx(2.0, rel=0.4)


def test_decode_is_learned_without_jumps() -> None:
    known = UNKNOWN
    for _ in range(100):
        known = observe_decode(known, itl_s=0.01, output_tokens=50)
    assert known.itl_s == pytest.approx(0.01, rel=0.01)
    assert known.service_s == pytest.approx(0.5, rel=0.05)
    assert observe_decode(known, itl_s=10.0, output_tokens=50).itl_s < 1.5 * known.itl_s


@given(
    st.lists(st.tuples(st.floats(1, 1e6), st.floats(1e-4, 600), st.floats(0, 50)), max_size=60),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
)
def test_a_forecast_is_positive_and_grows_with_work(
    seen: list[tuple[float, float, float]], work: float, more: float
) -> None:
    known, now_s = UNKNOWN, 0.0
    for tokens, ttft_s, gap_s in seen:
        now_s += gap_s
        known = observe_ttft(known, now_s, work_tokens=tokens, prompt_tokens=tokens, slot_wait_s=0, ttft_s=ttft_s)
    assert 0 < predict_ttft_s(known, work) <= predict_ttft_s(known, work + more)
    assert known.sigma > 0


def test_a_decision_takes_less_than_a_millisecond() -> None:
    views = tuple(revision(f"r{i}", weight=50) for i in range(4))
    many = context(*views, targets=tuple(target(f"t{i}") for i in range(4)))
    best, state = 1.0, SpillState()
    for _ in range(50):
        started = time.perf_counter()
        _, state = decide(many, state)
        best = min(best, time.perf_counter() - started)
    assert best < 0.001
