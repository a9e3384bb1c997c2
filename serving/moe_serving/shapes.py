"""True shapes of the model that a rank has loaded, and the work of its steps, for S-MBU and S-MFU.

Everything is read from the modules themselves: no configuration is trusted to say what was built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Meter:
    """Work of a rank's steps since it started. `kv`: (bytes of one token in the cache, window or None) by group."""

    kv: tuple[tuple[float, int | None], ...] = ()
    tokens: int = 0
    pairs: int = 0
    decode_steps: int = 0
    decode_busy_s: float = 0.0
    decode_kv_bytes: float = 0.0

    def note(self, scheduled: Any, seconds: float, *, prefill: bool) -> None:
        """One step: vLLM's SchedulerOutput, its time, and whether any of its tokens was prefill."""
        requests = [(context, scheduled.num_scheduled_tokens[name]) for name, context in _contexts(scheduled)]
        self.tokens += sum(new for _, new in requests)
        # A token attends to those before it and to itself.
        self.pairs += sum(new * context + new * (new + 1) // 2 for context, new in requests)
        if prefill or not requests:
            return
        self.decode_steps += 1
        self.decode_busy_s += seconds
        for size, window in self.kv:
            held = (context + new for context, new in requests)
            self.decode_kv_bytes += size * sum(tokens if window is None else min(tokens, window) for tokens in held)

    def read(self) -> dict[str, Any]:
        """Totals for `moestack_read`."""
        return {
            "tokens": self.tokens,
            "pairs": self.pairs,
            "decode_steps": self.decode_steps,
            "decode_busy_s": self.decode_busy_s,
            "decode_kv_bytes": self.decode_kv_bytes,
        }


METER = Meter()
"""The meter of this worker process."""


def _contexts(scheduled: Any) -> list[tuple[str, int]]:
    """(request, tokens computed before this step) of everything that a step runs."""
    new = [(request.req_id, int(request.num_computed_tokens)) for request in scheduled.scheduled_new_reqs]
    old = scheduled.scheduled_cached_reqs
    known = [*new, *zip(old.req_ids, map(int, old.num_computed_tokens), strict=True)]
    return [(name, context) for name, context in known if name in scheduled.num_scheduled_tokens]


def kv_groups(config: Any) -> tuple[tuple[float, int | None], ...]:
    """Bytes of one token and sliding window of each cache group of vLLM's KVCacheConfig, recurrent state left out."""
    groups = []
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        if not hasattr(spec, "num_kv_heads"):
            continue
        size = spec.page_size_bytes * len(group.layer_names) / spec.block_size
        groups.append((size, getattr(spec, "sliding_window", None)))
    return tuple(groups)


def shapes(model: Any, layers: list[Any]) -> dict[str, Any]:
    """Parameters and bytes of a rank by part. `layers` are Rank.layers: each has the name of its MoE module."""
    modules = dict(model.named_modules())
    experts = [_experts(modules.get(layer.name) or _ending(modules, layer.name), layer) for layer in layers]
    counted = {id(p) for part in experts for p in part.pop("tensors")}
    head = {id(p) for p in _parameters(getattr(model, "lm_head", None))}
    for module in modules.values():
        # Only rows of it are read; where the output head is tied to it, it is the head.
        if type(module).__name__ == "VocabParallelEmbedding":
            counted |= {id(p) for p in module.parameters(recurse=False)} - head
    blocks = {layer.name.rpartition(".")[0]: layer.experts for layer in layers}
    token_params = router_params = head_params = fixed_bytes = 0
    for name, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            shape = _shape(module, own, parameter)
            params = math.prod(shape)
            fixed_bytes += params * parameter.element_size()
            if id(parameter) in head:
                head_params += params
            elif len(shape) < 2:
                continue  # norms and biases multiply nothing
            elif blocks.get(name.rpartition(".")[0]) == shape[0]:
                router_params += params
            else:
                token_params += params
    return {
        "fixed_bytes": fixed_bytes,
        "token_params": token_params,
        "router_params": router_params,
        "head_params": head_params,
        "experts": experts,
        "score_width": sum(_score_width(module) for module in modules.values()),
        "weight_bytes": min((part["weight_bytes"] for part in experts), default=2),
    }


def _experts(module: Any, layer: Any) -> dict[str, Any]:
    """One routed expert of a layer: its bytes and parameters on this rank, and whether they are the whole of it."""
    routed = getattr(module, "routed_experts", None)
    tensors = _parameters(routed)
    local = max(1, int(layer.experts if layer.owner is None else layer.owner.sum()))
    matrices = [p for p in tensors if p.dim() > 1]
    return {
        "bytes": sum(p.numel() * p.element_size() for p in tensors) / local,
        "params": sum(p.numel() for p in matrices) / local,
        "whole": layer.owner is not None,
        "weight_bytes": min((p.element_size() for p in matrices), default=2),
        "tensors": tensors,
    }


def _parameters(module: Any) -> list[Any]:
    return [] if module is None else list(module.parameters())


def _ending(modules: dict[str, Any], name: str) -> Any:
    """The module that a layer's own name ends in, where the model is wrapped in another."""
    return next((module for path, module in modules.items() if path and name.endswith(path)), None)


def _shape(module: Any, own: str, parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter, also of a linear layer whose weight a CPU kernel has packed away."""
    if parameter.numel() or own != "weight":
        return tuple(parameter.shape)
    rows = getattr(module, "output_size_per_partition", getattr(module, "output_size", 0))
    columns = getattr(module, "input_size_per_partition", getattr(module, "input_size", 0))
    return int(rows), int(columns)


def _score_width(module: Any) -> int:
    """Of one of vLLM's attention layers; 0 of any other module."""
    if not hasattr(module, "kv_cache_dtype") or not hasattr(module, "num_heads") or not hasattr(module, "head_size"):
        return 0
    value = getattr(module, "head_size_v", None) or getattr(module, "kv_lora_rank", None) or module.head_size
    return int(module.num_heads) * (int(module.head_size) + int(value))
