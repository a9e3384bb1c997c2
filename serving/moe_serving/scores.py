"""What a vLLM router's logits mean: scores for capacity, and weights for experts that capacity assigned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_serving.capacity import Scores


class UnknownRouting(Exception):
    """A router whose scores are not known: its load is counted, capacity is refused for its layer."""


@dataclass(frozen=True)
class Routing:
    """How a router turns logits into experts and weights.

    Experts are chosen by gate + bias where there is a bias, by the gate itself where `by_gate`, else by the logits.
    They differ where a gate saturates: close logits then share a gate. A softmax's logits are taken less the logarithm
    of its sum, which is the gate's logarithm: between tokens, raw ones say nothing of what an expert is worth to each.
    """

    scoring: str
    renormalize: bool
    scaling: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    bias: Tensor | None = None
    by_gate: bool = False


def routing_of(router: Any) -> Routing:
    """Read a router's rule from its attributes, as its own class uses them. Raises UnknownRouting with the reason."""
    kind = type(router).__name__
    if kind not in _READERS:
        raise UnknownRouting(f"router class {kind}; known are {', '.join(sorted(_READERS))}")
    return _READERS[kind](router)


def scores(routing: Routing, logits: Tensor) -> Scores:
    """Selection and gate scores [T, E] of router logits [T, E]."""
    gate = _gate(routing.scoring, logits.float())
    if routing.bias is not None:
        selection = gate + routing.bias.float().unsqueeze(0)
    elif routing.by_gate:
        selection = gate
    elif routing.scoring == "softmax":
        selection = torch.log_softmax(logits.float(), dim=-1)
    else:
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
    by_group = selection.view(tokens, routing.groups, experts // routing.groups)
    strength = by_group.amax(-1) if routing.bias is None else by_group.topk(2, dim=-1).values.sum(-1)
    chosen = strength.topk(routing.groups_per_token, dim=-1).indices
    mask = torch.zeros(tokens, routing.groups, dtype=torch.bool, device=selection.device)
    return mask.scatter_(1, chosen, True).repeat_interleave(experts // routing.groups, dim=1)


def _cpu(router: Any) -> Routing:
    """One class for every scheme, which it tries in this order; what a scheme does not use is ignored, as there."""
    if router.use_grouped_topk:
        return _in_groups(router, int(router.num_expert_group), int(router.topk_group))
    if router.scoring_func == "sqrtsoftplus":
        return _biased(router)
    if router.custom_routing_function is not None:
        return _custom(router)
    if router.scoring_func != "softmax":
        raise UnknownRouting(f"CPURouter with scoring {router.scoring_func!r} and no groups: vLLM cannot run it")
    # Neither a bias nor a scale: this branch of the class reads neither.
    return Routing("softmax", bool(router.renormalize))


def _grouped(router: Any) -> Routing:
    _own_slots(router)
    groups, experts = int(router.num_expert_group), int(router.global_num_experts)
    if experts <= groups or experts % groups:
        if router.e_score_correction_bias is None:
            # The class falls back to plain softmax here, whatever its scoring, and drops the scale.
            return Routing("softmax", bool(router.renormalize))
        return _biased(router)
    return _in_groups(router, groups, int(router.topk_group))


def _in_groups(router: Any, groups: int, groups_per_token: int) -> Routing:
    return Routing(
        _scoring(router, "softmax", "sigmoid"),
        bool(router.renormalize),
        float(router.routed_scaling_factor),
        groups,
        groups_per_token,
        router.e_score_correction_bias,
        by_gate=True,
    )


def _biased(router: Any) -> Routing:
    if getattr(router, "_hash_indices_table", None) is not None:
        raise UnknownRouting("hash-routed: experts follow the token id, not a score")
    _own_slots(router)
    if getattr(router, "bias_vl", None) is not None:
        raise UnknownRouting("image tokens are routed with a bias of their own")
    scoring = _scoring(router, "softmax", "sigmoid", "sqrtsoftplus")
    bias, scaling = router.e_score_correction_bias, float(router.routed_scaling_factor)
    return Routing(scoring, bool(router.renormalize), scaling, bias=bias)


def _plain(router: Any) -> Routing:
    return Routing(_scoring(router, "softmax", "sigmoid"), bool(router.renormalize))


def _custom(router: Any) -> Routing:
    custom = router.custom_routing_function
    name = f"{getattr(custom, '__module__', '')}.{getattr(custom, '__qualname__', type(custom).__name__)}"
    if name == "vllm.model_executor.models.llama4.Llama4MoE.custom_routing_function":
        # Chosen by the logits, weighted by their sigmoid, and never renormalised.
        return Routing("sigmoid", renormalize=False)
    if name == "vllm.model_executor.models.cohere2_moe.token_choice_with_bias":
        return Routing("sigmoid", bool(router.renormalize), by_gate=True)
    raise UnknownRouting(f"custom routing function {name}")


def _own_slots(router: Any) -> None:
    if getattr(router, "num_fused_shared_experts", 0):
        raise UnknownRouting("shared experts are slots of the routed ones here, and take every token")


def _scoring(router: Any, *known: str) -> str:
    scoring = str(router.scoring_func)
    if scoring not in known:
        raise UnknownRouting(f"{type(router).__name__} with scoring {scoring!r}")
    return scoring


_READERS: Mapping[str, Callable[[Any], Routing]] = {
    "CPURouter": _cpu,
    "CustomRoutingRouter": _custom,
    "FusedTopKBiasRouter": _biased,
    "FusedTopKRouter": _plain,
    "GroupedTopKRouter": _grouped,
}
