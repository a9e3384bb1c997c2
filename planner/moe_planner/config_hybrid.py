"""Readers of config.json for families in which a recurrent state or a convolution stands for most of the attention.

Shapes are those of the modelling files of transformers 5; the tests hold them to its models, parameter for parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

from moe_planner.catalog import KvGroup, Other
from moe_planner.config_common import bias, dense, layer_types, routed, usual
from moe_planner.config_grouped import qwen, shared_gated
from moe_planner.config_keys import Keys
from moe_planner.config_latent import latent


def _mixed(values: Mapping[str, Any], full: int, state: int, params: int, name: str) -> dict[str, Any]:
    """`full` layers of grouped-query attention; the others hold `params` each, and `state` elements for a sequence."""
    others = values["layers"] - full
    groups = (
        KvGroup(full, width=2 * values["head_dim"], heads=values["kv_heads"]),
        KvGroup(others, state=state),
    )
    return {
        "linear_layers": others,
        "kv": tuple(group for group in groups if group.layers),
        "others": (*values.get("others", ()), *((Other(name, others * params),) if others else ())),
    }


def _qwen3_next(keys: Keys) -> dict[str, Any]:
    values = {**qwen(keys), **shared_gated(keys), "qk_norm": "head", "attention": "deltanet", **bias(keys, "all")}
    values["head_dim"] = keys.whole("head_dim")
    layers = values["layers"]
    kinds, every = layer_types(keys, layers), keys.whole("full_attention_interval", default=4)
    linear = kinds.count("linear_attention") if kinds else layers - layers // every
    size, value_size = keys.whole("linear_key_head_dim"), keys.whole("linear_value_head_dim")
    if size != value_size:
        raise keys.wrong("linear_value_head_dim", f"{value_size} is not the keys' {size}: not counted")
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


def _jamba(keys: Keys) -> dict[str, Any]:
    """Jamba: Mamba, attention in every so many layers, experts in every so many."""
    values = usual(keys)
    layers, hidden = values["layers"], values["hidden"]
    full = _every(keys, layers, "attn_layer", 8, 4)
    sparse = _every(keys, layers, "expert_layer", 2, 1)
    inner = keys.whole("mamba_expand", default=2) * hidden
    state, kernel = keys.whole("mamba_d_state", default=16), keys.whole("mamba_d_conv", default=4)
    rank = (
        ceil(hidden / 16) if keys.is_text("mamba_dt_rank") else keys.whole("mamba_dt_rank", default=ceil(hidden / 16))
    )
    each = hidden * 2 * inner + inner * kernel + inner * (rank + 2 * state) + rank * inner + inner * hidden
    each += inner * state + 2 * inner + rank + 2 * state  # decay, skip, the step's bias, three norms
    each += inner * keys.flag("mamba_conv_bias", default=True)
    each += (2 * inner + hidden) * keys.flag("mamba_proj_bias")
    return {
        **values,
        **dense(keys, layers - sparse),
        "experts": keys.whole("num_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("intermediate_size"),
        **_mixed(values, full, inner * (state + kernel), each, "mamba"),
    }


def _every(keys: Keys, layers: int, name: str, period: int, offset: int) -> int:
    """Layers of a kind that comes every `NAME_period`, from `NAME_offset` on."""
    step = keys.whole(f"{name}_period", default=period)
    first = keys.whole(f"{name}_offset", default=offset, least=0)
    return sum(layer % step == first for layer in range(layers))


def _mamba2(hidden: int, heads: int, size: int, groups: int, state: int, kernel: int, biased: bool) -> tuple[int, int]:
    """Parameters and state of a Mamba 2 layer: `heads` of `size`, `groups` of inputs of `state`."""
    inner = heads * size
    mixed = inner + 2 * groups * state
    each = hidden * (inner + mixed + heads) + mixed * kernel + 3 * heads + inner + inner * hidden
    each += mixed * biased
    return each, inner * state + mixed * kernel


def _granite_hybrid(keys: Keys) -> dict[str, Any]:
    """Granite 4: Mamba 2 beside attention, experts and a shared one in every layer."""
    keys.also("mamba_expand")  # heads and their size say it
    values = usual(keys, kv_heads=True)
    layers, hidden = values["layers"], values["hidden"]
    kinds = layer_types(keys, layers)
    if not kinds:
        raise keys.wrong("layer_types", "is missing: which layers have attention")
    full = kinds.count("attention") + kinds.count("full_attention")
    heads, size = keys.whole("mamba_n_heads"), keys.whole("mamba_d_head")
    if keys.flag("mamba_proj_bias"):
        raise keys.wrong("mamba_proj_bias", "is true: not counted for this family")
    each, state = _mamba2(
        hidden, heads, size, keys.whole("mamba_n_groups"), keys.whole("mamba_d_state"),
        keys.whole("mamba_d_conv"), keys.flag("mamba_conv_bias", default=True),
    )  # fmt: skip
    shared = keys.whole("shared_intermediate_size", least=0, null=0)
    return {
        **values,
        "experts": keys.whole("num_local_experts", least=0),
        "topk": keys.whole("num_experts_per_tok", least=0),
        "moe_intermediate": keys.whole("intermediate_size"),
        "shared_experts": int(shared > 0),
        "shared_intermediate": shared,
        **bias(keys, "all"),
        **_mixed(values, full, state, each, "mamba"),
    }


NEMOTRON = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
"""Letters of `hybrid_override_pattern`."""


def _nemotron(keys: Keys) -> dict[str, Any]:
    """Nemotron-H with experts: every layer is one of Mamba 2, attention, or experts, behind a norm of its own."""
    pattern = keys.text("hybrid_override_pattern", default="")
    if any(letter not in NEMOTRON for letter in pattern):
        raise keys.wrong("hybrid_override_pattern", f"has other letters than {' '.join(NEMOTRON)}")
    kinds = [NEMOTRON[letter] for letter in pattern] or keys.words("layers_block_type")
    same = {"linear_attention": "mamba", "full_attention": "attention"}
    kinds = [same.get(kind, kind) for kind in kinds]
    layers = keys.whole("num_hidden_layers", default=len(kinds))
    if not kinds or len(kinds) != layers:
        raise keys.wrong("hybrid_override_pattern", f"has {len(kinds)} letters for {layers} layers")
    full, sparse = kinds.count("attention"), kinds.count("moe")
    if "mlp" in kinds or full + sparse + kinds.count("mamba") != layers:
        raise keys.wrong("hybrid_override_pattern", "only Mamba, attention and experts are counted")
    hidden = keys.whole("hidden_size")
    keys.also("expand", "layers_block_type", "layer_types")
    for name in ("use_bias", "mlp_bias", "mamba_proj_bias", "attention_bias"):
        if keys.flag(name):
            raise keys.wrong(name, "is true: not counted for this family")
    each, state = _mamba2(
        hidden, keys.whole("mamba_num_heads"), keys.whole("mamba_head_dim"), keys.whole("n_groups"),
        keys.whole("ssm_state_size"), keys.whole("conv_kernel"), keys.flag("use_conv_bias", default=True),
    )  # fmt: skip
    heads = keys.whole("num_attention_heads")
    head_dim, kv_heads = keys.whole("head_dim"), keys.whole("num_key_value_heads")
    mamba = kinds.count("mamba")
    shared = keys.whole("n_shared_experts", default=0, least=0)
    groups = (KvGroup(full, width=2 * head_dim, heads=kv_heads), KvGroup(mamba, state=state))
    return {
        "attention": "gqa",
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": keys.whole("vocab_size"),
        "max_context": keys.whole("max_position_embeddings"),
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        "dense_layers": layers - sparse,
        "dense_intermediate": 0,
        "layer_norms": 1,
        "expert_matrices": 2,
        "linear_layers": layers - full,
        "experts": keys.whole("n_routed_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("moe_intermediate_size"),
        "shared_experts": shared,
        "shared_intermediate": keys.whole("moe_shared_expert_intermediate_size") if shared else 0,
        "score_bias": True,
        "kv": tuple(group for group in groups if group.layers),
        "others": (Other("mamba", mamba * each),) if mamba else (),
    }


def _lfm2(keys: Keys) -> dict[str, Any]:
    """LFM2: short convolutions beside attention."""
    tied = keys.flag("tie_embedding", default=True)
    values = usual(keys, tied=tied)
    layers, hidden = values["layers"], values["hidden"]
    kinds = layer_types(keys, layers)
    full = kinds.count("full_attention") if kinds else len(keys.numbers("full_attn_idxs"))
    if not full:
        raise keys.wrong("layer_types", "is missing: which layers have attention")
    kernel = keys.whole("conv_L_cache")
    each = hidden * (4 * hidden + kernel) + 5 * hidden * keys.flag("conv_bias")
    return {
        **values,
        **dense(keys, keys.whole("num_dense_layers", least=0)),
        "experts": keys.whole("num_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("moe_intermediate_size"),
        "qk_norm": "head",
        "score_bias": keys.flag("use_expert_bias", default=True),
        **_mixed(values, full, hidden * kernel, each, "convolutions"),
    }


def _minimax(keys: Keys) -> dict[str, Any]:
    """MiniMax-Text-01 and M1: lightning attention beside softmax attention."""
    values = usual(keys)
    layers, hidden = values["layers"], values["hidden"]
    kinds, each_kind = layer_types(keys, layers), keys.numbers("attn_type_list")
    if not kinds and len(each_kind) != layers:
        raise keys.wrong("attn_type_list", f"has {len(each_kind)} entries for {layers} layers")
    full = kinds.count("full_attention") if kinds else each_kind.count(1)
    keys.also("shared_moe_mode")
    if keys.whole("shared_intermediate_size", default=0, least=0):
        raise keys.wrong("shared_intermediate_size", "is above zero: not counted for this family")
    width = values["heads"] * values["head_dim"]
    return {
        **values,
        "experts": keys.whole("num_local_experts"),
        "topk": keys.whole("num_experts_per_tok"),
        "moe_intermediate": keys.whole("intermediate_size"),
        **_mixed(values, full, width * values["head_dim"], hidden * width * 5 + width, "lightning attention"),
    }


def _kimi_linear(keys: Keys) -> dict[str, Any]:
    """Kimi Linear: delta attention beside latent attention."""
    layers, hidden = keys.whole("num_hidden_layers"), keys.whole("hidden_size")
    kinds = layer_types(keys, layers)
    inner = keys.optional("linear_attn_config")
    if inner is not None:
        linear = len(inner.numbers("kda_layers"))
        if linear + len(inner.numbers("full_attn_layers")) != layers:
            raise inner.wrong("kda_layers", f"and full_attn_layers must name each of {layers} layers")
        count, size = inner.whole("num_heads"), inner.whole("head_dim")
        kernel = inner.whole("short_conv_kernel_size")
        inner.all_read()
    elif not kinds:
        raise keys.wrong("linear_attn_config", "is missing: which layers have delta attention")
    else:
        linear = kinds.count("linear_attention")
        count, size = keys.whole("linear_num_heads"), keys.whole("linear_head_dim")
        kernel = keys.whole("linear_conv_kernel_dim")
    width = count * size
    each = 3 * hidden * width + 3 * width * kernel + width * hidden  # in, convolutions, out
    each += 2 * (hidden * size + size * width) + hidden * count + width + count + size  # gates, step, decay, norm
    heads = keys.whole("num_attention_heads")
    keys.also("num_key_value_heads", "mla_use_nope")
    values = latent(keys)
    groups = (
        KvGroup(layers - linear, width=values["kv_lora_rank"] + values["rope_dim"]),
        KvGroup(linear, state=width * size + 3 * width * kernel, heads=count),
    )
    return {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "vocab": keys.whole("vocab_size"),
        "max_context": keys.whole("model_max_length", "max_position_embeddings"),
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        **routed(keys, layers, None),
        **values,
        "score_bias": True,
        "linear_layers": linear,
        "kv": tuple(group for group in groups if group.layers),
        "others": (Other("delta attention", linear * each),) if linear else (),
    }


def _mimo(keys: Keys) -> dict[str, Any]:
    """MiMo-V2-Flash: full and windowed layers with other heads, and values narrower than keys.

    Its attention is none of the usual shapes, so all of it is counted under `others`.
    """
    values = usual(keys)
    layers, hidden = values["layers"], values["hidden"]
    pattern = keys.numbers("hybrid_layer_pattern")
    if len(pattern) != layers or any(kind not in (0, 1) for kind in pattern):
        raise keys.wrong("hybrid_layer_pattern", f"must say 0 or 1 for each of {layers} layers")
    if keys.flag("attention_bias"):
        raise keys.wrong("attention_bias", "is true: not counted for this family")
    groups, params = [], 0
    for prefix, count, sinks in (
        ("", pattern.count(0), keys.flag("add_full_attention_sink_bias")),
        ("swa_", pattern.count(1), keys.flag("add_swa_attention_sink_bias")),
    ):
        heads, kv_heads = keys.whole(f"{prefix}num_attention_heads"), keys.whole(f"{prefix}num_key_value_heads")
        size, value = keys.whole(f"{prefix}head_dim"), keys.whole(f"{prefix}v_head_dim")
        each = hidden * (heads + kv_heads) * (size + value) + heads * sinks
        window = keys.whole("sliding_window") if prefix else None
        if count:
            groups.append(KvGroup(count, width=size + value, heads=kv_heads, window=window))
            params += count * each
    return {
        **values,
        **routed(keys, layers, None),
        "score_bias": True,
        "linear_layers": layers,
        "kv": tuple(groups),
        "others": (Other("attention", params),),
    }


READERS: Mapping[str, Callable[[Keys], dict[str, Any]]] = {
    "granitemoehybrid": _granite_hybrid,
    "jamba": _jamba,
    "kimi_linear": _kimi_linear,
    "lfm2_moe": _lfm2,
    "mimo_v2_flash": _mimo,
    "minimax": _minimax,
    "minimax_m1": _minimax,
    "minimax_text_01": _minimax,
    "nemotron_h": _nemotron,
    "qwen3_5_moe_text": _qwen3_next,
    "qwen3_next": _qwen3_next,
}
"""By `model_type`."""
