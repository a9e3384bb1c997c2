"""How far engines stay below the hardware's peaks: few bounded factors, fitted to published runs."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from moe_planner.roofline import Peaks, Rates
from moe_planner.work import BLOCK, Gemm

FILE = "calibration.toml"
DEFAULT_ENGINE = "vllm"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where a factor must lie to be physical, and where fitting starts."""

    low: float
    start: float
    high: float


BOUNDS: Mapping[str, Bounds] = {
    "bandwidth": Bounds(0.3, 0.7, 0.95),
    "cache": Bounds(0.3, 0.75, 0.95),
    "gemm_16": Bounds(0.15, 0.6, 0.9),
    "gemm_8": Bounds(0.1, 0.5, 0.9),
    "gemm_4": Bounds(0.05, 0.35, 0.9),
    "blocks": Bounds(0.02, 0.25, 1.0),
    "dequantised": Bounds(0.05, 0.35, 0.9),
    "core": Bounds(0.05, 0.4, 0.9),
    "flash": Bounds(0.1, 0.5, 0.9),
    "link": Bounds(0.1, 0.5, 0.9),
    "network": Bounds(0.2, 0.6, 0.9),
    "spread": Bounds(0.02, 0.4, 2.0),
    "stagger": Bounds(0.01, 0.3, 4.0),
    "elsewhere": Bounds(0.5, 1.0, 4.0),
    "narrow": Bounds(50.0, 800.0, 5000.0),
    "padding": Bounds(1.0, 8.0, 64.0),
    "kernel_s": Bounds(2e-7, 2e-6, 2e-5),
    "step_s": Bounds(1e-4, 2e-3, 20e-3),
    "sequence_s": Bounds(1e-7, 1e-5, 1e-4),
    "call_s": Bounds(2e-6, 15e-6, 100e-6),
    "cold_s": Bounds(10.0, 90.0, 240.0),
}
"""Shares of peaks (bandwidth; GEMM by bytes of an operand; of FP32 where `blocks` are added up; attention; links);
of prompts that hold up other ranks; the time of work `elsewhere` than on NVIDIA's GPUs; the width at which experts'
GEMMs take twice as long on GPUs with FP4 units; rows that fill up a tile: half of 16; and seconds: a kernel's launch, a
step, a sequence in it, a collective, and the compiling that a first burst waits for: it starts between SGLang's 108 s
(issue 4773) and vLLM's 48 to 83 s (pull request 22215)."""


@dataclass(frozen=True)
class Factors:
    """Shares of peaks, and overheads. `software`: an engine's time over the reference's.

    `error`: half-width of the interval, in ln(speed).
    """

    bandwidth: float
    cache: float
    gemm_16: float
    gemm_8: float
    gemm_4: float
    blocks: float
    dequantised: float
    core: float
    flash: float
    link: float
    network: float
    spread: float
    stagger: float
    elsewhere: float
    narrow: float
    padding: float
    kernel_s: float
    step_s: float
    sequence_s: float
    call_s: float
    cold_s: float
    software: float = 1.0
    error: float = 0.0
    engines: Mapping[str, float] = field(default_factory=dict)

    def of_engine(self, name: str) -> Factors:
        """The factors with that engine's software factor in force; an engine that is not known has the reference's."""
        return replace(self, software=self.engines.get(name.lower(), 1.0))

    def rates(self, peaks: Peaks) -> Rates:
        """What is attained of the peaks."""
        slow = self.software
        work = slow if peaks.nvidia else slow * self.elsewhere
        arithmetic = peaks.attained / work
        return Rates(
            bandwidth=peaks.bandwidth * self.bandwidth / work,
            cache=peaks.bandwidth * self.cache / work,
            linear_flops=self.product(*peaks.linear, arithmetic, peaks.vector / work),
            mlp_flops=self.product(*peaks.mlp, arithmetic, peaks.vector / work),
            expert_flops=self.product(*peaks.experts, arithmetic, peaks.vector / work),
            head_flops=peaks.wide[0] * self.gemm_16 * arithmetic,
            core_flops=peaks.attention * self.core * arithmetic,
            flash_flops=peaks.prompts * self.flash * arithmetic,
            link=peaks.link * self.link / work,
            network=peaks.network * self.network / work,
            spread=self.spread,
            stagger=self.stagger,
            narrow=self.narrow if peaks.fp4 else 0.0,
            padding=self.padding,
            kernel_s=self.kernel_s * slow,
            step_s=self.step_s * slow * peaks.host,
            sequence_s=self.sequence_s * slow * peaks.host,
            call_s=self.call_s * slow,
        )

    def product(self, peak: float, kind: Gemm, attained: float, vector: float) -> float:
        """Operations a second of matrix products. `attained`: beside the shares; `vector`: peak in FP32.

        With scales in blocks the sum over each block's columns, two operations for each of them, leaves the matrix
        units, and the cores beside them scale and add it: two operations more.
        """
        units = peak * self.gemm(kind) * attained
        if kind != "8 in blocks":
            return units
        return 1.0 / (1.0 / units + 1.0 / (BLOCK * vector * self.blocks))

    def gemm(self, kind: Gemm) -> float:
        """Share of peak."""
        match kind:
            case "16":
                return self.gemm_16
            case "8" | "8 in blocks":
                return self.gemm_8
            case "4":
                return self.gemm_4
            case "dequantised":
                return self.dequantised


def of_values(values: Mapping[str, float], error: float = 0.0, engines: Mapping[str, float] | None = None) -> Factors:
    """Factors from their names in BOUNDS."""
    given: dict[str, Any] = {name: float(values[name]) for name in BOUNDS}
    return Factors(**given, error=error, engines=engines or {})


START = of_values({name: bound.start for name, bound in BOUNDS.items()})
"""Before anything is fitted."""


@cache
def packaged() -> Factors:
    """The factors that come with this version, for the engine that is deployed."""
    return parse(text()).of_engine(DEFAULT_ENGINE)


def text() -> str:
    """The calibration file that comes with this version."""
    return (resources.files("moe_planner") / "data" / FILE).read_text(encoding="utf-8")


def fitted_sources() -> tuple[str, ...]:
    """Sources of published runs that the packaged factors were fitted to."""
    return tuple(tomllib.loads(text())["fitted"]["sources"])


def parse(given: str) -> Factors:
    """Factors from the text of a calibration file. Raises ValueError where one is missing or out of bounds."""
    document = tomllib.loads(given)
    values = document.get("factors", {})
    for name, bound in BOUNDS.items():
        if name not in values:
            raise ValueError(f"{FILE}: factors.{name} is missing: fit again with `python -m benchmarks.planner --fit`")
        if not bound.low <= values[name] <= bound.high:
            raise ValueError(f"{FILE}: factors.{name} = {values[name]} must lie in {bound.low} to {bound.high}")
    engines = {name: float(value) for name, value in document.get("engines", {}).items()}
    return of_values(values, float(document["held_out"]["error"]), engines)


def recalibrate(factors: Factors, measured: Mapping[float, float]) -> Factors:
    """Factors that agree with live measurements: `measured` maps predicted to measured output tokens/s.

    The ratio's geometric mean moves the software factor, drawn towards 1 by as much as one measurement weighs against
    the calibration's own error; the interval narrows as measurements agree. Pure.
    """
    logs = [math.log(seen / told) for told, seen in measured.items() if seen > 0 and told > 0]
    if not logs:
        return factors
    count = len(logs)
    mean = sum(logs) / count
    spread = math.sqrt(sum((value - mean) ** 2 for value in logs) / count)
    noise = max(spread, 0.05)  # of one measurement, where too few tell it
    prior = max(factors.error, 1e-6)
    weight = prior**2 / (prior**2 + noise**2 / count)
    left = math.sqrt(1.0 / (1.0 / prior**2 + count / noise**2))
    return replace(factors, software=factors.software * math.exp(-weight * mean), error=min(prior, left + spread))
