"""The detector: quick on real changes, silent on noise, and able to accept a new normal."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from moe_core.change import ADOPT_SAMPLES, WARM_UP, Detector, update

NOISE = 0.1


def feed(detector: Detector, level: float, count: int, rng: random.Random) -> tuple[Detector, list[int]]:
    """`count` noisy samples; the alarm after each."""
    alarms = []
    for _ in range(count):
        detector = update(detector, level + rng.gauss(0, NOISE), NOISE)
        alarms.append(detector.changed)
    return detector, alarms


def test_independent_noise_raises_no_alarm_in_a_day() -> None:
    _, alarms = feed(Detector(), 1.0, 86_400, random.Random(1))
    assert not any(alarms)


def test_a_rise_and_a_fall_are_told_apart_within_ten_samples() -> None:
    for step, sign in ((0.5, 1), (-0.5, -1)):
        detector, _ = feed(Detector(), 1.0, 100, random.Random(2))
        _, alarms = feed(detector, 1.0 + step, 10, random.Random(3))
        assert alarms[-1] == sign


def test_nothing_is_alarmed_before_the_level_is_known() -> None:
    detector, alarms = feed(Detector(), 1.0, 5, random.Random(4))
    _, later = feed(detector, 9.0, WARM_UP - 5, random.Random(4))
    assert not any(alarms + later)


def test_an_alarm_ends_when_the_level_returns() -> None:
    detector, _ = feed(Detector(), 1.0, 100, random.Random(5))
    detector, _ = feed(detector, 2.0, 20, random.Random(6))
    assert detector.changed == 1
    detector, _ = feed(detector, 1.0, 20, random.Random(7))
    assert detector.changed == 0
    assert abs(detector.mean - 1.0) < 0.1


def test_a_level_that_stays_becomes_the_new_normal() -> None:
    detector, _ = feed(Detector(), 1.0, 100, random.Random(8))
    detector, _ = feed(detector, 2.0, ADOPT_SAMPLES + 20, random.Random(9))
    assert detector.changed == 0
    assert abs(detector.mean - 2.0) < 0.1
    _, alarms = feed(detector, 2.0, 600, random.Random(10))
    assert not any(alarms)


def test_one_outlier_is_no_change() -> None:
    detector, _ = feed(Detector(), 1.0, 100, random.Random(11))
    assert update(detector, 1e9, NOISE).changed == 0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=80), st.floats(0, 10))
def test_no_input_breaks_it_and_its_state_survives_json(values: list[float], noise: float) -> None:
    detector = Detector()
    for value in values:
        detector = update(detector, value, noise)
    assert math.isfinite(detector.mean)
    assert Detector.model_validate_json(detector.model_dump_json()) == detector
