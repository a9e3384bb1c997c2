"""Every family that a config.json is read for: parameter for parameter as transformers builds it, and as published."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_planner import config_json, kv, weights
from moe_planner.catalog import CatalogInvalid
from moe_planner.weights import Layout

FOUR = {"num_hidden_layers": 4}
MLP = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
MIXED = {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
# What the classes' own defaults become for small models: other keys stay as the class has them.
SMALL: dict[str, dict[str, Any]] = {
    "afmoe": {**FOUR, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "axk1": {**FOUR, "n_routed_experts": 16},
    "deepseek_v2": {**FOUR, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {**FOUR, "n_routed_experts": 16, "first_k_dense_replace": 2},
    "deepseek_v32": {**FOUR, "n_routed_experts": 16, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dots1": {**FOUR, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "hidden_size": 4096},
    "ernie4_5_moe": {**FOUR, **MLP},
    "exaone_moe": {**FOUR, **MLP, **WINDOWS},
    "flex_olmo": FOUR,
    "glm4_moe": {**FOUR, "head_dim": 128, "n_routed_experts": 8, "use_qk_norm": True, "attention_bias": True},
    "glm4_moe_lite": {**FOUR, **MLP},
    "gpt_oss": {**FOUR, **WINDOWS, "num_local_experts": 8},
    "granitemoe": {**FOUR, "tie_word_embeddings": True},
    "granitemoehybrid": {**FOUR, **MIXED},
    "granitemoeshared": {**FOUR, "shared_intermediate_size": 512},
    "hunyuan_v1_moe": {**FOUR, "num_experts": 4, "moe_topk": 2, "num_key_value_heads": 8, "head_dim": 128},
    "hy_v3": {**FOUR, **MLP, "num_experts": 8},
    "jamba": {"num_hidden_layers": 8, "num_experts": 4},
    "kimi_linear": {**FOUR, **MLP, **MIXED, "num_experts": 8},
    "lfm2_moe": {**FOUR, "layer_types": ["conv", "full_attention", "conv", "conv"]},
    "llama4_text": {**FOUR, "interleave_moe_layer_step": 2, "num_local_experts": 4},
    "mellum": {**FOUR, "mlp_layer_types": ["sparse"] * 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "minimax": {**FOUR, **MIXED},
    "minimax_m2": {**FOUR, "num_local_experts": 8},
    "mixtral": FOUR,
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "olmoe": FOUR,
    "phimoe": {**FOUR, "attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": {**FOUR, "decoder_sparse_step": 2},
    "qwen3_5_moe_text": {**FOUR, **MIXED},
    "qwen3_moe": {**FOUR, "mlp_only_layers": [1, 3]},
    "qwen3_next": {**FOUR, **MIXED},
    "solar_open": {**FOUR, "n_routed_experts": 8},
}


@cache
def config(family: str) -> str:
    return str(CONFIG_MAPPING[family](**SMALL[family]).to_json_string(use_diff=False))


def built(family: str) -> int:
    """Parameters as transformers builds the model, and the routers' corrections, which it keeps as buffers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SMALL[family]))
    corrections = [buffer for name, buffer in model.named_buffers() if "bias" in name]
    return sum(tensor.numel() for tensor in [*model.parameters(), *corrections])


@pytest.mark.parametrize("family", sorted(SMALL))
def test_parameters_are_those_that_transformers_builds(family: str) -> None:
    assert weights.total_params(config_json.read(config(family), family)) == built(family)


def counted(values: dict[str, Any], name: str) -> tuple[float, float, int]:
    facts = config_json.read(json.dumps(values), name)
    return weights.total_params(facts), kv.sequence_bytes(facts, 100_000, Layout(1), fp8=False), facts.topk


@pytest.mark.parametrize("family", sorted(SMALL))
def test_a_missing_key_is_the_classes_default_or_an_error(family: str) -> None:
    """Of each key alone, where the file has the class's own value: without it the same is meant, or it is refused."""
    values = json.loads(config(family))
    usual = json.loads(CONFIG_MAPPING[family]().to_json_string(use_diff=False))
    whole = counted(values, family)
    for key in [key for key in values if values[key] == usual.get(key)]:
        less = {name: value for name, value in values.items() if name != key}
        try:
            found = counted(less, family)
        except CatalogInvalid:
            continue
        assert found == whole, key


_LING = {
    "model_type": "bailing_moe", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "use_bias": False, "use_qkv_bias": False,
}  # fmt: skip
# Published files in the keys that count, with the parameters (all, and those that a token meets; 10^9) of their cards.
CARDS: dict[str, tuple[dict[str, Any], float, float]] = {
    "Ling-lite-1.5": (
        {**_LING, "first_k_dense_replace": 0, "intermediate_size": 1408, "moe_intermediate_size": 1408,
         "num_experts": 64, "num_experts_per_tok": 6, "num_shared_experts": 2, "num_hidden_layers": 28,
         "vocab_size": 126464, "norm_head": False, "embedding_dropout": 0.0}, 16.8, 2.75),
    "Ling-mini-2.0": (
        {**_LING, "first_k_dense_replace": 1, "intermediate_size": 5120, "moe_intermediate_size": 512, "head_dim": 128,
         "moe_shared_expert_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8,
         "num_shared_experts": 1, "num_hidden_layers": 20, "vocab_size": 157184, "use_qk_norm": True,
         "moe_router_enable_expert_bias": True, "n_group": 8, "topk_group": 4}, 16.26, 1.43),
    "Nemotron-3-Nano-30B-A3B": (
        {"model_type": "nemotron_h", "attention_bias": False, "chunk_size": 128, "conv_kernel": 4, "head_dim": 128,
         "hidden_size": 2688, "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
         "intermediate_size": 1856, "mamba_head_dim": 64, "mamba_num_heads": 64, "max_position_embeddings": 262144,
         "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_groups": 8,
         "n_routed_experts": 128, "n_shared_experts": 1, "num_attention_heads": 32, "num_experts_per_tok": 6,
         "num_hidden_layers": 52, "num_key_value_heads": 2, "ssm_state_size": 128, "tie_word_embeddings": False,
         "vocab_size": 131072}, 31.6, 3.6),
    "MiniMax-M1": (
        {"model_type": "minimax_m1", "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10, "head_dim": 128,
         "hidden_size": 6144, "intermediate_size": 9216, "max_position_embeddings": 10240000,
         "num_attention_heads": 64, "num_experts_per_tok": 2, "num_hidden_layers": 80, "num_key_value_heads": 8,
         "num_local_experts": 32, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
         "tie_word_embeddings": False, "vocab_size": 200064}, 456.0, 45.9),
    "MiMo-V2-Flash": (
        {"model_type": "mimo_v2_flash", "add_full_attention_sink_bias": False, "add_swa_attention_sink_bias": True,
         "head_dim": 192, "hidden_size": 4096, "hybrid_layer_pattern": [0, *[1, 1, 1, 1, 0, 1] * 7, 1, 1, 1, 1, 0],
         "intermediate_size": 16384, "max_position_embeddings": 262144, "moe_intermediate_size": 2048,
         "moe_layer_freq": [0, *[1] * 47], "n_routed_experts": 256, "n_shared_experts": None,
         "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
         "sliding_window": 128, "swa_head_dim": 192, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8,
         "swa_v_head_dim": 128, "v_head_dim": 128, "vocab_size": 152576}, 309.0, 15.4),
    "dots.llm1.inst": (
        {"model_type": "dots1", "attention_bias": False, "first_k_dense_replace": 1, "hidden_size": 4096,
         "intermediate_size": 10944, "max_position_embeddings": 32768, "moe_intermediate_size": 1408,
         "n_routed_experts": 128, "n_shared_experts": 2, "num_attention_heads": 32, "num_experts_per_tok": 6,
         "num_hidden_layers": 62, "num_key_value_heads": 32, "tie_word_embeddings": False,
         "vocab_size": 152064}, 142.8, 14.0),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CARDS))
def test_published_files_give_the_published_parameters(name: str) -> None:
    values, total, active = CARDS[name]
    facts = config_json.read(json.dumps(values), name)
    assert facts.total_params_b == pytest.approx(total, rel=0.005)
    assert facts.active_params_b == pytest.approx(active, rel=0.06)


@pytest.mark.parametrize(("family", "total", "active"), [
    ("longcat_flash", 560.0, 27.0), ("kimi_linear", 49.1, 3.4), ("phimoe", 41.9, 6.6), ("jamba", 51.6, 12.0),
])  # fmt: skip
def test_defaults_of_a_class_are_a_published_model(family: str, total: float, active: float) -> None:
    """LongCat-Flash, Kimi-Linear-48B-A3B, Phi-3.5-MoE and Jamba v0.1: their classes' defaults."""
    facts = config_json.read(str(CONFIG_MAPPING[family]().to_json_string(use_diff=False)), family)
    assert facts.total_params_b == pytest.approx(total, rel=0.005)
    assert facts.active_params_b == pytest.approx(active, rel=0.1)


def test_grok_1_is_the_314_billion_of_its_readme() -> None:
    """Shapes of xai-org/grok-1 run.py, in the keys of the converted checkpoints; embeddings are the head too."""
    values = {"model_type": "grok-1", "vocab_size": 131072, "hidden_size": 6144, "intermediate_size": 32768,
              "num_hidden_layers": 64, "num_attention_heads": 48, "num_key_value_heads": 8, "max_attn_value": 30.0,
              "max_position_embeddings": 8192, "num_experts_per_tok": 2, "num_experts": 8}  # fmt: skip
    facts = config_json.read(json.dumps(values), "grok-1")
    assert facts.tied_embeddings
    assert facts.total_params_b == pytest.approx(314.0, rel=0.006)
    assert kv.sequence_bytes(facts, 1, Layout(1), fp8=False) == 64 * 2 * 8 * 128 * 2


NOT_COUNTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a gate of a later model": ("qwen3_moe", {"attn_output_gate": True}, "attn_output_gate: True is not counted"),
    "shared experts where there are none": ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts: 1 is not counted"),
    "a latent for experts": ("nemotron_h", {"moe_latent_size": 1024}, "moe_latent_size: 1024 is not counted"),
    "layers of another list": ("mixtral", {"mlp_only_layers": [0]}, "mlp_only_layers: [0] is not counted"),
    "as many kinds as layers": ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types: has 1 entries for 4"),
    "a window of no size": ("exaone_moe", {"sliding_window": None}, "sliding_window: is missing"),
    "a bias that is not counted": ("deepseek_v3", {"attention_bias": True}, "attention_bias: is true"),
    "no latent attention": ("deepseek_v2", {"use_mla": False}, "use_mla: is false"),
}


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_what_would_be_left_out_is_refused(name: str) -> None:
    family, change, words = NOT_COUNTED[name]
    with pytest.raises(CatalogInvalid) as caught:
        config_json.read(json.dumps({**json.loads(config(family)), **change}), family)
    assert words in str(caught.value)


def test_embeddings_of_a_nested_model_follow_the_outer_file() -> None:
    inner = json.loads(config("qwen3_moe"))
    del inner["tie_word_embeddings"]
    tied = config_json.read(json.dumps({"model_type": "x", "tie_word_embeddings": True, "text_config": inner}), "x")
    assert tied.tied_embeddings
    both = {"model_type": "x", "tie_word_embeddings": True, "text_config": {**inner, "tie_word_embeddings": False}}
    with pytest.raises(CatalogInvalid, match="tie_word_embeddings: is not what the text model says"):
        config_json.read(json.dumps(both), "x")
