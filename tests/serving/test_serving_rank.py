"""A rank's state: knobs act by a write to tensors, with no look at values and no new trace; k by token; who counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from moe_core.wire import ExpertKnobs, Overflow

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode  # noqa: E402

from moe_serving.rank import DECODE, PADDING, PREFILL, KnobsRefused, Layer, Rank  # noqa: E402
from moe_serving.route import route  # noqa: E402
from moe_serving.scores import Routing  # noqa: E402
from tests.serving.capacity_cases import Case, cases, chosen_sets  # noqa: E402

E, K, T = 8, 3, 12
PLAIN = Routing("softmax", True)
GROUPED = Routing("sigmoid", True, 2.5, 4, 2, torch.linspace(0, 0.5, E), by_gate=True)
SETTINGS = [
    ExpertKnobs(),
    ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal(1)),
    ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal("1.5"), capacity_factor_decode=Decimal(1)),
    ExpertKnobs(overflow=Overflow.DROP, capacity_factor_decode=Decimal("1.25")),
    ExpertKnobs(overflow=Overflow.EXPERT_CHOICE, capacity_factor_prefill=Decimal("1.25")),
]


def a_rank(routing: Routing | None = PLAIN, layers: int = 1, why: str = "") -> Rank:
    rank = Rank()
    rank.layers.extend(Layer(n, f"moe.{n}", E, K, routing, why) for n in range(layers))
    return rank


def logits(seed: int = 0, count: int = T) -> torch.Tensor:
    """Of a router that likes the first experts."""
    noise = torch.randn(count, E, generator=torch.Generator().manual_seed(seed))
    return noise + torch.linspace(3, 0, E)


def routed(rank: Rank, rows: torch.Tensor, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    count = rows.shape[0]
    case = Case(rank.layers[0].routing or PLAIN, K, rows, (PREFILL,) * count, (0,) * count, ExpertKnobs())
    return rank.route(layer, *case.router(), rows)


def phases(*parts: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.concatenate([np.full(count, phase, np.uint8) for phase, count in parts])


def load(ids: torch.Tensor) -> list[int]:
    return torch.bincount(ids[ids >= 0].long(), minlength=E).tolist()


@pytest.mark.parametrize("routing", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_the_whole_route_compiles_and_knobs_act_without_a_new_trace(routing: Routing) -> None:
    traces = 0

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal traces
        traces += 1
        return graph.forward

    torch._dynamo.reset()
    compiled, eager = a_rank(routing), a_rank(routing)
    step = torch.compile(route, fullgraph=True, dynamic=False, backend=counting)
    for version, (seed, knobs) in enumerate(((s, k) for s in range(2) for k in SETTINGS), start=1):
        rows = logits(seed)
        given_weights, ids = Case(routing, K, rows, (PREFILL,) * T, (0,) * T, knobs).router()
        k = np.array([0, 1, 2, 3] * (T // 4), np.int64) if seed else None
        for rank in (compiled, eager):
            # γ · min k ≥ 1 is a rule of apply; k 1 needs a higher γ than these settings have, so none says so here.
            rank.apply(knobs, version)
            rank.begin_step(phases((PREFILL, 6), (DECODE, 4 + seed), (PADDING, 2 - seed)), 0, k)
        state = (compiled.layers[0], compiled.phase[:T], compiled.token_k[:T], compiled.overflow)
        out = step(*state, given_weights, ids, rows)
        want = eager.route(0, given_weights, ids, rows)
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True)), knobs
    for name in ("demand", "assigned", "tokens", "dropped", "rerouted", "overflow_kept", "max_prefill_load"):
        assert torch.equal(getattr(compiled.layers[0], name), getattr(eager.layers[0], name)), name
    assert int(compiled.layers[0].rerouted) > 0 < int(compiled.layers[0].dropped)
    assert traces == 1


def test_the_route_compiles_through_functionalization_too() -> None:
    """As before a graph capture: in-place counters become outputs and are written back."""
    torch._dynamo.reset()
    rank, eager = a_rank(), a_rank()
    step = torch.compile(route, fullgraph=True, dynamic=False, backend="aot_eager")
    rows = logits()
    given_weights, ids = Case(PLAIN, K, rows, (PREFILL,) * T, (0,) * T, SETTINGS[1]).router()
    for each in (rank, eager):
        each.apply(SETTINGS[1], 1)
        each.begin_step(phases((PREFILL, T)), 0)
    state = (rank.layers[0], rank.phase[:T], rank.token_k[:T], rank.overflow)
    assert torch.equal(step(*state, given_weights, ids, rows)[1], eager.route(0, given_weights, ids, rows)[1])
    assert torch.equal(rank.layers[0].assigned, eager.layers[0].assigned)


@pytest.mark.parametrize("routing", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_the_hot_path_never_looks_at_a_value(routing: Routing) -> None:
    """Tensors without values: whatever asks for one, to branch or to shape by, raises. So no step waits."""
    with FakeTensorMode() as mode:
        rank = a_rank(routing)
        if routing.bias is not None:
            rank.layers[0].routing = Routing("sigmoid", True, 2.5, 4, 2, mode.from_tensor(routing.bias), by_gate=True)
        rank.reserve(T)
        batch = (torch.rand(T, K), torch.zeros(T, K, dtype=torch.int32), torch.randn(T, E))
        state = (rank.layers[0], rank.phase[:T], rank.token_k[:T], rank.overflow)
        out_weights, out_ids = route(*state, *batch)
        assert out_weights.shape == out_ids.shape == (T, K)
        with pytest.raises(DataDependentOutputException):
            route(*state, *batch, early_out=True)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_unlimited_without_tiers_is_the_router_bit_for_bit(case: Case) -> None:
    rank = case.rank()
    rank.apply(ExpertKnobs(), 2)
    rank.begin_step(np.array(case.phase, np.uint8), 0)
    given_weights, ids = case.router(by_index=False)
    out_weights, out_ids = rank.route(0, given_weights, ids, case.logits)
    assert out_weights.numpy().tobytes() == given_weights.numpy().tobytes()
    assert torch.equal(out_ids, ids)


def test_a_token_with_its_own_k_keeps_its_best_and_the_others_are_untouched() -> None:
    rank = a_rank()
    rows = logits()
    rank.begin_step(phases((PREFILL, T)), 0, np.array([0, 1, 2, 3] * (T // 4), np.int64))
    given_weights, ids = Case(PLAIN, K, rows, (PREFILL,) * T, (0,) * T, ExpertKnobs(), seed=5).router()
    out_weights, out_ids = rank.route(0, given_weights, ids, rows)
    best = torch.sort(rows, dim=1, descending=True).indices
    for t, k in enumerate([3, 1, 2, 3] * (T // 4)):
        assert chosen_sets(out_ids)[t] == set(best[t, :k].tolist())
        assert float(out_weights[t].sum()) == pytest.approx(1.0)
    kept = [t for t in range(T) if t % 4 in (0, 3)]
    assert out_weights[kept].numpy().tobytes() == given_weights[kept].numpy().tobytes()
    assert torch.equal(out_ids[kept], ids[kept])
    assert rank.layers[0].demand.tolist() == rank.layers[0].assigned.tolist() == load(out_ids)
    assert int(rank.layers[0].demand.sum()) == (3 + 1 + 2 + 3) * (T // 4)


def test_gamma_is_by_layer() -> None:
    rank = a_rank(layers=2)
    rank.apply(ExpertKnobs(overflow=Overflow.DROP, capacity_factor_prefill=Decimal(1)), 1)
    rank.layers[1].gamma_micro.copy_(torch.tensor([1_500_000, 0]))
    rank.begin_step(phases((PREFILL, T)), 0)
    loads = [max(load(routed(rank, logits(), layer)[1])) for layer in range(2)]
    assert loads == [-(-T * K // E), -(-3 * T * K // (2 * E))]


def test_only_tokens_of_the_step_are_counted() -> None:
    rank = a_rank()
    rank.apply(SETTINGS[1], 1)
    routed(rank, logits(count=40))  # warm-up, longer than any batch so far
    assert int(rank.layers[0].tokens) == 0
    rank.begin_step(phases((PREFILL, 5), (DECODE, 3)), generated=3)
    _, ids = routed(rank, logits(count=40))  # padded to a size that a graph was made for
    assert int(rank.layers[0].tokens) == 8
    assert rank.layers[0].assigned.tolist() == load(ids[:8])
    assert int(rank.layers[0].max_prefill_load) == max(load(ids[:5])) <= -(-5 * K // E)
    rank.end_step(0.5)
    routed(rank, logits(count=40))  # a rank without work runs a batch that is nobody's
    rank.begin_step(phases((DECODE, 2)), generated=2)
    routed(rank, logits(count=40))
    assert int(rank.layers[0].tokens) == 10
    assert (rank.steps, rank.prompt_tokens, rank.generated_tokens) == (2, 5, 5)


def test_tensors_stay_where_they_are_between_steps() -> None:
    rank = a_rank()
    rank.reserve(64)
    layer = rank.layers[0]
    held = [rank.phase, rank.token_k, rank.overflow, layer.gamma_micro, layer.demand, layer.assigned, layer.dropped]
    before = [tensor.data_ptr() for tensor in held]
    for version, knobs in enumerate(SETTINGS, start=1):
        rank.apply(knobs, version)
        rank.begin_step(phases((PREFILL, 40)), 0, np.ones(40, np.int64))
        routed(rank, logits(count=40))
        rank.end_step(0.0)
    held = [rank.phase, rank.token_k, rank.overflow, layer.gamma_micro, layer.demand, layer.assigned, layer.dropped]
    assert [tensor.data_ptr() for tensor in held] == before
    assert not rank.phase.any()
    assert not rank.token_k.any()


def test_an_empty_batch_passes() -> None:
    rank = a_rank()
    rank.apply(SETTINGS[1], 1)
    rank.begin_step(phases((PREFILL, 0)), 0)
    out_weights, out_ids = rank.route(0, torch.zeros(0, K), torch.zeros(0, K, dtype=torch.int32), torch.zeros(0, E))
    assert out_weights.shape == out_ids.shape == (0, K)


FEW = {"perToken": {"free": 2}}
CAPPED = {"overflow": "Reroute", "capacityFactorPrefill": "1"}


@pytest.mark.parametrize(
    ("knobs", "layer", "words"),
    [
        ({"perToken": {"gold": 4}}, {}, r"experts\.perToken: 4 for tier gold; layer moe\.0 has 1 to 3"),
        ({"perToken": {"gold": 0}}, {}, r"experts\.perToken: 0 for tier gold"),
        (FEW, {"routing": None, "why_unknown": "hash-routed"}, r"experts\.perToken: .* counted only \(hash"),
        (FEW, {"bypassed": "monolithic kernel"}, r"experts\.perToken: .* bypasses the router \(monolithic"),
        ({**CAPPED, **FEW, "capacityFactorDecode": "0.4"}, {}, r"capacityFactor\.decode: .*at least 0\.5"),
        ({**CAPPED, "capacityFactorPrefill": "0.3"}, {}, r"capacityFactor\.prefill: .*at least 0\.3333"),
        ({**CAPPED, "capacityFactorByLayer": {"2": {"prefill": "2"}}}, {}, r"no MoE layer 2; there are 0 to 1"),
        ({"capacityFactorByLayer": {"7": {}}}, {}, r"experts\.capacityFactorByLayer: no MoE layer 7"),
        (
            {**CAPPED, **FEW, "capacityFactorByLayer": {"1": {"decode": "0.4"}}},
            {},
            r"capacityFactorByLayer\[1\]\.decode: .*at least 0\.5",
        ),
        (CAPPED, {"routing": None, "why_unknown": "hash-routed"}, r"experts\.overflow: .* counted only \(hash"),
        (CAPPED, {"bypassed": "monolithic kernel"}, r"experts\.overflow: .* bypasses the router \(monolithic"),
    ],
    ids=[
        "k above the model's", "k of nothing", "k where scores are unknown", "k where bypassed",
        "γ · min k < 1 by tier", "γ · k < 1",
        "γ of a layer that is not there", "even where nothing is capped", "γ of a layer too low",
        "capacity where scores are unknown", "capacity where bypassed",
    ],
)  # fmt: skip
def test_knobs_that_a_layer_cannot_follow_are_refused_whole(
    knobs: dict[str, Any], layer: dict[str, Any], words: str
) -> None:
    rank = a_rank(layers=2)
    before = ExpertKnobs(overflow=Overflow.DROP, capacity_factor_decode=Decimal(2))
    rank.apply(before, 1)
    for name, value in layer.items():
        setattr(rank.layers[0], name, value)
    with pytest.raises(KnobsRefused, match=words):
        rank.apply(ExpertKnobs.model_validate(knobs), 2)
    assert (rank.knobs, rank.knobs_version) == (before, 1)
    assert [each.gamma_micro.tolist() for each in rank.layers] == [[0, 2_000_000]] * 2


def test_a_layer_holds_its_own_capacity_and_the_others_the_common_one() -> None:
    rank = a_rank(layers=3)
    by_layer = {"1": {"prefill": "1.5", "decode": "1.5"}, "2": {}}
    rank.apply(ExpertKnobs.model_validate({**CAPPED, "capacityFactorByLayer": by_layer}), 1)
    assert [layer.gamma_micro.tolist() for layer in rank.layers] == [[1_000_000, 0], [1_500_000, 1_500_000], [0, 0]]
    rows = logits()
    rank.begin_step(phases((PREFILL, T)), 0)
    held = [max(load(routed(rank, rows, layer)[1])) for layer in range(3)]
    mean = T * K / E
    assert held[0] <= math.ceil(mean) < held[1] <= math.ceil(1.5 * mean) < held[2]
    rank.apply(ExpertKnobs.model_validate(CAPPED), 2)
    assert [layer.gamma_micro.tolist() for layer in rank.layers] == [[1_000_000, 0]] * 3


def test_k_of_the_model_itself_is_accepted_where_nothing_can_be_cut() -> None:
    rank = a_rank(routing=None, why="hash-routed")
    rank.apply(ExpertKnobs(per_token={"gold": K}), 1)
    assert rank.knobs.per_token == {"gold": K}
    rank.begin_step(phases((PREFILL, T)), 0)
    routed(rank, logits())
    assert int(rank.layers[0].demand.sum()) == T * K


def test_older_knobs_change_nothing() -> None:
    rank = a_rank()
    rank.apply(SETTINGS[1], 5)
    rank.apply(SETTINGS[3], 5)
    rank.apply(SETTINGS[3], 4)
    assert (rank.knobs, rank.knobs_version) == (SETTINGS[1], 5)
    assert rank.layers[0].gamma_micro.tolist() == [1_000_000, 0]
