"""A config.json read: to the byte against checkpoints, as the catalog has it, and what is wrong in it is named."""

from __future__ import annotations

import json
import re
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_planner import config_json, weights
from moe_planner.catalog import CatalogInvalid, ModelFacts, packaged
from moe_planner.weights import Layout
from moe_serving.tiny import FAMILIES, cached_checkpoint
from tests.planner.published_configs import PUBLISHED

EXPERTS = re.compile(r"experts|block_sparse_moe\.(in|out)put_linear")
BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def read(config: dict[str, Any], name: str = "org/model") -> ModelFacts:
    return config_json.read(json.dumps(config), name)


def tensors(checkpoint: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor, from the header of a safetensors file (eight bytes of length, then JSON)."""
    with (checkpoint / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: (at["dtype"], tuple(at["shape"])) for name, at in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_are_those_of_the_tiny_checkpoint_to_the_byte(family: str) -> None:
    checkpoint = cached_checkpoint(family)
    facts = config_json.read((checkpoint / "config.json").read_text(), family)
    found = tensors(checkpoint)
    precision = packaged().precisions[facts.native]
    assert weights.total_bytes(facts, precision) == sum(BYTES[kind] * prod(shape) for kind, shape in found.values())
    experts = [
        prod(shape)
        for name, (_, shape) in found.items()
        if EXPERTS.search(name) and "shared" not in name and "bias" not in name
    ]
    parts = {part.name: part for part in weights.parts(facts)}
    assert parts["experts"].params == sum(experts)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ranks_share_a_tiny_checkpoint_out(family: str) -> None:
    """Two expert parallel ranks hold at least half of it each, and all of it between them."""
    facts = config_json.read((cached_checkpoint(family) / "config.json").read_text(), family)
    precision = packaged().precisions[facts.native]
    whole = weights.total_bytes(facts, precision)
    assert weights.gpu_bytes(facts, precision, Layout(1)) == whole
    half = weights.gpu_bytes(facts, precision, Layout(2, expert=2))
    assert whole / 2 <= half < whole


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_catalog_agrees_with_the_published_file(name: str) -> None:
    known = packaged().model(name)
    assert known is not None
    facts, found = known[0], read(PUBLISHED[name], name)
    same = ("attention", "layers", "dense_layers", "hidden", "heads", "kv_heads", "head_dim", "experts", "topk")
    same += (
        "moe_intermediate",
        "vocab",
        "max_context",
        "native",
        "qk_norm",
        "attention_bias",
        "shared_gate",
        "score_bias",
    )
    same += (
        "tied_embeddings",
        "kv_lora_rank",
        "q_lora_rank",
        "kv_groups",
        "kv_dtype",
        "expert_bias",
        "attention_sinks",
    )
    if facts.attention == "csa":
        same += ("o_groups", "o_lora_rank", "index_heads", "index_dim")
    assert {field: getattr(found, field) for field in same} == {field: getattr(facts, field) for field in same}
    assert weights.total_params(found) == weights.total_params(facts)


FORMS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "as trained": (None, "bf16"),
    "FP8 in blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    "MXFP4": ({"quant_method": "mxfp4"}, "mxfp4"),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq"),
    "GPTQ in 8 bits": ({"quant_method": "gptq", "bits": 8}, "int8"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
    "ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    "compressed tensors, FP8": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8"),
    "compressed tensors, INT4 as Kimi ships": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
        },
        "int4-experts",
    ),
}
LAYERS = range(94)
WIDE = ["lm_head", "re:.*self_attn.*"]
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
# What checkpoints leave in 16 bits, and whether their form is counted so.
LEFT_OUT: dict[str, tuple[dict[str, Any], str | None]] = {
    "norms and gates of FP8": (
        {"quant_method": "fp8", "modules_to_not_convert": [
            f"model.layers.{layer}.{part}" for layer in LAYERS for part in ("post_attention_layernorm", "mlp.gate")]},
        "fp8"),
    "attention of FP8, by a pattern": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": WIDE}, None),
    "attention of FP8, layer by layer": (
        {"quant_method": "fp8", "modules_to_not_convert": [f"layers.{n}.self_attn.q_proj" for n in LAYERS]}, None),
    "attention of AWQ, by its name": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["self_attn"]}, None),
    "the gate alone, of AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["gate"]}, "awq"),
    "attention of NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": WIDE}, "nvfp4"),
    "the head alone, of NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, None),
    "attention of some layers": (
        {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.self_attn.q_proj"]}, None),
    "two groups": (
        {**PACKED, "config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}}, None),
    "a group of another name": (
        {**PACKED, "config_groups": {"W4A16": {"weights": {"num_bits": 4, "group_size": 128}}}, "ignore": ["lm_head"]},
        "gptq"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_checkpoint_leaves_wide_is_as_counted_or_refused(name: str) -> None:
    quantized, wanted = LEFT_OUT[name]
    if wanted is not None:
        assert read({**QWEN, "quantization_config": quantized}).native == wanted
        return
    with pytest.raises(CatalogInvalid, match=r"quantization_config\.\w+: .*entry by hand"):
        read({**QWEN, "quantization_config": quantized})


QWEN = PUBLISHED["Qwen/Qwen3-235B-A22B"]


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_weights(name: str) -> None:
    quantized, wanted = FORMS[name]
    assert read({**QWEN, **({"quantization_config": quantized} if quantized else {})}).native == wanted


def test_experts_in_fp4_beside_fp8() -> None:
    config = {**PUBLISHED["deepseek-ai/DeepSeek-V4-Flash"], "quantization_config": {"quant_method": "fp8"}}
    assert read({**config, "expert_dtype": "fp4"}).native == "mxfp4-fp8"
    assert read({key: value for key, value in config.items() if key != "expert_dtype"}).native == "fp8"


def test_an_outer_quantization_and_an_inner_text_model() -> None:
    inner = {key: value for key, value in QWEN.items() if key not in ("model_type", "torch_dtype")}
    outer = {
        "model_type": "qwen3_vl_moe",
        "text_config": {**inner, "model_type": "qwen3_vl_moe_text"},
        "quantization_config": {"quant_method": "fp8"},
    }
    assert (read(outer).native, weights.total_params(read(outer))) == ("fp8", weights.total_params(read(QWEN)))


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in QWEN.items() if name != key}


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "config.json: is no JSON"),
    "no object": ([1], "config.json: is no object"),
    "no type": (without("model_type"), "model_type: is missing"),
    "an unknown family": ({**QWEN, "model_type": "qwen9"}, "model_type: qwen9 is not known: one of"),
    "a dense model": ({**QWEN, "model_type": "llama"}, "llama is a dense model"),
    "a family's dense member": ({**QWEN, "num_experts": 1}, "qwen3_moe has no experts here"),
    "a missing key": (without("moe_intermediate_size"), "config.json: moe_intermediate_size: is missing"),
    "experts under no name": (without("num_experts"), "config.json: num_experts: is missing"),
    "a text for a number": ({**QWEN, "hidden_size": "4096"}, "hidden_size: must be a whole number"),
    "a number for a flag": ({**QWEN, "tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false"),
    "more layers than any model has": ({**QWEN, "num_hidden_layers": 10**6}, "num_hidden_layers: must be 1 to 10000"),
    "as many heads for keys, unsaid": (without("num_key_value_heads"), "num_key_value_heads: is missing"),
    "a count with a point": ({**QWEN, "hidden_size": 4096.0}, "hidden_size: must be a whole number"),
    "no heads": ({**QWEN, "num_attention_heads": 0}, "num_attention_heads: must be 1 to"),
    "layers that differ": ({**QWEN, "moe_intermediate_size": [768, 1536]}, "the same for all layers"),
    "more a token than there are": ({**QWEN, "num_experts_per_tok": 129}, "129 of 128 cannot be"),
    "only dense layers": ({**QWEN, "mlp_only_layers": list(range(94))}, "94 of 94 leave no experts"),
    "an unknown quantisation": (
        {**QWEN, "quantization_config": {"quant_method": "x"}}, "quantization_config.quant_method: x"),
    "bits that are not counted": (
        {**QWEN, "quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantization_config.bits: 3 bits"),
    "an unknown type of numbers": ({**QWEN, "torch_dtype": "float64"}, "torch_dtype: float64 is not known"),
    "nothing nested": (
        {**QWEN, "model_type": "dbrx", "d_model": 8, "n_heads": 2}, "attn_config: is missing"),
    "ratios for other layers": (
        {**PUBLISHED["deepseek-ai/DeepSeek-V4-Flash"], "compress_ratios": [4]}, "compress_ratios: has 1 entries for"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    config, words = WRONG[name]
    with pytest.raises(CatalogInvalid) as caught:
        config_json.read(config if isinstance(config, str) else json.dumps(config), "org/model")
    assert words in str(caught.value)
    assert str(caught.value).startswith("org/model: ")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(allow_nan=False), st.text(max_size=3),
    st.lists(st.integers(-2, 5), max_size=4), st.lists(st.text(max_size=3), max_size=3), st.just({}),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PUBLISHED)), st.data())
def test_any_change_is_read_or_refused_by_name(name: str, data: st.DataObject) -> None:
    config = dict(PUBLISHED[name])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(VALUES)
    try:
        facts = read(config)
    except CatalogInvalid as error:
        where = error.where
    else:
        where = facts.key
        assert weights.total_params(facts) >= weights.active_params(facts) > 0
    assert where.startswith("org/model")
