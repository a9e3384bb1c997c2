"""The tuner's benchmark: its plant agrees with the simulator, its parts keep their own rules, its short form works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tuner_replay_days as days
from benchmarks.tuner_replay import Case, brief, gain, goals, lowest_gamma, run
from benchmarks.tuner_replay_days import NOMINAL, UNCAPPED
from benchmarks.tuner_replay_plant import Lanes, Plant
from benchmarks.tuner_replay_validate import compare
from moe_planner.sim.scenarios import load

SCENARIO = {
    "slo": {"ttft_deadline_ms": 1500, "itl_p95_ms": 50},
    "pools": {
        "pool": {
            "prefill_tokens_per_s": 24000,
            "itl_ms_base": 9.0,
            "itl_ms_per_active": 0.11,
            "max_active": 256,
            "kv_tokens": 230000,
            "usd_per_hour": 10.0,
            "experts": 32,
            "top_k": 4,
            "ranks": 4,
            "gate_zipf": 0.6,
        }
    },
    "apis": {
        "api": {
            "ttft_ms_lognormal": {"median": 550, "p95": 1600},
            "itl_ms": 18,
            "usd_per_m_input": 5.0,
            "usd_per_m_output": 30.0,
        }
    },
    "scenarios": [
        {
            "name": "bursts",
            "pool": "pool",
            "api": ["api"],
            "generate": {
                "minutes": 120,
                "mean_rps": 8.0,
                "gamma_shape": 0.4,
                "input_lognormal": {"median": 700, "p99": 6000},
                "output_lognormal": {"median": 180, "p99": 1200},
                "spikes": {"per_hour": 60, "height": 4.0, "seconds": [10, 30]},
            },
            "seed": 3,
        }
    ],
}


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "scenarios.json"
    path.write_text(json.dumps(SCENARIO))
    return path


def test_the_plant_agrees_with_the_simulator(scenarios: Path) -> None:
    world = load(scenarios, "bursts").world
    both = compare(world, days.workload(scenarios, "bursts", None, 1.0, 1, 0), 300.0)
    exact, fluid = both["simulator"], both["plant"]
    assert exact["spilled"] > 0.02
    assert fluid["attained"] == pytest.approx(exact["attained"], abs=0.04)
    assert fluid["usd"] == pytest.approx(exact["usd"], rel=0.3)


def test_a_day_is_the_same_for_a_seed_and_another_for_another(scenarios: Path) -> None:
    def arrivals(seed: int, day: int) -> list[float]:
        return days.workload(scenarios, "bursts", None, 1.0, seed, day).at_s.tolist()

    assert arrivals(1, 0) == arrivals(1, 0)
    assert arrivals(1, 0) != arrivals(2, 0)
    assert arrivals(1, 0) != arrivals(1, 1)
    assert vars(days.truth(1)) == vars(days.truth(1)) != vars(days.truth(2))


def test_every_request_is_served_spilled_shed_or_still_there(scenarios: Path) -> None:
    world = load(scenarios, "bursts").world
    drawn = tuple(
        days.day_of(world, days.workload(scenarios, "bursts", None, 2.0, seed, 0), seed, 0, days.truth(seed))
        for seed in (1, 2)
    )
    plant = Plant(world, Lanes(np.array([0, 1, 1]), drawn, (days.truth(1), days.truth(2))))
    plant.miss[2] = 0.1
    first = 0.0
    for _ in range(120):
        plant.reset_second()
        plant.advance(2)
        first = first + plant.second["first"]
    rows = plant.windows
    away = (rows["spilled"] + rows["shed"]).sum(axis=1)
    assert first + away + plant.waiting.sum(axis=1) == pytest.approx(rows["arrivals"].sum(axis=1))
    assert rows["spilled"][2].sum() > rows["spilled"][1].sum(), "a lower threshold spills more"
    assert (rows["attained"].sum(axis=1) <= rows["arrivals"].sum(axis=1) + 1e-6).all()
    twin = plant.copied(np.array([2, 0]))
    twin.advance(20)
    plant.advance(20)
    assert twin.usd == pytest.approx(plant.usd[[2, 0]])
    assert twin.tokens.sum() == pytest.approx(plant.tokens[[2, 0]].sum())


def test_the_lowest_gamma_keeps_quality(scenarios: Path) -> None:
    world = load(scenarios, "bursts").world
    day = days.day_of(world, days.workload(scenarios, "bursts", None, 1.0, 1, 0), 1, 0, NOMINAL)
    gamma = lowest_gamma(day, 0, 100, 0.02)
    assert 0 < gamma < UNCAPPED
    assert day.lost[day.spell[0], gamma] <= 0.02 < day.lost[day.spell[0], gamma - 4]


def test_the_short_form_gives_every_key(scenarios: Path) -> None:
    world = load(scenarios, "bursts").world
    case = Case(scenarios, None, "bursts", world, 1.5, (1,), 130.0, 0.02)
    row = run(case, lambda _: None)
    found = goals({"bursts": row})
    assert set(found) >= {
        *("slo_attainment_spikes", "cost_over_oracle", "gain_over_random_ci", "gain_over_static_best_ci"),
        *("unsafe_rate", "changes_when_steady"),
    }
    assert 0.5 < found["cost_over_oracle"] < 5
    assert json.loads(json.dumps(brief(row)))["requests"] > 500


def test_gains_leave_steady_out_and_know_their_sign() -> None:
    better = {"costs": {"fast": [1.0, 1.2, 0.9], "static_best": [2.0, 2.1, 2.2]}}
    worse = {"costs": {"fast": [9.0, 9.0, 9.0], "static_best": [1.0, 1.0, 1.0]}}
    found = gain({"one": better, "steady": worse}, "static_best")
    assert found is not None
    assert found["n"] == 3
    low, high = found["interval"]
    assert 0.4 < low <= found["mean"] <= high < 0.7
    assert gain({"steady": worse}, "static_best") is None
