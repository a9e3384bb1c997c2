"""Layers on a GPU: which may be hooked there, what is left of them in a captured graph, and EPLB's view of demand.

Everything here was read in vLLM 0.32 and tried without a device; on a device it was never run. So it is off unless
`MOESTACK_GPU` asks for it, before the engine starts, because a captured graph cannot grow hooks later:

off (default)  layers on a GPU are left as stock vLLM has them, reported as bypassed, and capacity is refused
count          expert load is counted inside the graphs; capacity is refused
capacity       capacity too, where the layer's kernel is known to leave out a dropped slot; kernels that route by
               themselves (monolithic) are ruled out where vLLM has another

What of a layer's kernel makes it fit is said at `unable`, and what of a deployment hides the batch at `hidden`;
`moe_serving.parallel` knows the parallel forms.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from moe_core.log import get_log
from moe_serving.plugin import wrap_once

log = get_log("gpu")
ENV = "MOESTACK_GPU"
PARTS_OF_PROMPTS = "prefill context parallel: its router sees a part of each prompt"
REMEDY = "engine.extraArgs moe-backend=triton (deep_gemm, marlin) asks for one that does, where it fits"
COST = "what the other kernel costs is unknown until benchmarks/capacity.py measures it on the device"


class Mode(StrEnum):
    """What is hooked of layers on a GPU."""

    OFF = "off"
    COUNT = "count"
    CAPACITY = "capacity"


def mode() -> Mode:
    """As the environment of this process has it. Raises ValueError that names the variable."""
    asked = os.environ.get(ENV, Mode.OFF)
    try:
        return Mode(asked)
    except ValueError:
        raise ValueError(f"{ENV}={asked}: it takes {', '.join(Mode)}") from None


REFUSED = {
    Mode.OFF: f"layers on a GPU are left as they are; {ENV}=capacity hooks them (read and tried, never run on one)",
    Mode.COUNT: f"{ENV}=count asks for counting only; {ENV}=capacity before the engine starts allows it",
}

_FAMILY = "vllm.model_executor.layers.fused_moe"
_TRITON, _MARLIN = f"{_FAMILY}.experts.triton_moe:TritonExperts", f"{_FAMILY}.experts.marlin_moe:MarlinExperts"
_DEEP_GEMM = f"{_FAMILY}.experts.deep_gemm_moe:DeepGemmExperts"
_EITHER = f"{_FAMILY}.experts.triton_deep_gemm_moe:TritonOrDeepGemmExperts"
_DISPATCHES = {
    f"{_FAMILY}.prepare_finalize.no_dp_ep:MoEPrepareAndFinalizeNoDPEPModular",
    f"{_FAMILY}.prepare_finalize.naive_dp_ep:MoEPrepareAndFinalizeNaiveDPEPModular",
}

ruled_out: dict[str, str] = {}
"""Monolithic kernels that `force_modular` kept from this process's layers: class → what was said about it."""

_never: dict[torch.device, Tensor] = {}
"""By device, a flag that stays false: EPLB's "record" of ids that are only mapped."""


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def unable(experts: Any) -> str:
    """Why a layer's kernel may not be given a dropped slot (expert -1 in a row that has others); "" if it may.

    `experts` is vLLM's RoutedExperts. Known to leave such a slot out, work and sum: Triton and Marlin, whose alignment
    sorts negative ids away and whose sum skips them (`sum_present` sees to it without expert parallelism too), and
    DeepGEMM, whose scatter and gather pass them by; each with tokens left in place or gathered with their ids.
    """
    kernel = getattr(experts.quant_method, "moe_kernel", None)
    if kernel is None:
        return f"{type(experts.quant_method).__name__} runs a kernel of its own, not known to leave out dropped slots"
    if _kind(kernel.prepare_finalize) not in _DISPATCHES:
        return f"dispatch {type(kernel.prepare_finalize).__name__} is not known to leave out dropped slots"
    if experts.moe_config.is_lora_enabled:
        return "LoRA aligns all slots itself, dropped ones too"
    chosen = kernel.fused_experts
    parts = (chosen.experts, chosen.fallback_experts) if _kind(chosen) == _EITHER else (chosen,)
    for part in parts:
        if _kind(part) not in (_TRITON, _MARLIN, _DEEP_GEMM):
            return f"kernel {type(part).__name__} is not known to leave out dropped slots; {REMEDY}"
        if _kind(part) == _TRITON and _one_scale(part):
            return "kernel TritonExperts with one activation scale for all rows reads those of dropped slots too"
        if _kind(part) == _MARLIN and part.input_dtype is not None:
            return "kernel MarlinExperts with quantised activations is not known to leave out dropped slots"
    return ""


def _one_scale(triton: Any) -> bool:
    """Whether the second GEMM's activations are scaled by the largest of all rows, unwritten ones among them."""
    quant = triton.quant_config
    by_row = triton.per_act_token_quant and not triton.quantization_emulation
    return quant.quant_dtype is not None and quant.a2_scale is None and triton.block_shape is None and not by_row


def describe(layer: Any, experts: Any) -> None:
    """Note on a rank's `layer` whether it is hooked, counted only or bypassed, and why. `experts` may be None."""
    from vllm.platforms import current_platform

    asked = mode()
    if asked is Mode.OFF:
        layer.bypassed = REFUSED[Mode.OFF]
    elif not current_platform.is_cuda():
        layer.bypassed = f"no kernel for {current_platform.device_name} was read for dropped slots"
    elif experts is None:
        layer.bypassed = layer.bypassed or "no experts of vLLM's modular kind behind its router"
    elif experts.moe_config.pcp_size > 1:
        layer.bypassed = layer.bypassed or PARTS_OF_PROMPTS
    if layer.bypassed:
        return
    if asked is Mode.COUNT:
        why = REFUSED[Mode.COUNT]
    elif experts.moe_config.num_experts != experts.moe_config.num_logical_experts:
        why = "redundant experts: a capacity for each replica is not built"
    else:
        why = unable(experts)
    if why:
        layer.routing, layer.why_unknown = None, layer.why_unknown or why


def hidden(runner: Any) -> str:
    """Why a hooked model runner's batches are still not known by token; "" if they are."""
    if runner.parallel_config.use_ubatching:
        return "dual batch overlap: a router sees half a batch"
    if getattr(runner, "adaptive_verification", None) is not None:
        return "adaptive verification: drafts are shared out on the device"
    if getattr(runner, "pcp_manager", None) is not None:
        return PARTS_OF_PROMPTS
    return ""


def longest_batch(runner: Any) -> int:
    """Tokens of the longest batch that a runner will run, padding to captured sizes and to even parts included."""
    sizes = runner.vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    return max(int(runner.max_num_tokens), *map(int, sizes)) + int(runner.parallel_config.tensor_parallel_size) - 1


def prepare(rank: Any, runner: Any) -> None:
    """Put a rank's tensors on the runner's device: after the model is loaded, before anything is captured."""
    device = torch.device(runner.device)
    rank.reserve(longest_batch(runner), device)
    _never.setdefault(rank.phase.device, torch.zeros((), dtype=torch.bool, device=device))


def force_modular() -> None:
    """Rule out kernels that route by themselves, by saying to vLLM's choice of kernel that they do not fit.

    The choice then takes the next kernel of its list. Where the list has none the engine does not start, and says so.
    """
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    original = FusedMoEExperts.is_supported_config
    if getattr(original, "_moestack_hooked", False):
        return

    def is_supported_config(cls: Any, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        if not cls.is_monolithic():
            answer: tuple[bool, str | None] = original(cls, *args, **kwargs)
            return answer
        fits, reason = original(cls, *args, **kwargs)
        if fits and cls.__name__ not in ruled_out:
            ruled_out[cls.__name__] = COST
            log.warning(
                "a kernel that routes by itself is ruled out for expert capacity", kernel=cls.__name__, cost=COST
            )
        return False, reason or f"expert capacity: it routes by itself ({ENV}={Mode.CAPACITY})"

    is_supported_config.__wrapped__ = original  # type: ignore[attr-defined]
    is_supported_config._moestack_hooked = True  # type: ignore[attr-defined]
    FusedMoEExperts.is_supported_config = staticmethod(is_supported_config)


def install(asked: Mode) -> None:
    """Hook what only a GPU has. Signatures were checked by the caller."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    if asked is not Mode.CAPACITY:
        return
    force_modular()
    wrap_once(BaseRouter, "_apply_eplb_mapping", record_demand)
    for kernel in (TritonExperts, MarlinExperts):
        wrap_once(kernel, "moe_sum", sum_present)


def record_demand(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap the router's step that maps logical to physical experts and records load for EPLB's planning.

    It records what the router asked for and maps what capacity left of it: planning from the latter would see no
    skew. The hook before it leaves the demand in `_moestack_demand`.
    """

    def apply_eplb_mapping(self: Any, topk_ids: Tensor) -> Tensor:
        demand, self._moestack_demand = getattr(self, "_moestack_demand", None), None
        if demand is None or self.eplb_state is None:
            return original(self, topk_ids)
        from vllm.model_executor.layers.fused_moe.router import base_router

        original(self, demand)
        state = self.eplb_state
        mapped: Tensor = base_router.eplb_map_to_physical_and_record(
            topk_ids=topk_ids,
            expert_load_view=state.expert_load_view,
            logical_to_physical_map=state.logical_to_physical_map,
            logical_replica_count=state.logical_replica_count,
            record_enabled=_never[topk_ids.device],
            num_unpadded_tokens=None,
        )
        return mapped

    return apply_eplb_mapping


def sum_present(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap a kernel's sum over a token's experts, so that rows which nothing was written to are left out.

    vLLM leaves them out under expert parallelism, where ids of other ranks are such rows; without it every row counts.
    """

    def moe_sum(
        self: Any, input: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None
    ) -> None:
        if topk_ids is None or expert_map is not None:
            original(self, input, output, topk_ids, expert_map)
            return
        from vllm import _custom_ops

        _custom_ops.moe_sum(input, output, topk_ids, None)

    return moe_sum


class StepClock:
    """Seconds of steps that a device runs later than the host sends them: told once they are over, never waited for.

    `mark` makes and records an event of the device.
    """

    def __init__(self, mark: Callable[[], Any]) -> None:
        self._mark = mark
        self._began: Any = None
        self._running: deque[tuple[Any, Any, Callable[[float], None]]] = deque()

    def begin(self) -> None:
        self._began = self._mark()

    def end(self, tell: Callable[[float], None]) -> None:
        """`tell` is called with the step's seconds, by a later call of this method."""
        self._running.append((self._began, self._mark(), tell))
        while self._running and self._running[0][1].query():
            began, ended, told = self._running.popleft()
            told(began.elapsed_time(ended) / 1e3)


def cuda_mark() -> Any:
    """An event of the current stream, recorded now."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
