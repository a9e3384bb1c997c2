"""Fits the calibration to published runs: robust least squares on the logarithm of the error, with numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_planner.calibration import BOUNDS, Bounds, Factors, of_values
from moe_planner.published import Case, predict

Vector = NDArray[np.float64]

REFERENCE = "tensorrt-llm"
"""The engine whose software factor is 1."""
ENGINE = Bounds(0.4, 1.0, 2.5)
PRIOR = 0.35
"""Width of a factor's prior in ln, about its start: what few rows tell stays near what is known of such hardware."""
LOOSE = frozenset(
    {"kernel_s", "step_s", "sequence_s", "call_s", "spread", "dequantised", "stagger", "elsewhere", "narrow"}
)
VAGUE = 1.2
"""Width of the prior of factors whose size nobody knows beforehand."""
PULL = 0.15
"""Weight of a factor's prior against one error."""
HUBER = 0.2
"""Errors in ln beyond this count linearly: one odd run does not bend the fit."""
ITERATIONS = 25


@dataclass(frozen=True)
class Side:
    """Sources by the side that they are on."""

    fitted: tuple[str, ...]
    held_out: tuple[str, ...]


def split(rows: Sequence[Mapping[str, str]]) -> Side:
    """The rule, made before any value was fitted: sources with a speed, in the order of their names, in turn.

    The first, third, fifth … are fitted; the second, fourth, sixth … are only predicted.
    """
    names = sorted({row.get("source", "") for row in rows if not row["metric"].startswith("fits")})
    return Side(tuple(names[::2]), tuple(names[1::2]))


def fit(cases: Sequence[Case], start: Factors | None = None) -> Factors:
    """Factors for throughput cases. Sources weigh as the root of their rows, so that none drowns the others."""
    used = [case for case in cases if case.throughput]
    engines = sorted({case.engine for case in used} - {REFERENCE})
    bounds = {**BOUNDS, **{f"engine {name}": ENGINE for name in engines}}
    counts: dict[str, int] = {}
    for case in used:
        counts[case.source] = counts.get(case.source, 0) + 1
    weights = np.array([counts[case.source] ** -0.25 for case in used])
    wanted = np.log([case.value for case in used])
    begin = np.zeros(len(bounds))
    if start is not None:
        given = {name: start.engines[name.removeprefix("engine ")] for name in bounds if name not in BOUNDS}
        given |= {name: float(getattr(start, name)) for name in BOUNDS}
        begin = np.array([_free(bound, given[name]) for name, bound in bounds.items()])

    def factors(at: Vector) -> Factors:
        values = {name: _physical(bound, float(x)) for (name, bound), x in zip(bounds.items(), at, strict=True)}
        return of_values(values, engines={REFERENCE: 1.0, **{name: values[f"engine {name}"] for name in engines}})

    def residuals(at: Vector) -> Vector:
        known = factors(at)
        found = (np.log([predict(case, known) for case in used]) - wanted) * weights
        priors = [
            math.log(_physical(bound, float(x)) / bound.start) / (VAGUE if name in LOOSE else PRIOR) * PULL
            for (name, bound), x in zip(bounds.items(), at, strict=True)
        ]
        return np.concatenate([_huber(found), np.array(priors)])

    return factors(_descend(residuals, begin))


def _physical(bound: Bounds, x: float) -> float:
    """A factor from the whole number line: its start at 0, its bounds at the ends, in ln."""
    low, high = math.log(bound.low), math.log(bound.high)
    middle = (math.log(bound.start) - low) / (high - low)
    offset = math.log(middle / (1.0 - middle))
    return math.exp(low + (high - low) / (1.0 + math.exp(-(x + offset))))


def _free(bound: Bounds, factor: float) -> float:
    """The inverse of _physical."""

    def place(value: float) -> float:
        share = (math.log(value) - math.log(bound.low)) / (math.log(bound.high) - math.log(bound.low))
        return math.log(share / (1.0 - share))

    return place(factor) - place(bound.start)


def _huber(errors: Vector) -> Vector:
    """Residuals whose squares are Huber's loss."""
    size = np.abs(errors)
    linear = np.sqrt(np.maximum(2.0 * HUBER * size - HUBER**2, 0.0))
    return np.asarray(np.sign(errors) * np.where(size <= HUBER, size, linear), dtype=np.float64)


def _descend(residuals: Callable[[Vector], Vector], start: Vector) -> Vector:
    """Levenberg-Marquardt with differences; the same answer on every machine to the digits that are kept."""
    at, damping = start, 1e-2
    error = residuals(at)
    for _ in range(ITERATIONS):
        step = 1e-4
        slopes = np.column_stack([(residuals(at + step * unit) - error) / step for unit in np.eye(len(at))])
        normal, gradient = slopes.T @ slopes, slopes.T @ error
        before = float(error @ error)
        for _ in range(8):
            move = np.linalg.solve(normal + damping * np.diag(np.maximum(np.diag(normal), 1e-6)), -gradient)
            tried = residuals(at + move)
            if float(tried @ tried) < before:
                at, error, damping = at + move, tried, damping / 3.0
                break
            damping *= 4.0
        else:
            return at
        if before - float(error @ error) < 1e-9 * before:
            return at
    return at


def errors(cases: Sequence[Case], factors: Factors) -> Vector:
    """Relative errors: prediction over value, less one."""
    return np.array([predict(case, factors) / case.value - 1.0 for case in cases])


def cross_validate(cases: Sequence[Case]) -> dict[str, Vector]:
    """Relative errors of each source's rows, by factors that were fitted to the other sources."""
    used = [case for case in cases if case.throughput]
    found = {}
    for source in sorted({case.source for case in used}):
        factors = fit([case for case in used if case.source != source])
        found[source] = errors([case for case in used if case.source == source], factors)
    return found
