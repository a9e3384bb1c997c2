"""What families of models call alike in a config.json: sizes, windows, biases, dense and sparse layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_planner.catalog import KvGroup
from moe_planner.config_keys import Keys


def usual(
    keys: Keys, *, tied: bool | None = False, head_dim: int | None = None, kv_heads: bool = False
) -> dict[str, Any]:
    """What most families call alike.

    `tied`, `head_dim`: what the family's own class takes where the file is silent; None: as many as share the width
    out, and for `tied` that the file must say it. `kv_heads`: as many as query heads where the file is silent; for most
    families another number would be meant, so that the file must say it. A null means as many everywhere.
    """
    heads, hidden = keys.whole("num_attention_heads"), keys.whole("hidden_size")
    if tied is None and not keys.has("tie_word_embeddings"):
        raise keys.wrong("tie_word_embeddings", "is missing")
    return {
        "attention": "gqa",
        "layers": keys.whole("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": keys.whole("num_key_value_heads", default=heads if kv_heads else None, null=heads),
        "head_dim": keys.whole("head_dim", default=head_dim or max(1, hidden // heads)),
        "vocab": keys.whole("vocab_size"),
        "max_context": keys.whole("max_position_embeddings"),
        "tied_embeddings": keys.flag("tie_word_embeddings", default=bool(tied)),
        "dense_layers": 0,
    }


def windows(keys: Keys, values: Mapping[str, Any]) -> tuple[KvGroup, ...]:
    """Caches of full layers and of those that see a window or a chunk, by `layer_types`; empty where all are full."""
    kinds = layer_types(keys, values["layers"])
    wide, heads = 2 * values["head_dim"], values["kv_heads"]
    found = []
    for kind, size in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        if layers := kinds.count(kind):
            chunked = kind == "chunked_attention"
            found.append(KvGroup(layers, width=wide, heads=heads, window=keys.whole(size), chunked=chunked))
    if not found:
        return ()
    full = values["layers"] - sum(group.layers for group in found)
    return (*found, KvGroup(full, width=wide, heads=heads)) if full else tuple(found)


def layer_types(keys: Keys, layers: int) -> list[str]:
    """`layer_types`, one for each layer; empty where there is none."""
    kinds = keys.words("layer_types")
    if kinds and len(kinds) != layers:
        raise keys.wrong("layer_types", f"has {len(kinds)} entries for {layers} layers")
    return kinds


def bias(keys: Keys, what: str, default: bool = False) -> dict[str, Any]:
    return {"attention_bias": what if keys.flag("attention_bias", default=default) else "none"}


def dense_by_kind(keys: Keys, layers: int) -> int | None:
    """Dense layers by `mlp_layer_types`, or by a list in `moe_layer_freq` or `is_moe_layer`; None without one."""
    if kinds := keys.words("mlp_layer_types"):
        if len(kinds) != layers:
            raise keys.wrong("mlp_layer_types", f"has {len(kinds)} entries for {layers} layers")
        return kinds.count("dense")
    for name in ("moe_layer_freq", "is_moe_layer"):
        if keys.is_list(name):
            each = keys.numbers(name)
            if len(each) != layers or not all(one in (0, 1) for one in each):
                raise keys.wrong(name, f"must say 0 or 1 for each of {layers} layers")
            return layers - sum(each)
    return None


def first_dense(keys: Keys, layers: int, default: int | None = 0) -> int:
    """Dense layers of the DeepSeek families: the first few, and all but every n-th of the others."""
    if (told := dense_by_kind(keys, layers)) is not None:
        return told
    first = keys.whole("first_k_dense_replace", default=default, least=0)
    step = keys.whole("moe_layer_freq", default=1)
    return sum(layer < first or layer % step != 0 for layer in range(layers))


def dense(keys: Keys, layers: int) -> dict[str, Any]:
    """So many dense layers, and their width."""
    return {"dense_layers": layers, "dense_intermediate": keys.whole("intermediate_size") if layers else 0}


def routed(keys: Keys, layers: int, default_dense: int | None = 0) -> dict[str, Any]:
    """Experts of the DeepSeek families, shared ones and dense layers."""
    return {
        **dense(keys, first_dense(keys, layers, default_dense)),
        "experts": keys.whole("n_routed_experts", "num_experts", "num_local_experts"),
        "shared_experts": keys.whole("n_shared_experts", "num_shared_experts", least=0, null=0),
        "topk": keys.whole("num_experts_per_tok", "num_experts_per_token"),
        "moe_intermediate": keys.whole("moe_intermediate_size"),
    }
