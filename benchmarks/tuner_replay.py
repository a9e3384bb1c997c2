"""The fast loop on generated days, against an oracle, and against leaving things alone in the best of all ways.

    python -m benchmarks.tuner_replay [--scenarios FILE] [--traces DIR] [--scenario NAME] [--seeds 20] [--quick]

Each scenario runs as generated days of 24 hours squeezed to 2, spikes in real seconds, one plant for each seed: two
days to learn, the third is scored. The plant (`tuner_replay_plant`) is not what any policy believes: its figures
differ by up to 30 %, and it does what no policy knows of. Production's own code runs: `moe_core.retune.decide` each
second on digests that are late, noisy and have gaps, and `moe_core.spill.decide` for what arrives.

Cost is closed-API dollars and rent, and for each request that missed its promise (shed, failed, late, slow, or served
while more gate mass was lost than quality allows) MISS_WORTH times what the closed API takes for it. Rates are scaled
by the file's rule, against a clairvoyant spill on the plant with the file's own figures. Held against it: the static
default; the static setting that was best in hindsight, for each seed; the best of random settings tried live; the best
of TPE's and of a hill-climb's trials, all three unguarded and with the same budget; and an oracle that knows the plant
and what will arrive, tries every setting of its grid on the future and acts through the same delay. The grid's γ is the
lowest that quality allows on the whole day (static) or on the next stretch (oracle).

A window of 10 s is unsafe where it breaks the SLO (under 95 % attained, 10 requests or more) or the quality bound, the
default on the same plant does not, and a knob was away from the default in it or in the two before. Gains are shares of
the other's cost, pooled over seeds and scenarios but `steady`, with an interval by bootstrap over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tuner_replay_days as days
from benchmarks.tuner_replay_days import DT_S, NOMINAL, UNCAPPED, WINDOW_S, Day, Floats, Ints, Truth
from benchmarks.tuner_replay_plant import Lanes, Plant
from benchmarks.tuner_replay_policies import (
    ACTUATION_S,
    MISS_WORTH,
    TRIAL_S,
    Blackbox,
    Fast,
    HillClimb,
    Knobs,
    Tpe,
    cost,
    default_of,
    put,
    trial_cost,
    undone,
)
from moe_planner.sim.scenarios import PACKAGED, load, names
from moe_planner.sim.world import World

SEEDS = 20
LEARNING_DAYS = 2
STEP, SCALES_MOST, SPILL_LEAST, SPILL_MOST, STEADY_SCALE = 0.25, 40, 0.05, 0.20, 3.0
SCALE_SEEDS = 2
MISSES = (0.05, 0.15, 0.3, 0.5, 0.7, 0.9)
LIMITS = (1.0, 0.6)
ORACLE_MISSES = (0.05, 0.15, 0.3, 0.5, 0.8)
ORACLE_S = 20.0
QUALITY_ROOM = 0.98
MAX_LOST = 0.02
ATTAINED_LEAST, COUNTED_LEAST = 0.95, 10
AWAY_WINDOWS = 2
BOOTSTRAPS = 2000
LEARNERS: dict[str, type[Blackbox]] = {"random": Blackbox, "tpe": Tpe, "hill_climb": HillClimb}


@dataclass(frozen=True, eq=False)
class Case:
    """One scenario at its rate."""

    path: Path
    traces: Path | None
    name: str
    world: World
    scale: float
    seeds: tuple[int, ...]
    seconds: float
    max_lost: float

    @property
    def steps(self) -> int:
        return int(self.seconds / DT_S)

    def day(self, seed: int, number: int, true: Truth) -> Day:
        arriving = days.workload(self.path, self.name, self.traces, self.scale, seed, number)
        return days.day_of(self.world, arriving, seed, number, true)


def scale_of(path: Path, traces: Path | None, name: str, seeds: Sequence[int]) -> float | str:
    """The file's rule on generated days; a text says why there is no such rate."""
    if name == "steady":
        return STEADY_SCALE
    world = load(path, name, traces=traces).world

    def spilled(scale: float) -> float:
        drawn = tuple(
            days.day_of(world, days.workload(path, name, traces, scale, seed, 0), seed, 0, NOMINAL) for seed in seeds
        )
        plant = Plant(world, Lanes(np.arange(len(drawn)), drawn, (NOMINAL,) * len(drawn)), clairvoyant=True)
        plant.advance(int(days.DAY_S / DT_S / 4))
        quarter = int(days.DAY_S / WINDOW_S / 4)
        asked = plant.windows["asked_usd"][:, :quarter].sum()
        return float(plant.windows["usd"][:, :quarter].sum() / asked) if asked else 0.0

    below, above, share = 0, 1, {0: 0.0}
    while above <= SCALES_MOST:
        share[above] = spilled(above * STEP)
        if share[above] >= SPILL_LEAST:
            break
        below, above = above, above * 2
    else:
        return f"the clairvoyant spills less than 5 % up to scale {below * STEP:g}"
    while above - below > 1:
        middle = (above + below) // 2
        share[middle] = spilled(middle * STEP)
        below, above = (below, middle) if share[middle] >= SPILL_LEAST else (middle, above)
    if share[above] > SPILL_MOST:
        return f"at scale {above * STEP:g} the clairvoyant spills {share[above]:.0%}, over 20 %"
    return above * STEP


def lowest_gamma(day: Day, first_s: int, last_s: int, max_lost: float) -> int:
    """The lowest γ whose loss of gate mass stays within the bound in these seconds."""
    lost = day.lost[np.unique(day.spell[first_s:last_s])].max(axis=0)
    fits = np.flatnonzero(lost <= QUALITY_ROOM * max_lost)
    return int(fits[0]) if len(fits) else UNCAPPED


def static_grid(case: Case, day: Day) -> list[Knobs]:
    top = float(case.world.engine.max_active)
    gammas = dict.fromkeys((UNCAPPED, lowest_gamma(day, 0, int(case.seconds), case.max_lost)))
    plain = [Knobs(gamma, top, miss) for gamma in (*gammas, *gammas)[:2] for miss in MISSES]
    return [*plain, *(Knobs(UNCAPPED, round(top * LIMITS[1]), miss) for miss in (0.15, 0.5))]


def run(case: Case, say: Any) -> dict[str, Any]:
    """Learn for two days, score the third."""
    seeds, count = case.seeds, len(case.seeds)
    truths = tuple(days.truth(seed) for seed in seeds)
    names_of = ("fast", "default", *LEARNERS)
    lanes = np.tile(np.arange(count), len(names_of))
    fast = Fast(case.world, list(range(count)), list(seeds), case.max_lost)
    learners = {
        (2 + place) * count + i: kind(case.world, seed)
        for place, kind in enumerate(LEARNERS.values())
        for i, seed in enumerate(seeds)
    }
    own = default_of(case.world)
    for number in range(LEARNING_DAYS):
        drawn = tuple(case.day(seed, number, true) for seed, true in zip(seeds, truths, strict=True))
        plant = Plant(case.world, Lanes(lanes, drawn, truths))
        _start(plant, fast, own)
        _live(case, plant, fast, learners, say, f"day {number + 1}")
    drawn = tuple(case.day(seed, LEARNING_DAYS, true) for seed, true in zip(seeds, truths, strict=True))
    grids = [static_grid(case, day) for day in drawn]
    size = max(len(grid) for grid in grids)
    extra = np.repeat(np.arange(count), size)
    plant = Plant(case.world, Lanes(np.concatenate([lanes, extra]), drawn, truths))
    _start(plant, fast, own)
    for lane, learner in learners.items():
        put(plant, lane, learner.best)
    for i, grid in enumerate(grids):
        for j, knobs in enumerate(grid):
            put(plant, len(lanes) + i * size + j, knobs)
    learned = [len(state.table) for state in fast.states]
    seen = [len(changes) for changes in fast.changes]
    away = _live(case, plant, fast, {}, say, "scored day")
    perfect = oracle(case, drawn, truths, say)
    return scored(case, plant, perfect, fast, drawn, away, seen) | {"rows_learned": float(np.mean(learned))}


def _start(plant: Plant, fast: Fast, own: Knobs) -> None:
    for lane in range(len(plant.lanes)):
        put(plant, lane, own)
    fast.new_day()
    for place, lane in enumerate(fast.lanes):
        put(plant, lane, fast._knobs(fast.settings[place]))


def _live(
    case: Case, plant: Plant, fast: Fast, learners: dict[int, Blackbox], say: Any, what: str
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Run a day second by second; which windows had a knob of the fast loop away from home."""
    away = np.zeros((len(fast.lanes), plant.spike.shape[1]), dtype=bool)
    own, per = default_of(case.world), int(1 / DT_S)
    for now in range(int(case.seconds)):
        if now % int(TRIAL_S) == 0:
            for lane, learner in learners.items():
                if now:
                    value = trial_cost(plant, lane, plant.step_at, case.max_lost)
                    if value is not None:
                        learner.tell(value)
                put(plant, lane, learner.ask())
        plant.reset_second()
        plant.advance(per)
        fast.second(plant, now)
        lanes = fast.lanes
        moved = (plant.gamma[lanes] != own.gamma) | (plant.limit[lanes] != own.limit) | (plant.miss[lanes] != own.miss)
        away[:, int(now / WINDOW_S)] |= moved
        say(f"{case.name}: {what}, second {now} of {case.seconds:g}")
    fast.clock_s += case.seconds
    return away


def oracle(case: Case, drawn: tuple[Day, ...], truths: tuple[Truth, ...], say: Any) -> Plant:
    """Every stretch, try the grid on the future and keep the best; a choice acts after the same delay."""
    count, top = len(drawn), float(case.world.engine.max_active)
    plant = Plant(case.world, Lanes(np.arange(count), drawn, truths))
    stretch = int(ORACLE_S / DT_S)
    delay = int(ACTUATION_S / DT_S)
    held = [default_of(case.world)] * count
    for start in range(0, case.steps, stretch):
        steps = min(stretch, case.steps - start)
        begin, end = int(start * DT_S), int((start + steps) * DT_S)
        choices = []
        for i, day in enumerate(drawn):
            gamma = lowest_gamma(day, begin, min(end + ACTUATION_S, len(day.spell)), case.max_lost)
            choices.append([held[i], *(Knobs(gamma, top, miss) for miss in ORACLE_MISSES)])
        width = len(choices[0])
        rows = np.repeat(np.arange(count), width)
        trial = plant.copied(rows)
        trial.advance(min(delay, steps))
        for i in range(count):
            for j, knobs in enumerate(choices[i]):
                put(trial, i * width + j, knobs)
        trial.advance(max(0, steps - delay))
        first = int(start * DT_S / WINDOW_S)
        paid, _ = cost(trial, np.arange(len(rows)), first, first + int(ORACLE_S / WINDOW_S), case.max_lost)
        # What waits is worth what it would cost to miss, as far as it is late already.
        paid = paid + _late(trial)
        best = paid.reshape(count, width).argmin(axis=1)
        held = [choices[i][j] for i, j in enumerate(best.tolist())]
        plant = trial.copied(np.arange(count) * width + best)
        say(f"{case.name}: oracle, second {end} of {case.seconds:g}")
    return plant


def _late(plant: Plant) -> Floats:
    """Dollars of misses to come: of the queue beyond what the pool works off in the promised time."""
    total = plant.worth.sum(axis=1)
    tokens = plant.tokens.sum(axis=1)
    fits = plant.world.slo.ttft_s / np.maximum(1e-9, plant.token_now) * plant.world.replicas / 2
    share: Floats = np.clip(1.0 - fits / np.maximum(tokens, 1e-9), 0.0, 1.0)
    late: Floats = MISS_WORTH * total * share
    return late


def scored(
    case: Case,
    plant: Plant,
    perfect: Plant,
    fast: Fast,
    drawn: tuple[Day, ...],
    away: np.ndarray[Any, np.dtype[np.bool_]],
    seen: list[int],
) -> dict[str, Any]:
    """Figures of the scored day, by seed."""
    count, last = len(case.seeds), int(case.seconds / WINDOW_S)
    rent = case.world.usd_per_hour * case.world.replicas * case.seconds / 3600.0

    def paid(lanes: Ints, of: Plant = plant) -> Floats:
        total: Floats = cost(of, lanes, 0, last, case.max_lost)[0] + rent
        return total

    def dollars(lanes: Ints, of: Plant = plant) -> Floats:
        total: Floats = of.windows["usd"][lanes, :last].sum(axis=1) + rent
        return total

    base = np.arange(count)
    costs = {"fast": paid(base), "default": paid(base + count), "oracle": paid(base, perfect)}
    for place, name in enumerate(LEARNERS):
        costs[name] = paid(base + (2 + place) * count)
    fixed = (len(plant.lanes) - (2 + len(LEARNERS)) * count) // count
    grid = paid(np.arange((2 + len(LEARNERS)) * count, len(plant.lanes))).reshape(count, fixed)
    costs["static_best"] = grid.min(axis=1)
    spikes = np.stack([day.spike[:last] for day in drawn])
    changes = [fast.changes[i][seen[i] :] for i in range(count)]
    return {
        "scale": case.scale,
        "costs": {name: value.tolist() for name, value in costs.items()},
        "dollars": {"fast": dollars(base).tolist(), "oracle": dollars(base, perfect).tolist()},
        "attained": _attained(plant, base, last, case.max_lost).tolist(),
        "attained_default": _attained(plant, base + count, last, case.max_lost).tolist(),
        "attained_oracle": _attained(perfect, base, last, case.max_lost).tolist(),
        "attained_spikes": _in_spikes(plant, base, last, case.max_lost, spikes),
        "attained_spikes_default": _in_spikes(plant, base + count, last, case.max_lost, spikes),
        "attained_spikes_oracle": _in_spikes(perfect, base, last, case.max_lost, spikes),
        "spilled": (plant.windows["spilled"][base, :last].sum(axis=1) / _arrived(plant, base, last)).tolist(),
        "unsafe": _unsafe(plant, count, last, case.max_lost, away).tolist(),
        "spike_windows": int(spikes.sum()),
        "changes": [len(each) for each in changes],
        "undone": [undone(each) for each in changes],
        "requests": float(_arrived(plant, base, last).sum()),
    }


def _arrived(plant: Plant, lanes: Ints, last: int) -> Floats:
    total: Floats = plant.windows["arrivals"][lanes, :last].sum(axis=1)
    return total


def _attained(plant: Plant, lanes: Ints, last: int, max_lost: float) -> Floats:
    """Share of requests that had what was promised, quality too."""
    good, arrivals = _good(plant, lanes, last, max_lost)
    share: Floats = good.sum(axis=1) / np.maximum(1.0, arrivals.sum(axis=1))
    return share


def _in_spikes(plant: Plant, lanes: Ints, last: int, max_lost: float, spikes: Any) -> list[float]:
    """The same of the requests of spikes, of all seeds together, since some have few."""
    good, arrivals = _good(plant, lanes, last, max_lost)
    total = float((arrivals * spikes).sum())
    return [float((good * spikes).sum()) / total] if total else []


def _good(plant: Plant, lanes: Ints, last: int, max_lost: float) -> tuple[Floats, Floats]:
    arrivals, good = plant.windows["arrivals"][lanes, :last], plant.windows["attained"][lanes, :last]
    spilled, lost = plant.windows["spilled"][lanes, :last], plant.windows["lost"][lanes, :last]
    return np.where(lost > max_lost, np.minimum(good, spilled), good), arrivals


def _unsafe(plant: Plant, count: int, last: int, max_lost: float, away: np.ndarray[Any, np.dtype[np.bool_]]) -> Floats:
    """Share of windows that the tuner's own change broke."""

    def broken(lanes: Ints) -> np.ndarray[Any, np.dtype[np.bool_]]:
        rows = {name: plant.windows[name][lanes, :last] for name in ("arrivals", "attained", "lost")}
        late = (rows["attained"] < ATTAINED_LEAST * rows["arrivals"]) & (rows["arrivals"] >= COUNTED_LEAST)
        return late | (rows["lost"] > max_lost)

    near = away[:, :last].copy()
    for by in range(1, AWAY_WINDOWS + 1):
        near[:, by:] |= away[:, : last - by]
    base = np.arange(count)
    found: Floats = (broken(base) & ~broken(base + count) & near).mean(axis=1)
    return found


def gain(rows: dict[str, dict[str, Any]], over: str) -> dict[str, Any] | None:
    """Mean share of the other's cost that is saved, its interval, and the effect in standard deviations."""
    shares = [
        1.0 - np.array(row["costs"]["fast"]) / np.array(row["costs"][over])
        for name, row in rows.items()
        if name != "steady" and "costs" in row
    ]
    if not shares:
        return None
    rng = np.random.default_rng(7)
    means = [
        float(np.mean([each[rng.integers(len(each), size=len(each))].mean() for each in shares]))
        for _ in range(BOOTSTRAPS)
    ]
    every = np.concatenate(shares)
    spread = float(every.std(ddof=1)) if len(every) > 1 else 0.0
    return {
        "mean": round(float(np.mean([each.mean() for each in shares])), 4),
        "interval": [round(float(np.quantile(means, q)), 4) for q in (0.025, 0.975)],
        "effect_size": round(float(every.mean()) / spread, 3) if spread else None,
        "won": round(float((every > 0).mean()), 3),
        "n": len(every),
    }


def goals(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of GOALS.md: the worst scenario's mean, and pooled gains."""
    ran = {name: row for name, row in rows.items() if "costs" in row}

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    spiky = [mean(row["attained_spikes"]) for row in ran.values() if row["spike_windows"]]
    over = [mean(np.array(row["costs"]["fast"]) / np.array(row["costs"]["oracle"])) for row in ran.values()]
    others = ("random", "static_best", "default", "tpe", "hill_climb")
    gains = {name: gain(ran, name) for name in others}

    def interval(name: str) -> list[float] | None:
        found = gains[name]
        return None if found is None else found["interval"]

    return {
        "slo_attainment_spikes": round(min(spiky), 4) if spiky else None,
        "cost_over_oracle": round(max(over), 4) if over else None,
        "gain_over_random_ci": interval("random"),
        "gain_over_static_best_ci": interval("static_best"),
        "unsafe_rate": round(max((mean(row["unsafe"]) for row in ran.values()), default=math.nan), 5) if ran else None,
        "changes_when_steady": max(ran["steady"]["changes"]) if "steady" in ran else None,
        "gains": gains,
    }


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """One scenario for a person: means over seeds."""
    if "costs" not in row:
        return row

    def mean(values: Sequence[float]) -> float | None:
        return round(float(np.mean(values)), 4) if len(values) else None

    fast = np.array(row["costs"]["fast"])
    return {
        **{key: row[key] for key in ("scale", "requests", "spike_windows", "rows_learned")},
        **{key: mean(row[key]) for key in row if key.startswith("attained")},
        **{key: mean(row[key]) for key in ("spilled", "unsafe", "changes", "undone")},
        "changes_most": max(row["changes"]),
        "cost_over": {name: mean(fast / np.array(value)) for name, value in row["costs"].items() if name != "fast"},
        "dollars_over_oracle": mean(np.array(row["dollars"]["fast"]) / np.array(row["dollars"]["oracle"])),
    }


class Progress:
    """A line each ten seconds on standard error."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._at > 10.0:
            import sys

            self._at = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=Path, default=PACKAGED)
    parser.add_argument("--traces", type=Path, default=None)
    parser.add_argument("--scenario", action="append", help="only this one; may be given again")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--scale", type=float, default=None, help="in place of the rule's")
    parser.add_argument("--keep", type=Path, help="folder: finished scenarios are kept there, and taken from there")
    parser.add_argument("--quick", action="store_true", help="two seeds, five minutes of each day")
    args = parser.parse_args()
    seeds = tuple(range(101, 101 + (2 if args.quick else args.seeds)))
    rows: dict[str, dict[str, Any]] = {}
    try:
        for name in args.scenario or names(args.scenarios):
            kept = None if args.keep is None else args.keep / f"{name}.json"
            if kept is not None and kept.exists():
                rows[name] = json.loads(kept.read_text())
                continue
            found = args.scale or scale_of(args.scenarios, args.traces, name, seeds[:SCALE_SEEDS])
            if isinstance(found, str):
                rows[name] = {"refused": found}
            else:
                world = load(args.scenarios, name, traces=args.traces).world
                seconds = 300.0 if args.quick else days.DAY_S
                case = Case(args.scenarios, args.traces, name, world, found, seeds, seconds, MAX_LOST)
                rows[name] = run(case, Progress())
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(rows[name]))
            print(json.dumps({"scenario": name, **brief(rows[name])}), flush=True)
    except KeyboardInterrupt:
        print("interrupted: what follows is of the scenarios that were finished", flush=True)
    scenarios = {name: brief(row) for name, row in rows.items()}
    print(json.dumps({"bench": "tuner_replay", "seeds": len(seeds), **goals(rows), "scenarios": scenarios}))


if __name__ == "__main__":
    main()
