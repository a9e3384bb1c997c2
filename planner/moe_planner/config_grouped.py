"""Readers of config.json for families with grouped-query attention in every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moe_planner.catalog import KvGroup, Other
from moe_planner.config_common import bias, dense, dense_by_kind, routed, usual, windows
from moe_planner.config_keys import Keys


def _mixtral(keys: Keys, kv_heads: bool = False) -> dict[str, Any]:
    values = usual(keys, kv_heads=kv_heads)
    window = keys.whole("sliding_window", default=0, least=0)
    return {
        **values,
        "experts": keys.whole("num_local_experts", "num_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("intermediate_size"),
        "kv": (KvGroup(values["layers"], width=2 * values["head_dim"], heads=values["kv_heads"], window=window),)
        if window
        else (),
    }


def _granite(keys: Keys) -> dict[str, Any]:
    values = _mixtral(keys, kv_heads=True)
    shared = keys.whole("shared_intermediate_size", default=0, least=0)
    return {**values, "shared_experts": int(shared > 0), "shared_intermediate": shared, **bias(keys, "all")}


def _olmoe(keys: Keys) -> dict[str, Any]:
    return {**_mixtral(keys, kv_heads=True), "qk_norm": "full", **bias(keys, "all")}


def _phi(keys: Keys) -> dict[str, Any]:
    """Phi-3.5-MoE: as Mixtral, with biases on its norms and, as a rule, on its head."""
    values = _mixtral(keys)
    biases = (2 * values["layers"] + 1) * values["hidden"]
    if keys.flag("lm_head_bias"):
        biases += values["vocab"]
    return {**values, **bias(keys, "all"), "others": (Other("norm and head biases", biases, "rest", "none"),)}


def _minimax_m2(keys: Keys) -> dict[str, Any]:
    values = _mixtral(keys)
    norm = "full" if keys.flag("use_qk_norm", default=True) else "none"
    shared = keys.whole("shared_intermediate_size", default=0, least=0)
    if any(kind != 1 for kind in keys.numbers("attn_type_list")):
        raise keys.wrong("attn_type_list", "has layers without full attention: not counted for this family")
    return {
        **values,
        "head_dim": keys.whole("head_dim"),
        "kv": (),
        "qk_norm": norm,
        "score_bias": keys.flag("use_routing_bias", default=True),
        "shared_experts": int(shared > 0),
        "shared_intermediate": shared,
    }


def _grok(keys: Keys) -> dict[str, Any]:
    """Grok-1 (xai-org/grok-1 run.py and model.py @11b95e7; the keys are those of the converted checkpoints): gated
    experts of width `intermediate_size`, and a norm before and after attention and experts."""
    keys.also("max_attn_value")  # bounds scores, and has no weights
    return {
        **usual(keys, tied=True),
        "experts": keys.whole("num_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("intermediate_size"),
        "layer_norms": 4,
    }


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    values = {**_mixtral(keys), "kv": (), "head_dim": keys.whole("head_dim", default=64)}
    layers = values["layers"]
    if not keys.words("layer_types"):  # older files: every other layer sees the window
        half = KvGroup(layers // 2, width=2 * values["head_dim"], heads=values["kv_heads"])
        sliding = replace(half, layers=layers - layers // 2, window=keys.whole("sliding_window"))
        groups: tuple[KvGroup, ...] = (sliding, half) if half.layers else (sliding,)
    else:
        groups = windows(keys, values)
    return {**values, "kv": groups, "attention_sinks": True, "expert_bias": True, **bias(keys, "all", default=True)}


def _dbrx(keys: Keys) -> dict[str, Any]:
    attention, ffn = keys.nested("attn_config"), keys.nested("ffn_config")
    keys.also("num_key_value_heads", "num_attention_heads", "hidden_size")
    heads, hidden = keys.whole("n_heads"), keys.whole("d_model")
    return {
        "attention": "gqa",
        "layers": keys.whole("n_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": attention.whole("kv_n_heads"),
        "head_dim": hidden // heads,
        "vocab": keys.whole("vocab_size"),
        "max_context": keys.whole("max_seq_len"),
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        "dense_layers": 0,
        "experts": ffn.whole("moe_num_experts"),
        "topk": ffn.whole("moe_top_k"),
        "moe_intermediate": ffn.whole("ffn_hidden_size"),
    }


def _sparse_steps(keys: Keys, layers: int) -> int:
    """Dense layers of the Qwen families: those named, and all but every n-th."""
    step, only = keys.whole("decoder_sparse_step", default=1), keys.numbers("mlp_only_layers")
    return sum(layer in only or (layer + 1) % step != 0 for layer in range(layers))


def qwen(keys: Keys, tied: bool | None = False) -> dict[str, Any]:
    values = usual(keys, tied=tied)
    layers = values["layers"]
    told = dense_by_kind(keys, layers)
    return {
        **values,
        **dense(keys, _sparse_steps(keys, layers) if told is None else told),
        "experts": keys.whole("num_experts", "num_local_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("moe_intermediate_size"),
        "kv": windows(keys, values) or _upper_windows(keys, values),
    }


def _upper_windows(keys: Keys, values: Mapping[str, Any]) -> tuple[KvGroup, ...]:
    """Qwen's older words for it: layers from `max_window_layers` on see a window, if it is used at all."""
    if not keys.flag("use_sliding_window") or keys.words("layer_types"):
        return ()
    full = min(keys.whole("max_window_layers", default=values["layers"], least=0), values["layers"])
    each = KvGroup(full, width=2 * values["head_dim"], heads=values["kv_heads"])
    sliding = replace(each, layers=values["layers"] - full, window=keys.whole("sliding_window"))
    return tuple(group for group in (sliding, each) if group.layers) if sliding.layers else ()


def shared_gated(keys: Keys) -> dict[str, Any]:
    width = keys.whole("shared_expert_intermediate_size", least=0)
    return {"shared_experts": int(width > 0), "shared_intermediate": width, "shared_gate": width > 0}


def _qwen2(keys: Keys) -> dict[str, Any]:
    return {**qwen(keys), **shared_gated(keys), "attention_bias": "qkv" if keys.flag("qkv_bias", True) else "none"}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {**qwen(keys), "qk_norm": "head", **bias(keys, "all")}


def _qwen3_vl(keys: Keys) -> dict[str, Any]:
    return {**qwen(keys, tied=None), "qk_norm": "head", **bias(keys, "all")}


def _mellum(keys: Keys) -> dict[str, Any]:
    return {**_qwen3(keys), "head_dim": keys.whole("head_dim")}


def _deepseek_moe(keys: Keys) -> dict[str, Any]:
    """DeepSeekMoE 16B, before latent attention."""
    values = usual(keys)
    return {**values, **routed(keys, values["layers"], None), **bias(keys, "all")}


def _glm4(keys: Keys) -> dict[str, Any]:
    values = {**usual(keys), "head_dim": keys.whole("head_dim")}
    norm = "head" if keys.flag("use_qk_norm") else "none"
    return {**values, **routed(keys, values["layers"], 1), "qk_norm": norm, "score_bias": True, **bias(keys, "qkv")}


def _glm4v(keys: Keys) -> dict[str, Any]:
    values = usual(keys)
    return {**values, **routed(keys, values["layers"], 1), "score_bias": True, **bias(keys, "qkv", default=True)}


def _dots(keys: Keys) -> dict[str, Any]:
    values = usual(keys)
    kv = windows(keys, values)
    return {
        **values,
        **routed(keys, values["layers"]),
        "kv": kv,
        "qk_norm": "head",
        "score_bias": True,
        **bias(keys, "all"),
    }


def _solar(keys: Keys) -> dict[str, Any]:
    values = usual(keys, head_dim=128)
    return {**values, **routed(keys, values["layers"]), "score_bias": True, **bias(keys, "all")}


def _exaone(keys: Keys) -> dict[str, Any]:
    values = usual(keys)
    if not keys.words("layer_types"):
        raise keys.wrong("layer_types", "is missing: which layers see a window")
    return {
        **values,
        **routed(keys, values["layers"], None),
        "kv": windows(keys, values),
        "qk_norm": "head",
        "score_bias": True,
    }


def _hy3(keys: Keys) -> dict[str, Any]:
    """Hunyuan 3."""
    values = usual(keys, head_dim=128)
    found = routed(keys, values["layers"], 1)
    return {**values, **found, "qk_norm": "head", "score_bias": True, **bias(keys, "all")}


def _afmoe(keys: Keys) -> dict[str, Any]:
    """Trinity: four norms a layer, an output gate on attention, some layers with a window."""
    keys.also("global_attn_every_n_layers")  # as `layer_types` has it
    values = usual(keys, head_dim=128)
    layers = values["layers"]
    gate = layers * values["hidden"] * values["heads"] * values["head_dim"]
    if not keys.words("layer_types"):
        raise keys.wrong("layer_types", "is missing: which layers see a window")
    return {
        **values,
        **dense(keys, keys.whole("num_dense_layers", least=0)),
        "experts": keys.whole("num_experts"),
        "shared_experts": keys.whole("num_shared_experts", least=0, null=0),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("moe_intermediate_size"),
        "kv": windows(keys, values),
        "qk_norm": "head",
        "score_bias": True,
        "layer_norms": 4,
        "others": (Other("attention gates", gate),),
        **bias(keys, "all"),
    }


def _bailing(keys: Keys) -> dict[str, Any]:
    """Ling and Ring (vLLM 0.32, bailing_moe.py)."""
    values = usual(keys)
    layers = values["layers"]
    if keys.flag("use_bias"):
        raise keys.wrong("use_bias", "is true: not counted for this family")
    found = routed(keys, layers)
    width = keys.whole("moe_shared_expert_intermediate_size", default=found["moe_intermediate"])
    return {
        **values,
        **found,
        "shared_intermediate": width * found["shared_experts"],
        "attention_bias": "qkv" if keys.flag("use_qkv_bias") else "none",
        "qk_norm": "head" if keys.flag("use_qk_norm") else "none",
        "score_bias": keys.flag("moe_router_enable_expert_bias"),
    }


def _llama4(keys: Keys) -> dict[str, Any]:
    values = usual(keys, head_dim=128)
    layers, step = values["layers"], keys.whole("interleave_moe_layer_step", default=1)
    keys.also("use_qk_norm")  # a norm without weights
    sparse = len(keys.numbers("moe_layers")) or layers // step
    if not keys.words("layer_types"):  # published files: a layer without rotary positions sees everything
        rotary = keys.numbers("no_rope_layers")
        if rotary and len(rotary) != layers:
            raise keys.wrong("no_rope_layers", f"has {len(rotary)} entries for {layers} layers")
        full = rotary.count(0) or layers // keys.whole("no_rope_layer_interval", default=4)
        chunk = keys.whole("attention_chunk_size")
        each = KvGroup(
            layers - full, width=2 * values["head_dim"], heads=values["kv_heads"], window=chunk, chunked=True
        )
        groups = tuple(
            group for group in (each, replace(each, layers=full, window=None, chunked=False)) if group.layers
        )
    else:
        groups = windows(keys, values)
    return {
        **values,
        "dense_layers": layers - sparse,
        "dense_intermediate": keys.whole("intermediate_size_mlp") if layers > sparse else 0,
        "experts": keys.whole("num_local_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("intermediate_size"),
        "shared_experts": 1,  # of the architecture: no key says so
        "kv": groups,
        **bias(keys, "all"),
    }


def _ernie(keys: Keys) -> dict[str, Any]:
    values = usual(keys, tied=True)
    layers = values["layers"]
    keys.also(
        "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"
    )  # as the list has it, if there is one
    if (told := dense_by_kind(keys, layers)) is None:
        first = keys.whole("moe_layer_start_index", default=1, least=0)
        last, step = (
            keys.whole("moe_layer_end_index", default=-1, least=-1),
            keys.whole("moe_layer_interval", default=1),
        )
        last = layers - 1 if last < 0 else last
        told = layers - sum(first <= layer <= last and (layer + 1) % step == 0 for layer in range(layers))
    if keys.flag("use_bias"):
        raise keys.wrong("use_bias", "is true: not counted for this family")
    return {
        **values,
        **dense(keys, told),
        "experts": keys.whole("moe_num_experts"),
        "topk": keys.whole("moe_k"),
        "moe_intermediate": keys.whole("moe_intermediate_size"),
        "shared_experts": keys.whole("moe_num_shared_experts", least=0, null=0),
        "score_bias": True,
    }


def _hunyuan(keys: Keys) -> dict[str, Any]:
    values = usual(keys)
    return {
        **values,
        **dense(keys, keys.whole("moe_layer_num_skipped", default=0, least=0)),
        "experts": keys.whole("num_experts"),
        "topk": keys.whole("moe_topk", "num_experts_per_tok"),
        "moe_intermediate": keys.whole("moe_intermediate_size", "intermediate_size"),
        "shared_experts": keys.whole("num_shared_expert", default=1, least=0)
        if keys.flag("use_mixed_mlp_moe", default=True)
        else 0,
        "qk_norm": "head" if keys.flag("use_qk_norm", default=True) else "none",
        **bias(keys, "all"),
    }


def _arctic(keys: Keys) -> dict[str, Any]:
    """Snowflake Arctic: a dense residual layer as wide as the model beside the experts of every layer."""
    values = _mixtral(keys)
    layers, hidden = values["layers"], values["hidden"]
    if keys.whole("moe_layer_frequency", default=2) != 1 or not keys.flag("use_residual"):
        raise keys.wrong("moe_layer_frequency", "only 1, with use_residual, is counted")
    keys.also("parallel_attn_mlp_res")
    residual = Other("residual layers", layers * 3 * hidden * hidden)
    return {**values, "layer_norms": 3, "others": (residual,), **bias(keys, "all")}


READERS: Mapping[str, Callable[[Keys], dict[str, Any]]] = {
    "afmoe": _afmoe,
    "arctic": _arctic,
    "bailing_moe": _bailing,
    "bailing_moe_v2": _bailing,
    "dbrx": _dbrx,
    "deepseek": _deepseek_moe,
    "dots1": _dots,
    "ernie4_5_moe": _ernie,
    "exaone_moe": _exaone,
    "flex_olmo": _olmoe,
    "glm4_moe": _glm4,
    "glm4v_moe": _glm4v,
    "glm4v_moe_text": _glm4v,
    "gpt_oss": _gpt_oss,
    "granitemoe": _granite,
    "granitemoeshared": _granite,
    "grok-1": _grok,
    "hunyuan_v1_moe": _hunyuan,
    "hy_v3": _hy3,
    "llama4_text": _llama4,
    "mellum": _mellum,
    "minimax_m2": _minimax_m2,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "phimoe": _phi,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
    "qwen3_vl_moe_text": _qwen3_vl,
    "solar_open": _solar,
}
"""By `model_type`."""
