"""vLLM's second model runner, its own batch code on doctored state: phases, tokens that a step yields, k by tier.

`tests/engine/test_engine_second_runner.py` runs the whole of it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_core.wire import ExpertKnobs
from moe_serving import hooks

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from moe_serving import second_runner  # noqa: E402
from moe_serving.capacity import DECODE, PREFILL  # noqa: E402
from moe_serving.rank import Rank  # noqa: E402


def passing(original: Any) -> Any:
    """A wrap that adds nothing."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return call


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's class, hooked, with a stub for what prepares inputs on a device; all put back afterwards."""
    from vllm.v1.worker.gpu import model_runner

    runner = model_runner.GPUModelRunner
    for name in ("add_requests", "_remove_request", "execute_model", "load_model"):
        monkeypatch.setattr(runner, name, getattr(runner, name))

    def prepare_inputs(
        self: Any, scheduler_output: Any, batch_req_state: Any, batch_desc: Any, num_active_loras: Any
    ) -> Any:
        return "inputs"

    def add_requests(self: Any, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            self._remove_request(request.req_id)

    def remove_request(self: Any, req_id: str) -> bool:
        return True

    monkeypatch.setattr(runner, "prepare_inputs", prepare_inputs)
    monkeypatch.setattr(runner, "add_requests", add_requests)
    monkeypatch.setattr(runner, "_remove_request", remove_request)
    second_runner.hook(type("Heir", (runner,), {}), passing, passing)
    return runner


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    alone = Rank()
    monkeypatch.setattr(second_runner, "RANK", alone)
    return alone


def test_the_installed_vllm_has_what_the_hooks_need() -> None:
    import vllm

    hooks.check((*hooks.SECOND_RUNNER, *hooks.WORKER_GPU), vllm.__version__)


def test_another_runner_is_left_alone() -> None:
    class Other:
        """A model runner of somebody's own."""

    second_runner.hook(Other, passing, passing)
    assert vars(Other).get("execute_model") is None


REQUESTS = {
    # name: (tokens of the prompt, tokens it has, tokens computed before, tokens of this step, tier)
    "decodes": (4, 4, 9, 1, "gold"),
    "ends its prompt": (6, 6, 4, 2, None),
    "goes on with its prompt": (20, 20, 4, 8, "gold"),
    "computed again": (5, 9, 0, 7, "unheard-of"),
    "one token of a prompt": (6, 6, 5, 1, None),
}


def a_runner(kind: Any, **doctored: Any) -> Any:
    runner = object.__new__(kind)
    rows = list(REQUESTS.values())
    prompt, have, computed = (np.array([row[at] for row in rows], np.int32) for at in range(3))
    runner.req_states = SimpleNamespace(
        req_id_to_index={name: at for at, name in enumerate(REQUESTS)},
        prompt_len=SimpleNamespace(np=prompt),
        prefill_len=SimpleNamespace(np=have),
        num_computed_tokens_np=computed,
        num_computed_prefill_tokens=np.minimum(computed, have),
    )
    usual = {"decode_query_len": 1, "use_pp": False, "adaptive_verification": None, "pcp_manager": None}
    vars(runner).update(usual | doctored)
    return runner


def scheduled() -> Any:
    new = [
        SimpleNamespace(
            req_id=name,
            sampling_params=SimpleNamespace(extra_args=None if row[4] is None else {"moestack_tier": row[4]}),
        )
        for name, row in REQUESTS.items()
    ]
    tokens = {name: row[3] for name, row in REQUESTS.items()}
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens={},
        scheduled_new_reqs=new,
    )


ORDER = ["decodes", "one token of a prompt", "ends its prompt", "computed again", "goes on with its prompt"]
"""vLLM's: requests of one token lead, then by length."""


def test_tokens_have_their_phase_and_k_in_the_order_of_the_batch(kind: Any, rank: Rank) -> None:
    rank.knobs = ExpertKnobs(per_token={"gold": 1})
    runner = a_runner(kind)
    runner.add_requests(scheduled())
    batch, _ = runner.gather_batch_req_state(scheduled(), dummy_run=False)
    assert batch.req_ids == ORDER
    assert runner.prepare_inputs(scheduled(), batch, None, 0) == "inputs"
    assert rank.phase[: rank.batch].tolist() == [DECODE] + [PREFILL] * 18
    assert rank.token_k[: rank.batch].tolist() == [1] + [0] * 3 + [0] * 7 + [1] * 8
    # The one that decodes and the two that end what they have; computed again, seven of nine do not.
    assert rank.generated_tokens == 3


def test_a_request_that_ended_leaves_nothing_behind(kind: Any, rank: Rank) -> None:
    runner = a_runner(kind)
    runner.add_requests(scheduled())
    for name in REQUESTS:
        assert runner._remove_request(name) is True
    assert second_runner._parameters(runner) == {}


@pytest.mark.parametrize("doctored", ["adaptive_verification", "pcp_manager"])
def test_a_batch_that_the_device_rearranges_begins_no_step(kind: Any, rank: Rank, doctored: str) -> None:
    runner = a_runner(kind)
    batch, _ = runner.gather_batch_req_state(scheduled(), dummy_run=False)
    setattr(runner, doctored, object())
    assert runner.prepare_inputs(scheduled(), batch, None, 0) == "inputs"
    assert (rank.steps, rank.batch) == (0, 0)


def test_a_second_runner_that_differs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    differs = hooks.Parameters("vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs", ("self", "other"))
    monkeypatch.setattr(hooks, "SECOND_RUNNER", (differs,))
    before = dict(vars(GPUModelRunner))
    second_runner.hook(GPUModelRunner, passing, passing)
    assert dict(vars(GPUModelRunner)) == before
