"""Vectorised capacity: equal to the plain reference on any router output, and true to the rules by themselves."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.capacity import CapacityRefused, Tokens, assign, capacity
from moe_core.wire import ExpertKnobs, Overflow

torch = pytest.importorskip("torch")
from moe_serving import capacity as fast  # noqa: E402
from moe_serving.cpu_experts import _map_local  # noqa: E402
from moe_serving.route import Layer, route  # noqa: E402
from moe_serving.scores import Routing, scores, weights  # noqa: E402
from tests.serving.capacity_cases import PHASES, Case, cases, chosen_sets  # noqa: E402

CAPPED = st.sampled_from([Overflow.REROUTE, Overflow.DROP, Overflow.EXPERT_CHOICE])


def routed(case: Case, early_out: bool, by_index: bool = True) -> tuple[Layer, torch.Tensor, torch.Tensor]:
    """The layer after the batch, and the batch's weights and experts."""
    rank = case.rank()
    count = len(case.phase)
    given_weights, ids = case.router(by_index)
    out = route(
        rank.layers[0],
        rank.phase[:count],
        rank.token_k[:count],
        rank.overflow,
        given_weights,
        ids,
        case.logits,
        early_out,
    )
    return rank.layers[0], *out


def equals_reference(case: Case, early_out: bool) -> None:
    layer, out_weights, out_ids = routed(case, early_out)
    original_weights, original_ids = case.router()
    want = case.reference()
    demand, assigned = ([0] * case.experts for _ in range(2))
    for phase, assignment in want.items():
        rows = case.rows(phase)
        assert chosen_sets(out_ids[rows]) == [set(row) for row in assignment.experts]
        for counts, choices in (
            (demand, assign(case.tokens(rows), Overflow.UNLIMITED, None).experts),
            (assigned, assignment.experts),
        ):
            for expert in (e for row in choices for e in row):
                counts[expert] += 1
    assert (layer.demand.tolist(), layer.assigned.tolist()) == (demand, assigned)
    assert int(layer.tokens) == sum(p != fast.PADDING for p in case.phase)
    assert int(layer.max_prefill_load) == max(want[fast.PREFILL].load(case.experts))
    for name in ("dropped", "rerouted", "overflow_kept"):
        assert int(getattr(layer, name)) == sum(getattr(a, name) for a in want.values()), name
    assert float(layer.lost_gate_mass) == pytest.approx(sum(sum(a.lost_gate_mass) for a in want.values()), abs=1e-4)

    # A token that keeps its experts keeps its weights bit by bit; another's are renewed by the model's own rule.
    same = torch.tensor(
        [a == b for a, b in zip(chosen_sets(out_ids), chosen_sets(original_ids), strict=True)], dtype=torch.bool
    )
    renewed = weights(case.routing, scores(case.routing, case.logits).gate, out_ids.long())
    want_weights = torch.where(same.view(-1, 1), original_weights, renewed)
    assert torch.equal(torch.nan_to_num(out_weights), torch.nan_to_num(want_weights))
    assert torch.equal(out_ids[same], original_ids[same])
    assert bool((torch.nan_to_num(out_weights)[out_ids < 0] == 0).all())


def rules_hold(case: Case, early_out: bool, by_index: bool) -> None:
    layer, _, out_ids = routed(case, early_out, by_index)
    _, original = case.router(by_index)
    held, k = chosen_sets(out_ids), case.k_in_force()
    real = [t for t, p in enumerate(case.phase) if p != fast.PADDING]
    assert all(1 <= len(held[t]) <= k[t] for t in real), "a token was left without an expert, or has more than its k"
    assert [sum(e >= 0 for e in row) for row in out_ids.tolist()] == [len(row) for row in held], "an expert twice"
    excess = 0
    for phase in PHASES:
        rows, gamma = case.rows(phase), case.gamma(phase)
        if gamma is None:
            continue
        limit = math.ceil(Fraction(gamma) * sum(k[t] for t in rows) / case.experts)
        load = [sum(e in held[t] for t in rows) for e in range(case.experts)]
        excess += sum(max(0, slots - limit) for slots in load)
    assert excess <= int(layer.overflow_kept)
    if case.routing.groups == 1:
        assert int(layer.overflow_kept) == 0
    size = case.experts // case.routing.groups
    assert all(len({e // size for e in held[t]}) <= case.routing.groups_per_token for t in real)
    asked = sum(k[t] for t in real)
    assert int(layer.dropped) + int(layer.assigned.sum()) == asked == int(layer.demand.sum())
    assert 0.0 <= float(layer.lost_gate_mass) <= len(real) + 1e-6
    untouched = [t for t in real if case.gamma(case.phase[t]) is None and not case.k[t]]
    assert torch.equal(out_ids[untouched], original[untouched])
    assert torch.equal(routed(case, early_out, by_index)[2], out_ids), "the same input gave another output"


@pytest.mark.parametrize("early_out", [False, True])
def test_between_tokens_the_gate_decides_and_not_how_large_logits_are(early_out: bool) -> None:
    logits = torch.tensor([[100.0, 99.9], [2.0, -2.0]])  # gates 0.52 and 0.98 of the one expert that both ask for
    layer = Layer(0, "moe.0", 2, 1, Routing("softmax", True))
    layer.gamma_micro.fill_(1_000_000)
    _, ids = route(
        layer,
        torch.full((2,), fast.PREFILL),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor(fast.MODES[Overflow.REROUTE]),
        torch.ones(2, 1),
        torch.zeros(2, 1, dtype=torch.int32),
        logits,
        early_out,
    )
    assert ids.tolist() == [[1], [0]]


def padding_is_irrelevant(case: Case) -> None:
    """More padding, anywhere and with any scores, changes nothing for the others."""
    count = len(case.phase)
    order = list(range(count))
    for place in sorted(((t * 7 + 3) % (count + 1) for t in range(3)), reverse=True):
        order.insert(place, count)  # the row of noise
    batch, (_, ids), rank = scores(case.routing, case.logits), case.router(), case.rank()
    noise = torch.randn(1, case.experts, generator=torch.Generator().manual_seed(case.seed % 1000))
    allowed = None if batch.allowed is None else torch.cat((batch.allowed, noise > 0))[order]
    padded = fast.Scores(
        torch.cat((batch.selection, noise))[order], torch.cat((batch.gate, noise))[order], allowed, batch.groups
    )
    limits = fast.Limits(rank.overflow, rank.layers[0].gamma_micro)
    k, phase = torch.tensor([*case.k_in_force(), case.top_k]), torch.tensor([*case.phase, fast.PADDING])
    chosen = torch.cat((ids.long(), torch.arange(case.top_k).unsqueeze(0)))
    chosen = torch.where(torch.arange(case.top_k) < k.unsqueeze(1), chosen, -1)
    first = fast.assign(batch, chosen[:count], k[:count], phase[:count], limits)
    second = fast.assign(padded, chosen[order], k[order], phase[order], limits)
    kept = [t < count for t in order]
    for name in ("experts", "changed"):
        assert torch.equal(getattr(first, name), getattr(second, name)[kept]), name
    assert torch.allclose(first.lost_gate_mass, second.lost_gate_mass[kept], atol=1e-5)
    for name in ("capacity", "dropped", "rerouted", "overflow_kept"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def ranks_share_the_whole(case: Case, ranks: int) -> None:
    """Every rank sees all tokens and decides alike; what ranks own, be they more than experts, is the whole."""
    first, second = (routed(case, early_out=True) for _ in range(2))
    assert all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(first[1:], second[1:], strict=True)
    )
    ids = first[2]
    parts = torch.zeros_like(ids)
    for rank in range(ranks):
        owned = [expert for expert in range(case.experts) if expert % ranks == rank]
        expert_map = torch.full((case.experts,), -1, dtype=torch.int32)
        expert_map[owned] = torch.arange(len(owned), dtype=torch.int32)
        local = _map_local(ids, expert_map)
        assert bool((local < max(1, len(owned))).all())
        parts += local >= 0
    assert torch.equal(parts, (ids >= 0).to(parts.dtype)), "a slot that no rank computes, or two do"


@settings(max_examples=250, deadline=None)
@given(case=cases(), early_out=st.booleans())
def test_vectorised_equals_reference(case: Case, early_out: bool) -> None:
    equals_reference(case, early_out)


@settings(max_examples=200, deadline=None)
@given(case=cases(CAPPED), early_out=st.booleans(), by_index=st.booleans())
def test_rules_hold_however_the_router_breaks_ties(case: Case, early_out: bool, by_index: bool) -> None:
    rules_hold(case, early_out, by_index)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_padding_is_irrelevant(case: Case) -> None:
    padding_is_irrelevant(case)


@settings(max_examples=60, deadline=None)
@given(case=cases(), ranks=st.integers(1, 16))
def test_ranks_share_the_whole(case: Case, ranks: int) -> None:
    ranks_share_the_whole(case, ranks)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None)
@given(case=cases(), early_out=st.booleans(), by_index=st.booleans(), ranks=st.integers(1, 16))
def test_ten_thousand_router_outputs(case: Case, early_out: bool, by_index: bool, ranks: int) -> None:
    equals_reference(case, early_out)
    rules_hold(case, early_out, by_index)
    padding_is_irrelevant(case)
    ranks_share_the_whole(case, ranks)


def test_capacity_is_exact_where_binary_fractions_are_not() -> None:
    # 1.1 * 160 / 16 is 11.000000000000002 in binary floating point.
    assert capacity(Decimal("1.1"), 160, 16) == 11
    assert int(fast.slots_per_expert(torch.tensor(1_100_000), torch.tensor(160), 16)) == 11


def test_gamma_too_small_for_one_slot_is_refused() -> None:
    with pytest.raises(CapacityRefused, match=r"at least 0\.5000"):
        assign(Tokens([[1.0, 0.0]] * 2, [[1.0, 0.5]] * 2, [2, 2]), Overflow.DROP, Decimal("0.4"))


def test_everyone_wants_one_expert() -> None:
    tokens = Tokens([[3.0, 2.0, 1.0, 0.0]] * 8, [[0.4, 0.3, 0.2, 0.1]] * 8, [2] * 8)
    reroute = assign(tokens, Overflow.REROUTE, Decimal(1))
    assert reroute.load(4) == [4, 4, 4, 4]
    assert reroute.dropped == 0
    drop = assign(tokens, Overflow.DROP, Decimal(1))
    assert drop.load(4) == [4, 4, 0, 0]
    assert drop.dropped == 8


def test_reroute_goes_k_plus_eight_rounds_down_the_ranking() -> None:
    # All 24 tokens rank the last expert first, C is 2. Two rounds give 4 slots, the 20 left over fill experts 0 to 9.
    # Ten rounds then find the room of experts 21 to 14; that of 13 to 10 is out of reach.
    logits = torch.arange(24.0).repeat(24, 1)
    knobs = ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal(1))
    case = Case(Routing("softmax", True), 2, logits, (fast.PREFILL,) * 24, (0,) * 24, knobs)
    for early_out in (False, True):
        layer, _, _ = routed(case, early_out)
        assert layer.assigned.tolist() == [2] * 10 + [0] * 4 + [2] * 10
        assert int(layer.dropped) == 8
    equals_reference(case, early_out=False)


def test_drop_offers_a_token_no_more_than_its_own_k() -> None:
    # All rank expert 3, 2, 1, 0; C = 8/4 = 2. Tokens 0 and 1 share expert 3, tokens 2 and 3 expert 2. What 0 misses
    # is dropped, though expert 1 has room, which is among the choices of token 3 alone.
    knobs = ExpertKnobs(overflow=Overflow.DROP, capacity_factor_prefill=Decimal(1))
    logits = torch.arange(4.0).repeat(4, 1)
    case = Case(Routing("softmax", True), 3, logits, (fast.PREFILL,) * 4, (2, 2, 1, 3), knobs)
    for early_out in (False, True):
        layer, _, out_ids = routed(case, early_out)
        assert chosen_sets(out_ids) == [{3}, {3}, {2}, {1, 2}]
        assert (int(layer.demand.sum()), int(layer.dropped)) == (8, 3)


def test_where_groups_tie_those_of_the_router_are_open() -> None:
    # Four groups of two, one open to each token. All scores are alike: by index group 0 is best, the router took 3.
    ids = torch.tensor([[6, 7]] * 6, dtype=torch.int32)
    knobs = ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal(1))
    routing = Routing("sigmoid", True, groups=4, groups_per_token=1, by_gate=True)
    rank = Case(routing, 2, torch.zeros(6, 8), (fast.PREFILL,) * 6, (0,) * 6, knobs).rank()
    _, out_ids = rank.route(0, torch.full((6, 2), 0.5), ids, torch.zeros(6, 8))
    assert set().union(*chosen_sets(out_ids)) == {6, 7}
    assert (int(rank.layers[0].overflow_kept), int(rank.layers[0].dropped)) == (2, 6)


@pytest.mark.parametrize(
    ("scores_in", "order"),
    [
        ([2.0, -1.0, 0.5, -3.0], [0, 2, 1, 3]),
        ([0.0, -0.0, 0.0, 1e-45], [3, 0, 1, 2]),
        ([float("nan"), float("-inf"), float("inf"), -1e38], [2, 3, 0, 1]),
    ],
    ids=["signs", "zeros alike", "NaN as minus infinity"],
)
def test_experts_are_preferred_by_score_then_by_index(scores_in: list[float], order: list[int]) -> None:
    preferred = fast.preference(torch.tensor([scores_in]), torch.arange(4))[0]
    assert sorted(range(4), key=lambda e: -int(preferred[e])) == order
    assert len(set(preferred.tolist())) == 4
