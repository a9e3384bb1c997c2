"""Tells a change of level from noise: a two-sided CUSUM over standardised deviations (Page, Biometrika, 1954).

The reference level and its spread are learned slowly; deviations beyond a slack accumulate, and their sum crossing a
threshold is the alarm. Feed it logarithms, so that a doubling weighs the same at every level.
"""

from __future__ import annotations

import math
from typing import Literal

from moe_api.base import Model

WARM_UP = 20
"""Samples before the first alarm is possible."""
REFERENCE_WEIGHT = 0.01
"""Weight of a new sample in the reference once 100 are in: a memory of about 100 samples."""
RECENT_WEIGHT = 0.2
SLACK = 1.5
"""Deviations below this many spreads do not accumulate."""
THRESHOLD = 15.0
"""Sum of deviations that raises the alarm. High, because samples of overlapping windows repeat one another: with 10 s
windows each second, steady Poisson traffic alarms less than once an hour, and a fourfold rate is seen in 7 to 11 s."""
CLIP = 4.0
"""Largest deviation that one sample may add: an outlier alone raises no alarm."""
RETURN_SAMPLES = 5
"""Samples near the reference that end an alarm."""
ADOPT_SAMPLES = 60
"""An alarm that lasts this long is a new normal: the recent level becomes the reference."""


class Detector(Model):
    """What the detector remembers. `changed` is 1 after a rise, -1 after a fall, 0 while nothing has changed."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    recent: float = 0.0
    up: float = 0.0
    down: float = 0.0
    changed: Literal[-1, 0, 1] = 0
    changed_for: int = 0
    near_for: int = 0

    @property
    def warm(self) -> bool:
        return self.count >= WARM_UP


def update(detector: Detector, value: float, noise: float) -> Detector:
    """Take in one sample.

    `noise` is the standard deviation that the value has even in steady traffic (for the logarithm of a count n,
    1/√n); the spread used is never below it. A value that is not finite is ignored.
    """
    if not math.isfinite(value) or not math.isfinite(noise):
        return detector
    count = detector.count + 1
    recent = value if detector.count == 0 else detector.recent + RECENT_WEIGHT * (value - detector.recent)
    weight = max(1.0 / count, REFERENCE_WEIGHT)
    if count <= WARM_UP:
        return detector.model_copy(update={**_learn(detector, value, weight), "count": count, "recent": recent})
    spread = max(noise, math.sqrt(detector.variance), 1e-6)
    deviation = min(CLIP, max(-CLIP, (value - detector.mean) / spread))
    if detector.changed:
        return _in_alarm(detector, deviation, count, recent)
    up = max(0.0, detector.up + deviation - SLACK)
    down = max(0.0, detector.down - deviation - SLACK)
    changed = 1 if up > THRESHOLD else -1 if down > THRESHOLD else 0
    # A sample that already counts towards an alarm must not teach the reference: that would hide a slow rise.
    learned = {} if up > SLACK or down > SLACK else _learn(detector, value, weight)
    kept = {"count": count, "recent": recent, "up": up, "down": down, "changed": changed, "changed_for": 0}
    return detector.model_copy(update={**learned, **kept})


def _in_alarm(detector: Detector, deviation: float, count: int, recent: float) -> Detector:
    near_for = detector.near_for + 1 if abs(deviation) < SLACK else 0
    changed_for = detector.changed_for + 1
    kept = {"count": count, "recent": recent}
    if near_for >= RETURN_SAMPLES or changed_for >= ADOPT_SAMPLES:
        mean = detector.mean if near_for >= RETURN_SAMPLES else recent
        cleared = {"up": 0.0, "down": 0.0, "changed": 0, "changed_for": 0, "near_for": 0}
        return detector.model_copy(update={**kept, **cleared, "mean": mean})
    return detector.model_copy(update={**kept, "changed_for": changed_for, "near_for": near_for})


def _learn(detector: Detector, value: float, weight: float) -> dict[str, float]:
    delta = value - detector.mean
    mean = detector.mean + weight * delta
    variance = (1.0 - weight) * (detector.variance + weight * delta * delta)
    return {"mean": mean, "variance": variance}
