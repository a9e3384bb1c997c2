"""Laws that hold in every simulation: nothing is lost or made of nothing, time adds up, the cache never runs over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.forecast import SpillContext
from moe_core.spill import Action, Decision, Reason
from moe_planner.sim.books import Snapshot
from moe_planner.sim.policy import PLAIN, Policy
from moe_planner.sim.replica import Replica
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.simulate import Run, simulate
from moe_planner.sim.workload import Arrivals, Lengths, Workload, generate
from moe_planner.sim.world import Outage, World
from tests.planner.sim_world import api, engine, rows, workloads, world, worlds

POLICIES = st.sampled_from([PLAIN, Policy()])


def spill_while_there_is_budget(context: SpillContext, state: Any) -> tuple[Decision, Any]:
    """Every request to the API that the budget has room for, else to the replicas."""
    target = context.targets[0]
    if target.name not in context.tried and target.cost_usd <= (context.budget_left_usd or 0):
        return Decision(Action.SPILL, Reason.SLO_PREDICTED, target.name), state
    return Decision(Action.LOCAL, Reason.WITHIN_SLO, context.revisions[0].name), state


def watched(workload: Workload, around: World, policy: Policy, seed: int = 0) -> tuple[Result, list[Snapshot]]:
    books: list[Snapshot] = []
    return simulate(workload, around, policy, seed=seed, probe=books.append), books


def tokens_balance(books: list[Snapshot]) -> None:
    for book in books:
        assert book.asked == book.made + book.left + book.lost
        assert book.left >= 0
    assert books[-1].left == 0
    assert books[-1].in_system == 0


def blocks_balance(books: list[Snapshot]) -> None:
    for book in books:
        for free, held in zip(book.free_blocks, book.held_blocks, strict=True):
            assert 0 <= free <= book.total_blocks
            assert free + held == book.total_blocks


@settings(max_examples=80, deadline=None)
@given(workloads(), worlds(), POLICIES, st.integers(0, 3))
def test_at_every_event_tokens_asked_are_made_in_flight_or_lost(
    workload: Workload, around: World, policy: Policy, seed: int
) -> None:
    _, books = watched(workload, around, policy, seed)
    tokens_balance(books)


@settings(max_examples=80, deadline=None)
@given(workloads(), worlds(), POLICIES)
def test_the_cache_is_never_overdrawn_and_every_block_has_a_holder(
    workload: Workload, around: World, policy: Policy
) -> None:
    _, books = watched(workload, around, policy)
    blocks_balance(books)


@settings(max_examples=60, deadline=None)
@given(workloads(), worlds(), POLICIES)
def test_every_request_has_exactly_one_outcome_and_the_records_that_go_with_it(
    workload: Workload, around: World, policy: Policy
) -> None:
    result, _ = watched(workload, around, policy)
    records_agree(result)


def records_agree(result: Result) -> None:
    workload, around = result.workload, result.world
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
    little(result, books)


def little(result: Result, books: list[Snapshot]) -> None:
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


@settings(max_examples=60, deadline=None)
@given(workloads(), worlds())
def test_prompt_tokens_computed_are_those_that_came_in_and_more_only_after_preemption(
    workload: Workload, around: World
) -> None:
    computed: list[int] = []

    class Counted(Replica):
        __slots__ = ()

        def _admit(self, count: int, preempted: bool) -> int:
            computed.append(super()._admit(count, preempted))
            return computed[-1]

    around = world(engine=around.engine, replicas=around.replicas)  # a dead replica computes in vain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_planner.sim.simulate.Replica", Counted)
        result = simulate(workload, around, PLAIN)
    came = int(workload.input_tokens[result.outcome == Outcome.LOCAL].sum())
    assert sum(computed) == came if not result.preemptions else sum(computed) > came


@pytest.mark.parametrize("seed", range(3))
def test_another_seed_is_another_run_of_the_same_traffic(seed: int) -> None:
    busy = generate(Arrivals(seconds=60, rps=30, inputs=Lengths(40, 120), outputs=Lengths(20, 60)), 4)
    around = world(apis=(api(),), gateways=2)
    one, two = (simulate(busy, around, seed=s) for s in (seed, seed + 1))
    assert one.usd.tolist() != two.usd.tolist()


# Known-bad variants: each is caught by a law above


class Leaky(Replica):
    """Forgets a block of every request that ends."""

    __slots__ = ()

    def _release(self, request: int, at: int) -> None:
        super()._release(request, at)
        self.free -= 1


class Generous(Replica):
    """Counts a token more than it made in every step."""

    __slots__ = ()

    def finish(self) -> tuple[list[int], list[int]]:
        self.tokens_out += 1
        return super().finish()


class Forgetful(Replica):
    """A preempted request loses what it had made."""

    __slots__ = ()

    def _preempt(self) -> None:
        super()._preempt()
        self.made[self.queue[0]] = 0


class Overdrawn(Replica):
    """Admits a prompt without a look at the cache."""

    __slots__ = ()

    def _admit(self, count: int, preempted: bool) -> int:
        self.free += 100
        taken = super()._admit(count, preempted)
        self.free -= 100
        return taken


def hurried(self: Run, request: int, outcome: Outcome, now: float) -> None:
    """Ends requests on paper before their time."""
    END(self, request, outcome, now)
    self.e2e[request] *= 0.99


def twice(self: Run, request: int, outcome: Outcome, now: float) -> None:
    """Writes down a cut request as answered."""
    END(self, request, Outcome.LOCAL if outcome == Outcome.CUT else outcome, now)


END = Run.end
CROWDED = generate(Arrivals(seconds=20, rps=8, inputs=Lengths(60, 200), outputs=Lengths(40, 120)), 1)
TIGHT = world(engine=engine(kv_tokens=24 * 16))
RUN = "moe_planner.sim.simulate"
BUGS: dict[str, tuple[str, Any, World, Policy]] = {
    "a block leaks": (f"{RUN}.Replica", Leaky, world(engine=engine(kv_tokens=4096 * 16)), PLAIN),
    "a token from nothing": (f"{RUN}.Replica", Generous, world(), PLAIN),
    "what was made is lost": (f"{RUN}.Replica", Forgetful, TIGHT, PLAIN),
    "a cache overdrawn": (f"{RUN}.Replica", Overdrawn, TIGHT, PLAIN),
    "time that nobody spent": (f"{RUN}.Run.end", hurried, world(), PLAIN),
    "a cut called an answer": (f"{RUN}.Run.end", twice, world(outages=(Outage(0, 5.0, 8.0),)), PLAIN),
    "a budget that forgets calls under way": (
        "moe_planner.sim.closed.ClosedApis.budget_left",
        property(lambda apis: apis._budget - apis._spent),
        world(apis=(api(ttft_median_s=5.0, ttft_p95_s=6.0),), budget_usd=0.2, output_bound=200),
        Policy(decide=spill_while_there_is_budget, state=None),
    ),
}


def laws(around: World, policy: Policy) -> None:
    result, books = watched(CROWDED, around, policy)
    tokens_balance(books)
    blocks_balance(books)
    records_agree(result)
    if policy is PLAIN and not around.outages:
        little(result, books)


@pytest.mark.parametrize("name", BUGS)
def test_a_known_bad_simulator_breaks_a_law(name: str) -> None:
    where, broken, around, policy = BUGS[name]
    laws(around, policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, broken)
        with pytest.raises(AssertionError):
            laws(around, policy)


def test_a_request_that_no_cache_could_hold_fails_and_holds_up_nobody() -> None:
    result = simulate(rows((0.0, 2000, 1), (0.0, 10, 2)), world(), PLAIN)
    assert list(result.outcome) == [Outcome.FAILED, Outcome.LOCAL]


def test_nothing_to_do_is_a_result() -> None:
    result = simulate(rows(), world(), PLAIN)
    assert result.summary()["requests"] == 0
    assert result.windows(10.0) == []
