"""The clairvoyant search: what it finds holds in the simulator, and costs no less than the oracle's bound."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gateway_spill_oracle import bound, dollars
from benchmarks.gateway_spill_reach import reach
from tests.benchmarks.test_benchmarks_gateway_spill import WORLD, workload


@pytest.mark.parametrize("seed", range(3))
def test_what_is_reached_keeps_every_promise_and_lies_above_the_bound(seed: int) -> None:
    load = workload(seed, 80, 12.0)
    found = reach(load, WORLD, seed)
    assert found.local_misses == 0
    assert bound(WORLD, load, seed).usd <= found.usd + 1e-6
    assert found.usd == pytest.approx(dollars(WORLD, load)[found.spilled].sum())
    assert found.usd < dollars(WORLD, load).sum()


def test_it_takes_back_what_need_not_have_been_spilled() -> None:
    load = workload(1, 60, 1.0)
    everything = np.ones(len(load), dtype=bool)
    assert reach(load, WORLD, 1, everything).usd < dollars(WORLD, load).sum()
    assert reach(load, WORLD, 1).usd == 0.0
