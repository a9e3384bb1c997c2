"""What a parallel form means for one MoE layer of a rank: whose tokens its router sees, and who holds its experts.

| form | a router sees | C counts the tokens of |
| --- | --- | --- |
| tensor parallel | every token of the engine, on each rank | the engine |
| data-parallel attention | the tokens of its own requests; dispatch follows | the data-parallel rank |
| both (sequence parallel) | its part of its data-parallel rank's tokens; dispatch follows | the part |
| a quantisation without a modular kernel, data parallel | every rank's tokens, after the gather | nothing: bypassed |
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

from moe_serving.route import Layer

AFTER_GATHER = "it routes after the tokens of all data-parallel ranks were gathered, and their phases were not"


def note_form(layer: Layer, module: Any) -> None:
    """Write down where `layer`, made of vLLM's MoE `module`, stands in its parallel form."""
    experts = getattr(module, "routed_experts", None)
    if getattr(module, "do_naive_dispatch_combine", False):
        layer.bypassed = layer.bypassed or AFTER_GATHER
    expert_map = getattr(experts, "expert_map", None)
    layer.owner = None if expert_map is None else (expert_map >= 0).cpu()
    if experts is None:
        return
    if expert_map is not None:
        layer.places = places(experts.expert_map_manager, layer.experts)
    if experts.moe_config.is_sequence_parallel:
        group = get_tp_group()
        layer.part, layer.parts = group.rank_in_group, group.world_size


def places(manager: Any, experts: int) -> tuple[tuple[int, ...], ...]:
    """Experts of each EP rank, in the order of ranks, also of those in other engines of a data-parallel gang."""
    maps = (
        determine_expert_map(manager.ep_size, rank, experts, manager.placement_strategy)[1]
        for rank in range(manager.ep_size)
    )
    return tuple(tuple(torch.nonzero(held >= 0).squeeze(1).tolist()) for held in maps)
