"""Entry point of `vllm.general_plugins`: runs in every vLLM process and installs what belongs there.

Kept light, because it runs in processes that serve HTTP too: hooks of workers are installed when the worker
imports its extension class (`moe_serving.worker`). `MOESTACK_PLUGIN=0` leaves vLLM as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

WORKER_EXTENSION = "moe_serving.worker.WorkerExtension"
_MARK = "_moestack_hooked"

HOOKS_FORMAT = 1
"""Part of the key of vLLM's compile cache: raise it when an operator or a hook changes. Without it a graph compiled
without the plugin would be taken for one with it, and nothing would be counted or capped."""

CPU_SPIN_S = 0.002
"""How long a process spins for the next message before it sleeps. vLLM's own second is right beside a GPU; on a CPU
the spinning ranks take the cores that the HTTP side and the next step need, for ever under a digest each second."""

CPU_RECHECK_MS = 20
"""How long it sleeps before it looks again. A wake-up can be lost when messages follow one another closely (the
notifying socket holds one at most); vLLM looks again after 5 s, which a stream would see as a stall."""


def enabled() -> bool:
    """False when `MOESTACK_PLUGIN=0` asks for a stock vLLM."""
    return os.environ.get("MOESTACK_PLUGIN", "1") != "0"


def register() -> None:
    """Install the hooks of this process once."""
    if not enabled():
        return
    import vllm
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.transformers_utils.model_arch_config_convertor import DbrxModelArchConfigConvertor
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    from moe_serving import engine_core, hooks, mends, tiers

    hooks.check(hooks.ENGINE + (hooks.ENGINE_CPU if current_platform.is_cpu() else ()), vllm.__version__)
    wrap_once(EngineArgs, "create_engine_config", _with_worker_extension)
    wrap_once(DbrxModelArchConfigConvertor, "get_num_experts", mends.count_dbrx_experts)
    if current_platform.is_cpu():
        wrap_once(SpinCondition, "__init__", _spin_briefly)
        wrap_once(SpinCondition, "wait", _recheck_often)
    wrap_once(Scheduler, "_preempt_request", engine_core.count_preemptions)
    wrap_once(EngineCore, "preprocess_add_request", tiers.salt_request)
    wrap_once(EngineCore, "add_request", tiers.settle_new)
    wrap_once(EngineCore, "collective_rpc", tiers.follow_knobs)
    # vLLM 0.31 has a second one of its own for models with several kinds of KV cache.
    wrap_each(KVCacheCoordinator, "cache_blocks", tiers.cache_unless_straddling)
    for name in engine_core.UTILITIES:
        if not hasattr(EngineCore, name):
            setattr(EngineCore, name, getattr(engine_core, name))


def wrap_once(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` by `make(owner.name)`, unless that was done before.

    Raises AttributeError where `owner` has no such method: this vLLM is not one that the plugin knows.
    """
    original = getattr(owner, name)
    if wrapped(original):
        return
    ours = make(original)
    ours.__wrapped__ = original  # type: ignore[attr-defined]  # so that its own signature can still be read
    setattr(ours, _MARK, True)
    setattr(owner, name, ours)


def wrapped(method: Any) -> bool:
    """Whether a method is one of ours."""
    return bool(getattr(method, _MARK, False))


def wrap_each(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """The same for `owner.name` and for that of each subclass, known so far, which has one of its own."""
    wrap_once(owner, name, make)
    heirs: list[type] = owner.__subclasses__()
    for heir in heirs:
        wrap_each(heir, name, make)


def _with_worker_extension(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.worker_extension_cls:
            self.worker_extension_cls = WORKER_EXTENSION
        if isinstance(self.additional_config, dict):
            self.additional_config = {**self.additional_config, "moestack": HOOKS_FORMAT}
        return original(self, *args, **kwargs)

    return create_engine_config


def _spin_briefly(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.busy_loop_s = min(self.busy_loop_s, CPU_SPIN_S)

    return init


def _recheck_often(original: Callable[..., None]) -> Callable[..., None]:
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        original(self, CPU_RECHECK_MS if timeout_ms is None else min(timeout_ms, CPU_RECHECK_MS))

    return wait
