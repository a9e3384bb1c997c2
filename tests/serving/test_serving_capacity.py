"""Vectorised capacity against the plain reference, on any router output."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.capacity import CapacityRefused, Tokens, assign, capacity
from moe_core.wire import Overflow

torch = pytest.importorskip("torch")
from moe_serving import capacity as fast  # noqa: E402

CAPPED = [Overflow.REROUTE, Overflow.DROP, Overflow.EXPERT_CHOICE]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tokens, Decimal]:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    experts = groups * draw(st.integers(1, 4)) * (2 if groups == 1 else 1)
    count = draw(st.integers(1, 24))
    open_groups = draw(st.integers(1, groups))
    most = min(experts // groups * open_groups, 4)
    k = [draw(st.integers(1, most)) for _ in range(count)]
    # Few distinct values make ties common; a skewed offset makes overload common.
    value = st.integers(0, 6).map(lambda v: v / 8)
    skew = [draw(st.integers(0, 3)) for _ in range(experts)]
    selection = [[draw(value) + skew[e] for e in range(experts)] for _ in range(count)]
    gate = [[abs(x) + 0.125 for x in row] for row in selection]
    allowed = None
    if groups > 1:
        allowed = [frozenset(draw(st.permutations(range(groups)))[:open_groups]) for _ in range(count)]
    low = int(Decimal(1000) / min(k)) + 1
    gamma = Decimal(draw(st.integers(low, 2600))) / 1000
    return Tokens(selection, gate, k, groups, allowed), gamma


def run_fast(tokens: Tokens, overflow: Overflow, gamma: Decimal, early_out: bool = False) -> fast.Capped:
    selection = torch.tensor(tokens.selection, dtype=torch.float32)
    allowed = None
    if tokens.allowed_groups is not None:
        size = selection.shape[1] // tokens.groups
        allowed = torch.tensor(
            [[e // size in groups for e in range(selection.shape[1])] for groups in tokens.allowed_groups]
        )
    plain = assign(tokens, Overflow.UNLIMITED, None)
    width = max(tokens.k)
    chosen = torch.tensor([[*row, *([-1] * (width - len(row)))] for row in plain.experts])
    scores = fast.Scores(selection, torch.tensor(tokens.gate), allowed, tokens.groups)
    limits = fast.Limits(torch.tensor(fast.MODES[overflow]), torch.tensor([int(gamma * 1_000_000), 0]))
    k = torch.tensor(tokens.k)
    return fast.assign(scores, chosen, k, torch.full_like(k, fast.PREFILL), limits, early_out=early_out)


@pytest.mark.parametrize("early_out", [False, True])
@pytest.mark.parametrize("overflow", CAPPED)
@settings(max_examples=400, deadline=None)
@given(batch=batches())
def test_vectorised_equals_reference(overflow: Overflow, early_out: bool, batch: tuple[Tokens, Decimal]) -> None:
    tokens, gamma = batch
    want = assign(tokens, overflow, gamma)
    got = run_fast(tokens, overflow, gamma, early_out)
    assert [tuple(e for e in row if e >= 0) for row in got.experts.tolist()] == list(want.experts)
    assert (int(got.capacity[0]), int(got.dropped), int(got.rerouted), int(got.overflow_kept)) == (
        want.capacity,
        want.dropped,
        want.rerouted,
        want.overflow_kept,
    )
    assert got.lost_gate_mass.tolist() == pytest.approx(want.lost_gate_mass, abs=1e-5)


@pytest.mark.parametrize("overflow", CAPPED)
@settings(max_examples=300, deadline=None)
@given(batch=batches())
def test_rules_hold(overflow: Overflow, batch: tuple[Tokens, Decimal]) -> None:
    tokens, gamma = batch
    result = assign(tokens, overflow, gamma)
    experts = len(tokens.selection[0])
    assert result.capacity == capacity(gamma, sum(tokens.k), experts)
    assert all(row for row in result.experts), "a token was left without an expert"
    assert all(len(row) == len(set(row)) <= k for row, k in zip(result.experts, tokens.k, strict=True))
    excess = sum(max(0, load - result.capacity) for load in result.load(experts))
    assert excess <= result.overflow_kept
    if tokens.allowed_groups is None:
        assert result.overflow_kept == 0
        assert max(result.load(experts)) <= result.capacity
    else:
        size = experts // tokens.groups
        for row, groups in zip(result.experts, tokens.allowed_groups, strict=True):
            assert {e // size for e in row} <= groups
    assert result.dropped + sum(len(row) for row in result.experts) == sum(tokens.k)
    assert all(0.0 <= lost <= 1.0 for lost in result.lost_gate_mass)


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


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 0.0])
def test_degenerate_logits_are_defined(fill: float) -> None:
    tokens = Tokens([[fill] * 4] * 6, [[0.25] * 4] * 6, [2] * 6)
    want = assign(tokens, Overflow.REROUTE, Decimal(1))
    got = run_fast(tokens, Overflow.REROUTE, Decimal(1))
    assert [tuple(e for e in row if e >= 0) for row in got.experts.tolist()] == list(want.experts)
    assert max(want.load(4)) <= 3
