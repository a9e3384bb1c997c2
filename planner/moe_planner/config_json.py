"""A model's facts from the config.json of its checkpoint, for the families of mixture-of-experts models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moe_planner import weights
from moe_planner.catalog import CatalogInvalid, Figure, KvGroup, ModelFacts
from moe_planner.checkpoint_form import native_form
from moe_planner.config_keys import Keys

DENSE = """bloom cohere cohere2 falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neox granite llama mistral olmo olmo2
 phi phi3 qwen2 qwen3 smollm3 starcoder2"""
"""Families without experts that people try."""


def read(text: str, name: str) -> ModelFacts:
    """The facts of the model `name` from the text of its config.json. Raises CatalogInvalid, which names the field.

    Parameters are counted from the shapes. A vision or audio tower and layers that only speculate are left out.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise CatalogInvalid(f"{name}: config.json", f"is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise CatalogInvalid(f"{name}: config.json", "is no object: give the file of a checkpoint")
    keys = Keys(document, name)
    inner = keys.nested("text_config", "llm_config", "language_config")
    kind = inner.text("model_type", default="") or keys.text("model_type")
    values = _reader(kind, inner)(inner)
    if values["experts"] < 2:
        raise CatalogInvalid(f"{name}: model_type", f"{kind} has no experts here: dense models are not placed")
    if not 1 <= values["topk"] <= values["experts"]:
        raise CatalogInvalid(f"{name}: experts per token", f"{values['topk']} of {values['experts']} cannot be")
    if not 0 <= values["dense_layers"] < values["layers"]:
        raise CatalogInvalid(
            f"{name}: dense layers", f"{values['dense_layers']} of {values['layers']} leave no experts"
        )
    values["native"] = native_form(keys, inner)
    source = f"config.json of {name}"
    figures = {field: Figure(value, source, None) for field, value in values.items()}
    facts = ModelFacts(key=name, total_params_b=0.0, active_params_b=0.0, figures=figures, **values)
    total, active = weights.total_params(facts) / 1e9, weights.active_params(facts) / 1e9
    counted = {"total_params_b": Figure(total, source, None), "active_params_b": Figure(active, source, None)}
    return replace(facts, total_params_b=total, active_params_b=active, figures={**figures, **counted})


def _reader(kind: str, keys: Keys) -> Callable[[Keys], dict[str, Any]]:
    if kind in READERS:
        return READERS[kind]
    if kind in DENSE.split():
        raise CatalogInvalid(
            f"{keys.name}: model_type", f"{kind} is a dense model: only models with experts are placed"
        )
    raise CatalogInvalid(
        f"{keys.name}: model_type",
        f"{kind} is not known: one of {', '.join(sorted(READERS))}; or write the model's entry in a catalog file",
    )


def _usual(keys: Keys) -> dict[str, Any]:
    """What most families call alike."""
    heads, hidden = keys.whole("num_attention_heads"), keys.whole("hidden_size")
    return {
        "attention": "gqa",
        "layers": keys.whole("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": keys.whole("num_key_value_heads", default=heads),
        "head_dim": keys.whole("head_dim", default=max(1, hidden // heads)),
        "vocab": keys.whole("vocab_size"),
        "max_context": keys.whole("max_position_embeddings"),
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        "dense_layers": 0,
    }


def _windows(keys: Keys, values: Mapping[str, Any]) -> tuple[KvGroup, ...]:
    """Caches of full layers and of those that see a window or a chunk, by `layer_types`; empty where all are full."""
    kinds = keys.words("layer_types")
    wide, heads = 2 * values["head_dim"], values["kv_heads"]
    found = []
    for kind, size in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        if layers := kinds.count(kind):
            found.append(KvGroup(layers, width=wide, heads=heads, window=keys.whole(size)))
    if not found:
        return ()
    full = values["layers"] - sum(group.layers for group in found)
    return (*found, KvGroup(full, width=wide, heads=heads)) if full else tuple(found)


def _sparse_steps(keys: Keys, layers: int) -> int:
    """Dense layers of the Qwen families: those named, and all but every n-th."""
    step, only = keys.whole("decoder_sparse_step", default=1), keys.numbers("mlp_only_layers")
    return sum(layer in only or (layer + 1) % step != 0 for layer in range(layers))


def _mixtral(keys: Keys) -> dict[str, Any]:
    values = _usual(keys)
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
    values = _mixtral(keys)
    shared = keys.whole("shared_intermediate_size", default=0, least=0)
    return {**values, "shared_experts": int(shared > 0), "shared_intermediate": shared, **_bias(keys, "all")}


def _olmoe(keys: Keys) -> dict[str, Any]:
    return {**_mixtral(keys), "qk_norm": "full", **_bias(keys, "all")}


def _minimax(keys: Keys) -> dict[str, Any]:
    values = _mixtral(keys)
    norm = "full" if keys.flag("use_qk_norm", default=True) else "none"
    shared = keys.whole("shared_intermediate_size", default=0, least=0)
    return {
        **values,
        "kv": (),
        "qk_norm": norm,
        "score_bias": keys.flag("use_routing_bias", default=True),
        "shared_experts": int(shared > 0),
        "shared_intermediate": shared,
    }


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    values = {**_mixtral(keys), "kv": ()}
    layers = values["layers"]
    if not keys.words("layer_types"):  # older files: every other layer sees the window
        half = KvGroup(layers // 2, width=2 * values["head_dim"], heads=values["kv_heads"])
        windows: tuple[KvGroup, ...] = (replace(half, window=keys.whole("sliding_window")), half)
    else:
        windows = _windows(keys, values)
    return {**values, "kv": windows, "attention_sinks": True, "expert_bias": True, **_bias(keys, "all", default=True)}


def _bias(keys: Keys, what: str, default: bool = False) -> dict[str, Any]:
    return {"attention_bias": what if keys.flag("attention_bias", default=default) else "none"}


def _dbrx(keys: Keys) -> dict[str, Any]:
    attention, ffn = keys.nested("attn_config"), keys.nested("ffn_config")
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


def _qwen(keys: Keys) -> dict[str, Any]:
    values = _usual(keys)
    dense = _sparse_steps(keys, values["layers"])
    return {
        **values,
        "dense_layers": dense,
        "dense_intermediate": keys.whole("intermediate_size") if dense else 0,
        "experts": keys.whole("num_experts", "num_local_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("moe_intermediate_size"),
    }


def _shared(keys: Keys) -> dict[str, Any]:
    width = keys.whole("shared_expert_intermediate_size", least=0)
    return {"shared_experts": int(width > 0), "shared_intermediate": width, "shared_gate": width > 0}


def _qwen2(keys: Keys) -> dict[str, Any]:
    bias = "qkv" if keys.flag("qkv_bias", default=True) else "none"
    return {**_qwen(keys), **_shared(keys), "attention_bias": bias}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {**_qwen(keys), "qk_norm": "head", **_bias(keys, "all")}


def _qwen3_next(keys: Keys) -> dict[str, Any]:
    values = {**_qwen(keys), **_shared(keys), "qk_norm": "head", "attention": "deltanet", **_bias(keys, "all")}
    kinds, every = keys.words("layer_types"), keys.whole("full_attention_interval", default=4)
    layers = values["layers"]
    linear = kinds.count("linear_attention") if kinds else layers - layers // every
    size, value_size = keys.whole("linear_key_head_dim"), keys.whole("linear_value_head_dim")
    if size != value_size:
        raise CatalogInvalid(
            f"{keys.name}: linear_value_head_dim", f"{value_size} is not the keys' {size}: not counted"
        )
    key_heads, value_heads = keys.whole("linear_num_key_heads"), keys.whole("linear_num_value_heads")
    kernel = keys.whole("linear_conv_kernel_dim")
    mixed = (2 * key_heads + value_heads) * size
    return {
        **values,
        "linear_layers": linear,
        "linear_key_heads": key_heads,
        "linear_value_heads": value_heads,
        "linear_head_dim": size,
        "linear_conv": kernel,
        "kv": (
            KvGroup(layers - linear, width=2 * values["head_dim"], heads=values["kv_heads"]),
            KvGroup(linear, state=value_heads * size * size + mixed * kernel, heads=key_heads),
        ),
    }


def _first_dense(keys: Keys, layers: int) -> int:
    """Dense layers of the DeepSeek families: the first few, and all but every n-th of the others."""
    if kinds := keys.words("mlp_layer_types"):
        return kinds.count("dense")
    first = keys.whole("first_k_dense_replace", default=0, least=0)
    step = keys.whole("moe_layer_freq", default=1)
    return sum(layer < first or layer % step != 0 for layer in range(layers))


def _routed(keys: Keys, layers: int) -> dict[str, Any]:
    dense = _first_dense(keys, layers)
    return {
        "dense_layers": dense,
        "dense_intermediate": keys.whole("intermediate_size") if dense else 0,
        "experts": keys.whole("n_routed_experts", "num_experts", "num_local_experts"),
        "shared_experts": keys.whole("n_shared_experts", default=0, least=0),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("moe_intermediate_size"),
    }


def _deepseek(keys: Keys) -> dict[str, Any]:
    values = _usual(keys)
    rope = keys.whole("qk_rope_head_dim")
    return {
        **values,
        **_routed(keys, values["layers"]),
        "attention": "mla",
        "head_dim": keys.whole("qk_nope_head_dim") + rope,
        "rope_dim": rope,
        "v_head_dim": keys.whole("v_head_dim"),
        "kv_lora_rank": keys.whole("kv_lora_rank"),
        "q_lora_rank": keys.whole("q_lora_rank", default=0, least=0),
    }


def _deepseek_v3(keys: Keys) -> dict[str, Any]:
    return {**_deepseek(keys), "score_bias": True}


def _deepseek_v32(keys: Keys) -> dict[str, Any]:
    """Latent attention with an indexer, whose keys are a cache of their own."""
    values = _deepseek_v3(keys)
    latent, index = values["kv_lora_rank"] + values["rope_dim"], keys.whole("index_head_dim")
    # In FP8: four scales and the rotary part in two bytes (vLLM's layout for 512 + 64); the indexer's keys, one scale.
    latent_fp8 = values["kv_lora_rank"] + values["kv_lora_rank"] // 128 * 4 + 2 * values["rope_dim"]
    return {
        **values,
        "index_heads": keys.whole("index_n_heads"),
        "index_dim": index,
        "kv": (
            KvGroup(values["layers"], width=latent, fp8_bytes=latent_fp8),
            KvGroup(values["layers"], width=index, fp8_bytes=index + 4),
        ),
    }


def _deepseek_v4(keys: Keys) -> dict[str, Any]:
    """Compressed attention: `compress_ratios` by layer, 0 or 1 where a layer has its window alone."""
    values = _usual(keys)
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
        **_routed(keys, layers),
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
        raise CatalogInvalid(f"{keys.name}: compress_ratios", f"has {len(ratios)} entries for {layers} layers")
    return ratios


def _glm4(keys: Keys) -> dict[str, Any]:
    values = _usual(keys)
    norm = "head" if keys.flag("use_qk_norm") else "none"
    routed = _routed(keys, values["layers"])
    return {**values, **routed, "qk_norm": norm, "score_bias": True, **_bias(keys, "qkv")}


def _llama4(keys: Keys) -> dict[str, Any]:
    values = _usual(keys)
    layers, step = values["layers"], keys.whole("interleave_moe_layer_step", default=1)
    sparse = len(keys.numbers("moe_layers")) or layers // step
    if not keys.words("layer_types"):  # published files: a layer without rotary positions sees everything
        full = keys.numbers("no_rope_layers").count(0) or layers // keys.whole("no_rope_layer_interval", default=4)
        chunk = keys.whole("attention_chunk_size")
        each = KvGroup(layers - full, width=2 * values["head_dim"], heads=values["kv_heads"], window=chunk)
        windows: tuple[KvGroup, ...] = (each, replace(each, layers=full, window=None))
    else:
        windows = _windows(keys, values)
    return {
        **values,
        "dense_layers": layers - sparse,
        "dense_intermediate": keys.whole("intermediate_size_mlp") if layers > sparse else 0,
        "experts": keys.whole("num_local_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("intermediate_size"),
        "shared_experts": 1,  # of the architecture: no key says so
        "kv": windows,
        **_bias(keys, "all"),
    }


def _ernie(keys: Keys) -> dict[str, Any]:
    values = _usual(keys)
    layers, first = values["layers"], keys.whole("moe_layer_start_index", default=0, least=0)
    last, step = keys.whole("moe_layer_end_index", default=-1, least=-1), keys.whole("moe_layer_interval", default=1)
    last = layers - 1 if last < 0 else last
    sparse = sum(first <= layer <= last and (layer + 1) % step == 0 for layer in range(layers))
    return {
        **values,
        "tied_embeddings": keys.flag("tie_word_embeddings", default=True),
        "dense_layers": layers - sparse,
        "dense_intermediate": keys.whole("intermediate_size") if layers > sparse else 0,
        "experts": keys.whole("moe_num_experts"),
        "topk": keys.whole("moe_k"),
        "moe_intermediate": keys.whole("moe_intermediate_size"),
        "shared_experts": keys.whole("moe_num_shared_experts", default=0, least=0),
        "score_bias": True,
    }


def _hunyuan(keys: Keys) -> dict[str, Any]:
    values = _usual(keys)
    return {
        **values,
        "dense_layers": keys.whole("moe_layer_num_skipped", default=0, least=0),
        "dense_intermediate": keys.whole("intermediate_size"),
        "experts": keys.whole("num_experts"),
        "topk": keys.whole("moe_topk", "num_experts_per_tok"),
        "moe_intermediate": keys.whole("moe_intermediate_size", "intermediate_size"),
        "shared_experts": keys.whole("num_shared_expert", default=0, least=0),
        "qk_norm": "head" if keys.flag("use_qk_norm", default=True) else "none",
        **_bias(keys, "all"),
    }


READERS: Mapping[str, Callable[[Keys], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "dbrx": _dbrx,
    "granitemoe": _granite,
    "granitemoeshared": _granite,
    "olmoe": _olmoe,
    "minimax_m2": _minimax,
    "gpt_oss": _gpt_oss,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
    "qwen3_vl_moe_text": _qwen3,
    "qwen3_next": _qwen3_next,
    "qwen3_5_moe_text": _qwen3_next,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "kimi_k25": _deepseek_v3,
    "glm4_moe_lite": _deepseek_v3,
    "deepseek_v32": _deepseek_v32,
    "glm_moe_dsa": _deepseek_v32,
    "deepseek_v4": _deepseek_v4,
    "glm4_moe": _glm4,
    "llama4_text": _llama4,
    "ernie4_5_moe": _ernie,
    "hunyuan_v1_moe": _hunyuan,
}
"""By `model_type`, of `text_config` where a file has one."""
