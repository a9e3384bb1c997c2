"""Layers on a GPU, without one: which are hooked, what a captured graph would hold, what EPLB sees, what is refused.

Classes, choices of kernel and the template of routing are vLLM's own; the device is a fake one, whose tensors have no
values, or the CPU. None of it ran on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_core.wire import ExpertKnobs, Overflow

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode  # noqa: E402

from moe_serving import gpu  # noqa: E402
from moe_serving.rank import DECODE, PREFILL, KnobsRefused, Layer, Rank, fetched  # noqa: E402
from moe_serving.route import COUNTERS  # noqa: E402
from moe_serving.scores import Routing  # noqa: E402

E, K, T = 8, 2, 12
PLAIN = Routing("softmax", True)
REROUTE = ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal("1.25"))


@pytest.mark.parametrize(
    ("value", "want"), [(None, "off"), ("off", "off"), ("count", "count"), ("capacity", "capacity")]
)
def test_nothing_of_a_gpu_is_hooked_unasked(monkeypatch: pytest.MonkeyPatch, value: str | None, want: str) -> None:
    monkeypatch.delenv(gpu.ENV, raising=False)
    if value is not None:
        monkeypatch.setenv(gpu.ENV, value)
    assert gpu.mode() == want


def test_an_unknown_mode_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.ENV, "1")
    with pytest.raises(ValueError, match="MOESTACK_GPU=1: it takes off, count, capacity"):
        gpu.mode()


def kernel_class(path: str) -> Any:
    import importlib

    module, name = path.split(":")
    return getattr(importlib.import_module(f"vllm.model_executor.layers.fused_moe.{module}"), name)


def triton(quant_dtype: Any = None, block: list[int] | None = None, per_token: bool = False, a2: Any = None) -> Any:
    kernel = object.__new__(kernel_class("experts.triton_moe:TritonExperts"))
    kernel.quant_config = SimpleNamespace(
        quant_dtype=quant_dtype, a2_scale=a2, block_shape=block, per_act_token_quant=per_token
    )
    kernel.quantization_emulation = False
    return kernel


def marlin(input_dtype: Any = None) -> Any:
    kernel = object.__new__(kernel_class("experts.marlin_moe:MarlinExperts"))
    kernel.input_dtype = input_dtype
    return kernel


def deep_gemm() -> Any:
    return object.__new__(kernel_class("experts.deep_gemm_moe:DeepGemmExperts"))


def either() -> Any:
    kernel = object.__new__(kernel_class("experts.triton_deep_gemm_moe:TritonOrDeepGemmExperts"))
    kernel.experts, kernel.fallback_experts = deep_gemm(), triton(torch.float8_e4m3fn, [128, 128])
    return kernel


IN_PLACE = "prepare_finalize.no_dp_ep:MoEPrepareAndFinalizeNoDPEPModular"
GATHERED = "prepare_finalize.naive_dp_ep:MoEPrepareAndFinalizeNaiveDPEPModular"
BATCHED = "prepare_finalize.batched:BatchedPrepareAndFinalize"


class OwnKernel:
    """A method that calls its kernel itself."""


def experts(kernel: Any, dispatch: str = IN_PLACE, *, monolithic: bool = False, **config: Any) -> Any:
    """RoutedExperts as `describe` reads it: its kernel and its config."""
    method: Any = OwnKernel() if kernel is None else SimpleNamespace()
    method.is_monolithic, method.supports_internal_mk = monolithic, kernel is not None
    if kernel is not None:
        method.moe_kernel = SimpleNamespace(
            fused_experts=kernel, prepare_finalize=object.__new__(kernel_class(dispatch))
        )
    usual = {
        "is_sequence_parallel": False,
        "pcp_size": 1,
        "dp_size": 1,
        "is_lora_enabled": False,
        "num_experts": E,
        "num_logical_experts": E,
        "experts_per_token": K,
    }
    return SimpleNamespace(quant_method=method, expert_map=None, moe_config=SimpleNamespace(**usual | config))


FP8 = torch.float8_e4m3fn
UNREAD = "is not known to leave out dropped slots"


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("Triton", experts(triton()), ""),
        ("Triton, tokens gathered by all-gather", experts(triton(), GATHERED, dp_size=2), ""),
        ("Triton, FP8 in blocks", experts(triton(FP8, [128, 128])), ""),
        ("Triton, FP8 by token", experts(triton(FP8, per_token=True)), ""),
        ("Triton, FP8 with a static scale", experts(triton(FP8, a2=1.0)), ""),
        ("Triton, FP8 with one scale", experts(triton(FP8)), "one activation scale for all rows"),
        ("Marlin", experts(marlin()), ""),
        ("Marlin, quantised activations", experts(marlin(FP8)), "MarlinExperts with quantised activations"),
        ("DeepGEMM", experts(deep_gemm()), ""),
        ("DeepGEMM or Triton", experts(either()), ""),
        (
            "another class",
            experts(object.__new__(kernel_class("experts.cutlass_moe:CutlassExpertsFp8"))),
            f"kernel CutlassExpertsFp8 {UNREAD}",
        ),
        (
            "an heir of Triton's",
            experts(object.__new__(kernel_class("experts.triton_moe:TritonWNA16Experts"))),
            f"kernel TritonWNA16Experts {UNREAD}",
        ),
        ("another dispatch", experts(triton(), BATCHED), f"dispatch BatchedPrepareAndFinalize {UNREAD}"),
        ("LoRA", experts(triton(), is_lora_enabled=True), "LoRA"),
        ("a method with its own kernel", experts(None), "OwnKernel runs a kernel of its own"),
    ],
)
def test_capacity_asks_for_a_kernel_that_leaves_out_a_dropped_slot(name: str, layer: Any, why: str) -> None:
    reason = gpu.unable(layer)
    assert (reason == "") == (why == ""), name
    assert why in reason


@pytest.mark.parametrize(
    ("runner", "why"),
    [
        ({}, ""),
        ({"adaptive_verification": None, "pcp_manager": None}, ""),
        ({"ubatching": True}, "dual batch overlap"),
        ({"adaptive_verification": object()}, "adaptive verification"),
        ({"pcp_manager": object()}, "prefill context parallel"),
    ],
)
def test_batches_that_the_device_rearranges_are_unknown(runner: dict[str, Any], why: str) -> None:
    parallel = SimpleNamespace(use_ubatching=runner.pop("ubatching", False))
    reason = gpu.hidden(SimpleNamespace(parallel_config=parallel, **runner))
    assert (reason == "") == (why == "")
    assert why in reason


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """A worker's load as on a GPU, with a rank of its own."""
    import vllm.platforms

    from moe_serving import worker

    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda")
    monkeypatch.setattr(worker, "current_platform", platform)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    rank = Rank()
    monkeypatch.setattr(worker, "RANK", rank)
    return rank


def plain_router() -> Any:
    """A router of vLLM's GPU class, which needs no device until it routes."""
    import moe_serving.worker  # noqa: F401  (hooks the routers)

    return kernel_class("router.fused_topk_router:FusedTopKRouter")(
        top_k=K, global_num_experts=E, eplb_state=None, renormalize=True
    )


def a_model(*layers: Any) -> Any:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList()
    for number, layer in enumerate(layers):
        module = torch.nn.Module()
        module.router, module.routed_experts = plain_router(), layer
        module.layer_name = f"model.layers.{number}.mlp.experts"
        model.layers.append(module)
    return model


@pytest.mark.parametrize(
    ("mode", "rows"),
    [
        ("off", [(False, "left as they are; MOESTACK_GPU=capacity hooks them")] * 4),
        (
            "count",
            [(True, "MOESTACK_GPU=count asks for counting only")] * 2
            + [(False, "prefill context parallel"), (False, "monolithic kernel of SimpleNamespace")],
        ),
        (
            "capacity",
            [
                (True, ""),
                (True, "redundant experts"),
                (False, "prefill context parallel"),
                (False, "monolithic kernel of SimpleNamespace"),
            ],
        ),
    ],
)
def test_every_layer_says_at_load_what_it_is(
    on_cuda: Rank, monkeypatch: pytest.MonkeyPatch, mode: str, rows: list[tuple[bool, str]]
) -> None:
    from moe_serving import worker

    monkeypatch.setenv(gpu.ENV, mode)
    worker.number_layers(
        a_model(
            experts(triton()),
            experts(triton(), num_experts=E + 4),
            experts(triton(), pcp_size=2),
            experts(triton(), monolithic=True),
        )
    )
    for layer, (hooked, why) in zip(on_cuda.layers, rows, strict=True):
        reason = layer.bypassed or layer.why_unknown
        assert (not layer.bypassed, why in reason, reason == "") == (hooked, True, why == ""), reason
        alone = Rank(layers=[layer])
        if reason:
            with pytest.raises(KnobsRefused, match=layer.name):
                alone.apply(REROUTE, 1)
        else:
            alone.apply(REROUTE, 1)
        alone.apply(ExpertKnobs(), 2)


@pytest.mark.parametrize(
    ("mode", "routes", "tells_eplb"), [("off", False, False), ("count", True, False), ("capacity", True, True)]
)
def test_what_a_hooked_router_does_to_a_graph(
    on_cuda: Rank, monkeypatch: pytest.MonkeyPatch, mode: str, routes: bool, tells_eplb: bool
) -> None:
    """Left alone it gives back the very tensors of vLLM; else new ones, and EPLB is left what the router asked for."""
    from moe_serving import worker

    monkeypatch.setenv(gpu.ENV, mode)
    worker.number_layers(a_model(experts(triton())))
    router = SimpleNamespace(_moestack_layer=0)
    answer = torch.empty(T, K, device="meta"), torch.empty(T, K, dtype=torch.int32, device="meta")
    hooked = worker._count_and_cap(lambda *_, **__: answer)
    weights, ids = hooked(router, None, torch.empty(T, E, device="meta"), torch.int32)
    assert (weights is not answer[0], ids is not answer[1]) == (routes, routes)
    assert (ids.shape, ids.dtype) == (answer[1].shape, answer[1].dtype)
    assert (getattr(router, "_moestack_demand", None) is answer[1]) == tells_eplb


def a_rank(layers: int = 1, routing: Routing | None = PLAIN) -> Rank:
    return Rank(layers=[Layer(n, f"moe.{n}", E, K, routing) for n in range(layers)])


@pytest.mark.parametrize(
    "routing",
    [
        None,
        PLAIN,
        Routing("sigmoid", True, 2.5, 4, 2, torch.linspace(0, 0.5, E), by_gate=True),
    ],
    ids=["counted only", "plain", "in groups"],
)
def test_a_graph_would_hold_fixed_shapes_and_never_ask_the_host(routing: Routing | None) -> None:
    """Tensors of a fake GPU have no values: whatever asked for one, or took a shape from one, would raise here."""
    rank = a_rank(routing=routing)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rank.reserve(64, torch.device("cuda"))
        if routing is not None and routing.bias is not None:
            object.__setattr__(routing, "bias", routing.bias.to("cuda"))
        weights = torch.empty(T, K, device="cuda")
        ids = torch.empty(T, K, dtype=torch.int32, device="cuda")
        out_weights, out_ids = rank.route(0, weights, ids, torch.empty(T, E, device="cuda"))
        assert (out_weights.shape, out_weights.dtype, out_weights.device) == (
            weights.shape,
            weights.dtype,
            weights.device,
        )
        assert (out_ids.shape, out_ids.dtype, out_ids.device) == (ids.shape, ids.dtype, ids.device)
        with pytest.raises(DataDependentOutputException):
            bool(rank.overflow)  # so the fake device does refuse a look
        assert {getattr(rank.layers[0], name).device.type for name in ("gamma_micro", *COUNTERS)} == {"cuda"}
        assert {rank.phase.device.type, rank.token_k.device.type, rank.overflow.device.type} == {"cuda"}


def test_what_a_graph_would_read_stays_where_it_is() -> None:
    rank = a_rank(2)
    rank.reserve(64)

    def addresses() -> list[int]:
        tensors = [rank.phase, rank.token_k, rank.overflow]
        tensors += [getattr(layer, name) for layer in rank.layers for name in ("gamma_micro", *COUNTERS)]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    for version, knobs in enumerate((REROUTE, ExpertKnobs(per_token={"gold": 1}), ExpertKnobs()), 1):
        rank.apply(knobs, version)
        for count in (T, 64, 1):
            rank.begin_step(np.full(count, PREFILL, np.uint8), 0, np.ones(count, np.int64))
            logits = torch.randn(count, E)
            rank.route(1, *torch.topk(torch.softmax(logits, 1), K), logits)
            rank.end_step()
    assert addresses() == before


def test_a_batch_longer_than_what_was_reserved_is_refused_on_a_device() -> None:
    rank = a_rank()
    rank.reserve(16, torch.device("meta"))
    rank.begin_step(np.full(16, DECODE, np.uint8), 16)
    with pytest.raises(ValueError, match="a batch of 17 tokens, 16 reserved"):
        rank.begin_step(np.full(17, DECODE, np.uint8), 17)
    too_long = (torch.empty(17, width, device="meta") for width in (K, K, E))
    with pytest.raises(ValueError, match="a batch of 17 tokens, 16 reserved"):
        rank.route(0, *too_long)


@pytest.mark.parametrize(
    ("tokens", "sizes", "ranks", "want"),
    [(256, [1, 8, 64], 1, 256), (250, [1, 256], 1, 256), (64, None, 1, 64), (64, None, 4, 67)],
)
def test_the_longest_batch_has_the_padding_of_captured_graphs(tokens: int, sizes: Any, ranks: int, want: int) -> None:
    compilation = SimpleNamespace(cudagraph_capture_sizes=sizes)
    runner = SimpleNamespace(
        max_num_tokens=tokens,
        vllm_config=SimpleNamespace(compilation_config=compilation),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    assert gpu.longest_batch(runner) == want


def test_padding_that_the_router_gave_nobody_stays_so() -> None:
    """vLLM gives rows that pad a graph no expert (-1, weight 0); they count for nothing and come out as they were."""
    rank, logits = a_rank(), torch.randn(T, E)
    weights, ids = torch.topk(torch.softmax(logits, 1), K)
    ids[8:], weights[8:] = -1, 0.0
    rank.apply(REROUTE, 1)
    rank.begin_step(np.full(8, PREFILL, np.uint8), 0)
    out_weights, out_ids = rank.route(0, weights, ids, logits)
    assert bool((out_ids[8:] == -1).all())
    assert not bool(out_weights[8:].any())
    assert int(rank.layers[0].tokens) == 8
    assert int(rank.layers[0].demand.sum()) == 8 * K


def test_counters_come_from_a_device_all_at_once() -> None:
    rank = a_rank(3)
    for layer in rank.layers:
        for at, name in enumerate(COUNTERS):
            getattr(layer, name).add_(at + 10 * layer.index)
    for layer, counters in zip(rank.layers, fetched(rank.layers), strict=True):
        assert set(counters) == set(COUNTERS)
        for name, value in counters.items():
            assert torch.equal(value, getattr(layer, name))


class Choice:
    """Kernels as vLLM's choice asks them: everything fits."""

    @staticmethod
    def activation_format() -> Any:
        return kernel_class("modular_kernel:FusedMoEActivationFormat").Standard

    @staticmethod
    def fits(*_: Any) -> bool:
        return True


def a_kernel(base: str, name: str) -> Any:
    asked = (
        "_supports_current_device", "_supports_no_act_and_mul", "_supports_activation", "_supports_quant_scheme",
        "_supports_parallel_config", "_supports_routing_method", "_supports_router_logits_dtype",
    )  # fmt: skip
    methods = dict.fromkeys(asked, staticmethod(Choice.fits))
    return type(
        name, (kernel_class(f"modular_kernel:{base}"),), {**methods, "activation_format": Choice.activation_format}
    )


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    owner = kernel_class("modular_kernel:FusedMoEExperts")
    monkeypatch.setattr(owner, "is_supported_config", staticmethod(owner.is_supported_config))  # put back afterwards
    gpu.force_modular()
    gpu.force_modular()  # changes nothing
    yield
    gpu.ruled_out.clear()


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(
    ("name", "kernels", "chosen"),
    [
        ("the next of its list", ["FusedMoEExpertsMonolithic", "FusedMoEExpertsModular"], "FusedMoEExpertsModular"),
        ("one that was first anyway", ["FusedMoEExpertsModular"], "FusedMoEExpertsModular"),
        ("none is left", ["FusedMoEExpertsMonolithic"], None),
    ],
)
def test_vllms_own_choice_passes_by_kernels_that_route_by_themselves(
    monkeypatch: pytest.MonkeyPatch, name: str, kernels: list[str], chosen: str | None
) -> None:
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    classes = [a_kernel(base, f"A{base}") for base in kernels]
    monkeypatch.setattr(unquantized, "backend_to_kernel_cls", lambda _: classes)
    monkeypatch.setattr(
        unquantized, "_get_priority_backends", lambda _: [unquantized.UnquantizedMoeBackend.FLASHINFER_TRTLLM]
    )
    monkeypatch.setattr(unquantized.current_platform, "is_cpu", lambda: False)
    parallel = SimpleNamespace(use_batched_activation_format=False, use_moonep_kernels=False, dp_size=1)
    config = SimpleNamespace(
        moe_backend="auto", moe_parallel_config=parallel, is_lora_enabled=False, is_act_and_mul=True, activation="silu",
        has_hash_routing=False, routing_method=None, router_logits_dtype=None, hidden_dim=64,
    )  # fmt: skip
    if chosen is None:
        with pytest.raises(NotImplementedError):
            unquantized.select_unquantized_moe_backend(config)
    else:
        _, kernel = unquantized.select_unquantized_moe_backend(config)
        assert kernel.__name__ == f"A{chosen}", name
    assert list(gpu.ruled_out) == ["AFusedMoEExpertsMonolithic"] * ("FusedMoEExpertsMonolithic" in kernels)
    assert all("unknown until benchmarks/capacity.py measures it" in said for said in gpu.ruled_out.values())


def eplb_of_torch(
    topk_ids: Any,
    expert_load_view: Any,
    logical_to_physical_map: Any,
    logical_replica_count: Any,
    record_enabled: Any,
    num_unpadded_tokens: Any = None,
) -> Any:
    """What vLLM's Triton kernel of that name does, for one replica each: -1 stays -1 and is not recorded."""
    mapped = torch.where(topk_ids >= 0, logical_to_physical_map[:, 0][topk_ids.clamp(min=0).long()], -1)
    if bool(record_enabled):
        real = mapped if num_unpadded_tokens is None else mapped[: int(num_unpadded_tokens)]
        expert_load_view += torch.bincount(real[real >= 0].flatten(), minlength=expert_load_view.numel())
    return mapped.to(topk_ids.dtype)


def test_eplb_plans_by_demand_and_maps_what_capacity_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.router import base_router

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", eplb_of_torch)
    monkeypatch.setitem(gpu._never, torch.device("cpu"), torch.zeros((), dtype=torch.bool))
    monkeypatch.setattr(
        base_router.BaseRouter, "_apply_eplb_mapping", gpu.record_demand(base_router.BaseRouter._apply_eplb_mapping)
    )
    monkeypatch.setattr(base_router, "dbo_current_ubatch_id", lambda: 0)
    asked = torch.tensor([[0, 1], [0, 2], [0, 3]])
    left = torch.tensor([[0, 1], [4, 2], [-1, 3]])

    class Router(base_router.BaseRouter):  # type: ignore[misc, name-defined]
        capped = True

        @property
        def routing_method_type(self) -> Any: ...

        def _compute_routing(
            self, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
        ) -> Any:
            self._moestack_demand = asked if self.capped else None
            return torch.ones(3, 2), left if self.capped else asked

    state = SimpleNamespace(
        expert_load_view=torch.zeros(E, dtype=torch.int64),
        logical_to_physical_map=torch.arange(E).flip(0).unsqueeze(1),
        logical_replica_count=torch.ones(E, dtype=torch.int64),
        should_record_tensor=torch.ones((), dtype=torch.bool),
        num_unpadded_tokens_tensors=[torch.tensor(3)],
    )
    router = Router(K, E, eplb_state=state)
    for capped, ids in ((True, left), (False, asked)):
        state.expert_load_view.zero_()
        router.capped = capped
        _, physical = router._select_experts(None, None, torch.int64)
        assert physical.tolist() == torch.where(ids >= 0, E - 1 - ids, -1).tolist()
        assert state.expert_load_view.flip(0).tolist() == torch.bincount(asked.flatten(), minlength=E).tolist()


def test_the_sum_leaves_out_rows_that_nothing_was_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops

    calls: list[tuple[str, Any, Any]] = []
    monkeypatch.setattr(_custom_ops, "moe_sum", lambda i, o, ids=None, emap=None: calls.append(("aware", ids, emap)))
    hooked = gpu.sum_present(lambda self, i, o, ids=None, emap=None: calls.append(("own", ids, emap)))
    hooked(None, "rows", "out")
    hooked(None, "rows", "out", "ids")
    hooked(None, "rows", "out", "ids", "map")
    assert calls == [("own", None, None), ("aware", "ids", None), ("own", "ids", "map")]


class Event:
    """An event of a device, over when told so."""

    def __init__(self, at_ms: float) -> None:
        self.at_ms, self.over = at_ms, False

    def query(self) -> bool:
        return self.over

    def elapsed_time(self, other: Event) -> float:
        return other.at_ms - self.at_ms


def test_a_step_is_told_when_the_device_is_done_and_nobody_waits() -> None:
    events: list[Event] = []

    def mark() -> Event:
        events.append(Event(10.0 * len(events) ** 2))
        return events[-1]

    told: list[tuple[str, float]] = []
    clock = gpu.StepClock(mark)
    for step in ("first", "second"):
        clock.begin()
        clock.end(lambda seconds, step=step: told.append((step, seconds)))
    assert told == []
    for event in events:
        event.over = True
    clock.begin()
    clock.end(lambda seconds: told.append(("third", seconds)))
    assert told == [("first", 0.01), ("second", 0.05)]
