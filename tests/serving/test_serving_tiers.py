"""Tiers inside the engine: k of each request, and which blocks a request may cache, on a core and requests that are
fakes. tests/engine shows the same on vLLM's own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from moe_core.tiers import cache_salt
from moe_core.wire import ExpertKnobs
from moe_serving import tiers
from moe_serving.batch import step_of
from moe_serving.capacity import DECODE, PREFILL
from moe_serving.engine_core import count_preemptions
from moe_serving.plugin import wrap_each, wrap_once
from moe_serving.tiers import experts_of_requests, tier_of

BLOCK = 4


def params(tier: object = None) -> SimpleNamespace:
    return SimpleNamespace(extra_args=None if tier is None else {"moestack_tier": tier, "session_id": "s"})


@pytest.mark.parametrize(
    ("name", "sampling", "want"),
    [
        ("a tier", params("gold"), "gold"),
        ("no arguments", params(), None),
        ("other arguments", SimpleNamespace(extra_args={"session_id": "s"}), None),
        ("no name", params(["gold"]), None),
        ("a pooling model", None, None),
    ],
)
def test_tier_of_a_request(name: str, sampling: object, want: str | None) -> None:
    assert tier_of(sampling) == want


@pytest.mark.parametrize(
    ("name", "batch", "per_token", "want"),
    [
        ("no tier has a k", [params("gold"), params()], {}, None),
        ("no request has a tier with one", [params(), params("draft")], {"gold": 2}, None),
        ("mixed", [params("gold"), params(), params("batch"), params("draft")], {"gold": 4, "batch": 1}, [4, 0, 1, 0]),
        ("default has one", [params("gold"), params(), None], {"gold": 4, "default": 2}, [4, 2, 2]),
        ("an empty batch", [], {"gold": 4}, None),
    ],
)
def test_k_of_a_batch(name: str, batch: list[Any], per_token: dict[str, int], want: list[int] | None) -> None:
    k = experts_of_requests(batch, per_token)
    assert (None if k is None else k.tolist()) == want
    assert k is None or k.dtype == "int64"


@dataclass(frozen=True)
class Row:
    """A request of a batch, in tokens: computed before this step, of its prompt, of this step, all that it has."""

    computed: int
    prompt: int
    scheduled: int
    have: int
    tier: str | None = None


P, D = PREFILL, DECODE


@pytest.mark.parametrize(
    ("name", "rows", "per_token", "phase", "generated", "k"),
    [
        ("a whole prompt", [Row(0, 3, 3, 3)], {}, [P, P, P], 1, None),
        ("part of a prompt, with a tier", [Row(0, 3, 2, 3, "gold")], {"gold": 2}, [P, P], 0, [2, 2]),
        ("a decode", [Row(4, 3, 1, 5)], {}, [D], 1, None),
        ("its own tokens again, after preemption", [Row(0, 2, 3, 4)], {}, [P, P, P], 0, None),
        (
            "mixed tiers and phases",
            [Row(2, 4, 2, 4, "gold"), Row(5, 4, 1, 6), Row(0, 3, 1, 3, "batch"), Row(4, 4, 1, 5, "batch")],
            {"gold": 3, "batch": 1},
            [P, P, D, P, D],
            3,
            [3, 3, 0, 1, 1],
        ),
        ("tiers without a k", [Row(4, 4, 1, 5, "draft")], {"gold": 2}, [D], 1, None),
        (
            "k for those without a tier",
            [Row(0, 2, 2, 2), Row(4, 4, 1, 5, "gold")],
            {"default": 2},
            [P, P, D],
            2,
            [2, 2, 0],
        ),
        ("an empty batch", [], {"gold": 2}, [], 0, None),
    ],
)
def test_a_step_by_token(
    name: str, rows: list[Row], per_token: dict[str, int], phase: list[int], generated: int, k: list[int] | None
) -> None:
    step = step_of(
        np.array([row.computed for row in rows], np.int32),
        np.array([row.prompt for row in rows], np.int32),
        np.array([row.scheduled for row in rows], np.int32),
        [SimpleNamespace(num_tokens=row.have, sampling_params=params(row.tier)) for row in rows],
        per_token,
    )
    assert (step.phase.tolist(), step.generated) == (phase, generated)
    assert (None if step.k is None else step.k.tolist()) == k


@dataclass
class FakeRequest:
    """vLLM's Request, as far as it goes."""

    request_id: str
    tokens: list[int]
    cache_salt: str | None
    sampling_params: Any
    num_computed_tokens: int = 0
    block_hashes: list[str] = field(default_factory=list)

    def update_block_hashes(self) -> None:
        while (start := len(self.block_hashes) * BLOCK) + BLOCK <= len(self.tokens):
            extra = self.cache_salt if start == 0 else self.block_hashes[-1]
            text = repr((start, extra, self.tokens[start : start + BLOCK]))
            self.block_hashes.append(hashlib.sha256(text.encode()).hexdigest())


class FakeScheduler:
    """Requests and the cache: hash → the knobs and tier that its tokens were computed under."""

    def __init__(self) -> None:
        self.requests: dict[str, FakeRequest] = {}
        self.cached: dict[str, set[str]] = {}
        self.computed: dict[str, list[str]] = {}

    def _preempt_request(self, request: FakeRequest) -> None:
        request.num_computed_tokens = 0
        self.computed[request.request_id] = []

    def cache_blocks(self, request: FakeRequest, tokens: int) -> None:
        for block in range(tokens // BLOCK):
            under = self.computed[request.request_id][block * BLOCK : (block + 1) * BLOCK]
            self.cached.setdefault(request.block_hashes[block], set()).update(under)


class FakeCore:
    """vLLM's EngineCore, as far as it goes; its workers accept all knobs but those of version 13."""

    def __init__(self) -> None:
        self.scheduler = FakeScheduler()
        self.in_force = "{}"

    def preprocess_add_request(self, request: Any) -> tuple[FakeRequest, int]:
        made = FakeRequest(request.request_id, request.tokens, request.cache_salt, request.sampling_params)
        made.update_block_hashes()
        return made, 0

    def add_request(self, request: FakeRequest, wave: int = 0) -> None:
        self.scheduler.requests[request.request_id] = request
        self.scheduler.computed[request.request_id] = []

    def collective_rpc(self, method: str, timeout: None = None, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        if method == "moestack_apply" and args[1] != 13:
            self.in_force = args[0]
        return [{"knobs": self.in_force}] * 2


def hooked() -> FakeCore:
    core_type = type("Core", (FakeCore,), {})
    scheduler_type = type("Scheduler", (FakeScheduler,), {})
    wrap_once(core_type, "preprocess_add_request", tiers.salt_request)
    wrap_once(core_type, "add_request", tiers.settle_new)
    wrap_once(core_type, "collective_rpc", tiers.follow_knobs)
    wrap_once(scheduler_type, "_preempt_request", count_preemptions)
    wrap_once(scheduler_type, "cache_blocks", tiers.cache_unless_straddling)
    core: FakeCore = core_type()
    core.scheduler = scheduler_type()
    return core


def submit(core: FakeCore, name: str = "r", tokens: int = 8, tier: str | None = None, salt: str | None = None) -> Any:
    sent = SimpleNamespace(request_id=name, tokens=[*range(tokens)], cache_salt=salt, sampling_params=params(tier))
    request, _ = core.preprocess_add_request(sent)
    core.add_request(request)
    return request


def apply(core: FakeCore, knobs: ExpertKnobs, version: int = 1) -> None:
    core.collective_rpc("moestack_apply", None, (knobs.model_dump_json(by_alias=True, exclude_none=True), version))


def step(core: FakeCore, request: FakeRequest, tokens: int) -> None:
    """Compute so many tokens of a request under the knobs in force, and cache its full blocks."""
    under = str(cache_salt(None, tier_of(request.sampling_params), ExpertKnobs.model_validate_json(core.in_force)))
    while len(request.tokens) < request.num_computed_tokens + tokens:
        request.tokens.append(1000 + len(request.tokens))
    request.update_block_hashes()
    core.scheduler.computed[request.request_id] += [under] * tokens
    request.num_computed_tokens += tokens
    core.scheduler.cache_blocks(request, request.num_computed_tokens)


CAPPED = ExpertKnobs.model_validate({"overflow": "Reroute", "capacityFactorPrefill": "1.25"})


@pytest.mark.parametrize("salt", [None, "of the client"])
def test_without_tier_and_capacity_a_request_is_stock(salt: str | None) -> None:
    core = hooked()
    request = submit(core, salt=salt)
    stock, _ = FakeCore().preprocess_add_request(
        SimpleNamespace(request_id="r", tokens=[*range(8)], cache_salt=salt, sampling_params=params())
    )
    assert (request.cache_salt, request.block_hashes) == (salt, stock.block_hashes)


def test_knobs_that_changed_between_the_input_thread_and_the_queue_count() -> None:
    core = hooked()
    sent = SimpleNamespace(request_id="r", tokens=[*range(8)], cache_salt="c", sampling_params=params("gold"))
    request, _ = core.preprocess_add_request(sent)
    early = list(request.block_hashes)
    apply(core, CAPPED)
    core.add_request(request)
    assert request.cache_salt == cache_salt("c", "gold", CAPPED)
    assert len(request.block_hashes) == len(early)
    assert not set(request.block_hashes) & set(early)


def test_knobs_that_the_ranks_refuse_change_no_salt() -> None:
    core = hooked()
    request = submit(core)
    apply(core, CAPPED, version=13)
    assert request.cache_salt is None


def test_a_request_that_waits_takes_the_new_salt_and_one_that_began_caches_nothing_more() -> None:
    core = hooked()
    began, waits = submit(core, "a", 12), submit(core, "b", 12)
    step(core, began, 6)
    apply(core, CAPPED)
    assert waits.cache_salt == cache_salt(None, None, CAPPED)
    assert began.cache_salt is None
    before = dict(core.scheduler.cached)
    step(core, began, 6)
    assert core.scheduler.cached == before, "a block computed under other knobs was cached"
    apply(core, ExpertKnobs(), 2)
    step(core, began, 4)
    assert core.scheduler.cached == before, "the setting returned, and its blocks of the time between with it"
    core.scheduler._preempt_request(began)
    step(core, began, 16)
    assert len(core.scheduler.cached) == 4, "what is computed anew may be cached again"


def test_a_change_that_does_not_touch_a_request_leaves_it_caching() -> None:
    core = hooked()
    request = submit(core, tokens=8, tier="gold")
    step(core, request, 4)
    apply(core, ExpertKnobs(per_token={"batch": 1}))
    step(core, request, 4)
    assert len(core.scheduler.cached) == 2


class CacheMachine(RuleBasedStateMachine):
    """Whatever comes in whatever order, no block is cached that was computed under another setting than it says."""

    requests: Bundle[FakeRequest] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.core = hooked()
        self.version = 20

    @rule(target=requests, tier=st.sampled_from([None, "gold", "batch"]), tokens=st.integers(1, 20))
    def arrives(self, tier: str | None, tokens: int) -> FakeRequest:
        request: FakeRequest = submit(self.core, f"r{len(self.core.scheduler.requests)}", tokens, tier)
        return request

    @rule(request=requests, tokens=st.integers(1, 9))
    def runs(self, request: FakeRequest, tokens: int) -> None:
        step(self.core, request, tokens)

    @rule(request=requests)
    def is_preempted(self, request: FakeRequest) -> None:
        self.core.scheduler._preempt_request(request)

    @rule(
        knobs=st.sampled_from(
            [
                ExpertKnobs(),
                CAPPED,
                CAPPED.model_copy(update={"per_token": {"gold": 2}}),
                ExpertKnobs(per_token={"gold": 2, "default": 3}),
            ]
        )
    )
    def knobs_change(self, knobs: ExpertKnobs) -> None:
        self.version += 1
        apply(self.core, knobs, self.version)

    @invariant()
    def every_block_was_computed_under_one_setting(self) -> None:
        assert all(len(under) == 1 for under in self.core.scheduler.cached.values())

    @invariant()
    def a_request_that_waits_looks_for_blocks_of_today(self) -> None:
        knobs = ExpertKnobs.model_validate_json(self.core.in_force)
        for request in self.core.scheduler.requests.values():
            if request.num_computed_tokens == 0:
                assert request.cache_salt == cache_salt(None, tier_of(request.sampling_params), knobs)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("kinds", [1, 2], ids=["one kind of KV cache", "two kinds, as with sliding windows"])
def test_vllms_own_cache_is_kept_apart(monkeypatch: pytest.MonkeyPatch, kinds: int) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm")
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_coordinator as coordinators
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
    from vllm.v1.request import Request

    for found_class in (value for value in vars(coordinators).values() if isinstance(value, type)):
        if "cache_blocks" in vars(found_class):  # so that each is its own again after the test
            monkeypatch.setattr(found_class, "cache_blocks", found_class.cache_blocks)
    wrap_each(coordinators.KVCacheCoordinator, "cache_blocks", tiers.cache_unless_straddling)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    specs = [FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=64)][:kinds]
    groups = [KVCacheGroupSpec([f"layer{number}"], spec) for number, spec in enumerate(specs)]
    manager = KVCacheManager(
        KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=64,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
    )

    def request(name: str, knobs: ExpertKnobs, tier: str | None = None) -> Any:
        sampling = SamplingParams(max_tokens=4, extra_args=None if tier is None else {"moestack_tier": tier})
        made = Request(name, [*range(17)], sampling, None, block_hasher=hasher)
        stock = list(made.block_hashes)
        tiers.settle(made, knobs)
        assert len(made.block_hashes) == len(stock) == 4
        assert (made.block_hashes == stock) is (cache_salt(None, tier, knobs) is None)
        return made

    def run(made: Any, tokens: int) -> None:
        assert manager.allocate_slots(made, tokens) is not None
        made.num_computed_tokens += tokens

    def found(knobs: ExpertKnobs, tier: str | None = None) -> int:
        cached: int = manager.get_computed_blocks(request("asks", knobs, tier))[1]
        return cached

    straddles = request("straddles", ExpertKnobs())
    run(straddles, 9)
    assert (found(ExpertKnobs()), found(CAPPED), found(ExpertKnobs(), "gold")) == (8, 0, 0)
    tiers.settle(straddles, CAPPED)
    run(straddles, 8)
    assert (found(ExpertKnobs()), found(CAPPED)) == (8, 0)
    run(request("capped", CAPPED), 17)
    assert (found(ExpertKnobs()), found(CAPPED), found(CAPPED, "gold")) == (8, 16, 0)
