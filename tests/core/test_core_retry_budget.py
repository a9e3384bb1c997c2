"""The retry budget: second attempts stay a share of requests, whatever fails."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_core import retry_budget
from moe_core.retry_budget import WINDOW_S, RetryBudget, allows, allows_at, faded, on_failure, on_sent

SHARE, FLOOR = 0.2, 1.0
STEPS = st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=200)


@given(STEPS)
def test_sent_attempts_never_pass_the_share_and_the_floor(steps: list[tuple[float, bool]]) -> None:
    budget, now_s = RetryBudget(), 0.0
    for wait_s, retry in steps:
        now_s += wait_s
        if retry and not allows(budget, now_s, share=SHARE, floor_per_s=FLOOR):
            continue
        budget = on_sent(budget, now_s, retry=retry)
        if retry:
            assert budget.retries <= SHARE * budget.requests + FLOOR * WINDOW_S + 1e-9


@given(st.floats(0, 100), st.floats(-10, 1000))
def test_counts_only_fade(counted: float, later_s: float) -> None:
    before = RetryBudget(counted, counted, counted, 10.0)
    after = faded(before, 10.0 + later_s)
    assert 0 <= after.requests <= counted
    assert after.at_s >= before.at_s


def test_a_steady_failure_of_everything_costs_a_fifth_more() -> None:
    budget, sent = RetryBudget(), 0
    for step in range(10_000):  # 100 requests a second, each of which would like a second attempt
        now_s = step / 100
        budget = on_sent(budget, now_s, retry=False)
        if allows(budget, now_s, share=SHARE, floor_per_s=0.0):
            budget, sent = on_sent(budget, now_s, retry=True), sent + 1
    assert 0.19 <= sent / 10_000 <= 0.21


def test_an_upstream_that_failed_nothing_takes_what_others_lost() -> None:
    healthy = RetryBudget()
    for _ in range(50):
        healthy = on_sent(healthy, 0.0, retry=True)
    assert allows_at(healthy, 0.0, share=SHARE, floor_per_s=FLOOR)
    failing = on_failure(on_failure(healthy, 0.0), 0.0)
    assert not allows_at(failing, 0.0, share=SHARE, floor_per_s=FLOOR)
    assert allows_at(failing, 100 * retry_budget.WINDOW_S, share=SHARE, floor_per_s=FLOOR)
