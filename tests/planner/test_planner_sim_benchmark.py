"""benchmarks.simulator: figures that made the steps are found again, and held-out loads are not fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.simulator import FIGURES, compare, fit, main
from moe_planner.sim.engine import Engine
from moe_planner.sim.policy import PLAIN
from moe_planner.sim.simulate import simulate
from moe_planner.sim.workload import Arrivals, Lengths, generate
from moe_planner.sim.world import Slo, World

TRUE = {"launch_s": 0.004, "prompt_s": 0.002, "prefill_token_s": 0.00003, "decode_s": 0.001, "active_s": 0.0004}
ENGINE = Engine(**TRUE, kv_tokens=64_000, max_active=16, max_batched_tokens=256)


def steps(count: int, noise: float = 0.0) -> list[dict[str, float]]:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(count):
        prompt, decodes = int(rng.choice([0, 0, 17, 200])), int(rng.integers(0, 17))
        if prompt + decodes:
            seconds = ENGINE.step_s(prompt, decodes) * (1 + noise * rng.standard_normal())
            found.append({"s": seconds, "prompt": prompt, "decodes": decodes})
    return found


def raw(held_out_slower: float = 1.0) -> dict[str, Any]:
    """A measurement whose engine is the simulator; at the held-out loads every time may be stretched."""
    segments = []
    for load in (0.3, 0.45, 0.6, 0.75):
        workload = generate(Arrivals(20, 40 * load, Lengths(64, 300), Lengths(24, 96)), round(load * 100))
        seen = simulate(workload, World(ENGINE, Slo(1, 1)), PLAIN)
        slower = held_out_slower if load in {0.45, 0.75} else 1.0
        rows = []
        for i in range(len(workload)):
            at, out = float(workload.at_s[i]), max(2, int(workload.output_tokens[i]))
            first = at + slower * float(seen.ttft_s[i])
            last = first + slower * float(np.nan_to_num(seen.itl_s[i])) * (out - 1)
            rows.append(
                {"at_s": at, "input": int(workload.input_tokens[i]), "output": out, "first_s": first, "last_s": last}
            )
        segments.append({"load": load, "round": 0, "requests": rows, "steps": steps(800)})
    return {
        "clock": "steady",
        "capacity_rps": 40.0,
        "max_seqs": 16,
        "max_tokens": 256,
        "block": 16,
        "blocks": 4000,
        "segments": segments,
    }


def test_the_figures_behind_the_steps_are_found_again() -> None:
    found = fit(steps(4000, noise=0.05))
    whole = Engine(**found, kv_tokens=64_000, max_active=16, max_batched_tokens=256)
    for prompt, decodes in ((0, 1), (0, 16), (200, 0), (200, 16), (17, 8)):
        assert whole.step_s(prompt, decodes) == pytest.approx(ENGINE.step_s(prompt, decodes), rel=0.03)


def test_no_figure_is_below_zero() -> None:
    odd = [{"s": 0.01 - 0.0001 * n, "prompt": 0, "decodes": n} for n in range(1, 17)]
    assert min(fit(odd).values()) >= 0
    assert set(fit(odd)) == set(FIGURES)


def test_a_simulated_engine_is_predicted_and_one_that_slows_down_at_held_out_loads_is_not() -> None:
    right, wrong = compare(raw()), compare(raw(held_out_slower=1.5))
    assert max(right["ttft_p95_error"], right["itl_p95_error"]) < 0.02
    assert min(wrong["ttft_p95_error"], wrong["itl_p95_error"]) > 0.25


def test_a_machine_that_drifts_is_followed_by_the_clock_on_the_wall() -> None:
    """Twice as slow in a second round, in steps and latencies alike: known from the fitted loads of that round."""
    drifting = raw()
    slow = []
    for segment in raw()["segments"]:
        rows = []
        for row in segment["requests"]:
            at = 2 * row["at_s"]
            first, last = (at + 2 * (row[name] - row["at_s"]) for name in ("first_s", "last_s"))
            rows.append({**row, "at_s": at, "first_s": first, "last_s": last})
        slow.append(
            {**segment, "round": 1, "requests": rows, "steps": [{**s, "s": 2 * s["s"]} for s in segment["steps"]]}
        )
    drifting["segments"] += slow
    errors = {clock: compare({**drifting, "clock": clock}) for clock in ("wall", "steady")}
    assert errors["steady"]["itl_p95_error"] > errors["wall"]["itl_p95_error"]
    assert errors["wall"]["drift"][0] == pytest.approx(errors["wall"]["drift"][1] / 2, rel=0.05)
    assert errors["wall"]["loads"]["0.45"]["itl_p95_error"] < 0.02


def test_the_last_line_is_json_with_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(raw()))
    main(["--quick", "--raw", str(path)])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["requests_per_s"] > 0
    assert last["mean_output_tokens"] > 80
    assert last["ttft_p95_error"] < 0.02
    main(["--quick", "--no-engine"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ttft_p95_error"] is None
