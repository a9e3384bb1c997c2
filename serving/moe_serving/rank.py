"""State of one EP rank: knobs in force, phase of each token of the step, counters of each MoE layer.

The ops below are opaque to the compiler: their Python runs in every step, so a change of knobs acts at once and
without a new trace.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_core.capacity import GAMMA_SCALE, CapacityRefused, check_gamma
from moe_core.wire import ExpertKnobs, Overflow
from moe_serving import capacity
from moe_serving.scores import Routing, UnknownRouting, routing_of, scores, weights

PADDING, PREFILL, DECODE = 0, 1, 2


class KnobsRefused(ValueError):
    """Knobs that some layer of this rank cannot follow; the message names the knob and the layer."""


@dataclass
class Layer:
    """One MoE layer as this rank sees it. Counters only grow, but for the window's maximum."""

    index: int
    name: str
    experts: int
    top_k: int
    routing: Routing | None
    why_unknown: str = ""
    bypassed: str = ""
    owner: Tensor | None = None
    demand: Tensor = dataclass_field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    assigned: Tensor = dataclass_field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    tokens: int = 0
    dropped: int = 0
    rerouted: int = 0
    overflow_kept: int = 0
    lost_gate_mass: float = 0.0
    max_prefill_load: int = 0

    def __post_init__(self) -> None:
        self.demand = torch.zeros(self.experts, dtype=torch.int64)
        self.assigned = torch.zeros(self.experts, dtype=torch.int64)


@dataclass
class Rank:
    """Everything that the hooks of one worker share."""

    layers: list[Layer] = dataclass_field(default_factory=list)
    knobs: ExpertKnobs = dataclass_field(default_factory=ExpertKnobs)
    knobs_version: int = 0
    phase: Tensor | None = None
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    busy_s: float = 0.0
    moe_s: float = 0.0
    recorder: deque[dict[str, Any]] | None = None

    def add_layer(self, router: Any) -> int:
        """Register a router as it is built; returns its number among the MoE layers."""
        index = len(self.layers)
        try:
            routing, why = routing_of(router), ""
        except UnknownRouting as reason:
            routing, why = None, str(reason)
        self.layers.append(
            Layer(index, f"moe.{index}", int(router.global_num_experts), int(router.top_k), routing, why)
        )
        return index

    def begin_step(self, phase: np.ndarray[Any, np.dtype[np.uint8]], generated: int) -> None:
        """Phase of each token of the batch that runs next, in its order; and how many tokens the step will yield."""
        self.phase = torch.from_numpy(phase)
        self.steps += 1
        self.prompt_tokens += int((phase == PREFILL).sum())
        self.generated_tokens += generated

    def end_step(self, seconds: float) -> None:
        self.phase = None
        self.busy_s += seconds

    def apply(self, knobs: ExpertKnobs, version: int) -> None:
        """Put knobs in force from the next step on. Raises KnobsRefused and changes nothing if a layer cannot follow.

        A version that is in force already, or an older one, changes nothing; 0 is what a replica boots with.
        """
        if version <= self.knobs_version and version > 0:
            return
        if knobs.per_token:
            raise KnobsRefused("experts.perToken: this engine routes every token with the model's own k")
        capped = knobs.overflow is not Overflow.UNLIMITED
        for layer in self.layers if capped else ():
            if layer.bypassed:
                raise KnobsRefused(f"experts.overflow: layer {layer.name} bypasses the router ({layer.bypassed})")
            if layer.routing is None:
                raise KnobsRefused(f"experts.overflow: layer {layer.name} is counted only ({layer.why_unknown})")
            for name, gamma in (
                ("prefill", knobs.capacity_factor_prefill),
                ("decode", knobs.capacity_factor_decode),
            ):
                try:
                    check_gamma(gamma, layer.top_k)
                except CapacityRefused as refused:
                    raise KnobsRefused(f"experts.capacityFactor.{name}: {refused}") from None
        self.knobs = knobs
        self.knobs_version = version

    def route(self, index: int, topk_weights: Tensor, topk_ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Count what the router asked for, and hold capacity. Shapes [T, K], [T, K], [T, E]; returns new tensors."""
        layer = self.layers[index]
        # An op may not return its own input; the copies are a few KB.
        out_weights, out_ids = topk_weights.clone(), topk_ids.clone()
        phase = self.phase
        if phase is None:  # warm-up and profiling runs
            return out_weights, out_ids
        phase = phase[: out_ids.shape[0]]
        real = phase.shape[0]
        demand = torch.bincount(topk_ids[:real].flatten().long(), minlength=layer.experts)
        layer.demand += demand
        layer.tokens += real
        if self.knobs.overflow is not Overflow.UNLIMITED and layer.routing is not None:
            for which, gamma in (
                (PREFILL, self.knobs.capacity_factor_prefill),
                (DECODE, self.knobs.capacity_factor_decode),
            ):
                if gamma is not None:
                    self._cap(layer, layer.routing, which, gamma, phase, out_weights, out_ids, logits)
        held = out_ids[:real]
        layer.assigned += torch.bincount(held[held >= 0].long(), minlength=layer.experts)
        prefill = held[phase == PREFILL]
        if prefill.numel():
            load = torch.bincount(prefill[prefill >= 0].long(), minlength=layer.experts)
            layer.max_prefill_load = max(layer.max_prefill_load, int(load.max()))
        if self.recorder is not None:
            self.recorder.append(
                {
                    "step": self.steps,
                    "layer": index,
                    "phase": phase.clone(),
                    "logits": logits[:real].float().clone(),
                    "ids": topk_ids[:real].clone(),
                    "out_ids": held.clone(),
                    "out_weights": out_weights[:real].clone(),
                }
            )
        return out_weights, out_ids

    def _cap(
        self,
        layer: Layer,
        routing: Routing,
        which: int,
        gamma: Decimal,
        phase: Tensor,
        out_weights: Tensor,
        out_ids: Tensor,
        logits: Tensor,
    ) -> None:
        rows = torch.nonzero(phase == which).squeeze(1)
        if rows.numel() == 0:
            return
        chosen = out_ids[rows].long()
        k = torch.full((rows.numel(),), chosen.shape[1])
        batch = scores(routing, logits[rows])
        capped = capacity.assign(batch, chosen, k, self.knobs.overflow, int(gamma * GAMMA_SCALE))
        layer.dropped += capped.dropped
        layer.rerouted += capped.rerouted
        layer.overflow_kept += capped.overflow_kept
        layer.lost_gate_mass += float(capped.lost_gate_mass.sum())
        moved = torch.nonzero(capped.changed).squeeze(1)
        if moved.numel():
            experts = capped.experts[moved]
            out_ids[rows[moved]] = experts.to(out_ids.dtype)
            out_weights[rows[moved]] = weights(routing, batch.gate[moved], experts).to(out_weights.dtype)


RANK = Rank()
"""The state of this worker process."""

_LIBRARY = torch.library.Library("moestack", "FRAGMENT")
_LIBRARY.define("route(Tensor topk_weights, Tensor topk_ids, Tensor logits, int layer) -> (Tensor, Tensor)")


def _route(topk_weights: Tensor, topk_ids: Tensor, logits: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    return RANK.route(layer, topk_weights, topk_ids, logits)


def _route_meta(topk_weights: Tensor, topk_ids: Tensor, logits: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(topk_weights), torch.empty_like(topk_ids)


_LIBRARY.impl("route", _route, "CPU")
_LIBRARY.impl("route", _route_meta, "Meta")


def now() -> float:
    """Seconds for measuring a step."""
    return time.perf_counter()
