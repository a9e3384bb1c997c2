"""Live limits on vLLM's own scheduler, without an engine: who runs goes on, who waits is let in, nobody starves."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serving.engine_core import LimitRefused, moestack_scheduler_state, moestack_set_limits

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

CEILING_SEQS, CEILING_TOKENS, LONGEST = 8, 256, 2048
Core = Any
NewCore = Callable[..., Core]


@pytest.fixture(scope="module")
def new_core() -> NewCore:
    """Makes a core whose scheduler is vLLM's own, with as many KV blocks and as long chunks as asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("MOESTACK_PLUGIN", "0")  # other tests of this process want the classes as they are
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from moe_serving.tiny import cached_checkpoint

        arguments = EngineArgs(
            model=str(cached_checkpoint("qwen3_moe")),
            dtype="float32",
            max_model_len=LONGEST,
            max_num_seqs=CEILING_SEQS,
            max_num_batched_tokens=CEILING_TOKENS,
            enforce_eager=True,
            async_scheduling=False,
            enable_prefix_caching=False,
        )
        config = arguments.create_engine_config()
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)

    def make(blocks: int = 1200, chunk: int = 0) -> Core:
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.long_prefill_token_threshold = chunk
        groups = [KVCacheGroupSpec(["layer"], spec)]
        cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        return SimpleNamespace(scheduler=Scheduler(config, cache, StructuredOutputManager(config), 16), sent=[])

    return make


def arrive(core: Core, prompt: int, output: int = 400) -> str:
    """A request of so many tokens in and out; returns its name."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    name = f"r{len(core.sent)}"
    core.sent.append(Request(name, [7] * prompt, SamplingParams(max_tokens=output, ignore_eos=True), None))
    core.scheduler.add_request(core.sent[-1])
    return name


def step(core: Core) -> dict[str, int]:
    """One step of an engine whose model answers 9 to everything; returns tokens by request."""
    from vllm.v1.outputs import ModelRunnerOutput

    planned = core.scheduler.schedule()
    names = list(planned.num_scheduled_tokens)
    requests = core.scheduler.requests
    answered = [[9] if requests[name].num_computed_tokens >= requests[name].num_tokens else [] for name in names]
    output = ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, answered)
    core.scheduler.update_from_output(planned, output)
    scheduled: dict[str, int] = planned.num_scheduled_tokens
    assert sum(scheduled.values()) <= core.scheduler.max_num_scheduled_tokens
    return scheduled


def running(core: Core) -> list[str]:
    return [request.request_id for request in core.scheduler.running]


def test_a_long_prefill_and_the_decodes_beside_it_both_go_on_under_fewer_tokens(new_core: NewCore) -> None:
    core = new_core()
    decodes = [arrive(core, 16) for _ in range(3)]
    step(core)
    long = arrive(core, 1000)
    assert step(core)[long] == CEILING_TOKENS - 3
    moestack_set_limits(core, 4, 20)
    left = 1000 - (CEILING_TOKENS - 3)
    chunks = 0
    while left > 0:
        scheduled = step(core)
        assert scheduled == {**dict.fromkeys(decodes, 1), long: min(17, left)}, "a decode or the prefill stood still"
        left -= scheduled[long]
        chunks += 1
    assert chunks == 44
    assert step(core) == dict.fromkeys([*decodes, long], 1)


def test_at_the_safe_bound_a_prefill_gets_one_token_and_below_it_the_limit_is_refused(new_core: NewCore) -> None:
    core = new_core()
    decodes = [arrive(core, 16) for _ in range(3)]
    step(core)
    long = arrive(core, 600)
    step(core)
    with pytest.raises(LimitRefused, match=r"engine\.maxBatchedTokens 3 .*4 active sequences need 4 tokens"):
        moestack_set_limits(core, 1, 3)
    assert (core.scheduler.max_num_active_reqs, core.scheduler.max_num_scheduled_tokens) == (8, 256)
    moestack_set_limits(core, 4, 4)
    for _ in range(5):
        assert step(core) == dict.fromkeys([*decodes, long], 1)


def test_fewer_active_sequences_preempt_nobody_and_admit_nobody_until_there_is_room(new_core: NewCore) -> None:
    core = new_core()
    early = [arrive(core, 16, output=6 + number) for number in range(6)]
    step(core)
    late = [arrive(core, 16, output=4) for _ in range(3)]
    moestack_set_limits(core, 2, None)
    finished: list[str] = []
    for _ in range(40):
        before = running(core)
        scheduled = step(core)
        assert [name for name in before if name not in scheduled] == [], "one that ran was left out of a step"
        admitted = [name for name in scheduled if name not in before]
        assert not admitted or len(scheduled) <= 2
        finished += [name for name in scheduled if name not in core.scheduler.requests]
    assert finished == [*early, *late], "first come, first served"
    assert not core.scheduler.requests
    assert [request.num_preemptions for request in core.sent] == [0] * 9


def test_prefills_side_by_side_need_room_for_a_chunk_of_each(new_core: NewCore) -> None:
    core = new_core(chunk=32)
    names = [arrive(core, 16), arrive(core, 500), arrive(core, 500)]
    step(core)
    assert step(core) == dict(zip(names, (1, 32, 32), strict=True))
    with pytest.raises(LimitRefused, match="3 active sequences need 96 tokens"):
        moestack_set_limits(core, 3, 95)
    moestack_set_limits(core, 3, 96)
    assert step(core) == dict(zip(names, (1, 32, 32), strict=True))


def test_limits_that_are_lifted_let_everyone_in_again(new_core: NewCore) -> None:
    core = new_core()
    moestack_set_limits(core, 1, 16)
    names = [arrive(core, 16) for _ in range(8)]
    assert list(step(core)) == names[:1]
    assert list(step(core)) == names[:1]
    assert moestack_set_limits(core, None, None) == {"active_seqs": CEILING_SEQS, "batched_tokens": CEILING_TOKENS}
    assert list(step(core)) == names
    state = moestack_scheduler_state(core)
    assert (state["running"], state["waiting"], state["ceiling_active_seqs"]) == (8, 0, CEILING_SEQS)


@pytest.mark.parametrize(
    ("seqs", "tokens", "words"),
    [
        (CEILING_SEQS + 1, None, "maxActiveSeqs 9 is outside 1 to 8, the launch-time ceiling"),
        (None, CEILING_TOKENS + 1, "the launch-time ceiling is 256"),
        (0, None, "maxActiveSeqs 0"),
        (8, 7, "8 active sequences need 8 tokens"),
    ],
    ids=["more sequences than launched for", "more tokens than launched for", "none", "fewer tokens than sequences"],
)
def test_what_the_engine_was_not_launched_for_is_refused_whole(
    new_core: NewCore, seqs: int | None, tokens: int | None, words: str
) -> None:
    core = new_core()
    moestack_set_limits(core, 3, 64)
    with pytest.raises(LimitRefused, match=words):
        moestack_set_limits(core, seqs, tokens)
    assert (core.scheduler.max_num_active_reqs, core.scheduler.max_num_scheduled_tokens) == (3, 64)


def test_the_ceiling_is_that_of_the_launch_whatever_was_in_force_since(new_core: NewCore) -> None:
    core = new_core()
    for seqs, tokens in ((1, 1), (8, 256), (2, 9), (8, 256)):
        assert moestack_set_limits(core, seqs, tokens) == {"active_seqs": seqs, "batched_tokens": tokens}


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.sampled_from([1200, 90]), chunk=st.sampled_from([0, 0, 24]))
def test_whatever_limits_come_everyone_that_runs_gets_a_token_in_every_step(
    new_core: NewCore, seed: int, blocks: int, chunk: int
) -> None:
    """With 90 blocks the cache is short and vLLM preempts by itself: then who was not preempted gets its token.

    `chunk` is vLLM's long-prefill-token-threshold, which lets a second prefill in behind a first one.
    """
    core, rng = new_core(blocks, chunk), random.Random(seed)

    def one_step() -> None:
        before = running(core)
        scheduled = step(core)
        after = set(running(core))
        assert all(name in scheduled for name in before if name in after), "one that runs starves"
        assert scheduled or not core.scheduler.requests, "requests wait, and nothing runs"

    for _ in range(30):
        what = rng.choice(("arrives", "arrives", "limits", "steps"))
        if what == "arrives":
            arrive(core, rng.choice((1, 5, 40, 300, 900)), rng.randint(1, 30))
        elif what == "steps":
            for _ in range(rng.randint(1, 12)):
                one_step()
        else:
            seqs, tokens = rng.randint(1, CEILING_SEQS), rng.choice((1, 2, 4, 8, 30, 100, 200, CEILING_TOKENS))
            floor = max(seqs, len(core.scheduler.running)) * max(1, chunk)
            with contextlib.nullcontext() if tokens >= floor else pytest.raises(LimitRefused):
                moestack_set_limits(core, seqs, tokens)
    for _ in range(20_000):
        if not core.scheduler.requests:
            break
        one_step()
    assert not core.scheduler.requests, "some request never ended"
