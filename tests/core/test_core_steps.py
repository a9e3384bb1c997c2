"""Steps are learned from running streams: the law is found again, more work is never faster, errors are known."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.steps import UNSEEN, StepEstimate, observe_end, observe_steps, predict_itl_s


def engine(running: float, prompt: float) -> float:
    return 0.012 + 0.00016 * running + 0.00011 * prompt


def taught(looks: int = 120, seed: int = 0, noise: float = 0.0) -> StepEstimate:
    rng, estimate = random.Random(seed), UNSEEN
    for second in range(looks):
        running, prompt = rng.uniform(10, 100), rng.uniform(0, 480)
        itl_s = engine(running, prompt) * math.exp(rng.gauss(0.0, noise))
        estimate = observe_steps(estimate, float(second), itl_s=itl_s, running=running, prompt_tokens=prompt)
    return estimate


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_law_of_steps_is_found_again(noise: float) -> None:
    known = taught(noise=noise)
    assert known.token_s == pytest.approx(0.00011, rel=0.1)
    assert known.base_s + 50 * known.seq_s == pytest.approx(0.02, rel=0.1)


def test_a_rate_of_prompts_makes_steps_longer_by_what_they_hold() -> None:
    """At r prompt tokens a second a step of t seconds holds r·t of them."""
    itl_s = predict_itl_s(taught(), 50.0, 4000.0)
    assert itl_s == pytest.approx(engine(50.0, 4000.0 * itl_s), rel=0.03)


def test_no_step_is_longer_than_a_full_one() -> None:
    assert predict_itl_s(taught(), 50.0, 1e6, room=512.0) == pytest.approx(engine(50.0, 512.0), rel=0.05)


def test_what_has_never_been_seen_is_taken_for_a_base_alone() -> None:
    assert predict_itl_s(UNSEEN, 100.0, 5000.0) == UNSEEN.base_s


LOOKS = st.lists(
    st.tuples(st.floats(1e-3, 0.5), st.floats(0.0, 500.0), st.floats(0.0, 4096.0), st.floats(0.0, 5.0)), max_size=30
)
LOADS = st.tuples(st.floats(0.0, 500.0), st.floats(0.0, 50_000.0))


@given(LOOKS, LOADS, LOADS, st.one_of(st.just(math.inf), st.floats(0.0, 8192.0)))
def test_more_work_is_never_faster_whatever_was_seen(
    looks: list[tuple[float, float, float, float]],
    one: tuple[float, float],
    other: tuple[float, float],
    room: float,
) -> None:
    estimate, now_s = UNSEEN, 0.0
    for itl_s, running, prompt, later_s in looks:
        now_s += later_s
        estimate = observe_steps(estimate, now_s, itl_s=itl_s, running=running, prompt_tokens=prompt)
    less = predict_itl_s(estimate, min(one[0], other[0]), min(one[1], other[1]), room)
    more = predict_itl_s(estimate, max(one[0], other[0]), max(one[1], other[1]), room)
    assert 0.0 < less <= more * (1 + 1e-9) < math.inf


def test_a_forecast_that_is_always_a_fifth_too_low_is_corrected_and_sure() -> None:
    known = taught()
    for _ in range(300):
        foreseen_s = predict_itl_s(known, 50.0, 2000.0)
        known = observe_end(known, itl_s=0.05, foreseen_s=foreseen_s)
    assert predict_itl_s(known, 50.0, 2000.0) == pytest.approx(0.05, rel=0.02)
    assert known.sigma < 0.06
