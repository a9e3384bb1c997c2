"""When requests arrive and how long they are: read from a trace, or drawn with a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_core import trace
from moe_planner.sim.invalid import Invalid

Z99 = 2.3263478740408408
"""99th percentile of the standard normal distribution."""
Z95 = 1.6448536269514722
MOST_TOKENS, MOST_HEIGHT = 10_000_000, 1000
MOST_REQUESTS = 20_000_000
"""A workload lies in memory: a gigabyte or two at this many."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class WorkloadInvalid(Invalid):
    """A workload that cannot be. The message has the file and line where there is one."""


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of arrival: seconds from the start, and lengths in tokens."""

    at_s: Floats
    input_tokens: Ints
    output_tokens: Ints

    def __post_init__(self) -> None:
        if not len(self.at_s) == len(self.input_tokens) == len(self.output_tokens):
            raise WorkloadInvalid(
                "at_s", "at_s, input_tokens, output_tokens differ in length", "give one of each a request"
            )
        if len(self.at_s) and not (np.all(np.isfinite(self.at_s)) and self.at_s[0] >= 0):
            raise WorkloadInvalid("at_s", "a time is not finite or before 0", "give seconds from the start")
        if np.any(np.diff(self.at_s) < 0):
            raise WorkloadInvalid("at_s", "times fall", "sort the requests by arrival")
        for name in ("input_tokens", "output_tokens"):
            if len(self.at_s) and getattr(self, name).min() < 1:
                raise WorkloadInvalid(name, "a request has none", "give each at least one token")

    def __len__(self) -> int:
        return len(self.at_s)

    @classmethod
    def of(cls, rows: Sequence[tuple[float, int, int]]) -> Workload:
        """From (seconds, input tokens, output tokens), in any order."""
        rows = sorted(rows, key=lambda row: row[0])
        return cls(
            np.array([row[0] for row in rows], dtype=np.float64),
            np.array([row[1] for row in rows], dtype=np.int64),
            np.array([row[2] for row in rows], dtype=np.int64),
        )

    def faster(self, factor: float) -> Workload:
        """The same requests, their times divided by `factor`."""
        if not (math.isfinite(factor) and factor > 0):
            raise WorkloadInvalid("scale", f"{factor} is no rate", "it must be above 0")
        return Workload(self.at_s / factor, self.input_tokens, self.output_tokens)

    def until(self, seconds: float) -> Workload:
        """Those that arrive before a time."""
        kept = int(np.searchsorted(self.at_s, seconds))
        return Workload(self.at_s[:kept], self.input_tokens[:kept], self.output_tokens[:kept])


@dataclass(frozen=True)
class Lengths:
    """Log-normal token counts by median and 99th percentile; equal ones make every request the same."""

    median: float
    p99: float

    def __post_init__(self) -> None:
        if not 1 <= self.median <= self.p99 < math.inf:
            raise WorkloadInvalid("median", f"{self.median:g}, with p99 {self.p99:g}", "1 ≤ median ≤ p99 is wanted")
        if self.p99 > MOST_TOKENS:
            raise WorkloadInvalid("p99", f"{self.p99:g} tokens", f"{MOST_TOKENS:,} are the most")

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        sigma = math.log(self.p99 / self.median) / Z99
        drawn = np.round(self.median * np.exp(sigma * rng.standard_normal(count)))
        return np.maximum(1, drawn).astype(np.int64)


@dataclass(frozen=True)
class Spikes:
    """Spells in which the rate is `height` times what it was, `per_hour` on average, each of seconds[0..1]."""

    per_hour: float
    height: float
    seconds: tuple[float, float]

    def __post_init__(self) -> None:
        if not 0 <= self.per_hour < math.inf:
            raise WorkloadInvalid("per_hour", f"{self.per_hour}", "it must be 0 or more")
        if self.per_hour > 3600:
            raise WorkloadInvalid("per_hour", f"{self.per_hour:g}", "one a second is the most")
        if not 1 <= self.height <= MOST_HEIGHT:
            raise WorkloadInvalid("height", f"{self.height:g}", f"it must lie in [1, {MOST_HEIGHT:,}]")
        if not 0 < self.seconds[0] <= self.seconds[1] < math.inf:
            raise WorkloadInvalid("seconds", f"{list(self.seconds)}", "0 < seconds[0] ≤ seconds[1] is wanted")


@dataclass(frozen=True)
class Arrivals:
    """A renewal process with Gamma gaps: shape 1 is Poisson, below 1 requests come in bursts."""

    seconds: float
    rps: float
    inputs: Lengths
    outputs: Lengths
    shape: float = 1.0
    shape_every_s: float | None = None  # redraws the shape uniformly in [0.5, 2] times the given one
    spikes: Spikes | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "rps", "shape"):
            if not 0 < getattr(self, name) < math.inf:
                raise WorkloadInvalid(name, f"{getattr(self, name):g}", "it must be above 0")
        if self.shape_every_s is not None and not self.shape_every_s > 0:
            raise WorkloadInvalid("shape_redrawn_every_s", f"{self.shape_every_s:g}", "it must be above 0")
        if self.shape_every_s is not None and self.seconds / self.shape_every_s > MOST_REQUESTS:
            raise WorkloadInvalid("shape_redrawn_every_s", f"{self.shape_every_s:g}", "give a longer time")
        height = 1.0 if self.spikes is None else self.spikes.height
        if (most := self.rps * height * self.seconds) > MOST_REQUESTS:
            remedy = f"lower the rate or the time: {MOST_REQUESTS:,} are the most"
            raise WorkloadInvalid("rps", f"up to {most:.2g} requests would arrive", remedy)


def generate(arrivals: Arrivals, seed: int) -> Workload:
    """Draw a workload. `rps` is the rate outside spikes; gaps are drawn in busy time, so that a spike squeezes them."""
    rng = np.random.default_rng(seed)
    edges, work = _clock(arrivals, rng)
    total = work[-1]
    busy = _busy_times(arrivals, edges, work, rng)
    busy = busy[busy < total]
    at_s = np.interp(busy, work, edges)
    return Workload(at_s, arrivals.inputs.draw(rng, len(at_s)), arrivals.outputs.draw(rng, len(at_s)))


def _clock(arrivals: Arrivals, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Moments at which the rate changes, and the expected arrivals until each."""
    edges = {0.0, arrivals.seconds}
    spells: list[tuple[float, float]] = []
    spikes = arrivals.spikes
    if spikes is not None:
        count = int(rng.poisson(spikes.per_hour * arrivals.seconds / 3600.0))
        for start in np.sort(rng.uniform(0.0, arrivals.seconds, count)):
            end = min(arrivals.seconds, float(start + rng.uniform(*spikes.seconds)))
            spells.append((float(start), end))
            edges |= {float(start), end}
    moments = np.array(sorted(edges))
    middles = (moments[1:] + moments[:-1]) / 2
    rates = np.full(len(middles), arrivals.rps)
    for start, end in spells:
        rates[(middles > start) & (middles < end)] = arrivals.rps * (spikes.height if spikes else 1.0)
    return moments, np.concatenate([[0.0], np.cumsum(rates * np.diff(moments))])


def _busy_times(arrivals: Arrivals, edges: Floats, work: Floats, rng: np.random.Generator) -> Floats:
    """Arrivals on a clock that expects one in each unit of time."""
    if arrivals.shape_every_s is None:
        return _gaps(rng, arrivals.shape, work[-1])
    pieces: list[Floats] = []
    at = 0.0
    for start in np.arange(0.0, arrivals.seconds, arrivals.shape_every_s):
        until = float(np.interp(start + arrivals.shape_every_s, edges, work))
        shape = arrivals.shape * float(rng.uniform(0.5, 2.0))
        times = at + _gaps(rng, shape, max(0.0, until - at))
        inside = times[times < until]
        pieces.append(inside)
        # The gap that crosses the edge goes on: dropping it would lose arrivals at every redraw.
        at = max(until, float(times[len(inside)])) if len(times) > len(inside) else until
        if at > until:
            pieces.append(np.array([at]))
    return np.concatenate(pieces) if pieces else np.zeros(0)


def _gaps(rng: np.random.Generator, shape: float, length: float) -> Floats:
    """Times of arrivals with Gamma gaps of mean 1; the last one lies beyond `length`."""
    times: list[Floats] = []
    at = 0.0
    while at <= length:
        gaps = rng.gamma(shape, 1.0 / shape, int(max(64.0, (length - at) * 1.05)))
        piece = at + np.cumsum(gaps)
        times.append(piece)
        at = float(piece[-1])
    every = np.concatenate(times)
    return every[: int(np.searchsorted(every, length, side="right")) + 1]


def read_trace(path: Path) -> Workload:
    """A trace in the form of the Azure LLM inference traces (CSV: TIMESTAMP,ContextTokens,GeneratedTokens)."""
    try:
        return Workload.of(trace.read(path))
    except trace.TraceInvalid as error:
        raise WorkloadInvalid("trace", error.message, error.remedy) from None
