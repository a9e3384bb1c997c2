"""`moectl simulate`: a table or JSON of scenarios, and refusals that name the field."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_cli.outcome import Refusal
from moe_cli.say import Say
from moe_cli.simulate import SimulateOptions, run

SMALL: dict[str, Any] = {
    "slo": {"ttft_deadline_ms": 1500, "itl_p95_ms": 50},
    "pools": {
        "p": {
            "prefill_tokens_per_s": 20000,
            "itl_ms_base": 10,
            "itl_ms_per_active": 0.1,
            "max_active": 64,
            "kv_tokens": 100000,
            "experts": 16,
            "top_k": 2,
            "ranks": 4,
            "gate_zipf": 0.5,
        }
    },
    "apis": {
        "a": {
            "ttft_ms_lognormal": {"median": 600, "p95": 1600},
            "itl_ms": 20,
            "usd_per_m_input": 5,
            "usd_per_m_output": 25,
            "outages": [[5, 6]],
        }
    },
    "scenarios": [
        {
            "name": "one",
            "pool": "p",
            "api": ["a"],
            "seed": 1,
            "generate": {
                "minutes": 0.5,
                "mean_rps": 4,
                "input_lognormal": {"median": 100, "p99": 400},
                "output_lognormal": {"median": 20, "p99": 60},
            },
            "replica_down": [[10, 12]],
        },
        {"name": "two", "pool": "p", "trace": "trace.csv"},
    ],
}


def play(folder: Path, document: Any, *, scenario: str = "one", **changes: Any) -> str:
    path = folder / "scenarios.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    (folder / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,100,10\n1.5,50,5\n")
    out = io.StringIO()
    given: dict[str, Any] = {
        "file": path,
        "scenarios": (scenario,) if scenario else (),
        "traces": None,
        "scale": 1.0,
        "seed": None,
        "policy": "production",
        "as_json": True,
    }
    assert (
        run(SimulateOptions(**{**given, **changes}), Say(Console(file=out, width=40), Console(file=io.StringIO()))) == 0
    )
    return out.getvalue()


def test_json_holds_the_figures_of_the_scenario(tmp_path: Path) -> None:
    result = json.loads(play(tmp_path, SMALL))
    assert result["scenario"] == "one"
    assert result["requests"] == sum(result["outcomes"].values()) > 60
    assert result["outcomes"]["api"] > 0  # while its only replica was down
    assert 0 < result["ttft_p50_s"] <= result["ttft_p95_s"]
    assert json.loads(play(tmp_path, SMALL)) == result
    assert json.loads(play(tmp_path, SMALL, seed=2)) != result


def test_a_trace_lies_beside_the_file_and_is_squeezed_by_the_scale(tmp_path: Path) -> None:
    one, two = (json.loads(play(tmp_path, SMALL, scenario="two", scale=s)) for s in (1.0, 2.0))
    assert one["requests"] == two["requests"] == 2
    assert one["seconds"] - two["seconds"] == pytest.approx(0.75, abs=0.01)


def test_the_table_has_every_scenario_and_cuts_nothing_on_a_narrow_terminal(tmp_path: Path) -> None:
    text = play(tmp_path, SMALL, scenario="", as_json=False, policy="local")
    header, one, two = text.splitlines()
    assert header.split()[:3] == ["scenario", "requests", "attained"]
    assert one.startswith("one ")
    assert two.startswith("two ")
    assert "…" not in text


def test_packaged_examples_are_all_there(tmp_path: Path) -> None:
    result = json.loads(play(tmp_path, SMALL, file=None, scenario="steady", scale=0.2))
    assert result["attainment"] > 0.99


def change(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def act(document: dict[str, Any]) -> None:
        inner: Any = document
        for step in path[:-1]:
            inner = inner[step]
        if to is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to

    return act


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a pool that is not there": (change("scenarios", 0, "pool", to="q"), "scenarios.one.pool"),
    "an API that is not there": (change("scenarios", 0, "api", to=["b"]), "scenarios.one.api"),
    "a missing figure": (change("pools", "p", "kv_tokens", to=None), "pools.p.kv_tokens"),
    "a word for a number": (change("pools", "p", "itl_ms_base", to="9"), "pools.p.itl_ms_base"),
    "a price below zero": (change("apis", "a", "usd_per_m_input", to=-5), "apis.a.usd_per_m_input"),
    "no prefill": (change("pools", "p", "prefill_tokens_per_s", to=0), "pools.p.prefill_tokens_per_s"),
    "experts that ranks cannot share": (change("pools", "p", "ranks", to=3), "pools.p.ranks"),
    "a median above the 99th percentile": (
        change("scenarios", 0, "generate", "input_lognormal", "median", to=900),
        "scenarios.one.generate.input_lognormal.median",
    ),
    "no rate": (change("scenarios", 0, "generate", "mean_rps", to=0), "scenarios.one.generate.mean_rps"),
    "an outage that ends before it begins": (
        change("scenarios", 0, "replica_down", to=[[5, 4]]),
        "scenarios.one.replica_down[0]",
    ),
    "half an outage": (change("apis", "a", "outages", to=[[5]]), "apis.a.outages[0]"),
    "neither trace nor generator": (change("scenarios", 0, "generate", to=None), "scenarios.one.generate"),
    "no SLO": (change("slo", to=None), "slo"),
    "no scenarios": (change("scenarios", to=None), "scenarios"),
    "a scenario without a name": (change("scenarios", 0, "name", to=None), "scenarios[0].name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_with_its_field(tmp_path: Path, name: str) -> None:
    act, field = REFUSED[name]
    document = copy.deepcopy(SMALL)
    act(document)
    with pytest.raises(Refusal) as refused:
        play(tmp_path, document)
    (problem,) = refused.value.problems
    assert problem.field == field
    assert problem.message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"scenario": "three"}, "--scenario"),
        ({"scale": 0.0}, "--scale"),
        ({"policy": "best"}, "--policy"),
        ({"file": Path("/nowhere/scenarios.json")}, "/nowhere/scenarios.json"),
        ({"scenario": "two", "traces": Path("/nowhere")}, "scenarios.two.trace"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as refused:
        play(tmp_path, SMALL, **changes)
    assert refused.value.problems[0].field == field
    assert refused.value.problems[0].remedy


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no JSON"):
        play(tmp_path, "{")
