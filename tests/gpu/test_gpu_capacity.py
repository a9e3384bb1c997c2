"""The plugin on a device, under captured graphs, with both model runners. Written, never run on a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

EXPERTS, TOP_K, LAYERS, MAX_TOKENS = 16, 4, 3, 12
SHAPE = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": LAYERS}
PROMPTS = [f"{i}. Say what {i * 37 % 101} times {i % 7} is,{' very' * (i % 9)} slowly." for i in range(40)]
UNLIMITED = {"overflow": "Unlimited"}
CAPPED = [
    {"overflow": "Reroute", "capacityFactorPrefill": "1", "capacityFactorDecode": "1"},
    {"overflow": "Drop", "capacityFactorPrefill": "1.25"},
    {"overflow": "ExpertChoice", "capacityFactorPrefill": "1.25"},
]
RUNNERS = {"first": "0", "second": "1"}


def run(folder: Path, runner: str, plugin: str, phases: list[Any], gpu: str = "capacity") -> dict[str, Any]:
    from moe_serving.tiny import Skew, cached_checkpoint

    job, out = folder / f"{plugin}{gpu}.json", folder / f"{plugin}{gpu}.out.json"
    job.write_text(
        json.dumps(
            {
                "checkpoint": str(cached_checkpoint("qwen3_moe", skew=Skew((0, 1, 2), 3.0), **SHAPE)),
                "plugin": plugin,
                "gpu": gpu,
                "second_runner": RUNNERS[runner],
                "prompts": PROMPTS,
                "phases": phases,
                "out": str(out),
            }
        )
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_gpu.py")), str(job)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.fixture(scope="module", params=list(RUNNERS))
def runner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def hooked(runner: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("hooked"), runner, "1", [UNLIMITED, *CAPPED, UNLIMITED])


@pytest.fixture(scope="module")
def stock(runner: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("stock"), runner, "0", [UNLIMITED])


def test_every_layer_is_hooked(hooked: dict[str, Any]) -> None:
    assert [(row["hooked"], row["why"]) for row in hooked["layers"]] == [(True, "")] * LAYERS
    assert [phase["error"] for phase in hooked["phases"]] == [None] * 5


def test_unlimited_is_stock_bit_by_bit_before_and_after_capacity(hooked: dict[str, Any], stock: dict[str, Any]) -> None:
    for phase in (hooked["phases"][0], hooked["phases"][4]):
        assert phase["tokens"] == stock["phases"][0]["tokens"]
        assert phase["logprobs"] == stock["phases"][0]["logprobs"]


@pytest.mark.parametrize("number", range(5))
def test_load_is_counted_exactly(hooked: dict[str, Any], number: int) -> None:
    phase = hooked["phases"][number]
    routed = sum(phase["prompt_tokens"]) + len(PROMPTS) * (MAX_TOKENS - 1)
    for before, after in zip(phase["before"]["layers"], phase["after"]["layers"], strict=True):
        assert after["tokens"] - before["tokens"] == routed
        assert sum(after["demand"]) - sum(before["demand"]) == routed * TOP_K


@pytest.mark.parametrize("number", [1, 2, 3])
def test_capacity_is_held_and_does_something(hooked: dict[str, Any], number: int) -> None:
    phase, free = hooked["phases"][number], hooked["phases"][0]
    gamma = float(CAPPED[number - 1]["capacityFactorPrefill"])
    most = -(-gamma * 256 * TOP_K // EXPERTS)  # C of the longest batch
    loads = [layer["max_prefill_load"] for layer in phase["after"]["layers"]]
    assert max(loads) <= most
    assert max(layer["max_prefill_load"] for layer in free["after"]["layers"]) > most
    moved = [
        sum(after[what] - before[what] for what in ("rerouted", "dropped"))
        for before, after in zip(phase["before"]["layers"], phase["after"]["layers"], strict=True)
    ]
    assert min(moved) > 0


def test_knobs_change_without_a_new_capture(hooked: dict[str, Any]) -> None:
    first, *later = hooked["captured"]
    assert first > 0
    assert later == [first] * 5


def test_left_alone_it_refuses_capacity_by_name(runner: str, tmp_path: Path) -> None:
    seen = run(tmp_path, runner, "1", [CAPPED[0]], gpu="off")
    assert "MOESTACK_GPU=capacity" in seen["phases"][0]["error"]
    assert [row["hooked"] for row in seen["layers"]] == [False] * LAYERS
