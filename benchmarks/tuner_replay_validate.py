"""The tuner's plant held to the discrete-event simulator: the same requests, the same figures, no hidden effects.

    python -m benchmarks.tuner_replay_validate [--scenarios FILE] [--traces DIR] [--seconds 1800]

Both run the gateway's own policy. The last line is one JSON object with both sides of each case.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tuner_replay_days as days
from benchmarks.tuner_replay_days import DT_S, NOMINAL, Day
from benchmarks.tuner_replay_plant import Lanes, Plant
from moe_planner.sim.policy import Policy
from moe_planner.sim.result import Outcome
from moe_planner.sim.scenarios import PACKAGED, load, names
from moe_planner.sim.simulate import simulate
from moe_planner.sim.workload import Workload
from moe_planner.sim.world import World

CASES = (
    ("chat-bursts", 1.5),
    ("chat-bursts", 2.5),
    ("azure-code", 2.0),
    ("skew-drift", 2.0),
    ("replica-outage", 2.0),
    ("steady", 3.0),
)
SEED = 1


def compare(world: World, arriving: Workload, seconds: float, seed: int = SEED) -> dict[str, dict[str, float]]:
    """Attainment, shares and dollars of the first seconds, by the simulator and by the plant."""
    day = days.day_of(world, arriving, seed, 0, NOMINAL)
    early = arriving.until(seconds)
    # The plant draws an expert load of its own seed; the simulator is given the same.
    exact = simulate(early, _with_outages(world, day), Policy(), seed=seed * 31)
    plant = Plant(world, Lanes(np.zeros(1, dtype=np.int64), (day,), (NOMINAL,)))
    plant.advance(int(seconds / DT_S))
    rows = {name: float(value.sum()) for name, value in plant.windows.items()}
    arrived = max(1.0, rows["arrivals"])
    return {
        "simulator": {
            "attained": round(float(exact.attained.mean()), 4),
            "spilled": round(exact.count(Outcome.API) / len(early), 4),
            "usd": round(exact.api_usd, 2),
        },
        "plant": {
            "attained": round(rows["attained"] / arrived, 4),
            "spilled": round(rows["spilled"] / arrived, 4),
            "usd": round(rows["usd"], 2),
        },
    }


def _with_outages(world: World, day: Day) -> World:
    """The world whose replicas and closed APIs are down when the day's are."""

    def spell(down: Any) -> tuple[float, float]:
        at = np.flatnonzero(down)
        return float(at[0] * DT_S), float((at[-1] + 1) * DT_S)

    outages = world.outages
    if outages:
        start, end = spell(day.up < 1.0)
        outages = (replace(outages[0], from_s=start, until_s=end),)
    apis = tuple(
        replace(api, outages=(spell(~up),)) if not up.all() else replace(api, outages=())
        for api, up in zip(world.apis, day.api_up, strict=True)
    )
    return replace(world, outages=outages, apis=apis)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=Path, default=PACKAGED)
    parser.add_argument("--traces", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=1800.0)
    args = parser.parse_args()
    known, rows = set(names(args.scenarios)), {}
    for name, scale in CASES:
        if name not in known:
            continue
        world = load(args.scenarios, name, traces=args.traces).world
        arriving = days.workload(args.scenarios, name, args.traces, scale, SEED, 0)
        rows[f"{name} {scale:g}"] = compare(world, arriving, args.seconds)
        print(json.dumps({name: rows[f"{name} {scale:g}"]}), flush=True)
    print(json.dumps({"bench": "tuner_replay_validate", "cases": rows}))


if __name__ == "__main__":
    main()
