"""What a clairvoyant can reach: a set of requests to spill, found in hindsight, with which the own pool keeps every
promise in the same simulator. Its dollars lie above the least that could be paid, as the oracle's bound lies below it:
between the two stands the true optimum.

It starts from a policy's choice, or with everything on the own pool. Each round runs the simulation and walks over the
requests that miss, in order of time: for each it spills, among those at work or waiting before it, the ones that give
the most seconds for a dollar, until what they give is as long as the promise was passed by. When none misses it takes
requests back, one in each spell of `SPELL_S` at a time, the dearest first, and keeps what makes nobody miss. Lengths
and arrivals are known to it; what an API answers is not asked: its late answers count in `attainment`, by their law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.gateway_spill_oracle import Floats, Speed, dollars, speed_of
from moe_planner.sim.policy import PLAIN
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.simulate import Run
from moe_planner.sim.workload import Workload
from moe_planner.sim.world import Api, World

ROUNDS = 30
TAKE_BACKS = 20
SPELL_S = 40.0
AT_ONCE_S = 2.0
"""How much of a busy spell a round repairs."""
IDLE_SHARE = 0.2
"""A TTFT below this share of the promise begins a new busy spell."""
BEFORE_S = 8.0
"""How long before a late request work may lie that is spilled for it."""


@dataclass(frozen=True, eq=False)
class Reach:
    """Dollars of the set that was found, and the share of requests that attain: local misses that are left, and what
    the APIs answer late by their own law, counted."""

    usd: float
    attainment: float
    local_misses: int
    spilled: NDArray[np.bool_]


class _Run(Run):
    """Everything to the own pool but the chosen ones."""

    def __init__(self, workload: Workload, world: World, seed: int, spilled: NDArray[np.bool_]) -> None:
        self.spilled: list[bool] = spilled.tolist()
        super().__init__(workload, world, PLAIN, seed)

    def place(self, request: int, now: float, tried: frozenset[str], failure: object) -> None:
        if self.spilled[request]:
            self.end(request, Outcome.SHED, now)
        else:
            super().place(request, now, tried, None)


def reach(workload: Workload, world: World, seed: int, start: NDArray[np.bool_] | None = None) -> Reach:
    """Search, from what is spilled in `start`. Gateways make no difference to it."""
    world = replace(world, gateways=1)
    usd, speed = dollars(world, workload), speed_of(world, workload, seed)
    spilled = np.zeros(len(workload), dtype=bool) if start is None else start.copy()
    result = _simulated(workload, world, seed, spilled)
    for _ in range(ROUNDS):
        if not _spill_more(workload, world, speed, result, usd, spilled):
            break
        result = _simulated(workload, world, seed, spilled)
    best = _missed(result, spilled)
    tried = np.zeros(len(workload), dtype=bool)
    for _ in range(TAKE_BACKS):
        back = _dearest_of_each_spell(workload, usd, spilled & ~tried)
        if not len(back):
            break
        tried[back] = True
        for _ in range(2):  # what went wrong in one spell may have gone on into the next
            trial = spilled.copy()
            trial[back] = False
            missed = _missed(_simulated(workload, world, seed, trial), trial)
            starts = np.searchsorted(workload.at_s, workload.at_s[back] - BEFORE_S)
            ends = np.searchsorted(workload.at_s, workload.at_s[back] + SPELL_S)
            grown = [missed[a:b].sum() > best[a:b].sum() for a, b in zip(starts, ends, strict=True)]
            if not any(grown):
                break
            back = back[~np.array(grown)]
        if missed.sum() <= best.sum():
            spilled, best = trial, missed
    late = float(spilled.sum()) * min(_p_late(api, world.slo.ttft_s) for api in world.apis)
    missed_requests = int(best.sum())
    return Reach(float(usd[spilled].sum()), 1.0 - (missed_requests + late) / len(workload), missed_requests, spilled)


def _simulated(workload: Workload, world: World, seed: int, spilled: NDArray[np.bool_]) -> Result:
    run = _Run(workload, world, seed, spilled)
    run.loop(None, None)
    return run.result()


def _missed(result: Result, spilled: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(~result.attained & ~spilled)


def _p_late(api: Api, deadline_s: float) -> float:
    return 0.5 * math.erfc(math.log(deadline_s / api.ttft_median_s) / (api.sigma * math.sqrt(2.0)))


def _spill_more(
    workload: Workload, world: World, speed: Speed, result: Result, usd: Floats, spilled: NDArray[np.bool_]
) -> int:
    """Spill for those that miss, in place; how many."""
    at, slo, engine = workload.at_s, world.slo, world.engine
    rest = np.maximum(workload.output_tokens - 1, 1)
    first_s = at + np.nan_to_num(result.ttft_s, nan=0.0)
    end_s = np.where(np.isnan(result.e2e_s), math.inf, at + result.e2e_s)
    each_step = np.maximum(np.nan_to_num(result.itl_s, nan=slo.itl_s), engine.decode_s)
    place = np.clip(np.searchsorted(speed.from_s, at, side="right") - 1, 0, None)
    prompt_s = workload.input_tokens * speed.prefill[place]
    active_s = speed.active[place]
    lateness = np.maximum(result.ttft_s - slo.ttft_s, (result.itl_s - slo.itl_s) * rest * ~np.isnan(result.itl_s))
    cut = np.isnan(lateness) | (result.outcome == Outcome.CUT) | (result.outcome == Outcome.FAILED)
    missed = _missed(result, spilled)
    given = [0.0] * world.replicas  # seconds that victims of a busy spell give to all that come later in it
    until: list[tuple[float, float]] = []  # (until when it gives, seconds) to decodes
    spell_s, first_miss_s = [0.0] * world.replicas, [math.inf] * world.replicas
    victims = 0
    for i in np.flatnonzero(~spilled).tolist():
        on = int(result.where[i])
        if on >= 0 and result.ttft_s[i] < IDLE_SHARE * slo.ttft_s:
            given[on], spell_s[on], first_miss_s[on] = 0.0, float(at[i]), math.inf
        if not missed[i] or spilled[i]:
            continue
        first_miss_s[on] = min(first_miss_s[on], float(at[i]))
        if at[i] > first_miss_s[on] + AT_ONCE_S:
            continue  # what is spilled now changes what comes then
        if cut[i]:
            spilled[i] = True
            victims += 1
            continue
        slow = not result.ttft_s[i] > slo.ttft_s
        begin, end = (first_s[i], end_s[i]) if slow else (at[i], first_s[i])
        until = [one for one in until if one[0] > begin]
        lacking = float(lateness[i]) - (sum(one[1] for one in until) if slow else given[on])
        if lacking <= 0:
            continue
        low = int(np.searchsorted(at, max(spell_s[on], begin - BEFORE_S)))
        high = int(np.searchsorted(at, end if slow else at[i], side="right"))
        others = np.arange(low, max(high, i + 1))
        others = others[~spilled[others] & (result.where[others] == on)]
        # Whose work was done in the span: prompts after its beginning, decodes beside it.
        beside = np.clip((np.minimum(end_s[others], end) - np.maximum(first_s[others], begin)), 0.0, None)
        relief = np.where((first_s[others] >= begin) & (at[others] <= end), prompt_s[others], 0.0)
        relief = relief + np.minimum(beside / each_step[others], workload.output_tokens[others]) * active_s[others]
        others, relief = others[relief > 0], relief[relief > 0]
        for j in np.argsort(-relief / usd[others], kind="stable").tolist():
            spilled[others[j]] = True
            victims += 1
            given[on] += float(relief[j])
            until.append((float(end), float(relief[j])))
            lacking -= float(relief[j])
            if lacking <= 0 or others[j] == i:
                break
    return victims


def _dearest_of_each_spell(workload: Workload, usd: Floats, of: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The dearest of them in every other spell of `SPELL_S`, far enough from each other not to meet."""
    chosen: list[int] = []
    last = -math.inf
    places = np.flatnonzero(of)
    spell = (workload.at_s[places] // SPELL_S).astype(np.int64)
    for number in np.unique(spell).tolist():
        inside = places[spell == number]
        dearest = int(inside[np.argmax(usd[inside])])
        if workload.at_s[dearest] - last >= SPELL_S + BEFORE_S:
            chosen.append(dearest)
            last = float(workload.at_s[dearest])
    return np.array(chosen, dtype=np.int64)
