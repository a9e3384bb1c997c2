"""Tiny checkpoints: every family writes one that says of its router what published ones say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_serving.tiny import FAMILIES, Skew, make_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ARCHITECTURES = {
    "dbrx": "DbrxForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}


def weights(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(path / "model.safetensors")
    return found


def routers(path: Path) -> dict[str, Any]:
    ends = ("gate.weight", "router.weight", "router.layer.weight")
    return {
        name: weight
        for name, weight in weights(path).items()
        if name.endswith(ends) and "shared" not in name and "proj" not in name
    }


def test_every_family_is_here() -> None:
    assert set(ARCHITECTURES) == set(FAMILIES)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_checkpoint_has_its_familys_architecture_and_routers(family: str, tmp_path: Path) -> None:
    path = tmp_path / family
    known = make_checkpoint(family, path)
    assert json.loads((path / "config.json").read_text())["architectures"] == [ARCHITECTURES[family]]
    found = routers(path)
    assert len(found) == known.moe_layers
    assert {weight.shape[0] for weight in found.values()} == {known.experts}
    assert sum(file.stat().st_size for file in path.iterdir()) < 30_000_000


def test_deepseek_v3_says_that_it_scores_by_sigmoid_and_corrects_by_a_bias(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", tmp_path / "v3")
    config = json.loads((tmp_path / "v3" / "config.json").read_text())
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")
    biases = [weight for name, weight in weights(tmp_path / "v3").items() if "e_score_correction_bias" in name]
    assert len(biases) == 3
    assert all(bool((bias != 0).all()) for bias in biases)


def test_a_seed_gives_the_same_weights_and_skew_changes_the_routers(tmp_path: Path) -> None:
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"skew": Skew((0, 1), 3.0)}}.items():
        make_checkpoint("mixtral", tmp_path / name, **options)  # type: ignore[arg-type]
    a, b, c, d = (routers(tmp_path / name) for name in "abcd")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    assert not any(torch.equal(a[name], d[name]) for name in a)
