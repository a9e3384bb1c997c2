"""Files of scenarios: every field of the form is used, and what is wrong is refused by its path."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_planner.sim.experts import load_over_time
from moe_planner.sim.fields import ScenarioInvalid
from moe_planner.sim.scenarios import PACKAGED, Scenario, load, names
from moe_planner.sim.simulate import simulate

WHOLE: dict[str, Any] = {
    "note": "words",
    "rule": "text at the top is for people",
    "slo": {"ttft_deadline_ms": 1500, "itl_p95_ms": 50, "attained": "words"},
    "quality": {"max_lost_gate_mass": 0.02},
    "pools": {
        "p": {
            "prefill_tokens_per_s": 20000,
            "itl_ms_base": 10,
            "itl_ms_per_active": 0.1,
            "max_active": 64,
            "max_batched_tokens": 256,
            "kv_tokens": 100000,
            "usd_per_hour": 10,
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
            "usd_per_m_cached_input": 0.5,
            "usd_per_m_output": 25,
            "requests_per_minute": 300,
            "p_429_in_burst": 0.1,
            "outages": [[5, 60]],
        }
    },
    "scenarios": [
        {
            "name": "one",
            "note": "words",
            "pool": "p",
            "replicas": 2,
            "api": ["a"],
            "seed": 1,
            "budget_usd": 3,
            "generate": {
                "minutes": 2,
                "mean_rps": 4,
                "gamma_shape": 0.5,
                "shape_redrawn_every_s": 20,
                "input_lognormal": {"median": 100, "p99": 400},
                "output_lognormal": {"median": 20, "p99": 60},
                "spikes": {"per_hour": 60, "height": 4, "seconds": [10, 30]},
            },
            "expert_drift": {
                "random_walk_sigma_per_min": 0.1,
                "topic_switch_per_hour": 30,
                "topic_zipf": [0.4, 1.3],
            },
            "replica_down": [[10, 100]],
            "tiers": [
                {"name": "gold", "share": 0.25, "ttft_deadline_ms": 800},
                {"name": "rest", "share": 0.75, "itl_p95_ms": 90, "fallback": False},
            ],
        },
        {"name": "two", "pool": "p", "trace": "trace.csv"},
    ],
}
UNUSED = {("slo", "attained"), ("quality", "max_lost_gate_mass"), ("apis", "a", "usd_per_m_cached_input")}
"""Fields of the form that are for people, for other benchmarks, or about what is not simulated (docs/simulator.md)."""
Path_ = tuple[str | int, ...]


def leaves(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Paths of everything that is no object or list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict | list):
        yield at
    for name, each in inner:
        yield from leaves(each, (*at, name))


def changed(path: Path_, to: Any) -> Any:
    document = copy.deepcopy(WHOLE)
    inner: Any = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to(inner[path[-1]]) if callable(to) else to
    return document


def read(folder: Path, document: Any, name: str = "one") -> Scenario:
    path = folder / "scenarios.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return load(path, name)


def picture(scenario: Scenario) -> tuple[Any, ...]:
    """All that a simulation takes from a scenario; expert load as it is drawn."""
    world, workload = scenario.world, scenario.workload
    load_ = load_over_time(world.experts, 60.0, scenario.seed).shares.tolist() if world.experts is not None else None
    return (
        scenario.seed,
        world,
        load_,
        *(tuple(np.asarray(a).tolist()) for a in (workload.at_s, workload.input_tokens, workload.output_tokens)),
    )


USED = [
    path
    for path in leaves(WHOLE)
    if path not in UNUSED and path[0] in {"slo", "pools", "apis", "quality", "scenarios"} and "note" not in path
]
ODD = {
    ("scenarios", 0, "api", 0): None,  # names are held against pools and apis below
    ("scenarios", 0, "pool"): None,
    ("scenarios", 0, "name"): None,
    ("scenarios", 1, "name"): None,
    ("scenarios", 1, "pool"): None,
    ("scenarios", 1, "trace"): None,
    ("pools", "p", "ranks"): 8,
    ("scenarios", 0, "tiers", 0, "name"): "silver",
    ("scenarios", 0, "tiers", 1, "name"): "others",
    ("scenarios", 0, "tiers", 1, "fallback"): True,
}


@pytest.mark.parametrize("path", [p for p in USED if ODD.get(p, 0) is not None], ids=str)
def test_every_figure_of_the_form_reaches_the_simulation(tmp_path: Path, path: Path_) -> None:
    def other(value: Any) -> Any:
        return ODD[path] if path in ODD else value * (2 if isinstance(value, int) else 1.25)

    document = changed(path, other)
    if path[-1] == "share":  # its neighbour takes what is left
        tiers = document["scenarios"][0]["tiers"]
        tiers[1 - int(path[3])]["share"] = 1 - tiers[int(path[3])]["share"]
    assert picture(read(tmp_path, document)) != picture(read(tmp_path, WHOLE))


def test_other_names_of_pools_apis_and_scenarios_are_read(tmp_path: Path) -> None:
    text = json.dumps(WHOLE)
    for old, new in (('"p"', '"a pool of eight"'), ('"a"', '"claude/4.7"'), ('"one"', '"größer"')):
        text = text.replace(old, new)
    other = read(tmp_path, text, "größer")
    assert other.world.apis[0].name == "claude/4.7"
    assert other.workload.at_s.tolist() == read(tmp_path, WHOLE).workload.at_s.tolist()


def test_two_pools_and_two_apis_are_told_apart(tmp_path: Path) -> None:
    document = copy.deepcopy(WHOLE)
    document["pools"]["q"] = {**document["pools"]["p"], "max_active": 7, "usd_per_hour": 99}
    document["apis"]["b"] = {**document["apis"]["a"], "usd_per_m_output": 99}
    document["scenarios"][0] |= {"pool": "q", "api": ["b", "a"], "replicas": 5}
    world = read(tmp_path, document).world
    assert (world.engine.max_active, world.usd_per_hour, world.replicas) == (7, 99, 5)
    assert [api.usd_per_m_output for api in world.apis] == [99, 25]


def test_without_a_token_budget_a_pool_takes_512_or_its_sequences(tmp_path: Path) -> None:
    for active, budget in ((64, 512), (700, 700)):
        document = changed(("pools", "p", "max_active"), active)
        del document["pools"]["p"]["max_batched_tokens"]
        assert read(tmp_path, document).world.engine.max_batched_tokens == budget


def test_packaged_examples_are_of_the_form() -> None:
    assert [load(PACKAGED, name).name for name in names(PACKAGED)] == ["steady", "bursts", "outage"]


ONE = ("scenarios", 0)
REFUSED: dict[str, tuple[Any, str, str]] = {
    "no number": (changed(("pools", "p", "itl_ms_base"), "9"), "pools.p.itl_ms_base", "no number"),
    "true for a number": (changed(("pools", "p", "itl_ms_base"), True), "pools.p.itl_ms_base", "no number"),
    "null for a number": (changed(("pools", "p", "usd_per_hour"), None), "pools.p.usd_per_hour", "null"),
    "NaN": (changed((*ONE, "generate", "mean_rps"), float("nan")), "scenarios.one.generate.mean_rps", "finite"),
    "infinity": (changed(("pools", "p", "kv_tokens"), float("inf")), "pools.p.kv_tokens", "finite"),
    "a number beyond floats": (changed(("pools", "p", "kv_tokens"), 10**400), "pools.p.kv_tokens", "finite"),
    "half a sequence": (changed(("pools", "p", "max_active"), 1.5), "pools.p.max_active", "whole"),
    "a negative rate": (changed((*ONE, "generate", "mean_rps"), -1), "scenarios.one.generate.mean_rps", "small"),
    "no rate": (changed((*ONE, "generate", "mean_rps"), 0), "scenarios.one.generate.mean_rps", "0"),
    "no time": (changed((*ONE, "generate", "minutes"), 0), "scenarios.one.generate.minutes", "0"),
    "no shape": (changed((*ONE, "generate", "gamma_shape"), 0), "scenarios.one.generate.gamma_shape", "0"),
    "too many": (changed((*ONE, "generate", "mean_rps"), 1e9), "scenarios.one.generate.mean_rps", "would arrive"),
    "a flat spike": (
        changed((*ONE, "generate", "spikes", "height"), 0.5),
        "scenarios.one.generate.spikes.height",
        "0.5",
    ),
    "an unknown pool": (changed((*ONE, "pool"), "q"), "scenarios.one.pool", "'q'"),
    "an unknown api": (changed((*ONE, "api"), ["a", "b"]), "scenarios.one.api", "'b'"),
    "an api twice": (changed((*ONE, "api"), ["a", "a"]), "scenarios.one.api", "twice"),
    "a text for a list": (changed((*ONE, "api"), "a"), "scenarios.one.api", "no list"),
    "no scenarios": (changed(("scenarios",), []), "scenarios", "empty"),
    "a scenario that is no object": (changed(("scenarios", 1), 7), "scenarios[1]", "no object"),
    "a name twice": (changed(("scenarios", 1, "name"), "one"), "scenarios[1].name", "twice"),
    "an unknown key at the top": ({**WHOLE, "scenario": []}, "scenario", "not known"),
    "an unknown key of a pool": (changed(("pools", "p"), lambda p: {**p, "kv_token": 1}), "pools.p.kv_token", "known"),
    "an unknown key of an api": (changed(("apis", "a"), lambda a: {**a, "rpm": 1}), "apis.a.rpm", "known"),
    "an unknown key of a scenario": (changed(ONE, lambda s: {**s, "rps": 1}), "scenarios[0].rps", "known"),
    "an unknown key of a generator": (
        changed((*ONE, "generate"), lambda g: {**g, "mean_rp": 1}),
        "scenarios.one.generate.mean_rp",
        "known",
    ),
    "a budget below zero": (changed((*ONE, "budget_usd"), -1), "scenarios.one.budget_usd", "small"),
    "shares of tiers above one": (
        changed((*ONE, "tiers", 0, "share"), 0.5),
        "scenarios.one.tiers",
        "add up to 1.25",
    ),
    "two tiers of a name": (changed((*ONE, "tiers", 0, "name"), "rest"), "scenarios.one.tiers", "same name"),
    "a share above one": (changed((*ONE, "tiers", 0, "share"), 2), "scenarios.one.tiers[0].share", "2"),
    "a right that is no right": (
        changed((*ONE, "tiers", 1, "fallback"), "Never"),
        "scenarios.one.tiers[1].fallback",
        "Never",
    ),
    "drift without experts": (
        changed(("pools", "p"), lambda p: {k: v for k, v in p.items() if k not in {"experts", "top_k", "ranks"}}),
        "scenarios.one.expert_drift",
        "no experts",
    ),
    "topics that fall": (
        changed((*ONE, "expert_drift", "topic_zipf"), [1, 0]),
        "scenarios.one.expert_drift.topic_zipf",
        "falls",
    ),
    "trace and generator": (changed(ONE, lambda s: {**s, "trace": "t.csv"}), "scenarios.one.generate", "both"),
    "a pool that is a list": (changed(("pools", "p"), []), "pools.p", "no object"),
    "ranks that do not share": (changed(("pools", "p", "ranks"), 3), "pools.p.ranks", "evenly"),
    "a chance above one": (changed(("apis", "a", "p_429_in_burst"), 2), "apis.a.p_429_in_burst", "2"),
    "no requests a minute": (changed(("apis", "a", "requests_per_minute"), 0), "apis.a.requests_per_minute", "0"),
    "a median above its p95": (
        changed(("apis", "a", "ttft_ms_lognormal", "median"), 9e9),
        "apis.a.ttft_ms_lognormal",
        "p95",
    ),
    "an outage of no length": (changed((*ONE, "replica_down"), [[5, 5]]), "scenarios.one.replica_down", "[5, 5]"),
    "no deadline": (changed(("slo", "ttft_deadline_ms"), 0), "slo.ttft_deadline_ms", "0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_file_is_refused_with_its_field_and_a_remedy(tmp_path: Path, name: str) -> None:
    document, field, says = REFUSED[name]
    with pytest.raises(ScenarioInvalid) as refused:
        read(tmp_path, document)
    assert refused.value.field == field
    assert says in refused.value.message
    assert refused.value.remedy
    assert "\n" not in str(refused.value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(WHOLE).replace('"max_active": 64', '"max_active": 64, "max_active": 65')
    with pytest.raises(ScenarioInvalid, match=r"^max_active: it is there twice"):
        read(tmp_path, text)


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BAD_TRACES = {
    "a bad row": (HEAD + "0,100,10\n1,ten,5\n", "line 3"),
    "half a row": (HEAD + "0,100,10\n1\n", "line 3"),
    "no rows": (HEAD, "no requests"),
    "an empty file": ("", "columns none"),
    "other columns": ("time,in,out\n0,1,1\n", "columns time,in,out"),
    "a time that is none": (HEAD + "inf,1,1\n", "line 2"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_bad_trace_is_refused_under_the_scenario_that_names_it(tmp_path: Path, name: str) -> None:
    text, says = BAD_TRACES[name]
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(ScenarioInvalid, match=says) as refused:
        read(tmp_path, WHOLE, "two")
    assert refused.value.field == "scenarios.two.trace"


def test_a_missing_trace_is_refused_under_the_scenario_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ScenarioInvalid, match="No such file") as refused:
        read(tmp_path, WHOLE, "two")
    assert refused.value.field == "scenarios.two.trace"


def test_a_trace_out_of_order_is_sorted_and_one_moment_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(HEAD + "7,4,1\n5,3,1\n5,1,1\n5,2,1\n")
    workload = read(tmp_path, WHOLE, "two").workload
    assert workload.at_s.tolist() == [0, 0, 0, 2]
    assert workload.input_tokens.tolist() == [3, 1, 2, 4]


JUNK = st.sampled_from(
    [None, True, "", "x", -1, -0.5, 0, 1.5, 10**30, float("nan"), float("inf"), [], [1], {}, {"a": 1}]
)


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from([p for p in leaves(WHOLE) if len(p) > 1]), value=JUNK)
def test_junk_in_any_place_is_a_scenario_or_one_refusal_that_names_a_field_there(
    tmp_path_factory: pytest.TempPathFactory, path: Path_, value: Any
) -> None:
    error = refusal(tmp_path_factory.mktemp("junk"), changed(path, value))
    if error is None:
        return
    assert error.remedy
    named = error.field.replace("scenarios.one", "scenarios[0]").replace("scenarios.two", "scenarios[1]")
    whole = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    beside = whole.rpartition(".")[0]  # two figures that do not go together: the neighbour may be named
    assert named.startswith((whole, beside)) or whole.startswith(named) or error.field == "--scenario"


def refusal(folder: Path, document: Any) -> ScenarioInvalid | None:
    """What is refused; every other error goes through, and what is not refused can be simulated."""
    try:
        found = read(folder, document)
    except ScenarioInvalid as error:
        return error
    assert len(found.workload)
    simulate(found.workload.until(3.0), found.world)
    return None
