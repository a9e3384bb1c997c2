"""Routers that answer NaN, Inf or all alike, k = E, one token, no token, fewer experts than ranks: the real engine.

One process imports vLLM and forks the engines that are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moe_core.capacity import capacity
from tests.engine.stack import environment

pytestmark = pytest.mark.engine

torch = pytest.importorskip("torch")

from tests.engine.faulty import BROKEN_LAYER, FAULTS, MAX_TOKENS, PROMPTS  # noqa: E402

Run = dict[str, Any]
UNLIMITED = {"overflow": "Unlimited"}


def both(overflow: str, gamma: str) -> dict[str, str]:
    return {"overflow": overflow, "capacityFactorPrefill": gamma, "capacityFactorDecode": gamma}


KNOBS = [UNLIMITED, both("Reroute", "1"), both("Drop", "1"), both("ExpertChoice", "1.25")]
ALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4}
RUNS: list[Run] = [
    {"name": "stock", "plugin": False, "ranks": 1, "shape": {}, "faults": list(FAULTS), "knobs": [UNLIMITED]},
    {"name": "one rank", "plugin": True, "ranks": 1, "shape": {}, "faults": list(FAULTS), "knobs": KNOBS},
    {"name": "two ranks", "plugin": True, "ranks": 2, "shape": {}, "faults": list(FAULTS), "knobs": KNOBS},
    {"name": "k = E, stock", "plugin": False, "ranks": 1, "shape": ALL_EXPERTS, "faults": list(FAULTS),
     "knobs": [UNLIMITED]},
    {"name": "k = E", "plugin": True, "ranks": 1, "shape": ALL_EXPERTS, "faults": list(FAULTS),
     "knobs": [UNLIMITED, both("Reroute", "0.5"), both("Drop", "0.5"), both("ExpertChoice", "0.5")]},
]  # fmt: skip


def run_engines(folder: Path, runs: list[Run]) -> dict[str, Run]:
    from moe_serving.tiny import cached_checkpoint

    job, out = folder / "job.json", folder / "out.json"
    found = [{**run, "checkpoint": str(cached_checkpoint("qwen3_moe", **run["shape"]))} for run in runs]
    job.write_text(json.dumps({"runs": found, "out": str(out)}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("faulty.py")), str(job)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return run_engines(tmp_path_factory.mktemp("faults"), RUNS)


def phases(found: dict[str, Run], name: str) -> list[dict[str, Any]]:
    assert "error" not in found[name], found[name]["error"]
    return list(found[name]["phases"])


def records(phase: dict[str, Any], rank: int = 0) -> list[dict[str, Any]]:
    return torch.load(f"{phase['records']}.rank{rank}.pt")  # type: ignore[no-any-return]


HOOKED = ["one rank", "two ranks", "k = E"]


@pytest.mark.parametrize(("name", "stock"), [("one rank", "stock"), ("k = E", "k = E, stock")])
def test_unlimited_answers_as_stock_vllm_does(found: dict[str, Run], name: str, stock: str) -> None:
    want = {phase["fault"]: phase for phase in phases(found, stock)}
    seen = {phase["fault"]: phase for phase in phases(found, name) if phase["knobs"] == UNLIMITED}
    assert list(seen) == list(want) == list(FAULTS)
    for fault, phase in seen.items():
        assert (phase["tokens"], phase["logprobs"]) == (want[fault]["tokens"], want[fault]["logprobs"]), fault
    differing = {json.dumps(phase["logprobs"]) for phase in want.values()}
    assert len(differing) > 2, "the faults change nothing: the test shows nothing"


@pytest.mark.parametrize("name", HOOKED)
def test_every_request_ends_and_every_slot_is_counted(found: dict[str, Run], name: str) -> None:
    shape = next(run["shape"] for run in RUNS if run["name"] == name)
    experts, top_k = shape.get("num_experts", 16), shape.get("num_experts_per_tok", 4)
    prompts = [*PROMPTS, PROMPTS[0]]
    routed = sum(map(len, prompts)) + (MAX_TOKENS - 1) * len(prompts)
    for phase in phases(found, name):
        assert [ack["error"] for ack in phase["acks"]] == [None] * len(phase["acks"])
        assert [len(tokens) for tokens in phase["tokens"]] == [MAX_TOKENS] * len(prompts)
        kept = records(phase)
        for layer in range(4):
            before, idle, after = (phase[when][0]["layers"][layer] for when in ("before", "idle", "after"))
            assert idle == {**before, "max_prefill_load": 0}, "a rank without work was counted"
            mine = [record for record in kept if record["layer"] == layer]
            demand, assigned = (
                sum(torch.bincount(r[ids][r[ids] >= 0].long(), minlength=experts) for r in mine).tolist()
                for ids in ("ids", "out_ids")
            )
            assert [b - a for a, b in zip(before["demand"], after["demand"], strict=True)] == demand
            assert [b - a for a, b in zip(before["assigned"], after["assigned"], strict=True)] == assigned
            assert after["tokens"] - before["tokens"] == routed
            assert sum(demand) == routed * top_k
            assert after["dropped"] - before["dropped"] == sum(demand) - sum(assigned)


@pytest.mark.parametrize("name", HOOKED)
def test_capacity_holds_and_leaves_no_token_without_an_expert(found: dict[str, Run], name: str) -> None:
    bound: set[str] = set()
    for phase in phases(found, name):
        gamma = phase["knobs"].get("capacityFactorPrefill")
        for record in records(phase):
            ids, experts = record["out_ids"], record["logits"].shape[1]
            assert int(ids.max()) < experts
            assert bool((ids >= 0).any(1).all()), (phase["fault"], phase["knobs"])
            for row in ids.tolist():
                taken = [expert for expert in row if expert >= 0]
                assert len(taken) == len(set(taken))
            if gamma is None:
                assert torch.equal(ids, record["ids"])
                continue
            if phase["fault"] in ("sound", "all alike"):
                total = record["out_weights"].sum(1)
                assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
            for step in (1, 2):
                rows = ids[record["phase"] == step]
                load = torch.bincount(rows[rows >= 0].long(), minlength=experts)
                limit = capacity(Decimal(gamma), rows.shape[0] * ids.shape[1], experts)
                assert int(load.max()) <= limit, (phase["fault"], phase["knobs"])
            if not torch.equal(ids, record["ids"]) and record["layer"] == BROKEN_LAYER:
                bound.add(phase["fault"])
    if name in ("one rank", "two ranks"):
        assert bound == set(FAULTS), "capacity never bound: the test shows nothing"


def test_ranks_decide_alike(found: dict[str, Run]) -> None:
    for phase in phases(found, "two ranks"):
        first, second = (records(phase, rank) for rank in range(2))
        assert len(first) == len(second) > 0
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a["out_ids"], b["out_ids"]), (phase["fault"], phase["knobs"])
        for one, other in zip(*(phase["after"][rank]["layers"] for rank in range(2)), strict=True):
            for what in ("demand", "assigned", "tokens", "dropped", "rerouted", "lost_gate_mass"):
                assert one[what] == other[what]


@pytest.mark.full
def test_an_engine_with_more_ranks_than_experts_ends_at_its_start(tmp_path: Path) -> None:
    """A plan with them is refused before (spec.parallelism.expert: experts do not divide by ranks)."""
    name, shape = "one expert", {"num_experts": 1, "num_experts_per_tok": 1}
    run = {"name": name, "plugin": True, "ranks": 2, "shape": shape, "faults": ["sound"], "knobs": [UNLIMITED]}
    found = run_engines(tmp_path, [run])
    assert "Engine core initialization failed" in found[name]["error"]
