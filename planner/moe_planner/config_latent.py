"""Readers of config.json for families with latent or compressed attention: DeepSeek's and those that follow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moe_planner.catalog import KvGroup, Other
from moe_planner.config_common import bias, routed, usual
from moe_planner.config_keys import Keys


def latent(keys: Keys) -> dict[str, Any]:
    """Ranks and widths of latent attention."""
    if not keys.flag("use_mla", default=True):
        raise keys.wrong("use_mla", "is false: this family is only counted with latent attention")
    rope = keys.whole("qk_rope_head_dim")
    return {
        "attention": "mla",
        "head_dim": keys.whole("qk_nope_head_dim") + rope,
        "rope_dim": rope,
        "v_head_dim": keys.whole("v_head_dim"),
        "kv_lora_rank": keys.whole("kv_lora_rank"),
        "q_lora_rank": keys.whole("q_lora_rank", least=0, null=0),
    }


def _deepseek(keys: Keys) -> dict[str, Any]:
    values = usual(keys, kv_heads=True)
    if keys.flag("attention_bias"):
        raise keys.wrong("attention_bias", "is true: not counted for this family")
    return {**values, **routed(keys, values["layers"], None), **latent(keys)}


def _deepseek_v3(keys: Keys) -> dict[str, Any]:
    return {**_deepseek(keys), "score_bias": True}


def _axk(keys: Keys) -> dict[str, Any]:
    """A.X K1: as DeepSeek V3, with a norm behind the experts."""
    values = _deepseek_v3(keys)
    norms = (values["layers"] - values["dense_layers"]) * values["hidden"]
    return {**values, "others": (Other("norms behind experts", norms, "rest", "none"),)}


def _deepseek_v32(keys: Keys) -> dict[str, Any]:
    """Latent attention with an indexer, whose keys are a cache of their own."""
    values = _deepseek_v3(keys)
    index = keys.whole("index_head_dim")
    width = values["kv_lora_rank"] + values["rope_dim"]
    # In FP8: four scales and the rotary part in two bytes (vLLM's layout for 512 + 64); the indexer's keys, one scale.
    width_fp8 = values["kv_lora_rank"] + values["kv_lora_rank"] // 128 * 4 + 2 * values["rope_dim"]
    return {
        **values,
        "index_heads": keys.whole("index_n_heads"),
        "index_dim": index,
        "kv": (
            KvGroup(values["layers"], width=width, fp8_bytes=width_fp8),
            KvGroup(values["layers"], width=index, fp8_bytes=index + 4),
        ),
    }


def _longcat(keys: Keys) -> dict[str, Any]:
    """LongCat-Flash: each of its layers is two of attention and dense feed-forward, and one of experts beside them.

    Of the experts that a token chooses some do nothing; `topk` is what it meets of the others on average, if all are
    chosen alike. Counted as twice the layers: the dense feed-forward of every other is the shared part of its experts.
    """
    layers, hidden = 2 * keys.whole("num_layers"), keys.whole("hidden_size")
    experts, zero = keys.whole("n_routed_experts"), keys.whole("zero_expert_num", least=0, null=0)
    width, chosen = keys.whole("ffn_hidden_size"), keys.whole("moe_topk")
    heads = keys.whole("num_attention_heads")
    keys.also("num_key_value_heads", "attention_method")
    return {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "vocab": keys.whole("vocab_size"),
        "max_context": keys.whole("max_position_embeddings"),
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        "dense_layers": layers // 2,
        "dense_intermediate": width,
        "shared_experts": 1,
        "shared_intermediate": width,
        "experts": experts,
        "topk": max(1, round(chosen * experts / (experts + zero))),
        "moe_intermediate": keys.whole("expert_ffn_hidden_size"),
        "score_bias": True,
        "others": (Other("router", layers // 2 * zero * (hidden + 1), "rest", "none"),) if zero else (),
        **latent(keys),
        **bias(keys, "none"),
    }


def _deepseek_v4(keys: Keys) -> dict[str, Any]:
    """Compressed attention: `compress_ratios` by layer, 0 or 1 where a layer has its window alone."""
    values = {**usual(keys, kv_heads=True), "head_dim": keys.whole("head_dim")}
    keys.also("hc_mult", "hc_eps", "hc_sinkhorn_iters")  # hyper-connections: below 0.1 %, left out
    layers, width, index = values["layers"], values["head_dim"], keys.whole("index_head_dim")
    ratios = _ratios(keys, layers)
    # In FP8: one byte for all but the rotary part, which keeps two, and eight of scales (vLLM's layout for 448 + 64).
    fp8 = width + keys.whole("qk_rope_head_dim", default=width // 8) + 8
    groups = [KvGroup(layers, width=width, fp8_bytes=fp8, window=keys.whole("sliding_window"))]
    for ratio in sorted({ratio for ratio in ratios if ratio > 1}):
        groups.append(KvGroup(ratios.count(ratio), width=width, fp8_bytes=fp8, every=ratio))
        if ratio == min(ratio for ratio in ratios if ratio > 1):
            groups.append(KvGroup(ratios.count(ratio), width=index, fp8_bytes=index + 4, every=ratio))
    return {
        **values,
        **routed(keys, layers),
        "attention": "csa",
        "rope_dim": keys.whole("qk_rope_head_dim", default=width // 8),
        "q_lora_rank": keys.whole("q_lora_rank"),
        "o_groups": keys.whole("o_groups"),
        "o_lora_rank": keys.whole("o_lora_rank"),
        "index_heads": keys.whole("index_n_heads"),
        "index_dim": index,
        "score_bias": True,
        "kv": tuple(groups),
        "kv_dtype": "fp8",
    }


def _ratios(keys: Keys, layers: int) -> list[int]:
    known = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    ratios = keys.numbers("compress_ratios")[:layers] or [known.get(kind, 0) for kind in keys.words("layer_types")]
    if len(ratios) != layers:
        raise keys.wrong("compress_ratios", f"has {len(ratios)} entries for {layers} layers")
    return ratios


READERS: Mapping[str, Callable[[Keys], dict[str, Any]]] = {
    "axk1": _axk,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v32": _deepseek_v32,
    "deepseek_v4": _deepseek_v4,
    "glm4_moe_lite": _deepseek_v3,
    "glm_moe_dsa": _deepseek_v32,
    "kimi_k2": _deepseek_v3,
    "kimi_k25": _deepseek_v3,
    "longcat_flash": _longcat,
}
"""By `model_type`."""
