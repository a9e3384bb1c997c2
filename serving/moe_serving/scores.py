"""What a vLLM router's logits mean: scores for capacity, and weights for experts that capacity assigned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_serving.capacity import Scores

_KNOWN_CUSTOM = {"Llama4MoE.custom_routing_function": "sigmoid"}
"""Custom routing functions whose scores are known: plain top-k of the logits, weights by this function."""


class UnknownRouting(Exception):
    """A router whose scores are not known: its load is counted, capacity is refused for its layer."""


@dataclass(frozen=True)
class Routing:
    """How a router turns logits into experts and weights."""

    scoring: str
    renormalize: bool
    scaling: float
    groups: int
    groups_per_token: int
    bias: Tensor | None


def routing_of(router: Any) -> Routing:
    """Read a router's rule from its attributes. Raises UnknownRouting with the reason."""
    if getattr(router, "_hash_indices_table", None) is not None:
        raise UnknownRouting("hash-routed: experts follow the token id, not a score")
    custom = getattr(router, "custom_routing_function", None)
    if custom is not None:
        name = getattr(custom, "__qualname__", repr(custom))
        if name not in _KNOWN_CUSTOM:
            raise UnknownRouting(f"custom routing function {name}")
        return Routing(_KNOWN_CUSTOM[name], False, 1.0, 1, 1, None)
    scoring = getattr(router, "scoring_func", None)
    if scoring not in ("softmax", "sigmoid", "sqrtsoftplus"):
        raise UnknownRouting(f"{type(router).__name__} with scoring {scoring!r}")
    bias = getattr(router, "e_score_correction_bias", None)
    groups, per_token = 1, 1
    # The CPU router covers every scheme in one class and says which by a flag; the others are a class each.
    grouped = bool(getattr(router, "use_grouped_topk", type(router).__name__ == "GroupedTopKRouter"))
    if grouped:
        groups, per_token = int(router.num_expert_group or 1), int(router.topk_group or 1)
    scaling = float(getattr(router, "routed_scaling_factor", 1.0)) if grouped or bias is not None else 1.0
    return Routing(str(scoring), bool(getattr(router, "renormalize", False)), scaling, groups, per_token, bias)


def scores(routing: Routing, logits: Tensor) -> Scores:
    """Selection and gate scores [T, E] of router logits [T, E]."""
    gate = _gate(routing.scoring, logits.float())
    if routing.bias is not None:
        selection = gate + routing.bias.float().unsqueeze(0)
    elif routing.groups > 1:
        selection = gate
    else:
        # Top-k of plain routers is taken on the logits; a softmax could merge close ones.
        selection = logits.float()
    if routing.groups == 1:
        return Scores(selection, gate)
    return Scores(selection, gate, _allowed(selection, routing), routing.groups)


def weights(routing: Routing, gate: Tensor, experts: Tensor) -> Tensor:
    """Weights [T, K] float32 of assigned experts [T, K], 0 where a slot is -1."""
    present = experts >= 0
    taken = gate.gather(1, experts.clamp(min=0)) * present
    if routing.renormalize:
        taken = taken / taken.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return taken * routing.scaling


def _gate(scoring: str, logits: Tensor) -> Tensor:
    if scoring == "softmax":
        return torch.softmax(logits, dim=-1)
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    return torch.sqrt(torch.nn.functional.softplus(logits))


def _allowed(selection: Tensor, routing: Routing) -> Tensor:
    """Groups open to each token: the best by their top expert, or by the sum of their top two under a bias."""
    tokens, experts = selection.shape
    by_group = selection.view(tokens, routing.groups, -1)
    strength = by_group.amax(-1) if routing.bias is None else by_group.topk(2, dim=-1).values.sum(-1)
    chosen = strength.topk(routing.groups_per_token, dim=-1).indices
    mask = torch.zeros(tokens, routing.groups, dtype=torch.bool, device=selection.device)
    return mask.scatter_(1, chosen, True).repeat_interleave(experts // routing.groups, dim=1)
