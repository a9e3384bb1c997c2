"""Capacity on two ranks that share experts is capacity on one, bit for bit, in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.wire import ExpertKnobs, Overflow

torch = pytest.importorskip("torch")
from moe_serving.scores import Routing  # noqa: E402
from tests.serving.capacity_cases import Case, cases  # noqa: E402
from tests.serving.two_ranks import RANKS, Batch, Shape, TwoRanks  # noqa: E402

CAPPED = st.sampled_from([Overflow.REROUTE, Overflow.DROP, Overflow.EXPERT_CHOICE])


@pytest.fixture(scope="module")
def ranks() -> Iterator[TwoRanks]:
    two = TwoRanks()
    yield two
    two.close()


def batch_of(case: Case, layer: int = 0) -> Batch:
    weights, ids = case.router()
    phase, k = (np.array(values, np.int64) for values in (case.phase, case.k))
    return Batch(layer, phase, k, case.logits.numpy(), weights.numpy(), ids.numpy())


@settings(max_examples=300, deadline=None)
@given(case=cases(CAPPED), placement=st.sampled_from(["linear", "round robin"]))
def test_two_ranks_decide_what_one_does(ranks: TwoRanks, case: Case, placement: str) -> None:
    if not case.phase:
        return
    shape = Shape.of(case.experts, case.top_k, case.routing, placement)
    ranks.agree_with_one([shape], [batch_of(case)], case.knobs)


@pytest.mark.parametrize("overflow", [Overflow.REROUTE, Overflow.DROP, Overflow.EXPERT_CHOICE], ids=lambda o: o.value)
@pytest.mark.parametrize("gamma", ["0.5", "1", "1.25", "2"])
@pytest.mark.parametrize(
    ("experts", "top_k", "routing"),
    [
        (64, 6, Routing("softmax", True)),
        (16, 4, Routing("sigmoid", True, 2.5, 4, 2, torch.linspace(-0.1, 0.1, 16), by_gate=True)),
    ],
    ids=["softmax", "groups and a bias"],
)
def test_where_capacity_binds(
    ranks: TwoRanks, overflow: Overflow, gamma: str, experts: int, top_k: int, routing: Routing
) -> None:
    """Long skewed batches of two layers, prefill and decode in one step, some tokens with a k of their tier."""
    gammas = {"capacity_factor_prefill": Decimal(gamma), "capacity_factor_decode": Decimal(gamma) * 2}
    knobs = ExpertKnobs(overflow=overflow, per_token={"least": 2}, **gammas)
    generator = torch.Generator().manual_seed(experts)
    count = 300
    phase = tuple(1 if token % 3 else 2 for token in range(count))
    k = tuple(2 if token % 5 == 0 else 0 for token in range(count))
    skew = torch.linspace(2, -2, experts)
    layers = [torch.randn(count, experts, generator=generator) + skew for _ in range(2)]
    batches = [
        batch_of(Case(routing, top_k, logits, phase, k, knobs), layer)
        for _ in range(2)
        for layer, logits in enumerate(layers)
    ]
    shapes = [Shape.of(experts, top_k, routing)] * 2
    one = ranks.agree_with_one(shapes, batches, knobs)
    assert all(int(layer["rerouted"]) + int(layer["dropped"]) > 0 for layer in one.counters), "it never bound"
    owned = sum(int(one.counters[0]["assigned"][shapes[0].owner(rank).numpy()].sum()) for rank in range(RANKS))
    assert owned == int(one.counters[0]["assigned"].sum())


def test_a_difference_of_one_bit_is_seen(ranks: TwoRanks) -> None:
    logits = torch.linspace(-1, 1, 64).view(8, 8)
    case = Case(Routing("softmax", True), 2, logits, (1,) * 8, (0,) * 8, ExpertKnobs())
    shapes, batch = [Shape.of(8, 2, case.routing)], batch_of(case)
    one = ranks.agree_with_one(shapes, [batch], case.knobs)
    weights = batch.weights.copy()
    weights[3, 1] = np.nextafter(weights[3, 1], np.float32(2))
    (other, _) = ranks.play(shapes, [replace(batch, weights=weights)], case.knobs)
    assert one.differences(other)[0] == "batch 0: weights"
