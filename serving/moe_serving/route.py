"""One routed batch of one MoE layer: cut to each token's own k, counted, held to capacity, counted again.

`route` is a function of tensors with fixed shapes that looks at no value, so it may be traced whole or captured:
knobs, phases and k are read from persistent tensors, counters are persistent tensors changed in place. Time it alone
by `Rank.route` on any logits (benchmarks need no engine): a `Rank` with one `Layer(0, "moe.0", E, K, Routing("softmax",
True))`, `apply`, `begin_step(numpy.full(T, PREFILL, numpy.uint8), 0)`, then `route(0, weights, ids, logits)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_core.wire import Overflow
from moe_serving import capacity
from moe_serving.capacity import MODES, PADDING, PHASES, PREFILL
from moe_serving.scores import Routing, scores, weights


def _none() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


@dataclass
class Layer:
    """One MoE layer as this rank sees it. Counters only grow, but for the window's maximum.

    `gamma_micro` [2] is γ of this layer by phase in millionths, 0 where uncapped. `demand` and `assigned` [E] are
    slots by expert before and after capacity, `max_prefill_load` is the most that one expert took in one step;
    `touched` is distinct experts with a slot, summed over steps that only decode. `places` are the experts of each EP
    rank. Where the step's tokens are cut into `parts` for routing (sequence parallel), this rank routes number `part`.
    """

    index: int
    name: str
    experts: int
    top_k: int
    routing: Routing | None
    why_unknown: str = ""
    bypassed: str = ""
    owner: Tensor | None = None
    places: tuple[tuple[int, ...], ...] | None = None
    part: int = 0
    parts: int = 1
    gamma_micro: Tensor = field(default_factory=lambda: torch.zeros(PHASES, dtype=torch.int64))
    demand: Tensor = field(default_factory=_none)
    assigned: Tensor = field(default_factory=_none)
    tokens: Tensor = field(default_factory=_none)
    dropped: Tensor = field(default_factory=_none)
    rerouted: Tensor = field(default_factory=_none)
    overflow_kept: Tensor = field(default_factory=_none)
    max_prefill_load: Tensor = field(default_factory=_none)
    touched: Tensor = field(default_factory=_none)
    lost_gate_mass: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def __post_init__(self) -> None:
        self.demand = torch.zeros(self.experts, dtype=torch.int64)
        self.assigned = torch.zeros(self.experts, dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        """Move knobs and counters; done once, before a graph is captured."""
        for name in ("gamma_micro", *COUNTERS):
            setattr(self, name, getattr(self, name).to(device))


COUNTERS = (
    "demand", "assigned", "tokens", "dropped", "rerouted", "overflow_kept", "max_prefill_load", "touched",
    "lost_gate_mass",
)  # fmt: skip


def route(
    layer: Layer,
    phase: Tensor,
    token_k: Tensor,
    overflow: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    logits: Tensor,
    early_out: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, K] of a batch under the knobs in force, new tensors.

    `phase` and `token_k` are [T] int64, k 0 is the model's own; `overflow` [] int64 of MODES; logits are [T, E]. Slots
    that a token gives up, or loses, are -1 with weight 0; a token that keeps its experts keeps its weights bit by bit.
    """
    real = phase > PADDING
    segment = (phase - 1).clamp(min=0)
    chosen = topk_ids.long()
    width = chosen.shape[1]
    k = torch.where((token_k > 0) & real, token_k.clamp(max=width), width)
    cut = k < width
    # In a graph both run in every step; eagerly only what does something. A layer that is counted only skips both.
    cuts = layer.routing is not None and not (early_out and not bool(cut.any()))
    caps = layer.routing is not None and not (early_out and int(overflow) == MODES[Overflow.UNLIMITED])
    if layer.routing is None or not (cuts or caps):
        counts = capacity.seat_counts(chosen, segment, real, layer.experts)
        _count(layer, real, counts, counts)
        return topk_weights.clone(), topk_ids.clone()

    batch = scores(layer.routing, logits)
    changed = cut
    if cuts:
        order = capacity.preference(batch.selection.gather(1, chosen.clamp(min=0)), chosen)
        better = (order.unsqueeze(1) > order.unsqueeze(2)).sum(2)
        chosen = torch.where(better < k.unsqueeze(1), chosen, -1)
    demand = capacity.seat_counts(chosen, segment, real, layer.experts)
    assigned = demand
    if caps:
        limits = capacity.Limits(overflow, layer.gamma_micro)
        capped = capacity.assign(batch, chosen, k, phase, limits, early_out)
        chosen = capped.experts
        changed = cut | capped.changed
        assigned = capacity.seat_counts(chosen, segment, real, layer.experts)
        layer.dropped.add_(capped.dropped)
        layer.rerouted.add_(capped.rerouted)
        layer.overflow_kept.add_(capped.overflow_kept)
        layer.lost_gate_mass.add_(capped.lost_gate_mass.sum())
    _count(layer, real, demand, assigned)
    theirs = weights(layer.routing, batch.gate, chosen).to(topk_weights.dtype)
    change = changed.unsqueeze(1)
    return torch.where(change, theirs, topk_weights), torch.where(change, chosen.to(topk_ids.dtype), topk_ids)


def _count(layer: Layer, real: Tensor, demand: Tensor, assigned: Tensor) -> None:
    layer.tokens.add_(real.sum())
    layer.demand.add_(demand.sum(0))
    layer.assigned.add_(assigned.sum(0))
    layer.touched.add_((assigned.sum(0) > 0).sum() * (demand[PREFILL - 1].sum() == 0))
    layer.max_prefill_load.copy_(torch.maximum(layer.max_prefill_load, assigned[PREFILL - 1].max()))
