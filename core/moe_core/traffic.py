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
RISE = {RATE: 1.5, PROMPT: 2.0, OUTPUT: 2.0, SKEW: 1.5}
"""A level that rose by less than this may be noise, and is no cause of a spike. Lengths have heavy tails: the mean of a
hundred requests is half as large again by chance, some times a day."""
SURGE = 4.0
"""Standard deviations of one sample that are a rise of the rate at once, before the CUSUM's alarm (Lucas, J. Quality
Technology, 1982: a Shewhart limit beside a CUSUM)."""
DOUBLE = 2.0
"""And times the usual rate: of a day's 86,400 samples some lie four deviations up, at half as much again."""
LEAP = 3.0
"""Times the usual rate that are a rise however much the rate has swung before: a detector that has just met bursts, or
has seen little, takes everything for noise. What chance does to a count of requests is still asked for."""
REPLICAS, REPLICAS_ADOPT = "replicas away", 600
"""Fewer replicas than usual is a cause, too; once it has lasted so many ticks, it is what is usual."""
SUDDEN = frozenset({RATE, REPLICAS})
"""What is known as it happens; lengths and skew are known once requests have been served."""
SKEW_EXCESS_FLOOR = 0.1
"""Skew is watched as its excess over 1; below this, ranks are as good as balanced."""
LENGTH_SPREAD = 1.0
"""Request lengths spread by about a factor e: the noise of their mean over n requests is this over √n."""
SKEW_NOISE = 0.25


class TrafficState(Model):
    """One detector for each property of the traffic, fed with logarithms, and how many replicas share it as a rule."""

    detectors: dict[str, Detector] = Field(default_factory=lambda: {name: Detector() for name in UNITS})
    replicas: int | None = None
    fewer_for: int = 0

    def levels(self, signals: Signals) -> dict[str, float]:
        """Present level of each property that is known."""
        return {name: level for name, level in _levels(signals).items() if level is not None}


def watch(signals: Signals, state: TrafficState) -> TrafficState:
    """Feed every known property to its detector."""
    levels, noises = _levels(signals), _noises(signals)
    detectors = dict(state.detectors)
    for name, level in levels.items():
        if level is not None:
            detectors[name] = update(detectors[name], _log(name, level, signals), noises[name])
    usual, now = state.replicas, signals.replicas
    fewer_for = state.fewer_for + 1 if usual is not None and now is not None and now < usual else 0
    if now is None:
        now, fewer_for = usual, state.fewer_for
    elif fewer_for and fewer_for < REPLICAS_ADOPT:
        now = usual
    return TrafficState(detectors=detectors, replicas=now, fewer_for=0 if fewer_for >= REPLICAS_ADOPT else fewer_for)


def rises(signals: Signals, state: TrafficState) -> frozenset[str]:
    """What has risen beyond noise: seen by its detector, or at once, and by as much as a cause must have."""
    risen, noises = set[str](), _noises(signals)
    for name, level in state.levels(signals).items():
        detector = state.detectors[name]
        if not detector.warm or _weight(name, level) < RISE[name] * _weight(name, _before(name, detector, signals)):
            continue
        spread = max(noises[name], math.sqrt(detector.variance), 1e-6)
        above = _log(name, level, signals) - detector.mean
        leapt = above >= max(math.log(LEAP), SURGE * noises[name])
        if detector.changed > 0 or (name == RATE and (leapt or above >= max(math.log(DOUBLE), SURGE * spread))):
            risen.add(name)
    return frozenset({*risen, REPLICAS} if state.fewer_for else risen)


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
    """Signal → (level before, level now), for every property whose normal level is known; what has not risen is as it
    was before, or noise would make it a cause."""
    risen = rises(signals, state)
    levels = state.levels(signals)
    before = {name: _before(name, state.detectors[name], signals) for name in levels if state.detectors[name].warm}
    return {name: (level, levels[name] if name in risen else level) for name, level in before.items()}


def peaks(
    cause: dict[str, tuple[float, float]], signals: Signals, state: TrafficState
) -> dict[str, tuple[float, float]]:
    """The same with the highest level since, of what is risen now."""
    risen, levels = rises(signals, state), state.levels(signals)
    return {
        name: (before, max(peak, levels[name]) if name in risen and name in levels else peak)
        for name, (before, peak) in cause.items()
    }


def receded(cause: dict[str, tuple[float, float]], levels: dict[str, float]) -> str | None:
    """In words, that everything which had risen is back nearer to its old level than to its peak; None otherwise.

    Where nothing had risen, or a level is unknown now, nothing can be said to have gone.
    """
    risen = {
        name: pair for name, pair in cause.items() if _weight(name, pair[1]) >= RISE[name] * _weight(name, pair[0])
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


def _noises(signals: Signals) -> dict[str, float]:
    """Standard deviation of each property's logarithm in steady traffic."""
    requests = (signals.arrivals_per_s or 0.0) * signals.window_s
    finished = (signals.completed_per_s or 0.0) * signals.window_s
    length = LENGTH_SPREAD / math.sqrt(max(1.0, finished))
    return {RATE: 1.0 / math.sqrt(max(1.0, requests)), PROMPT: length, OUTPUT: length, SKEW: SKEW_NOISE}


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
