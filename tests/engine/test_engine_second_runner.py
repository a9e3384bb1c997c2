"""vLLM's second model runner under the plugin, on a CPU with Triton interpreted; and Triton's experts kernel alone."""

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
pytest.importorskip("triton")

EXPERTS, TOP_K, LAYERS = 8, 2, 2
SHAPE = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
}
PROMPTS = ["What is " + "very " * (3 * i) + "so?" for i in range(6)]
TIERS = [None, "gold", None, "batch", "gold", None]
PHASES: list[dict[str, Any]] = [
    {"overflow": "Unlimited"},
    {"overflow": "Reroute", "capacityFactorPrefill": "1"},
    {"overflow": "Unlimited", "perToken": {"gold": 1}},
    {"overflow": "Unlimited"},
]
MAX_TOKENS = 4


def engine(folder: Path, **job: Any) -> dict[str, Any]:
    from moe_serving.tiny import Skew, cached_checkpoint

    out = folder / "out.json"
    job |= {
        "checkpoint": str(cached_checkpoint("qwen3_moe", skew=Skew((0, 1), 3.0), **SHAPE)),
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "out": str(out),
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_second.py")), str(folder / "job.json")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("second")
    result = engine(folder, tiers=TIERS, phases=PHASES)
    result["records"] = [torch.load(folder / f"out.json.phase{number}.rank0.pt") for number in range(len(PHASES))]
    return result


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return engine(tmp_path_factory.mktemp("stock"), stock=True)


def counted(phase: dict[str, Any], layer: int, what: str) -> Any:
    after, before = (phase[when]["layers"][layer][what] for when in ("after", "before"))
    return [a - b for a, b in zip(after, before, strict=True)] if isinstance(after, list) else after - before


def test_it_is_the_second_runner_and_every_layer_is_hooked(run: dict[str, Any]) -> None:
    assert "vllm.v1.worker.gpu.model_runner.GPUModelRunner" in run["runner"]
    assert [(row["hooked"], row["why"]) for row in run["layers"]] == [(True, "")] * LAYERS
    assert [phase["error"] for phase in run["phases"]] == [None] * len(PHASES)


def test_unlimited_is_bit_identical_to_stock(run: dict[str, Any], stock: dict[str, Any]) -> None:
    assert stock["runner"] == run["runner"]
    assert len(stock["scores"]) == len(PROMPTS)
    assert stock["scores"] == run["scores"]


@pytest.mark.parametrize("number", range(len(PHASES)))
def test_load_and_tokens_are_counted_exactly(run: dict[str, Any], number: int) -> None:
    """Each request runs its prompt once, and each token but the last once more; nothing else counts."""
    phase, k_of = run["phases"][number], PHASES[number].get("perToken", {})
    routed = [prompt + MAX_TOKENS - 1 for prompt in phase["prompt_tokens"]]
    slots = sum(count * k_of.get(tier, TOP_K) for count, tier in zip(routed, TIERS, strict=True))
    for layer in range(LAYERS):
        assert counted(phase, layer, "tokens") == sum(routed)
        assert sum(counted(phase, layer, "demand")) == slots
    prompts, yielded = (phase["after"][name] - phase["before"][name] for name in ("prompt_tokens", "generated_tokens"))
    assert (prompts, yielded) == (sum(phase["prompt_tokens"]), len(PROMPTS) * MAX_TOKENS)


def test_capacity_is_held_in_prefill_and_decode_is_left_alone(run: dict[str, Any]) -> None:
    busiest = 0
    for record in run["records"][1]:
        prefill, decode = record["phase"] == 1, record["phase"] == 2
        limit = capacity(Decimal(1), TOP_K * int(prefill.sum()), EXPERTS)
        load = torch.bincount(record["out_ids"][prefill].clamp(min=0).long().flatten(), minlength=EXPERTS)
        asked = torch.bincount(record["ids"][prefill].long().flatten(), minlength=EXPERTS)
        assert int(load.max()) <= limit or not bool(prefill.any())
        busiest = max(busiest, int(asked.max()) - limit)
        assert torch.equal(record["out_ids"][decode], record["ids"][decode])
    assert busiest > 0  # the router asked for more than C somewhere
    assert any(bool((record["phase"] == 2).any()) for record in run["records"][1])


def test_capacity_lifted_gives_the_first_values_again(run: dict[str, Any]) -> None:
    """By the logits of the last layer's router: texts of so small a model hardly differ."""

    def seen(phase: int) -> Any:
        return torch.cat([record["logits"] for record in run["records"][phase] if record["layer"] == LAYERS - 1])

    assert torch.equal(seen(3), seen(0))
    assert run["phases"][3]["tokens"] == run["phases"][0]["tokens"]
    assert not torch.equal(seen(1), seen(0))
    assert not torch.equal(seen(2), seen(0))


def test_tokens_without_a_tier_keep_what_the_router_gave(run: dict[str, Any]) -> None:
    for record in run["records"][2]:
        same = record["k"] == 0
        assert torch.equal(record["out_ids"][same], record["ids"][same])
        assert bool(((record["out_ids"][~same] >= 0).sum(1) == 1).all())
    assert any(bool((record["k"] == 1).any()) and bool((record["k"] == 0).any()) for record in run["records"][2])


KERNEL_CASES = [
    "whole, alone",
    "whole, a rank of two",
    "dropped, alone",
    "dropped, a rank of two",
    "one token, dropped",
    "DeepGEMM, alone",
    "DeepGEMM, a rank of two",
]


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_vllms_triton_kernels_leave_out_dropped_slots(run: dict[str, Any], name: str) -> None:
    """Interpreted, with what is CUDA between them written in torch: NaN wherever an unwritten row was read."""
    for tokens, error in run["kernel"][name].items():
        assert error < 1e-4, tokens
