"""State of one EP rank: knobs in force, phase and k of each token of the step, counters of each MoE layer.

What a step reads lies in tensors that stay where they are. Begin a step, and change knobs, by writing to them: that
acts at once, without a new trace or capture. The ops below are opaque to the compiler besides.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_core.capacity import GAMMA_SCALE, CapacityRefused, check_gamma
from moe_core.wire import ExpertKnobs, Overflow
from moe_serving.capacity import DECODE, MODES, PADDING, PREFILL
from moe_serving.route import COUNTERS, Layer, route
from moe_serving.scores import UnknownRouting, routing_of

__all__ = ["DECODE", "PADDING", "PREFILL", "RANK", "KnobsRefused", "Layer", "Rank", "now", "on_host"]


class KnobsRefused(ValueError):
    """Knobs that some layer of this rank cannot follow; the message names the knob and the layer."""


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


@dataclass
class Rank:
    """Everything that the hooks of one worker share.

    `phase` and `token_k` [most tokens of a batch] tell each token of the step in its order, and 0 behind it: padding,
    and batches that are nobody's (warm-up, profiling, a rank without work), are never counted.
    """

    layers: list[Layer] = dataclass_field(default_factory=list)
    knobs: ExpertKnobs = dataclass_field(default_factory=ExpertKnobs)
    knobs_version: int = 0
    phase: Tensor = dataclass_field(default_factory=lambda: _zeros(0))
    token_k: Tensor = dataclass_field(default_factory=lambda: _zeros(0))
    overflow: Tensor = dataclass_field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    batch: int = 0
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

    def reserve(self, tokens: int, device: torch.device | None = None) -> None:
        """Room for the longest batch, on the device of the model: before a graph is captured, since addresses stay.

        `moe_serving.gpu.prepare` calls it on a GPU; on a CPU the room grows with the batches.
        """
        device = device or self.phase.device
        if tokens > self.phase.shape[0] or device != self.phase.device:
            longest = max(tokens, self.phase.shape[0])
            phase, token_k = (torch.zeros(longest, dtype=torch.int64, device=device) for _ in range(2))
            phase[: self.phase.shape[0]] = self.phase
            token_k[: self.token_k.shape[0]] = self.token_k
            self.phase, self.token_k = phase, token_k
        self.overflow = self.overflow.to(device)
        for layer in self.layers:
            layer.to(device)

    def begin_step(
        self,
        phase: np.ndarray[Any, np.dtype[np.uint8]],
        generated: int,
        k: np.ndarray[Any, np.dtype[np.int64]] | None = None,
    ) -> None:
        """Phase of each token of the batch that runs next, in its order; and how many tokens the step will yield.

        `k` [T] are experts per token, 0 for the model's own; None: every token takes the model's own.
        """
        self._write(phase, k)
        self.steps += 1
        self.prompt_tokens += int((phase == PREFILL).sum())
        self.generated_tokens += generated

    def end_step(self, seconds: float = 0.0) -> None:
        """The step's batch was sent, and took so long: what runs before the next `begin_step` is nobody's."""
        self._write(np.zeros(0, np.uint8), None)
        self.busy_s += seconds

    def _write(self, phase: np.ndarray[Any, np.dtype[np.uint8]], k: np.ndarray[Any, np.dtype[np.int64]] | None) -> None:
        now, before = len(phase), self.batch
        self._need(now)
        _send(phase, self.phase[:now])
        self.phase[now:before].zero_()
        if k is None:
            self.token_k[: max(now, before)].zero_()
        else:
            _send(k, self.token_k[:now])
            self.token_k[now:before].zero_()
        self.batch = now

    def _need(self, tokens: int) -> None:
        """Room for a batch. Graphs know where the tensors lie, so on a device there is no more than was reserved."""
        if tokens <= self.phase.shape[0]:
            return
        if self.phase.device.type != "cpu":
            raise ValueError(f"a batch of {tokens} tokens, {self.phase.shape[0]} reserved: capture knows no longer one")
        self.reserve(tokens)

    def check(self, knobs: ExpertKnobs) -> None:
        """Raises KnobsRefused if a layer cannot follow, or is none of this model's."""
        known = [layer.index for layer in self.layers]
        for index in knobs.capacity_factor_by_layer or ():
            if index not in known:
                there = f"{min(known)} to {max(known)}" if known else "none"
                raise KnobsRefused(f"experts.capacityFactorByLayer: no MoE layer {index}; there are {there}")
        for layer in self.layers:
            _check_k(layer, knobs)
            _check_capacity(layer, knobs)

    def apply(self, knobs: ExpertKnobs, version: int) -> None:
        """Put knobs in force from the next step on. Raises KnobsRefused and changes nothing if a layer cannot follow.

        A version that is in force already, or an older one, changes nothing; 0 is what a replica boots with.
        `knobs.per_token` is k by tier; which tier a token has is said by `begin_step`.
        """
        if version <= self.knobs_version and version > 0:
            return
        self.check(knobs)
        self.overflow.fill_(MODES[knobs.overflow])
        for layer in self.layers:
            gammas = knobs.factors(layer.index)
            micro = [0 if gamma is None else int(gamma * GAMMA_SCALE) for gamma in (gammas.prefill, gammas.decode)]
            layer.gamma_micro.copy_(torch.tensor(micro))
        self.knobs = knobs
        self.knobs_version = version

    def route(self, index: int, topk_weights: Tensor, topk_ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Count what the router asked for, and hold capacity. Shapes [T, K], [T, K], [T, E]; returns new tensors."""
        layer = self.layers[index]
        tokens = topk_ids.shape[0]
        eager = topk_ids.device.type == "cpu"
        # Warm-up and profiling runs, steps of a data-parallel rank without work, and rows of other ranks.
        if layer.bypassed or (eager and not self.batch):
            return topk_weights.clone(), topk_ids.clone()
        first = layer.part * tokens if layer.parts > 1 else 0
        self._need(first + tokens)
        phase, token_k = self.phase[first : first + tokens], self.token_k[first : first + tokens]
        out_weights, out_ids = route(
            layer, phase, token_k, self.overflow, topk_weights, topk_ids, logits, early_out=eager
        )
        if self.recorder is not None and eager:  # a captured graph would record its capture alone
            real = max(0, min(tokens, self.batch - first))
            self.recorder.append(
                {
                    "step": self.steps,
                    "layer": index,
                    "phase": phase[:real].to(torch.uint8),
                    "k": token_k[:real].clone(),
                    "logits": logits[:real].float().clone(),
                    "ids": topk_ids[:real].clone(),
                    "weights": topk_weights[:real].clone(),
                    "out_ids": out_ids[:real].clone(),
                    "out_weights": out_weights[:real].clone(),
                }
            )
        return out_weights, out_ids


def _send(values: np.ndarray[Any, Any], into: Tensor) -> None:
    """Copy to where `into` lies, in the order of its stream; through pinned memory, so that nobody waits for it."""
    source = torch.from_numpy(values)
    if into.device.type == "cuda":
        source = source.to(into.dtype).pin_memory()
    into.copy_(source, non_blocking=True)


def on_host(layers: list[Layer]) -> list[dict[str, Tensor]]:
    """Counters by name of each layer, in the CPU's memory."""
    if not layers or layers[0].demand.device.type == "cpu":
        return [{name: getattr(layer, name) for name in COUNTERS} for layer in layers]
    return fetched(layers)


def fetched(layers: list[Layer]) -> list[dict[str, Tensor]]:
    """The same in two transfers, however many layers: each one waits for the device."""
    found: list[dict[str, Tensor]] = [{} for _ in layers]
    for dtype in (torch.int64, torch.float64):
        wanted = [(at, name, getattr(layer, name)) for at, layer in enumerate(layers) for name in COUNTERS]
        wanted = [item for item in wanted if item[2].dtype == dtype]
        together = torch.cat([part.reshape(-1) for _, _, part in wanted]).cpu()
        values = together.split([part.numel() for _, _, part in wanted])
        for (at, name, part), value in zip(wanted, values, strict=True):
            found[at][name] = value.view(part.shape)
    return found


def _check_k(layer: Layer, knobs: ExpertKnobs) -> None:
    for tier, k in knobs.per_token.items():
        if not 1 <= k <= layer.top_k:
            raise KnobsRefused(
                f"experts.perToken: {k} for tier {tier}; layer {layer.name} has 1 to {layer.top_k} experts per token"
            )
        if k < layer.top_k:
            _check_follows(layer, "experts.perToken")


def _check_capacity(layer: Layer, knobs: ExpertKnobs) -> None:
    if knobs.overflow is Overflow.UNLIMITED:
        return
    _check_follows(layer, "experts.overflow")
    fewest = min((layer.top_k, *knobs.per_token.values()))
    own = layer.index in (knobs.capacity_factor_by_layer or ())
    knob = f"experts.capacityFactorByLayer[{layer.index}]" if own else "experts.capacityFactor"
    gammas = knobs.factors(layer.index)
    for name, gamma in (("prefill", gammas.prefill), ("decode", gammas.decode)):
        try:
            check_gamma(gamma, fewest)
        except CapacityRefused as refused:
            raise KnobsRefused(f"{knob}.{name}: {refused}") from None


def _check_follows(layer: Layer, knob: str) -> None:
    if layer.bypassed:
        raise KnobsRefused(f"{knob}: layer {layer.name} bypasses the router ({layer.bypassed})")
    if layer.routing is None:
        raise KnobsRefused(f"{knob}: layer {layer.name} is counted only ({layer.why_unknown})")


RANK = Rank()
"""The state of this worker process."""

_LIBRARY = torch.library.Library("moestack", "FRAGMENT")
_LIBRARY.define("route(Tensor topk_weights, Tensor topk_ids, Tensor logits, int layer) -> (Tensor, Tensor)")


def _route(topk_weights: Tensor, topk_ids: Tensor, logits: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    return RANK.route(layer, topk_weights, topk_ids, logits)


def _route_meta(topk_weights: Tensor, topk_ids: Tensor, logits: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(topk_weights), torch.empty_like(topk_ids)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("route", _route, _device)
_LIBRARY.impl("route", _route_meta, "Meta")


def now() -> float:
    """Seconds for measuring a step."""
    return time.perf_counter()
