"""vLLM's second model runner (vllm.v1.worker.gpu.model_runner): what a step's batch is, read as its inputs are made.

It is vLLM's default where Triton is, and has a subclass for CPUs. Its dummy batches (profiling, warm-up, a rank without
work) and its captures never make inputs of requests, so they begin no step and are never counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import vllm

from moe_core.log import get_log
from moe_serving import hooks
from moe_serving.batch import Step, step_of
from moe_serving.plugin import wrap_once
from moe_serving.rank import RANK

log = get_log("second runner")
_MODULE = "vllm.v1.worker.gpu.model_runner"
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Held(NamedTuple):
    """What `step_of` reads of a request: the tokens that it has, and its parameters."""

    num_tokens: int
    sampling_params: Any


def hook(kind: type, time_step: Wrap, number_after_load: Wrap) -> None:
    """Hook the class of a worker's model runner if it is the second one, or its heir, as the hooks know it.

    Else nothing: its layers are then reported as bypassed, with the first runner as remedy.
    """
    runner = next((base for base in kind.__mro__ if base.__module__ == _MODULE), None)
    if runner is None:
        return
    if found := [text for need in hooks.SECOND_RUNNER for text in hooks.differences(need)]:
        log.warning("vLLM's second model runner is not hooked", version=vllm.__version__, differs=found)
        return
    wrap_once(runner, "add_requests", _keep_parameters)
    wrap_once(runner, "_remove_request", _drop_parameters)
    wrap_once(runner, "prepare_inputs", _note_phases)
    wrap_once(runner, "execute_model", time_step)
    wrap_once(runner, "load_model", number_after_load)


def step_of_batch(runner: Any, batch: Any) -> Step:
    """Phase and k of each token of a BatchReqState, in its order: decode first, then prompts by length.

    A request computed again after it was pushed out of the KV cache has more tokens than its prompt, and yields one
    when it has run them all: `prefill_len` is what it has until then.
    """
    states, index = runner.req_states, batch.idx_mapping_np
    parameters = _parameters(runner)
    have = states.prefill_len.np[index]
    return step_of(
        states.num_computed_tokens_np[index],
        states.prompt_len.np[index],
        batch.num_scheduled_tokens,
        [Held(int(tokens), parameters.get(name)) for name, tokens in zip(batch.req_ids, have, strict=True)],
        RANK.knobs.per_token,
    )


def _parameters(runner: Any) -> dict[str, Any]:
    """Sampling parameters by request: this runner keeps what its sampler needs, and nothing of a tier."""
    kept: dict[str, Any] = vars(runner).setdefault("_moestack_parameters", {})
    return kept


def _keep_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_requests(self: Any, scheduler_output: Any) -> Any:
        answer = original(self, scheduler_output)  # drops what a request of the same name had
        kept = _parameters(self)
        for request in scheduler_output.scheduled_new_reqs:
            kept[request.req_id] = request.sampling_params
        return answer

    return add_requests


def _drop_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    def remove_request(self: Any, req_id: str) -> Any:
        _parameters(self).pop(req_id, None)
        return original(self, req_id)

    return remove_request


def _note_phases(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, scheduler_output: Any, batch_req_state: Any, *args: Any, **kwargs: Any) -> Any:
        # Both change which token lies where on the device, after this point: such batches stay unknown.
        if self.adaptive_verification is None and self.pcp_manager is None:
            step = step_of_batch(self, batch_req_state)
            RANK.begin_step(step.phase, step.generated, step.k)
        return original(self, scheduler_output, batch_req_state, *args, **kwargs)

    return prepare_inputs
