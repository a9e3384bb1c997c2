"""What the traffic itself does: detectors on rate, lengths and expert skew, and when a spike's cause has gone.

A change here comes from outside: it freezes exploration and censors a trial, and never counts against a candidate.
"""

from __future__ import annotations

import math

from pydantic import Field

from moe_api.base import Model
from moe_core.change import Detector, update
from moe_core.setting import Signals

RATE, PROMPT, OUTPUT, SKEW = "arrivals/s", "prompt tokens", "output tokens", "rank demand max/mean"
UNITS = (RATE, PROMPT, OUTPUT, SKEW)
CAUSE_RATIO = 1.5
"""A level that rose by less than this may be noise, and is no cause of a spike."""
SKEW_EXCESS_FLOOR = 0.1
"""Skew is watched as its excess over 1; below this, ranks are as good as balanced."""
LENGTH_SPREAD = 1.0
"""Request lengths spread by about a factor e: the noise of their mean over n requests is this over √n."""
SKEW_NOISE = 0.25


class TrafficState(Model):
    """One detector for each property of the traffic, fed with logarithms."""

    detectors: dict[str, Detector] = Field(default_factory=lambda: {name: Detector() for name in UNITS})

    @property
    def rising(self) -> bool:
        return any(detector.changed > 0 for detector in self.detectors.values())

    def levels(self, signals: Signals) -> dict[str, float]:
        """Present level of each property that is known."""
        return {name: level for name, level in _levels(signals).items() if level is not None}


def watch(signals: Signals, state: TrafficState) -> TrafficState:
    """Feed every known property to its detector."""
    levels = _levels(signals)
    detectors = dict(state.detectors)
    requests = (levels[RATE] or 0.0) * signals.window_s
    finished = (signals.completed_per_s or 0.0) * signals.window_s
    noises = {
        RATE: 1.0 / math.sqrt(max(1.0, requests)),
        PROMPT: LENGTH_SPREAD / math.sqrt(max(1.0, finished)),
        OUTPUT: LENGTH_SPREAD / math.sqrt(max(1.0, finished)),
        SKEW: SKEW_NOISE,
    }
    for name, level in levels.items():
        if level is not None:
            detectors[name] = update(detectors[name], _log(name, level, signals), noises[name])
    return TrafficState(detectors=detectors)


def outside_change(signals: Signals, state: TrafficState) -> str | None:
    """The change of traffic that the detectors see now, in words; None while all is as it was."""
    if signals.api_failing:
        return "a closed API is failing"
    for name, detector in state.detectors.items():
        if detector.changed:
            level = _levels(signals)[name]
            verb = "rose" if detector.changed > 0 else "fell"
            now = "" if level is None else f" to {level:.3g}"
            return f"{name} {verb} from {_before(name, detector, signals):.3g}{now}"
    return None


def causes(signals: Signals, state: TrafficState) -> dict[str, tuple[float, float]]:
    """Signal → (level before, level now), for every property whose normal level is known."""
    return {
        name: (_before(name, state.detectors[name], signals), level)
        for name, level in state.levels(signals).items()
        if state.detectors[name].warm
    }


def receded(cause: dict[str, tuple[float, float]], levels: dict[str, float]) -> str | None:
    """In words, that everything which had risen is back nearer to its old level than to its peak; None otherwise.

    Where nothing had risen, or a level is unknown now, nothing can be said to have gone.
    """
    risen = {
        name: pair for name, pair in cause.items() if _weight(name, pair[1]) > CAUSE_RATIO * _weight(name, pair[0])
    }
    if not risen:
        return None
    words = []
    for name, (before, peak) in risen.items():
        level = levels.get(name)
        if level is None and name == RATE:
            return None
        if level is not None and level > (before + peak) / 2:
            return None
        words.append(f"{name} went from {peak:.3g} back to {'none' if level is None else format(level, '.3g')}")
    return ", ".join(words)


def _levels(signals: Signals) -> dict[str, float | None]:
    skew = signals.rank_demand
    return {
        RATE: signals.arrivals_per_s,
        PROMPT: signals.prompt_tokens,
        OUTPUT: signals.output_tokens,
        SKEW: None if skew is None else max(1.0, skew),
    }


def _weight(name: str, level: float) -> float:
    return max(SKEW_EXCESS_FLOOR, level - 1.0) if name == SKEW else level


def _log(name: str, level: float, signals: Signals) -> float:
    if name == RATE:
        return math.log(level + 1.0 / signals.window_s)
    return math.log(_weight(name, level) if name == SKEW else max(1.0, level))


def _before(name: str, detector: Detector, signals: Signals) -> float:
    """The reference level, back from its logarithm."""
    level = math.exp(detector.mean)
    if name == RATE:
        return max(0.0, level - 1.0 / signals.window_s)
    return 1.0 + level if name == SKEW else level
