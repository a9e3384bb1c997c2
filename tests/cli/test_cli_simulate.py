"""`moectl simulate`: a table or JSON of scenarios, and refusals that name the field."""

from __future__ import annotations

import copy
import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_cli.outcome import Exit, Refusal
from moe_cli.plan import PlanOptions, answer
from moe_cli.say import Say
from moe_cli.simulate import SimulateOptions, run
from moe_cli.simulate_file import FileOptions
from moe_planner.sim.result import Result
from moe_planner.sim.simulate import simulate

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


# A MoEDeployment

QWEN = """
apiVersion: moestack.dev/v1alpha1
kind: MoEDeployment
metadata: {name: qwen3}
spec:
  model: {id: Qwen/Qwen3-235B-A22B-FP8}
  hardware: {accelerator: nvidia-h100, gpusPerReplica: 4}
  replicas: {min: 1, max: 4}
  slo: {ttftP95: 800ms, itlP95: 50ms}
  tiers:
    - {name: gold, slo: {ttftP95: 400ms}}
    - {name: batch, slo: {ttftP95: 30s}, fallback: Never}
  fallback:
    targets:
      - name: gpt
        provider: openai
        model: gpt-5.5
        secretRef: {name: openai, key: apiKey}
        price: {inputUsdPerMTokens: 5, outputUsdPerMTokens: 30}
        limits: {requestsPerMinute: 3000}
    trigger: {missProbability: "0.4"}
    budget: {usdPerDay: "2"}
"""


def deployed(folder: Path, text: str = QWEN, *, err: io.StringIO | None = None, **of_file: Any) -> dict[str, Any]:
    path = folder / "moed.yaml"
    path.write_text(text)
    out = io.StringIO()
    told = FileOptions(**{"rps": 6.0, "seconds": 60.0, **of_file})
    options = SimulateOptions(path, (), None, 1.0, None, "production", True, told)
    assert run(options, Say(Console(file=out, width=40), Console(file=err or io.StringIO()))) == 0
    document: dict[str, Any] = json.loads(out.getvalue())
    return document


def test_a_deployment_is_simulated_as_it_would_be_planned_with_its_promises_targets_and_budget(tmp_path: Path) -> None:
    err = io.StringIO()
    result = deployed(tmp_path, err=err)
    planned = answer(PlanOptions(tmp_path / "moed.yaml", input_tokens=2000, output_tokens=200, rps=6.0))
    assert planned.chosen is not None
    assert result["plan"]["layout"] == str(planned.chosen.layout)
    assert result["plan"]["budget_usd"] == 2
    assert result["requests"] == sum(result["outcomes"].values()) > 300
    assert 0 < result["api_usd"] <= 2
    assert result["rent_usd"] > 0
    assert result["usd_per_m_tokens"] > 0
    assert "nothing scales here" in err.getvalue()
    assert "is assumed" in err.getvalue()


def test_more_replicas_attain_more_and_spill_less(tmp_path: Path) -> None:
    one, four = (deployed(tmp_path, replicas=n) for n in (1, 4))
    assert four["attainment"] > one["attainment"]
    assert four["api_usd"] < one["api_usd"]
    assert four["rent_usd"] > one["rent_usd"]


def test_a_trace_is_traffic_too(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,100,10\n1.5,50,5\n9,50,5\n")
    assert deployed(tmp_path, rps=None, seconds=None, trace=trace)["requests"] == 3
    assert deployed(tmp_path, rps=None, seconds=5.0, trace=trace)["requests"] == 2


def test_tiers_have_their_own_promise_and_right_to_spill(tmp_path: Path) -> None:
    tiers = deployed(tmp_path, tiers=("gold=0.5", "batch=0.25"))["tiers"]
    assert set(tiers) == {"gold", "batch", "default"}
    assert tiers["gold"]["requests"] == pytest.approx(2 * tiers["batch"]["requests"], rel=0.4)
    assert tiers["batch"]["spill_share"] == 0
    assert tiers["gold"]["spill_share"] > 0
    assert tiers["gold"]["attainment"] < tiers["default"]["attainment"]


FILE_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no traffic": (QWEN, {"rps": None}, "--rps"),
    "no rate": (QWEN, {"rps": -1.0}, "--rps"),
    "no time": (QWEN, {"seconds": 0.0}, "--seconds"),
    "a rate that is no number": (QWEN, {"rps": float("nan")}, "--rps"),
    "gaps of no shape": (QWEN, {"burstiness": 0.0}, "--burstiness"),
    "lengths that are none": (QWEN, {"input_tokens": "0"}, "--input-tokens"),
    "latency that is none": (QWEN, {"api_ttft_ms": "600,5"}, "--api-ttft-ms"),
    "a trace that is not there": (QWEN, {"rps": None, "trace": Path("/nowhere.csv")}, "--trace"),
    "a trace and a rate": (QWEN, {"trace": Path("/nowhere.csv")}, "--rps"),
    "a tier that is not there": (QWEN, {"tiers": ("silver=0.1",)}, "--tier"),
    "a tier without a share": (QWEN, {"tiers": ("gold",)}, "--tier"),
    "shares above one": (QWEN, {"tiers": ("gold=0.7", "batch=0.7")}, "--tier"),
    "a tier twice": (QWEN, {"tiers": ("gold=0.1", "gold=0.1")}, "--tier"),
    "no price": (
        QWEN.replace("gpt-5.5", "no-such-model").replace(
            "price: {inputUsdPerMTokens: 5, outputUsdPerMTokens: 30}", "zeroRetention: true"
        ),
        {},
        "spec.fallback.targets[0].price",
    ),
    "what does not fit": (QWEN.replace("gpusPerReplica: 4", "gpusPerReplica: 1"), {}, "spec"),
    "a file with a wrong field": (QWEN.replace("replicas: {min: 1", "replicas: {min: -1"), {}, ""),
}


@pytest.mark.parametrize("name", FILE_REFUSED)
def test_what_cannot_be_simulated_of_a_deployment_is_refused_by_field(tmp_path: Path, name: str) -> None:
    text, of_file, field = FILE_REFUSED[name]
    with pytest.raises(Refusal) as refused:
        deployed(tmp_path, text, **of_file)
    assert refused.value.problems[0].field == field
    assert refused.value.problems[0].message


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"of_file": FileOptions(rps=1.0)}, "--rps"), ({"of_file": FileOptions(tiers=("a=1",))}, "--tier")],
)
def test_traffic_is_no_option_of_a_file_that_has_its_own(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as refused:
        play(tmp_path, SMALL, **changes)
    assert refused.value.problems[0].field == field


# Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_shows_what_has_ended_marked_as_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupted(*given: Any, progress: Callable[[float], bool], **named: Any) -> Result:
        def heard(share: float) -> bool:
            if share > 0.3:
                signal.raise_signal(number)
            return progress(share)

        return simulate(*given, progress=heard, **named)

    monkeypatch.setattr("moe_cli.simulate.simulate", interrupted)
    before = signal.getsignal(number)
    document = copy.deepcopy(SMALL)
    document["scenarios"][0]["generate"] |= {"minutes": 30, "mean_rps": 4}
    path = tmp_path / "scenarios.json"
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,100,10\n")
    path.write_text(json.dumps(document))
    for as_json in (True, False):
        out, err = io.StringIO(), io.StringIO()
        options = SimulateOptions(path, (), None, 1.0, None, "local", as_json)
        assert run(options, Say(Console(file=out, width=40), Console(file=err, width=200))) == Exit.INTERRUPTED == 130
        assert "interrupted: one has" in err.getvalue()
        assert "1 more not begun" in err.getvalue()
        assert signal.getsignal(number) is before
        if as_json:
            (result,) = json.loads(out.getvalue())
            assert result["partial"] is True
            assert 0 < result["requests"] == sum(result["outcomes"].values()) <= 4096
            assert result["unfinished"] > 3000
        else:
            assert "one (partial)" in out.getvalue()
