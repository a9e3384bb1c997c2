"""What the plugin needs of vLLM, checked before anything is hooked: a vLLM that differs is refused, not half-hooked."""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SUPPORTED = "vLLM 0.31 and 0.32"
_ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_SPIN = "vllm.distributed.device_communicators.shm_broadcast:SpinCondition"
_COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator"
_EXPERTS = "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts"


class UnsupportedVllm(RuntimeError):
    """This vLLM is not one that the plugin knows; the message names each symbol, what is expected and what is found."""


@dataclass(frozen=True)
class Parameters:
    """A function's parameters: `names` in order, "*" before those given by name only.

    With `more` others may follow, because the hook passes on what it does not know.
    """

    symbol: str
    names: tuple[str, ...]
    more: bool = False


@dataclass(frozen=True)
class Attributes:
    """Attributes that instances of a class have: properties, methods, or set by its `__init__`."""

    symbol: str
    names: tuple[str, ...]


Need = Parameters | Attributes

ROUTE = ("self", "hidden_states", "router_logits", "indices_type", "*", "input_ids")

ENGINE: tuple[Need, ...] = (
    Parameters("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",), more=True),
    Parameters(
        "vllm.transformers_utils.model_arch_config_convertor:DbrxModelArchConfigConvertor.get_num_experts", ("self",)
    ),
    Parameters("vllm.v1.core.sched.scheduler:Scheduler._preempt_request", ("self", "request"), more=True),
    Attributes(
        "vllm.v1.core.sched.scheduler:Scheduler",
        (
            "max_num_active_reqs", "max_num_scheduled_tokens", "max_num_running_reqs", "running", "waiting",
            "scheduler_config", "kv_cache_manager", "max_model_len", "requests",
        ),
    ),
    Attributes("vllm.v1.engine.core:EngineCore", ("scheduler",)),
    Parameters("vllm.v1.engine.core:EngineCore.preprocess_add_request", ("self", "request")),
    Parameters("vllm.v1.engine.core:EngineCore.add_request", ("self", "request"), more=True),
    Parameters("vllm.v1.engine.core:EngineCore.collective_rpc", ("self", "method"), more=True),
    Parameters(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks", ("self", "request"), more=True
    ),
    Attributes(
        "vllm.v1.request:Request",
        ("cache_salt", "sampling_params", "num_computed_tokens", "block_hashes", "update_block_hashes"),
    ),
)  # fmt: skip
"""Of every vLLM process."""

ENGINE_CPU: tuple[Need, ...] = (
    Attributes(_SPIN, ("busy_loop_s",)),
    Parameters(f"{_SPIN}.wait", ("self", "timeout_ms")),
)

WORKER: tuple[Need, ...] = (
    Parameters("vllm.distributed.parallel_state:get_tp_group", ()),
    Attributes("vllm.distributed.parallel_state:GroupCoordinator", ("cpu_group", "world_size", "rank_in_group")),
    Parameters("vllm.model_executor.models.dbrx:DbrxModel.load_weights", ("self", "weights")),
    Parameters(
        "vllm.model_executor.models.dbrx:DbrxExperts.weight_loader",
        ("self", "param", "loaded_weight", "weight_name", "shard_id"),
        more=True,
    ),
    Parameters(f"{_ROUTER}.__init__", ("self", "top_k", "global_num_experts"), more=True),
    Parameters(f"{_ROUTER}._compute_routing", ROUTE),
    Parameters(f"{_RUNNER}._prepare_inputs", ("self", "scheduler_output", "num_scheduled_tokens"), more=True),
    Parameters(f"{_RUNNER}.execute_model", ("self", "scheduler_output"), more=True),
    Parameters(f"{_RUNNER}.load_model", ("self",), more=True),
    Parameters("vllm.v1.worker.gpu_worker:Worker.load_model", ("self",), more=True),
    Attributes(_RUNNER, ("input_batch", "requests", "get_model")),
    Attributes("vllm.v1.worker.gpu_input_batch:CachedRequestState", ("num_tokens", "sampling_params")),
    Attributes(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        ("num_reqs", "req_ids", "num_computed_tokens_cpu", "num_prompt_tokens"),
    ),
    Attributes(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner",
        ("router", "routed_experts", "layer_name", "do_naive_dispatch_combine"),
    ),
    Attributes(
        "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts",
        ("quant_method", "expert_map", "expert_map_manager", "moe_config"),
    ),
    Attributes(
        "vllm.model_executor.layers.fused_moe.expert_map_manager:ExpertMapManager", ("ep_size", "placement_strategy")
    ),
    Parameters(
        "vllm.model_executor.layers.fused_moe.expert_map_manager:determine_expert_map",
        ("ep_size", "ep_rank", "global_num_experts", "expert_placement_strategy"),
        more=True,
    ),
)  # fmt: skip

WORKER_CPU: tuple[Need, ...] = (
    Attributes(_COMMUNICATOR, ("world_size", "rank_in_group", "device_group")),
    Parameters(f"{_COMMUNICATOR}.all_gatherv", ("self", "input_", "dim", "sizes")),
    Parameters(f"{_COMMUNICATOR}.reduce_scatterv", ("self", "input_", "dim", "sizes")),
    Parameters("vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model", ("self",), more=True),
    Parameters(
        "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding.forward_cpu",
        ("self", "positions", "query", "key"),
    ),
    Parameters(
        f"{_EXPERTS}.apply",
        (
            "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation",
            "global_num_experts", "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2",
            "expert_tokens_meta", "apply_router_weight_on_input",
        ),
    ),
    Attributes(_EXPERTS, ("isa", "w1_bias", "w2_bias", "_use_zentorch")),
    Parameters(
        "vllm._custom_ops:cpu_fused_moe",
        (
            "out", "input", "w13", "w2", "w13_bias", "w2_bias", "topk_weights", "topk_ids", "act", "isa",
            "skip_weighted",
        ),
    ),
)  # fmt: skip

_MOE = "vllm.model_executor.layers.fused_moe"
MOE_SUM = ("self", "input", "output", "topk_ids", "expert_map")

WORKER_GPU: tuple[Need, ...] = (
    Parameters(f"{_ROUTER}._apply_eplb_mapping", ("self", "topk_ids")),
    Parameters(
        f"{_MOE}.router.base_router:eplb_map_to_physical_and_record",
        (
            "topk_ids", "expert_load_view", "logical_to_physical_map", "logical_replica_count", "record_enabled",
            "num_unpadded_tokens",
        ),
    ),
    Parameters(
        f"{_MOE}.modular_kernel:FusedMoEExperts.is_supported_config",
        ("cls", "moe_config", "weight_key", "activation_key", "activation_format"),
    ),
    Attributes(f"{_MOE}.modular_kernel:FusedMoEKernel", ("prepare_finalize", "fused_experts")),
    Attributes(
        f"{_MOE}.config:FusedMoEConfig",
        (
            "pcp_size", "is_lora_enabled", "num_experts", "num_logical_experts",
        ),
    ),
    Parameters(f"{_MOE}.experts.triton_moe:TritonExperts.moe_sum", MOE_SUM),
    Attributes(f"{_MOE}.experts.triton_moe:TritonExperts", ("quantization_emulation", "quant_config", "block_shape")),
    Parameters(f"{_MOE}.experts.marlin_moe:MarlinExperts.moe_sum", MOE_SUM),
    Attributes(f"{_MOE}.experts.marlin_moe:MarlinExperts", ("input_dtype",)),
    Attributes(f"{_MOE}.experts.triton_deep_gemm_moe:TritonOrDeepGemmExperts", ("experts", "fallback_experts")),
    Parameters("vllm._custom_ops:moe_sum", ("input", "output", "topk_ids", "expert_map")),
)  # fmt: skip
"""Of a worker with a GPU whose layers are to be hooked."""

_SECOND = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"

SECOND_RUNNER: tuple[Need, ...] = (
    Parameters(f"{_SECOND}.prepare_inputs", ("self", "scheduler_output", "batch_req_state"), more=True),
    Parameters(f"{_SECOND}.execute_model", ("self", "scheduler_output"), more=True),
    Parameters(f"{_SECOND}.add_requests", ("self", "scheduler_output")),
    Parameters(f"{_SECOND}._remove_request", ("self", "req_id")),
    Parameters(f"{_SECOND}.load_model", ("self",), more=True),
    Attributes(
        _SECOND,
        (
            "req_states", "adaptive_verification", "pcp_manager", "parallel_config", "vllm_config", "max_num_tokens",
            "device", "get_model",
        ),
    ),
    Attributes("vllm.v1.worker.gpu.states:RequestState", ("num_computed_tokens_np", "prompt_len", "prefill_len")),
    Attributes(
        "vllm.v1.worker.gpu.model_runner:BatchReqState", ("req_ids", "num_scheduled_tokens", "idx_mapping_np")
    ),
)  # fmt: skip
"""Of a worker that runs vLLM's second model runner."""


def check(needs: Sequence[Need], version: str) -> None:
    """Raise UnsupportedVllm that lists every need which this vLLM (`version`) does not meet."""
    refuse([text for need in needs for text in differences(need)], version)


def check_parameters(owner: type, name: str, wanted: tuple[str, ...], version: str) -> None:
    """The same for one method of a class that is met while a model is built."""
    need = Parameters(f"{owner.__module__}:{owner.__qualname__}.{name}", wanted)
    refuse(_of_function(need, getattr(owner, name)), version)


def refuse(found: Sequence[str], version: str) -> None:
    """Raise UnsupportedVllm if there is a difference."""
    if found:
        raise UnsupportedVllm(
            f"vLLM {version} is not one that moestack can hook: {'; '.join(found)}. Supported: {SUPPORTED}. "
            "Install that, or set MOESTACK_PLUGIN=0 to run without expert load, capacity and live limits."
        )


def differences(need: Need) -> list[str]:
    """Where the installed vLLM differs from a need, in words; empty where it does not."""
    module, _, path = need.symbol.partition(":")
    try:
        target: Any = importlib.import_module(module)
        for name in path.split("."):
            target = getattr(target, name)
    except (ImportError, AttributeError) as missing:
        return [f"{need.symbol} is missing ({missing})"]
    if isinstance(need, Parameters):
        return _of_function(need, target)
    lacking = [name for name in need.names if not has_attribute(target, name)]
    return [f"{need.symbol} has no attribute {', '.join(lacking)}"] if lacking else []


def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names in order, with "*" before those by name only, and stars on the variable ones."""
    names: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(name.startswith("*") for name in names):
            names.append("*")
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        names.append(("**" if parameter.kind is parameter.VAR_KEYWORD else star) + parameter.name)
    return tuple(names)


def has_attribute(owner: type, name: str) -> bool:
    """Whether instances have it: on the class, or stored on `self` by some `__init__` of its bases."""
    if hasattr(owner, name):
        return True
    for base in owner.__mro__:
        init = inspect.unwrap(base.__dict__.get("__init__", object.__init__))
        code = getattr(init, "__code__", None)
        if code is not None and any(
            step.opname == "STORE_ATTR" and step.argval == name for step in dis.get_instructions(code)
        ):
            return True
    return False


def _of_function(need: Parameters, function: Callable[..., Any]) -> list[str]:
    found = parameters_of(inspect.unwrap(function))
    compared = found[: len(need.names)] if need.more else found
    if compared == need.names:
        return []
    wanted = ", ".join(need.names) + (", ..." if need.more else "")
    return [f"{need.symbol} takes ({', '.join(found)}), expected ({wanted})"]
