"""How fast the simulator is, and how right its queueing is beside the real engine.

    python -m benchmarks.simulator [--raw FILE] [--clock wall | steady] [--rounds 12] [--quick] [--no-engine]

Speed: simulated requests of about 100 output tokens each, decided by production's own spill policy (`requests_per_s`)
and by none (`requests_per_s_plain`), for a second of CPU time: the simulator has one thread, so that on an idle machine
it is a second of the clock. `…_wall` is what the clock said on this machine as it was. The best of some runs each.

Error: `benchmarks.simulator_engine` runs the real engine on the tiny checkpoint at four loads. The step times of two of
them are fitted; the simulator then replays the arrivals of the other two, one between and one beyond, and its p95 of
TTFT and of the requests' mean ITL are compared with what was seen. `ttft_p95_error` and `itl_p95_error` are the larger
ones. `--raw` names a file of that measurement, which is then not repeated. Right queueing at a tiny model's step times
says nothing of a GPU's speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moe_planner.sim.engine import Engine
from moe_planner.sim.policy import PLAIN, Policy
from moe_planner.sim.simulate import simulate
from moe_planner.sim.workload import Arrivals, Floats, Lengths, Workload, generate
from moe_planner.sim.world import Api, Slo, World

FITTED, HELD_OUT = (0.3, 0.6), (0.45, 0.75)
"""Loads as shares of the capacity (`benchmarks.simulator_engine.LOADS`)."""
FIGURES = ("launch_s", "prompt_s", "prefill_token_s", "decode_s", "active_s")


def speed(seconds: float, runs: int) -> dict[str, float]:
    """Requests a second through one pool of two replicas with a closed API beside it."""
    engine = Engine(prefill_token_s=1 / 24000, decode_s=0.009, active_s=0.00011, kv_tokens=230_000, max_active=256)
    api = Api("closed", 0.55, 1.6, 0.018, 5.0, 30.0)
    world = World(engine, Slo(1.5, 0.05), replicas=2, apis=(api,))
    arrivals = Arrivals(seconds=seconds, rps=20.0, inputs=Lengths(700, 3000), outputs=Lengths(90, 250))
    workload = generate(arrivals, 1)
    found = {"requests": float(len(workload)), "mean_output_tokens": float(workload.output_tokens.mean())}
    for name, policy in (("requests_per_s", Policy()), ("requests_per_s_plain", PLAIN)):
        cpu, wall = [], []
        for _ in range(runs):
            cpu_started, started = time.process_time(), time.perf_counter()
            simulate(workload, world, policy)
            cpu.append(time.process_time() - cpu_started)
            wall.append(time.perf_counter() - started)
        found |= {name: len(workload) / min(cpu), f"{name}_wall": len(workload) / min(wall)}
    return found


def fit(steps: list[dict[str, float]]) -> dict[str, float]:
    """Step-time figures by least squares, none below zero: of all subsets of figures that keep to it, the best.

    The one step in two hundred that took longest is left out, on both sides: what the machine did then is not the
    engine's.
    """
    seconds = np.array([step["s"] for step in steps])
    prompt = np.array([step["prompt"] for step in steps])
    decodes = np.array([step["decodes"] for step in steps])
    kept = seconds <= np.quantile(seconds, 0.995)
    table = np.stack([np.ones_like(seconds), prompt > 0, prompt, decodes > 0, decodes], axis=1).astype(float)
    table, seconds = table[kept], seconds[kept]
    best: tuple[float, dict[str, float]] | None = None
    for size in range(1, len(FIGURES) + 1):
        for chosen in itertools.combinations(range(len(FIGURES)), size):
            values, *_ = np.linalg.lstsq(table[:, chosen], seconds, rcond=None)
            if values.min() < 0:
                continue
            loss = float(np.square(table[:, chosen] @ values - seconds).sum())
            if best is None or loss < best[0]:
                best = (loss, {FIGURES[i]: float(v) for i, v in zip(chosen, values, strict=True)})
    assert best is not None  # a constant step time is always in reach
    return {name: best[1].get(name, 0.0) for name in FIGURES}


def replay(segment: dict[str, Any], engine: Engine) -> tuple[Floats, Floats]:
    """Simulated (TTFT, mean ITL) of a segment's requests."""
    workload = Workload.of([(r["at_s"], r["input"], r["output"]) for r in segment["requests"]])
    result = simulate(workload, World(engine, Slo(1.0, 1.0)), PLAIN)
    return result.ttft_s, result.itl_s


def seen(segment: dict[str, Any]) -> tuple[Floats, Floats]:
    """Measured (TTFT, mean ITL) of a segment's requests."""
    rows = segment["requests"]
    ttft = np.array([r["first_s"] - r["at_s"] for r in rows])
    itl = np.array([(r["last_s"] - r["first_s"]) / (r["output"] - 1) for r in rows])
    return ttft, itl


def drifts(segments: list[dict[str, Any]], engine: Engine) -> list[float]:
    """How slow the machine was around each segment: seconds of steps over those that the figures give, in the nearest
    fitted segments before and after (its own where it is fitted). Held-out steps are never looked at."""

    def sums(place: int) -> tuple[float, float]:
        steps = segments[place]["steps"]
        wanted = sum(engine.step_s(step["prompt"], int(step["decodes"])) for step in steps)
        return sum(step["s"] for step in steps), wanted

    fitted = [i for i, s in enumerate(segments) if s["load"] in FITTED]
    found = []
    for i in range(len(segments)):
        before = [place for place in fitted if place <= i][-1:]
        after = [place for place in fitted if place >= i][:1]
        took, wanted = (sum(part) for part in zip(*(sums(place) for place in {*before, *after}), strict=True))
        found.append(took / wanted)
    return found


def counts(segments: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens that the requests asked for, and that the engine's steps had: the last chunk of a prompt makes the first
    output token, every other one is a decode. Preempted requests would be computed again: `stepped` is then more."""
    rows = [row for segment in segments for row in segment["requests"]]
    steps = [step for segment in segments for step in segment["steps"]]
    return {
        "asked": int(sum(row["input"] + row["output"] for row in rows)),
        "stepped": int(sum(step["prompt"] + step["decodes"] for step in steps)) + len(rows),
    }


def compare(raw: dict[str, Any]) -> dict[str, Any]:
    """Fit on some loads, predict the others."""
    segments = raw["segments"]
    steps = [step for s in segments if s["load"] in FITTED for step in s["steps"]]
    figures = fit(steps)
    limits: dict[str, Any] = {
        "block": raw["block"],
        "max_active": raw["max_seqs"],
        "max_batched_tokens": raw["max_tokens"],
    }
    limits["kv_tokens"] = raw["block"] * raw["blocks"]

    def engine(slower: float) -> Engine:
        return Engine(**limits, **{name: value * slower for name, value in figures.items()})  # type: ignore[arg-type]

    # The steady clock has taken the machine's drift out already.
    drift = drifts(segments, engine(1.0)) if raw["clock"] == "wall" else [1.0] * len(segments)
    engines = [engine(slower) for slower in drift]
    rows: dict[str, dict[str, float]] = {}
    for load in (*FITTED, *HELD_OUT):
        of = [(s, e) for s, e in zip(segments, engines, strict=True) if s["load"] == load]
        real = [np.concatenate(parts) for parts in zip(*(seen(s) for s, _ in of), strict=True)]
        simulated = [np.concatenate(parts) for parts in zip(*(replay(s, e) for s, e in of), strict=True)]
        row = {"requests": float(len(real[0]))}
        for name, one, other in zip(("ttft", "itl"), real, simulated, strict=True):
            for q in (0.5, 0.95):
                there, here = float(np.quantile(one, q)), float(np.quantile(other, q))
                row |= {f"{name}_p{q * 100:.0f}_s": there, f"{name}_p{q * 100:.0f}_error": abs(here - there) / there}
        rows[f"{load:g}"] = {key: round(value, 5) for key, value in row.items()}
    worst = {f"{n}_p95_error": max(rows[f"{load:g}"][f"{n}_p95_error"] for load in HELD_OUT) for n in ("ttft", "itl")}
    return {
        **worst,
        "clock": raw["clock"],
        "capacity_rps": round(raw["capacity_rps"], 2),
        "fitted_loads": FITTED,
        "held_out_loads": HELD_OUT,
        "steps_fitted": len(steps),
        "tokens": counts(segments),
        "drift": [round(min(drift), 3), round(max(drift), 3)],
        "engine_ms": {name[:-2]: round(value * 1e3, 5) for name, value in figures.items()},
        "loads": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure; the last line is the result as JSON. Errors are null where the engine was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="a measurement of benchmarks.simulator_engine")
    parser.add_argument("--clock", choices=["wall", "steady"], default="wall")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--quick", action="store_true", help="small: shows that it works")
    parser.add_argument("--no-engine", action="store_true", help="speed alone")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"requests_per_s": None, "ttft_p95_error": None, "itl_p95_error": None}
    found |= speed(30.0 if options.quick else 1000.0, 1 if options.quick else 3)
    if options.raw is not None:
        found |= compare(json.loads(options.raw.read_text()))
    elif not options.no_engine:
        with tempfile.TemporaryDirectory(prefix="moe-simulator-") as folder:
            out = Path(folder) / "raw.json"
            command = [sys.executable, "-m", "benchmarks.simulator_engine", str(out), "--clock", options.clock]
            command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
            subprocess.run([*command, *(["--quick"] if options.quick else [])], check=True, stdout=sys.stderr)
            found |= compare(json.loads(out.read_text()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
