"""Laws that hold in every simulation: nothing is lost or made of nothing, time adds up, the cache never runs over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_planner.sim.books import Snapshot
from moe_planner.sim.policy import PLAIN, Policy
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.simulate import simulate
from moe_planner.sim.workload import Arrivals, Lengths, Workload, generate
from moe_planner.sim.world import World
from tests.planner.sim_world import engine, rows, workloads, world, worlds

POLICIES = st.sampled_from([PLAIN, Policy()])


def watched(workload: Workload, around: World, policy: Policy, seed: int = 0) -> tuple[Result, list[Snapshot]]:
    books: list[Snapshot] = []
    return simulate(workload, around, policy, seed=seed, probe=books.append), books


@settings(max_examples=80, deadline=None)
@given(workloads(), worlds(), POLICIES, st.integers(0, 3))
def test_at_every_event_tokens_asked_are_made_in_flight_or_lost(
    workload: Workload, around: World, policy: Policy, seed: int
) -> None:
    _, books = watched(workload, around, policy, seed)
    for book in books:
        assert book.asked == book.made + book.left + book.lost
        assert book.left >= 0
    assert books[-1].left == 0
    assert books[-1].in_system == 0


@settings(max_examples=80, deadline=None)
@given(workloads(), worlds(), POLICIES)
def test_the_cache_is_never_overdrawn_and_every_block_has_a_holder(
    workload: Workload, around: World, policy: Policy
) -> None:
    _, books = watched(workload, around, policy)
    for book in books:
        for free, held in zip(book.free_blocks, book.held_blocks, strict=True):
            assert 0 <= free <= book.total_blocks
            assert free + held == book.total_blocks


@settings(max_examples=60, deadline=None)
@given(workloads(), worlds(), POLICIES)
def test_every_request_has_exactly_one_outcome_and_the_records_that_go_with_it(
    workload: Workload, around: World, policy: Policy
) -> None:
    result, _ = watched(workload, around, policy)
    assert sum(result.count(outcome) for outcome in Outcome) == len(workload)
    for i, outcome in enumerate(result.outcome):
        answered = outcome in {Outcome.LOCAL, Outcome.API}
        assert answered == (not np.isnan(result.e2e_s[i]))
        assert (answered or outcome == Outcome.CUT) == (not np.isnan(result.ttft_s[i]))
        assert (result.usd[i] > 0) == (outcome == Outcome.API)
        if answered:
            assert 0 <= result.ttft_s[i] <= result.e2e_s[i] + 1e-9
        if outcome in {Outcome.LOCAL, Outcome.CUT}:
            assert 0 <= result.where[i] < around.replicas
    assert result.api_usd <= around.budget_usd + 1e-9


@settings(max_examples=60, deadline=None)
@given(workloads(), worlds())
def test_littles_law_holds_exactly(workload: Workload, around: World) -> None:
    """∫ requests in the system dt = Σ of their times there: one side by counting at events, the other by records."""
    around = world(engine=around.engine, replicas=around.replicas)  # without losses every request has a time
    result, books = watched(workload, around, PLAIN)
    area, last, inside = 0.0, 0.0, 0
    for book in books:
        area += inside * (book.now_s - last)
        last, inside = book.now_s, book.in_system
    assert area == pytest.approx(float(np.nansum(result.e2e_s)), rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(workloads(), worlds(), POLICIES, st.integers(0, 5))
def test_the_same_seed_gives_the_same_result(workload: Workload, around: World, policy: Policy, seed: int) -> None:
    one, two = (simulate(workload, around, policy, seed=seed) for _ in range(2))
    for name in ("outcome", "where", "ttft_s", "itl_s", "e2e_s", "usd", "p_miss"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.summary() == two.summary()


@settings(max_examples=60, deadline=None)
@given(workloads(), st.integers(1, 3))
def test_no_number_of_replicas_attains_more_than_one_for_each_request(workload: Workload, replicas: int) -> None:
    """Alone on a replica a request has the lowest TTFT and ITL that there is. Between two numbers of replicas nothing
    so strict holds: a request may gain by sharing a step that its neighbour began."""
    few = simulate(workload, world(replicas=replicas), PLAIN)
    alone = simulate(workload, world(replicas=len(workload)), PLAIN)
    served = few.outcome == Outcome.LOCAL
    assert np.all(few.ttft_s[served] >= alone.ttft_s[served] - 1e-9)
    assert np.all(few.e2e_s[served] >= alone.e2e_s[served] - 1e-9)
    assert few.attainment <= alone.attainment


@pytest.mark.parametrize("seed", range(3))
def test_more_replicas_attain_more_of_the_same_long_trace(seed: int) -> None:
    arrivals = Arrivals(seconds=120, rps=14, inputs=Lengths(40, 120), outputs=Lengths(20, 60), shape=0.5)
    workload = generate(arrivals, seed)
    attained = [simulate(workload, world(replicas=n), PLAIN).attainment for n in (1, 2, 4, 8)]
    assert attained == sorted(attained)
    assert attained[0] < 0.5
    assert attained[-1] > 0.95


@settings(max_examples=60, deadline=None)
@given(workloads(), st.sampled_from(["prefill_token_s", "decode_s", "active_s"]))
def test_a_lone_request_is_never_faster_on_a_slower_engine(workload: Workload, figure: str) -> None:
    fast = simulate(workload, world(replicas=len(workload)), PLAIN)
    slow_engine = engine(**{figure: 2 * getattr(engine(), figure)})
    slow = simulate(workload, world(engine=slow_engine, replicas=len(workload)), PLAIN)
    served = fast.outcome == Outcome.LOCAL
    assert np.all(slow.e2e_s[served] >= fast.e2e_s[served] - 1e-9)


def test_a_request_that_no_cache_could_hold_fails_and_holds_up_nobody() -> None:
    result = simulate(rows((0.0, 2000, 1), (0.0, 10, 2)), world(), PLAIN)
    assert list(result.outcome) == [Outcome.FAILED, Outcome.LOCAL]


def test_nothing_to_do_is_a_result() -> None:
    result = simulate(rows(), world(), PLAIN)
    assert result.summary()["requests"] == 0
    assert result.windows(10.0) == []
