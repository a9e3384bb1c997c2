"""KV cache: bytes that sequences take on one GPU, by kind of attention."""

from __future__ import annotations

from math import ceil

from moe_api.enums import KvCacheDtype
from moe_planner.catalog import KvGroup, ModelFacts
from moe_planner.weights import Layout


def is_fp8(model: ModelFacts, dtype: KvCacheDtype) -> bool:
    """Whether the cache is kept in FP8: as asked, or as the model has it."""
    return model.kv_dtype == "fp8" if dtype is KvCacheDtype.AUTO else dtype is not KvCacheDtype.BFLOAT16


def sequence_bytes(model: ModelFacts, tokens: int, layout: Layout, *, fp8: bool, in_flight: int = 0) -> float:
    """Bytes on the fullest GPU that a sequence of `tokens` takes.

    `in_flight`: tokens of one step, which a sliding window keeps beside its own while a prompt is read.
    """
    stage = ceil(model.layers / layout.pipeline) / model.layers
    return stage * sum(group.layers * _layer_bytes(group, tokens, layout, fp8, in_flight) for group in model.kv_groups)


def _layer_bytes(group: KvGroup, tokens: int, layout: Layout, fp8: bool, in_flight: int) -> float:
    kept = tokens if group.window is None else min(tokens, group.window + in_flight)
    element = 1 if fp8 else 2
    entry = group.fp8_bytes if fp8 and group.fp8_bytes is not None else group.width * element
    heads = ceil(group.heads / layout.tensor)
    # A recurrent state stays in two bytes whatever the cache's format, and its heads are divided like any other.
    return heads * entry * ceil(kept / group.every) + 2 * group.state * heads / group.heads


def longest(model: ModelFacts, room: float, layout: Layout, *, fp8: bool, in_flight: int, most: int) -> int:
    """Tokens of the longest sequence that `room` bytes hold, `most` at most; 0 where none fits."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if sequence_bytes(model, middle, layout, fp8=fp8, in_flight=in_flight) <= room:
            low = middle
        else:
            high = middle - 1
    return low
