"""Generated days for the tuner's benchmark: what arrives, how experts are loaded, and what the plant really is.

A day of 24 hours is squeezed to 2: the rate follows a daily curve, while spikes keep their real seconds. Everything is
drawn from a seed that no tuner sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_core.wire import ExpertKnobs, Overflow
from moe_planner.sim.experts import ExpertLoad, load_over_time
from moe_planner.sim.scenarios import load
from moe_planner.sim.workload import Workload
from moe_planner.sim.world import World

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
DAY_S = 7200.0
DT_S = 0.5
"""Step of the plant."""
SWING = 0.5
"""The daily curve: 1 + SWING·sin, its phase by seed. `steady` has none."""
BLOCK_S = 60.0
"""A trace is resampled in blocks of this, so that its spikes of 10 to 30 s stay whole."""
JITTER_S = 1.0
"""Copies of a traced request lie within this of it."""
SPREAD = 0.3
"""Each figure of the plant is that of the file times a draw from [1 − SPREAD, 1 + SPREAD]."""
SPIKE_RATIO = 2.0
WINDOW_S = 10.0
"""A spike is a window of this in which arrivals are above SPIKE_RATIO times the day's mean, or a replica is down."""
GAMMAS = tuple(round(0.05 * i, 2) for i in range(20, 81))
"""γ that the tables know, 1 to 4; the index after the last is uncapped."""
UNCAPPED = len(GAMMAS)
LOST_PRICE, LOST_POWER = 1.0, 1.7
"""Lost gate mass = LOST_PRICE·(share of slots moved)^LOST_POWER: measured on a trained model, docs/benchmarks.md
(0.055, 0.014, 0.003 at 18.6, 8.4, 3.1 % moved)."""


@dataclass(frozen=True, eq=False)
class Truth:
    """What one seed's plant really is: factors on the file's figures, which no policy is told."""

    prefill: float = 1.0
    decode: float = 1.0
    active: float = 1.0
    kv: float = 1.0
    prefill_share: float = 1.0
    decode_share: float = 1.0
    lost: float = 1.0
    api_ttft: float = 1.0
    hidden: bool = True
    """Whether the effects that no model of the tuner has are there (see `tuner_replay_plant`)."""


NOMINAL = Truth(hidden=False)


def truth(seed: int) -> Truth:
    """Draw one."""
    rng = np.random.default_rng([seed, 11])
    a, b, c, d, e, f, g, h = (float(x) for x in rng.uniform(1.0 - SPREAD, 1.0 + SPREAD, 8))
    return Truth(a, b, c, d, e, f, g, h)


@dataclass(frozen=True, eq=False)
class Day:
    """One day of one seed. Arrays by step of DT_S, but `spell` by second and `spike` by window."""

    count: Floats
    prompt: Floats  # tokens
    output: Floats
    spell: NDArray[np.int64]
    demand: Floats  # rank load max/mean by spell
    assigned: Floats  # by spell and γ
    lost: Floats  # gate mass, by spell and γ
    cv: Floats  # of demand over experts, by spell
    up: Floats  # share of replicas, by step
    api_up: NDArray[np.bool_]  # by API and step
    speed: Floats  # factor on every time of a step; infinite where the engine stands still
    spike: NDArray[np.bool_]


def workload(path: Path, name: str, traces: Path | None, scale: float, seed: int, day: int) -> Workload:
    """What arrives on a day."""
    rng = np.random.default_rng([seed, day, 13])
    scenario = load(path, name, traces=traces, scale=1.0, seed=seed)
    swing = 0.0 if name == "steady" else SWING
    phase = float(np.random.default_rng([seed, 17]).uniform(0.0, 2 * math.pi))

    def curve(at_s: Floats) -> Floats:
        return 1.0 + swing * np.sin(2 * math.pi * at_s / DAY_S + phase)

    if _traced(path, name, traces):
        return _resampled(scenario.workload, curve, scale, rng)
    pieces: list[Workload] = []
    start, most = 0.0, 1.0 + swing
    own = seed * 1000 + day * 10
    while start < DAY_S:
        piece = load(path, name, traces=traces, scale=scale * most, seed=own + len(pieces)).workload
        length = max(60.0, math.ceil(float(piece.at_s[-1]) / 60.0) * 60.0)
        pieces.append(Workload(piece.at_s + start, piece.input_tokens, piece.output_tokens))
        start += length
    at_s = np.concatenate([piece.at_s for piece in pieces])
    inputs = np.concatenate([piece.input_tokens for piece in pieces])
    outputs = np.concatenate([piece.output_tokens for piece in pieces])
    kept = (at_s < DAY_S) & (rng.random(len(at_s)) < curve(at_s) / most)
    return Workload(at_s[kept], inputs[kept], outputs[kept])


def day_of(world: World, arriving: Workload, seed: int, day: int, true: Truth, *, drifts: bool = True) -> Day:
    """The arrays of a day. `drifts`: expert load goes on from day to day by the scenario's own law."""
    rng = np.random.default_rng([seed, day, 19])
    steps, seconds = int(DAY_S / DT_S), int(DAY_S)
    place = np.minimum(steps - 1, (arriving.at_s / DT_S).astype(np.int64))
    count = np.bincount(place, minlength=steps).astype(np.float64)
    prompt = np.bincount(place, weights=arriving.input_tokens, minlength=steps).astype(np.float64)
    output = np.bincount(place, weights=arriving.output_tokens, minlength=steps).astype(np.float64)
    demand, assigned, lost, cv, spell = _experts(world, seed * 31 + (day if drifts else 0), true, rng)
    up = np.ones(steps)
    for outage in world.outages:
        length = outage.until_s - outage.from_s
        start = float(rng.uniform(0.0, DAY_S - length))
        up[int(start / DT_S) : int((start + length) / DT_S)] -= 1.0 / world.replicas
    api_up = np.ones((len(world.apis), steps), dtype=bool)
    for index, api in enumerate(world.apis):
        for begin, end in api.outages:
            length = end - begin
            start = float(rng.uniform(0.0, DAY_S - length))
            api_up[index, int(start / DT_S) : int((start + length) / DT_S)] = False
    windows = count.reshape(-1, int(WINDOW_S / DT_S)).sum(axis=1)
    down = up.reshape(-1, int(WINDOW_S / DT_S)).min(axis=1) < 1.0
    spike = (windows > SPIKE_RATIO * windows.mean()) | down
    speed = _speed(steps, rng) if true.hidden else np.ones(steps)
    return Day(count, prompt, output, spell[:seconds], demand, assigned, lost, cv, up, api_up, speed, spike)


def _traced(path: Path, name: str, traces: Path | None) -> bool:
    first = load(path, name, traces=traces, scale=1.0, seed=1).workload
    second = load(path, name, traces=traces, scale=1.0, seed=2).workload
    return len(first) == len(second) and bool(np.array_equal(first.at_s, second.at_s))


def _resampled(trace: Workload, curve: Callable[[Floats], Floats], scale: float, rng: np.random.Generator) -> Workload:
    """Blocks of the trace at random; each request comes Poisson(scale × daily curve) times, lengths drawn anew."""
    blocks = max(1, int(float(trace.at_s[-1]) / BLOCK_S))
    at: list[Floats] = []
    for start in np.arange(0.0, DAY_S, BLOCK_S):
        begin = float(rng.integers(blocks)) * BLOCK_S
        inside = trace.at_s[(trace.at_s >= begin) & (trace.at_s < begin + BLOCK_S)] - begin
        at.append(inside + start)
    at_s = np.concatenate(at)
    copies = rng.poisson(scale * curve(at_s))
    at_s = np.repeat(at_s, copies)
    at_s = np.sort(np.minimum(at_s + rng.uniform(0.0, JITTER_S, len(at_s)), DAY_S - 1e-3))
    row = rng.integers(len(trace), size=len(at_s))
    return Workload(at_s, trace.input_tokens[row], trace.output_tokens[row])


def _experts(
    world: World, seed: int, true: Truth, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats, Floats, NDArray[np.int64]]:
    seconds = int(DAY_S)
    if world.experts is None:
        flat = np.ones((1, UNCAPPED + 1))
        return np.ones(1), flat, flat * 0.0, np.zeros(1), np.zeros(seconds, dtype=np.int64)
    drawn = load_over_time(world.experts, DAY_S, seed)
    assigned, moved = _capped(drawn)
    price = true.lost * LOST_PRICE
    topic = np.exp(0.2 * rng.standard_normal(len(drawn.from_s))) if true.hidden else np.ones(len(drawn.from_s))
    lost = price * topic[:, None] * moved**LOST_POWER
    shares = drawn.shares * world.experts.experts
    spell = np.searchsorted(drawn.from_s, np.arange(seconds) + 0.5, side="right") - 1
    return assigned[:, UNCAPPED].copy(), assigned, lost, shares.std(axis=1), spell.astype(np.int64)


def _capped(drawn: ExpertLoad) -> tuple[Floats, Floats]:
    """(rank load max/mean, share of slots moved) by spell and γ, by the simulator's own rule (Reroute)."""
    spells = len(drawn.from_s)
    assigned, moved = np.ones((spells, UNCAPPED + 1)), np.zeros((spells, UNCAPPED + 1))
    coarse = range(0, UNCAPPED, 4)
    for spell in range(spells):
        for index in coarse:
            knobs = ExpertKnobs(
                overflow=Overflow.REROUTE,
                capacity_factor_prefill=Decimal(str(GAMMAS[index])),
                capacity_factor_decode=None,
            )
            balance = drawn.balance(spell, knobs)
            assigned[spell, index], moved[spell, index] = balance.prefill, balance.moved
        for index in range(UNCAPPED):
            if index % 4:
                low, high = index - index % 4, min(index - index % 4 + 4, UNCAPPED - 1)
                part = (index - low) / max(1, high - low)
                assigned[spell, index] = (1 - part) * assigned[spell, low] + part * assigned[spell, high]
                moved[spell, index] = (1 - part) * moved[spell, low] + part * moved[spell, high]
        assigned[spell, UNCAPPED] = drawn.balance(spell).demand
    return assigned, moved


def _speed(steps: int, rng: np.random.Generator) -> Floats:
    """Slow drift of clocks and neighbours (±8 %, 10 min), and four stalls an hour of 0.5 to 3 s."""
    every = int(15.0 / DT_S)
    rough = np.zeros(steps // every + 2)
    for i in range(1, len(rough)):
        rough[i] = 0.975 * rough[i - 1] + 0.08 * math.sqrt(1 - 0.975**2) * rng.standard_normal()
    speed: Floats = np.exp(np.interp(np.arange(steps), np.arange(len(rough)) * every, rough))
    for start in rng.integers(0, steps - 20, rng.poisson(4 * DAY_S / 3600.0)).tolist():
        speed[start : start + int(rng.uniform(0.5, 3.0) / DT_S)] = math.inf
    return speed
