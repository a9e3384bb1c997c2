"""Faults of the supported vLLM that keep a model family from loading, and that a few lines mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def find_dbrx_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DbrxModel.load_weights`: its experts moved into `routed_experts`, its names for their weights did not.

    Without it every DBRX checkpoint ends in KeyError 'blocks.0.ffn.experts.w13_weight' (vLLM 0.32.0, any device).
    """

    def load_weights(self: Any, weights: Iterable[tuple[str, Any]]) -> Any:
        if any(".experts.routed_experts." in name for name, _ in self.named_parameters()):
            weights = ((moved(name), weight) for name, weight in weights)
        return original(self, weights)

    return load_weights


def moved(name: str) -> str:
    """Where a DBRX weight lies now: blocks.0.ffn.experts.mlp.w1 → blocks.0.ffn.experts.routed_experts.mlp.w1."""
    return name.replace(".ffn.experts.mlp.", ".ffn.experts.routed_experts.mlp.")
