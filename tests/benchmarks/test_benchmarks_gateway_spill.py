"""The benchmark's parts: its oracle pays no more than a policy that attains everything, its twins tell the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gateway_spill import interval, skill
from benchmarks.gateway_spill_oracle import bound, dollars
from benchmarks.gateway_spill_twin import TwinRun, missed
from moe_core.forecast import SpillContext
from moe_core.spill import Action, Decision, Reason
from moe_planner.sim.engine import Engine
from moe_planner.sim.policy import Policy
from moe_planner.sim.simulate import simulate
from moe_planner.sim.workload import Workload
from moe_planner.sim.world import LOCAL, Api, Outage, Slo, World

ENGINE = Engine(1 / 8000, 0.01, 0.0002, kv_tokens=200_000, max_active=64, max_batched_tokens=512)
API = Api("api", 0.3, 0.31, 0.01, 5.0, 30.0)
WORLD = World(ENGINE, Slo(1.0, 0.1), apis=(API,))


def workload(seed: int, count: int, rate: float) -> Workload:
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / rate, count))
    return Workload(at, rng.integers(50, 3000, count), rng.integers(1, 60, count))


def thrifty(keep: frozenset[int], at: dict[float, int]) -> Policy:
    """Local for the requests named, an API for the rest."""

    def decide(context: SpillContext, state: object) -> tuple[Decision, object]:
        here = at[context.now_s] in keep
        action, target = (Action.LOCAL, LOCAL) if here else (Action.SPILL, "api")
        return Decision(action, Reason.WITHIN_SLO, target), state

    return Policy(decide=decide, state=None)


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_that_attains_everything_pays_less_than_the_oracle(seed: int) -> None:
    """A clairvoyant search: drop what misses, cheapest work first, until all that stay are within their promise."""
    load = workload(seed, 60, 12.0)
    of = {at: n for n, at in enumerate(load.at_s.tolist())}
    keep = frozenset(range(len(load)))
    rng = np.random.default_rng(seed)
    while True:
        result = simulate(load, WORLD, thrifty(keep, of), seed=seed)
        late = [n for n in keep if not result.attained[n]]
        if not late:
            break
        keep -= {int(rng.choice(late))}
    assert result.preemptions == 0
    least = bound(WORLD, load, seed)
    assert least.usd <= result.api_usd + 1e-6
    assert result.api_usd == pytest.approx(dollars(WORLD, load)[sorted(set(range(60)) - keep)].sum())


def test_the_oracle_pays_nothing_for_little_and_something_for_too_much() -> None:
    assert bound(WORLD, workload(1, 40, 0.5), 1).usd == 0.0
    flood = bound(WORLD, workload(1, 400, 40.0), 1)
    assert flood.usd > 0.5 * dollars(WORLD, workload(1, 400, 40.0)).sum()


def test_an_outage_makes_the_bound_higher_not_lower() -> None:
    load = workload(3, 120, 5.0)
    down = replace(WORLD, outages=(Outage(0, 5.0, 15.0),))
    assert bound(down, load, 3).usd >= bound(WORLD, load, 3).usd


def test_a_twin_says_what_the_replica_would_have_done() -> None:
    """Where one request alone goes elsewhere, its twin must tell what a run with it shows."""
    load = workload(5, 80, 6.0)
    of = {at: n for n, at in enumerate(load.at_s.tolist())}
    everything = frozenset(range(len(load)))
    all_local = simulate(load, WORLD, thrifty(everything, of), seed=0)
    for spilled in range(5, 80, 5):
        run = TwinRun(load, WORLD, thrifty(everything - {spilled}, of), 0)
        run.loop(None, None)
        assert [missed(run, twin) for twin in run.twins] == [not all_local.attained[spilled]]


def test_skill_is_1_for_a_prophet_and_0_for_the_base_rate() -> None:
    came = np.array([True, False, False, False])
    even = np.ones(4)
    assert skill(came.astype(float), came, even)[0] == 1.0
    assert skill(np.full(4, 0.25), came, even)[0] == pytest.approx(0.0)


def test_the_interval_holds_the_sum() -> None:
    at = np.arange(600.0)
    low, high = interval(at, np.full(600, 0.1))
    assert low == pytest.approx(60.0) == high
