"""The worker's side: hooks that are installed when a vLLM worker imports this module, and calls that it answers.

`WorkerExtension` is mixed into vLLM's worker class (`worker_extension_cls`); its methods are reached by collective_rpc,
which every rank of an engine runs at the same point between two steps.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.models.dbrx import DbrxExperts, DbrxModel
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from moe_core.wire import ExpertKnobs
from moe_serving import gpu, hooks, second_runner
from moe_serving.agreement import Proposal, everyone, objection
from moe_serving.batch import step_of
from moe_serving.mends import find_dbrx_experts, lend_gatherv, load_own_dbrx_experts, rotate_by_head
from moe_serving.parallel import note_form
from moe_serving.plugin import enabled, wrap_once, wrapped
from moe_serving.rank import RANK, now, on_host
from moe_serving.shapes import METER, kv_groups, shapes


def install() -> None:
    """Hook routers, the model runner and, on a CPU, the experts; on a GPU what is asked for there (moe_serving.gpu).

    Raises UnsupportedVllm before it hooks anything.
    """
    asked = gpu.mode()
    needs = hooks.WORKER_CPU if current_platform.is_cpu() else () if asked is gpu.Mode.OFF else hooks.WORKER_GPU
    hooks.check(hooks.WORKER + needs, vllm.__version__)
    wrap_once(DbrxModel, "load_weights", find_dbrx_experts)
    wrap_once(DbrxExperts, "weight_loader", load_own_dbrx_experts)
    wrap_once(BaseRouter, "__init__", _register_router)
    wrap_once(GPUModelRunner, "_prepare_inputs", _note_phases)
    wrap_once(GPUModelRunner, "execute_model", _time_step)
    wrap_once(Worker, "load_model", _make_ready)
    if not current_platform.is_cpu():
        wrap_once(GPUModelRunner, "load_model", _number_after_load)
        gpu.install(asked)
    else:
        from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        from moe_serving.cpu_experts import hooked_apply

        lend_gatherv(CpuCommunicator, DeviceCommunicatorBase)

        wrap_once(CPUModelRunner, "load_model", _number_after_load)
        wrap_once(CPUUnquantizedExperts, "apply", hooked_apply)
        wrap_once(RotaryEmbedding, "forward_cpu", rotate_by_head)


def _register_router(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._moestack_layer = -1  # numbered at its first use, when every attribute of the subclass is set
        hooks.check_parameters(type(self), "_compute_routing", hooks.ROUTE, vllm.__version__)
        wrap_once(type(self), "_compute_routing", _count_and_cap)

    return init


def _count_and_cap(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_routing(
        self: Any, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
    ) -> Any:
        topk_weights, topk_ids = original(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        if self._moestack_layer < 0:
            return topk_weights, topk_ids
        if topk_ids.device.type != "cpu":
            layer = RANK.layers[self._moestack_layer]
            if layer.bypassed:
                return topk_weights, topk_ids
            self._moestack_demand = topk_ids if layer.routing is not None else None
        return torch.ops.moestack.route(topk_weights, topk_ids, router_logits, self._moestack_layer)

    return compute_routing


def number_layers(model: Any, bypassed: str = "") -> None:
    """Number the model's MoE layers and note which are bypassed by a kernel that routes by itself.

    `bypassed` says why all of them are, where the engine's steps are not seen.
    """
    for path, module in model.named_modules():
        router, experts = getattr(module, "router", None), getattr(module, "routed_experts", None)
        name = getattr(module, "layer_name", path)
        if isinstance(router, BaseRouter):
            if router._moestack_layer >= 0:
                continue
            router._moestack_layer = RANK.add_layer(router)
            layer = RANK.layers[router._moestack_layer]
        elif experts is not None and all(layer.name != name for layer in RANK.layers):
            layer = RANK.layers[RANK.add_layer(_Unrouted(experts.moe_config))]
            layer.bypassed = f"router class {type(router).__name__} computes no routing of its own"
        else:
            continue
        number = re.search(r"\.(\d+)\.", name)
        layer.name = name
        layer.index = int(number.group(1)) if number else layer.index
        if experts is not None and experts.quant_method.is_monolithic:
            layer.bypassed = f"monolithic kernel of {type(experts.quant_method).__name__}"
        if not current_platform.is_cpu():
            gpu.describe(layer, experts)
        elif experts is not None and not layer.bypassed and (unable := _keeps_dropped_slots(experts.quant_method)):
            layer.routing, layer.why_unknown = None, unable
        note_form(layer, module)
        layer.bypassed = bypassed or layer.bypassed


class _Unrouted:
    """Shape of a layer that has no router of vLLM's modular kind."""

    def __init__(self, config: Any) -> None:
        self.global_num_experts, self.top_k = int(config.num_experts), int(config.experts_per_token)


def _keeps_dropped_slots(quant_method: Any) -> str:
    """Why a layer's CPU kernel would not leave out a dropped slot (expert -1); empty where ours runs."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = getattr(getattr(quant_method, "moe_kernel", None), "fused_experts", quant_method)
    if not isinstance(kernel, CPUUnquantizedExperts):
        return f"kernel {type(kernel).__name__} takes no dropped slots"
    return "zentorch's kernel takes no dropped slots" if kernel._use_zentorch else ""


def number_missed(worker: Any) -> None:
    """Name as bypassed what loading did not number: an engine whose model runner, or whose experts, are not hooked."""
    runner = worker.model_runner
    if not wrapped(getattr(type(runner), "execute_model", None)):
        kind = f"{type(runner).__module__}.{type(runner).__qualname__}"
        number_layers(
            worker.get_model(), f"model runner {kind} is not hooked; VLLM_USE_V2_MODEL_RUNNER=0 selects one that is"
        )
    elif not current_platform.is_cpu() and (why := gpu.hidden(runner)):
        for layer in RANK.layers:
            layer.bypassed = layer.bypassed or why
    config = worker.model_config
    if not RANK.layers and config.get_num_experts() > 0:
        shape = SimpleNamespace(
            num_experts=config.get_num_experts(), experts_per_token=config.get_num_experts_per_tok() or 1
        )
        layer = RANK.layers[RANK.add_layer(_Unrouted(shape))]
        layer.bypassed = f"no layer of {type(worker.get_model()).__name__} passes vLLM's routers"


def _note_phases(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        count = batch.num_reqs
        step = step_of(
            batch.num_computed_tokens_cpu[:count],
            batch.num_prompt_tokens[:count],
            num_scheduled_tokens[:count],
            [self.requests[name] for name in batch.req_ids[:count]],
            RANK.knobs.per_token,
        )
        RANK.begin_step(step.phase, step.generated, step.k)
        return original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)

    return prepare_inputs


def _time_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        started, steps, prompt_tokens = now(), RANK.steps, RANK.prompt_tokens
        if CLOCK is not None:
            CLOCK.begin()
        try:
            return original(self, *args, **kwargs)
        finally:
            seconds = now() - started
            scheduled = args[0] if args else kwargs["scheduler_output"]
            tell = partial(_note_step, scheduled, RANK.steps > steps, RANK.prompt_tokens > prompt_tokens)
            RANK.end_step()
            if CLOCK is None:
                tell(seconds)
            else:
                CLOCK.end(tell)

    return execute_model


def _note_step(scheduled: Any, counts: bool, prefill: bool, seconds: float) -> None:
    RANK.busy_s += seconds
    if counts:
        METER.note(scheduled, seconds, prefill=prefill)


CLOCK = gpu.StepClock(gpu.cuda_mark) if current_platform.is_cuda() else None
"""A device runs a step after the call that sends it."""


class WorkerExtension:
    """Calls that a vLLM worker answers for us."""

    def moestack_start(self: Any) -> list[dict[str, Any]]:
        """What this rank has: MoE layers, hooked or bypassed."""
        number_missed(self)
        return [
            {
                "layer": layer.index,
                "name": layer.name,
                "experts": layer.experts,
                "top_k": layer.top_k,
                "hooked": not layer.bypassed,
                "why": layer.bypassed or layer.why_unknown,
                "ruled_out": dict(gpu.ruled_out),
            }
            for layer in RANK.layers
        ]

    def moestack_shapes(self: Any) -> dict[str, Any]:
        """Parameters and bytes of this rank's model by part. From here on the cache's reads are counted too."""
        METER.kv = kv_groups(self.model_runner.kv_cache_config)
        return shapes(self.get_model(), RANK.layers)

    def moestack_apply(self: Any, knobs: str, version: int) -> dict[str, Any]:
        """Put expert knobs (JSON) in force, on all ranks that route the same tokens or on none; answers with what is in
        force then, and an error where it was refused."""
        error, wanted = None, ExpertKnobs()
        number_missed(self)
        try:
            wanted = ExpertKnobs.model_validate_json(knobs)
            if version > RANK.knobs_version or version == 0:
                RANK.check(wanted)
        except ValueError as refused:
            error = str(refused)
        group = get_tp_group()
        proposal = Proposal(int(self.rank), version, knobs, RANK.knobs_version, error)
        error = objection(everyone(proposal, group.cpu_group, group.world_size))
        if error is None:
            RANK.apply(wanted, version)
        return {
            "rank": int(self.rank),
            "version": RANK.knobs_version,
            "knobs": RANK.knobs.model_dump_json(by_alias=True, exclude_none=True),
            "step": RANK.steps,
            "at_s": time.time(),
            "error": error,
        }

    def moestack_read(self: Any, new_window: bool) -> dict[str, Any]:
        """Counters of this rank. With `new_window` the window's maxima begin anew."""
        layers = []
        for layer, counters in zip(RANK.layers, on_host(RANK.layers), strict=True):
            layers.append(
                {
                    "layer": layer.index,
                    "hooked": not layer.bypassed,
                    "demand": counters["demand"].tolist(),
                    "assigned": counters["assigned"].tolist(),
                    "mine": None if layer.owner is None else torch.nonzero(layer.owner).squeeze(1).tolist(),
                    "places": layer.places,
                    "split": layer.parts > 1,
                    "tokens": int(counters["tokens"]),
                    "dropped": int(counters["dropped"]),
                    "rerouted": int(counters["rerouted"]),
                    "overflow_kept": int(counters["overflow_kept"]),
                    "lost_gate_mass": float(counters["lost_gate_mass"]),
                    "max_prefill_load": int(counters["max_prefill_load"]),
                    "touched": int(counters["touched"]),
                }
            )
            if new_window:
                layer.max_prefill_load.zero_()
        return {
            "rank": int(self.rank),
            "knobs": RANK.knobs.model_dump_json(by_alias=True, exclude_none=True),
            "version": RANK.knobs_version,
            "steps": RANK.steps,
            "prompt_tokens": RANK.prompt_tokens,
            "generated_tokens": RANK.generated_tokens,
            "busy_s": RANK.busy_s,
            "moe_s": RANK.moe_s,
            "work": METER.read(),
            "layers": layers,
        }

    def moestack_record(self: Any, steps: int, path: str | None = None) -> int:
        """Keep the routing of the last `steps` layer calls (0 ends it); with `path`, save them there by torch.save."""
        kept = 0 if RANK.recorder is None else len(RANK.recorder)
        if path is not None and RANK.recorder is not None:
            torch.save(list(RANK.recorder), f"{path}.rank{int(self.rank)}.pt")
        RANK.recorder = deque(maxlen=steps) if steps else None
        return kept


def _make_ready(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the worker's loading: its model runner exists by then, and nothing was profiled or captured yet."""

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        second_runner.hook(type(self.model_runner), _time_step, _number_after_load)
        result = original(self, *args, **kwargs)
        # Behind vLLM's own loading, whose allocations may go to a pool that sleeping throws away.
        if current_platform.is_cuda() and gpu.mode() is not gpu.Mode.OFF:
            gpu.prepare(RANK, self.model_runner)
        return result

    return load_model


def _number_after_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        number_layers(self.get_model())
        return result

    return load_model


if enabled():
    install()
