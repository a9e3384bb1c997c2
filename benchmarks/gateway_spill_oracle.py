"""The least that any policy must pay to closed APIs: a linear program, so that a policy's spend has something to face.

Claim. Take any policy, clairvoyant or not, under which every request is answered within its promise by the own pool or
goes to an API, and in whose run no engine preempts. Its API dollars are at least `Bound.usd`.

Proof. Let x_i be 1 where request i (arrival a_i, L_i prompt tokens, o_i output tokens, deadline D) is served by the
pool, 0 where by an API, at the lowest price there is. Spread each engine step evenly over its duration and cut time
into buckets. In each bucket let P0 be prompt tokens of steps without a decode, P1 of steps with one, S steps with a
decode and G decode tokens. The engine (`moe_planner.sim.replica`) then obeys, summed over replicas:
1. time: (P0 + P1)·prefill + S·decode_s + G·active ≤ bucket × replicas that are up, with that bucket's expert load;
2. a step's token budget B and its places: P1 + G ≤ B·S, G ≤ max_active·S;
3. prompts: those arrived may be worked on, and those past a_i + D are done, or i would miss its TTFT;
4. decodes: from its first token on, i makes a token in every step, and a step takes from decode_s + active (the
   shortest) to a full one (the longest). So i has made at least (t − a_i − D)/longest − 1 tokens at t, and at most
   (t − a_i − L_i·prefill)/shortest + 1; and what it still lacks at t fits, in shortest steps, before its own ITL's end;
5. pure prefill is rare: a stretch of steps without a decode ends with the first prompt that completes and goes on to
   decode, so that it holds at most that prompt and B tokens more; that request, the starter s_i ≤ x_i, then decodes
   o_i − 1 steps, in a spell that no other starter of its replica shares. A stretch whose starter came before the cut
   below, or whose replica dies, gets its B tokens, or its longest prompt, for nothing.
All are linear in x, s, P0, P1, S, G; x may be fractional, and what a stretch of `CHUNK_S` owes to the next is forgiven:
each only lowers the optimum. So the policy's run is a feasible point and pays no less than the least of the program. ∎
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from moe_core.setting import Setting
from moe_planner.sim.experts import load_over_time
from moe_planner.sim.knobs import slowed
from moe_planner.sim.workload import Workload
from moe_planner.sim.world import World

Floats = NDArray[np.float64]
CHUNK_S = 120.0
BUCKETS_OF_DEADLINE = 6
STARTER_WINDOW = 40  # buckets


@dataclass(frozen=True, eq=False)
class Bound:
    """The least dollars, and how much of each request the pool serves where they are least."""

    usd: float
    local: Floats
    spilled_tokens_share: float


@dataclass(frozen=True, eq=False)
class Speed:
    """Seconds of a prompt token and of a decoding sequence in a step, from moments on."""

    from_s: Floats
    prefill: Floats
    active: Floats

    def least(self, start: float, end: float) -> tuple[float, float]:
        """The fastest of each between two moments."""
        first = max(0, int(np.searchsorted(self.from_s, start, side="right")) - 1)
        last = max(first + 1, int(np.searchsorted(self.from_s, end, side="left")))
        return float(self.prefill[first:last].min()), float(self.active[first:last].min())


def speed_of(world: World, workload: Workload, seed: int) -> Speed:
    """What expert load does to the pool over time: the same draw as the simulation of this seed."""
    engine = world.engine
    if world.experts is None:
        return Speed(np.zeros(1), np.array([engine.prefill_token_s]), np.array([engine.active_s]))
    load = load_over_time(world.experts, float(workload.at_s[-1]) + 1.0, seed)
    spells = range(len(load.from_s))
    each = [slowed(engine, world.experts, load.balance(spell, Setting().experts)) for spell in spells]
    return Speed(
        np.asarray(load.from_s, dtype=np.float64), np.array([e[0] for e in each]), np.array([e[1] for e in each])
    )


def dollars(world: World, workload: Workload) -> Floats:
    """What each request costs at the cheapest API, by its true lengths."""
    prices = [
        (workload.input_tokens * api.usd_per_m_input + workload.output_tokens * api.usd_per_m_output) / 1e6
        for api in world.apis
    ]
    least: Floats = np.array(prices, dtype=np.float64).min(axis=0)
    return least


def bound(world: World, workload: Workload, seed: int) -> Bound:
    """Solve the program, stretch by stretch."""
    speed, usd = speed_of(world, workload, seed), dollars(world, workload)
    local, total = np.ones(len(workload)), 0.0
    end = float(workload.at_s[-1]) + 1.0
    for number in range(math.ceil(end / CHUNK_S)):
        low, high = np.searchsorted(workload.at_s, [number * CHUNK_S, (number + 1) * CHUNK_S])
        if low == high:
            continue
        rows = slice(int(low), int(high))
        x, least = _stretch(
            world,
            speed,
            number * CHUNK_S,
            workload.at_s[rows] - number * CHUNK_S,
            workload.input_tokens[rows].astype(np.float64),
            workload.output_tokens[rows].astype(np.float64),
            usd[rows],
            int(low - np.searchsorted(workload.at_s, number * CHUNK_S - world.slo.ttft_s)),
        )
        local[rows] = x
        total += least
    tokens = workload.input_tokens + workload.output_tokens
    return Bound(total, local, float(((1.0 - local) * tokens).sum() / tokens.sum()))


def _stretch(
    world: World,
    speed: Speed,
    start_s: float,
    at: Floats,
    prompt: Floats,
    output: Floats,
    usd: Floats,
    before_cut: int,
) -> tuple[Floats, float]:
    """(share of each request served by the pool, dollars) of one stretch; `at` counts from its start.

    `before_cut` requests arrived less than a deadline before it.
    """
    engine, deadline = world.engine, world.slo.ttft_s
    width = deadline / BUCKETS_OF_DEADLINE
    count = math.ceil(CHUNK_S / width)
    edges: Floats = np.arange(count + 1, dtype=np.float64) * width
    each = [speed.least(start_s + edges[b], start_s + edges[b + 1]) for b in range(count)]
    prefill, active = np.array([e[0] for e in each]), np.array([e[1] for e in each])
    n, most = len(at), engine.max_batched_tokens
    inside = (speed.from_s < start_s + CHUNK_S) & (np.append(speed.from_s[1:], np.inf) > start_s)
    slow_prefill, slow_active = float(speed.prefill[inside].max()), float(speed.active[inside].max())
    longest = engine.launch_s + engine.prompt_s + engine.decode_s
    longest += max((most - seqs) * slow_prefill + seqs * slow_active for seqs in (1, min(engine.max_active, most)))
    shortest = engine.decode_s + float(active.min())
    rest = output - 1.0
    program = _Program(n, count)
    x, s = 0, n
    p0, p1, steps, made = (2 * n + k * count for k in range(4))
    sent, due, least, reach = (2 * n + (4 + k) * count for k in range(4))
    of = np.arange(n)
    # 1, 2: time, token budget, places
    up = np.array([_up(world, start_s + edges[b], start_s + edges[b + 1]) for b in range(count)])
    for b in range(count):
        program.at_most(
            [(p0 + b, prefill[b]), (p1 + b, prefill[b]), (steps + b, engine.decode_s), (made + b, active[b])],
            width * up[b],
        )
        program.at_most([(p1 + b, 1.0), (made + b, 1.0), (steps + b, -float(most))], 0.0)
        program.at_most([(made + b, 1.0), (steps + b, -float(engine.max_active))], 0.0)
    # 3, 4: running totals of what may be and must be done, tied to x by their growth in each bucket
    arrived = np.minimum((at / width).astype(np.int64), count - 1)
    program.growth(sent, arrived, x + of, prompt)
    late = np.ceil((at + deadline) / width - 1e-9).astype(np.int64) - 1
    program.growth(due, late, x + of, prompt)
    last = at + deadline + world.slo.itl_s * rest

    def surely(moment: float) -> Floats:
        slowest = np.maximum((moment - at - deadline) / longest - 1.0, rest - (last - moment) / shortest)
        made: Floats = np.clip(slowest, 0.0, rest)
        return made

    def possibly(moment: float) -> Floats:
        made: Floats = np.clip((moment - at - prompt * prefill.min()) / shortest + 1.0, 0.0, rest)
        return made

    for first, made_by in ((least, surely), (reach, possibly)):
        before = made_by(float(edges[0]))
        for b in range(count):
            now = made_by(float(edges[b + 1]))
            grown = np.nonzero(now - before > 1e-9)[0]
            program.growth(first, np.full(len(grown), b), x + grown, (now - before)[grown])
            before = now
    for total in (sent, due, least, reach):
        program.close(total)
    program.cumulative((p0, p1), due, sent)
    program.cumulative((made,), least, reach)
    _starters(program, world, start_s, edges, (at, prompt, rest), longest, before_cut)
    for i in range(n):
        program.at_most([(s + i, 1.0), (x + i, -1.0)], 0.0)
    solved = program.solve(np.concatenate([-usd, np.zeros(n + 8 * count)]), np.concatenate([np.ones(2 * n)]))
    kept = np.clip(solved[:n], 0.0, 1.0)
    return kept, float(((1.0 - kept) * usd).sum())


def _starters(
    program: _Program,
    world: World,
    start_s: float,
    edges: Floats,
    requests: tuple[Floats, Floats, Floats],
    longest: float,
    before_cut: int,
) -> None:
    """5: what is prefilled without a decode beside it belongs to few, who then decode (at, prompt, rest by request)."""
    at, prompt, rest = requests
    count, n = len(edges) - 1, len(at)
    s, p0, steps = n, 2 * n, 2 * n + 2 * count
    deadline, most = world.slo.ttft_s, world.engine.max_batched_tokens
    for first_bucket in range(0, count, STARTER_WINDOW):
        last_bucket = min(count, first_bucket + STARTER_WINDOW)
        begin, stop = edges[first_bucket], edges[last_bucket]
        near = np.nonzero((at >= begin - deadline) & (at < stop))[0]
        buckets = range(first_bucket, last_bucket)
        free = float(most * before_cut) if first_bucket == 0 else 0.0
        for outage in world.outages:
            if begin <= outage.from_s - start_s < stop:
                free += float(prompt.max()) + most
        program.at_most([(p0 + b, 1.0) for b in buckets] + [(s + i, -(prompt[i] + most)) for i in near], free)
        sure = np.clip((stop - at - deadline) / longest - 1.0, 0.0, rest)
        sure[at < begin] = 0.0
        program.at_most([(steps + b, -1.0) for b in buckets] + [(s + i, sure[i]) for i in np.nonzero(sure > 0)[0]], 0.0)


def _up(world: World, start: float, end: float) -> int:
    """The most replicas that are up at any moment of a bucket."""
    gone = {o.replica for o in world.outages if o.from_s <= start and end <= o.until_s}
    return world.replicas - len(gone)


class _Program:
    """Rows of a sparse linear program, as they are thought of."""

    def __init__(self, requests: int, buckets: int) -> None:
        self.buckets = buckets
        self.columns = 2 * requests + 8 * buckets
        self._upper: tuple[list[int], list[int], list[float]] = ([], [], [])
        self._right: list[float] = []
        self._equal: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], list[Floats]] = ([], [], [])
        self._totals: dict[int, int] = {}

    def at_most(self, terms: list[tuple[int, float]], right: float) -> None:
        row = len(self._right)
        for column, value in terms:
            self._upper[0].append(row)
            self._upper[1].append(int(column))
            self._upper[2].append(float(value))
        self._right.append(right)

    def growth(self, total: int, bucket: NDArray[np.int64], column: NDArray[np.int64], by: Floats) -> None:
        """The running total at column `total` grows by `by` × column in a bucket; what lies outside is forgiven."""
        base = self._totals.setdefault(total, len(self._totals)) * self.buckets
        inside = (bucket >= 0) & (bucket < self.buckets)
        self._equal[0].append(base + bucket[inside])
        self._equal[1].append(column[inside])
        self._equal[2].append(by[inside])

    def close(self, total: int) -> None:
        """total[b] − total[b − 1] = its growth in b."""
        base, b = self._totals[total] * self.buckets, np.arange(self.buckets)
        for rows, columns, value in ((b, total + b, -1.0), (b[1:], total + b[:-1], 1.0)):
            self._equal[0].append(base + rows)
            self._equal[1].append(columns)
            self._equal[2].append(np.full(len(rows), value))

    def cumulative(self, parts: tuple[int, ...], low: int, high: int) -> None:
        """low ≤ running sum of the parts ≤ high, by a running total of their own in new columns."""
        own, self.columns = self.columns, self.columns + self.buckets
        name = -own
        b = np.arange(self.buckets)
        for part in parts:
            self.growth(name, b, part + b, np.ones(self.buckets))
        base = self._totals[name] * self.buckets
        for rows, columns, value in ((b, own + b, -1.0), (b[1:], own + b[:-1], 1.0)):
            self._equal[0].append(base + rows)
            self._equal[1].append(columns)
            self._equal[2].append(np.full(len(rows), value))
        for k in range(self.buckets):
            self.at_most([(low + k, 1.0), (own + k, -1.0)], 0.0)
            self.at_most([(own + k, 1.0), (high + k, -1.0)], 0.0)

    def solve(self, cost: Floats, bounded: Floats) -> Floats:
        cost = np.concatenate([cost, np.zeros(self.columns - len(cost))])
        upper = coo_array(
            (self._upper[2], (self._upper[0], self._upper[1])), shape=(len(self._right), self.columns)
        ).tocsr()
        rows, columns, values = (np.concatenate(part) for part in self._equal)
        equal = coo_array((values, (rows, columns)), shape=(len(self._totals) * self.buckets, self.columns)).tocsr()
        limits = np.column_stack([np.zeros(self.columns), np.full(self.columns, np.inf)])
        limits[: len(bounded), 1] = bounded
        solved = linprog(
            cost,
            A_ub=upper,
            b_ub=np.array(self._right),
            A_eq=equal,
            b_eq=np.zeros(equal.shape[0]),
            bounds=limits,
            method="highs-ds",
        )
        if solved.status != 0:
            raise RuntimeError(f"the oracle's program was not solved: {solved.message}")
        return np.asarray(solved.x)
