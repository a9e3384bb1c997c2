"""The arithmetic of `benchmarks.skew`: who lies where, what won back is measured by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.skew import verdict
from benchmarks.skew_trained import balanced, by_load

LOADS = st.lists(st.integers(0, 10_000), min_size=8, max_size=8)


def heaviest(order: list[int], loads: list[int], ranks: int) -> int:
    owned = len(loads) // ranks
    return max(sum(loads[e] for e in order[first : first + owned]) for first in range(0, len(loads), owned))


@given(LOADS, st.sampled_from([1, 2, 4]))
def test_placements_hold_each_expert_once_and_balance_never_makes_it_worse(loads: list[int], ranks: int) -> None:
    for order in (by_load(loads), balanced(loads, ranks)):
        assert sorted(order) == list(range(len(loads)))
    assert heaviest(balanced(loads, ranks), loads, ranks) <= heaviest(by_load(loads), loads, ranks)


def test_verdict_by_hand() -> None:
    base = {"tokens_per_s": 500.0, "slots_by_rank": [80, 20], "experts_share_of_step": 0.5, "perplexity": 50.0}
    capped = {"tokens_per_s": 600.0, "slots_by_rank": [40, 60], "experts_share_of_step": 0.4, "perplexity": 51.0}
    found = verdict({"tokens_per_s": 1000.0}, {"unlimited": base, "reroute": capped})
    assert found["fall"] == 0.5
    # Half of a step is experts, and the busier rank has 60 slots for 80: 1 / (0.5 + 0.5 × 0.75).
    assert found["won_back"]["reroute"] == {
        "speedup": 1.2,
        "bound": pytest.approx(1.143, abs=1e-3),
        "over_bound": 1.05,
        "of_even": 0.6,
        "ppl_delta": 0.02,
    }
