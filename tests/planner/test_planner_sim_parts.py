"""Workloads, expert load, gateway and knobs of the simulator."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.forecast import SpillContext
from moe_core.setting import Setting
from moe_core.spill import Action, Decision, Reason
from moe_core.wire import EngineKnobs, ExpertKnobs, Overflow
from moe_planner.sim.experts import Drift, Experts, load_over_time, slot_shares
from moe_planner.sim.policy import PLAIN, ControlContext, Policy
from moe_planner.sim.result import Outcome
from moe_planner.sim.simulate import simulate
from moe_planner.sim.workload import Arrivals, Lengths, Spikes, Workload, WorkloadInvalid, generate, read_trace
from moe_planner.sim.world import Outage
from tests.planner.sim_world import api, engine, rows, world

SAME = Lengths(10, 10)

# Workloads


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(shape: float) -> None:
    gaps = np.diff(generate(Arrivals(4000, 10, SAME, SAME, shape), 1).at_s)
    assert len(gaps) == pytest.approx(40_000, rel=0.03)
    # A Gamma distribution's coefficient of variation is 1/√shape.
    assert gaps.std() / gaps.mean() == pytest.approx(shape**-0.5, rel=0.05)


def test_redrawing_the_shape_leaves_the_rate() -> None:
    drawn = generate(Arrivals(8000, 5, SAME, SAME, 0.3, shape_every_s=60), 2)
    assert len(drawn) == pytest.approx(40_000, rel=0.04)
    assert np.all(np.diff(drawn.at_s) >= 0)


def test_spikes_multiply_the_rate_for_their_seconds() -> None:
    quiet = generate(Arrivals(36_000, 2, SAME, SAME), 3)
    spiky = generate(Arrivals(36_000, 2, SAME, SAME, spikes=Spikes(12, 4.0, (10, 30))), 3)
    # 12 an hour of 20 s on average, each with three times the rate on top: 1 + 12·20/3600·3 = 1.2.
    assert len(spiky) / len(quiet) == pytest.approx(1.2, rel=0.06)


def test_lengths_have_the_median_and_the_99th_percentile_asked_for() -> None:
    drawn = Lengths(700, 6000).draw(np.random.default_rng(0), 200_000)
    assert np.median(drawn) == pytest.approx(700, rel=0.02)
    assert np.quantile(drawn, 0.99) == pytest.approx(6000, rel=0.05)


TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:05.5,8,9\n2023-11-16 18:17:03.9799600,4808,10\n"


def test_a_trace_is_read_in_order_from_its_first_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    read = read_trace(path).faster(2)
    assert read.at_s.tolist() == pytest.approx([0.0, 0.76002], abs=1e-5)
    assert read.input_tokens.tolist() == [4808, 8]


BAD_TRACES = {
    "other columns": ("a,b\n1,2\n", "columns"),
    "no request": ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
    "a word for a number": (TRACE + "2023-11-16 18:17:06,x,1\n", "line 4"),
    "a time that is none": (TRACE + "nan,1,1\n", "line 4"),
    "half a row": (TRACE + "2023-11-16 18:17:06\n", "line 4"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    text, says = BAD_TRACES[name]
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(WorkloadInvalid, match=says):
        read_trace(path)


def test_a_workload_out_of_order_is_refused() -> None:
    with pytest.raises(WorkloadInvalid, match="at_s"):
        Workload(np.array([1.0, 0.0]), np.array([1, 1]), np.array([1, 1]))


# Experts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=64), st.integers(1, 4))
def test_no_expert_gets_more_than_one_slot_of_a_token(popularity: list[float], top_k: int) -> None:
    shares = slot_shares(np.array(popularity), top_k)
    assert shares.sum() == pytest.approx(1.0)
    assert shares.max() <= 1.0 / top_k + 1e-6


@settings(max_examples=50, deadline=None)
@given(st.floats(0.0, 1.5), st.integers(0, 20), st.sampled_from(["1", "1.1", "1.25", "2"]))
def test_capacity_bounds_the_busiest_rank_and_rerouting_keeps_every_slot(zipf: float, seed: int, gamma: str) -> None:
    load = load_over_time(Experts(32, 4, 4, zipf), 10.0, seed)
    free = load.balance(0)
    factor = Decimal(gamma)
    for overflow in (Overflow.REROUTE, Overflow.DROP):
        capped = load.balance(0, ExpertKnobs(overflow=overflow, capacity_factor_prefill=factor))
        assert capped.demand == free.demand
        assert capped.prefill <= min(float(factor), free.demand) + 1e-6 or overflow is Overflow.REROUTE
        assert capped.prefill <= float(factor) + 1e-6
        assert capped.decode == free.demand  # decode has a factor of its own
        assert 0.0 <= capped.moved < 1.0
        if overflow is Overflow.REROUTE:
            assert capped.prefill >= 1.0 - 1e-9


def test_topics_and_the_walk_move_the_load() -> None:
    still = load_over_time(Experts(16, 2, 4, 1.0), 3600.0, 1)
    moving = load_over_time(Experts(16, 2, 4, 1.0, Drift(0.2, 6.0, (0.4, 1.3))), 3600.0, 1)
    assert len(still.from_s) == 1
    assert len(moving.from_s) > 240
    assert len({round(moving.balance(i).demand, 6) for i in range(240)}) > 200


def test_skewed_experts_slow_prompts_and_capacity_wins_it_back() -> None:
    requests = rows(*[(i * 0.4, 200, 1) for i in range(20)])
    skewed = world(experts=Experts(16, 2, 4, 1.2))
    capped = Setting(experts=ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal(1)))
    even, slow, back = (
        simulate(requests, around, Policy(decide=PLAIN.decide, state=None, setting=setting)).quantile("ttft_s", 0.5)
        for around, setting in ((world(), Setting()), (skewed, Setting()), (skewed, capped))
    )
    assert slow > 1.2 * even
    assert back == pytest.approx(even, rel=1e-6)


# Gateway and closed APIs


def spill_all(context: SpillContext, state: Any) -> tuple[Decision, Any]:
    """Every request to the first API that has not been tried; the local revision has no part in it."""
    for target in context.targets:
        if target.name not in context.tried:
            return Decision(Action.SPILL, Reason.SLO_PREDICTED, target.name), state
    return Decision(Action.SHED, Reason.OVERLOAD), state


SPILL_ALL = Policy(decide=spill_all, state=None)


def test_a_spilled_request_costs_its_tokens_at_the_price() -> None:
    result = simulate(rows((0.0, 1000, 100)), world(apis=(api(),)), SPILL_ALL)
    assert list(result.outcome) == [Outcome.API]
    assert result.api_usd == pytest.approx((1000 * 5 + 100 * 30) / 1e6)
    assert result.itl_s[0] == pytest.approx(0.01)


def test_requests_beyond_the_limit_of_a_minute_go_to_the_next_api_or_fail() -> None:
    two = (api(requests_per_minute=3.0), api(name="claude", requests_per_minute=2.0))
    result = simulate(rows(*[(i * 0.1, 10, 1) for i in range(7)], (61.0, 10, 1)), world(apis=two), SPILL_ALL)
    assert list(result.outcome) == [Outcome.API] * 5 + [Outcome.FAILED] * 2 + [Outcome.API]
    assert list(result.where) == [0, 0, 0, 1, 1, -1, -1, 0]


def test_an_outage_of_the_api_fails_over() -> None:
    down = api(outages=((0.0, 10.0),))
    result = simulate(rows((1.0, 10, 1), (11.0, 10, 1)), world(apis=(down,)), SPILL_ALL)
    assert list(result.outcome) == [Outcome.FAILED, Outcome.API]


def test_production_spills_under_overload_and_keeps_more_of_the_slo_than_never_spilling() -> None:
    busy = generate(Arrivals(120, 30, Lengths(40, 120), Lengths(20, 60), 0.5), 4)
    around = world(apis=(api(),))
    spilled, plain = simulate(busy, around), simulate(busy, around, PLAIN)
    assert spilled.count(Outcome.API) > 100
    assert spilled.attainment > plain.attainment + 0.2


def test_without_budget_production_spends_nothing() -> None:
    busy = generate(Arrivals(60, 30, Lengths(40, 120), Lengths(20, 60)), 4)
    assert simulate(busy, world(apis=(api(),), budget_usd=0.0)).api_usd == 0.0


def test_while_every_replica_is_down_requests_go_to_the_api() -> None:
    around = world(apis=(api(),), outages=(Outage(0, 1.0, 5.0),))
    result = simulate(rows(*[(i * 0.5, 10, 2) for i in range(20)]), around)
    assert {int(o) for o in result.outcome[2:10]} == {Outcome.API}
    assert result.outcome[-1] == Outcome.LOCAL
    assert result.attainment == 1.0


def test_the_forecast_is_kept_for_each_request_that_had_one() -> None:
    result = simulate(rows((0.0, 10, 2), (0.1, 10, 2)), world())
    assert np.all((result.p_miss >= 0) & (result.p_miss <= 1))


# Knobs


def test_a_control_sees_signals_and_its_knobs_act_after_the_delay() -> None:
    seen: list[ControlContext] = []

    def one_sequence(context: ControlContext, ticks: int) -> tuple[Setting | None, int]:
        seen.append(context)
        return Setting(engine=EngineKnobs(max_active_seqs=1)) if ticks == 4 else None, ticks + 1

    policy = Policy(decide=PLAIN.decide, state=None, control=one_sequence, control_state=0, control_delay_s=2.0)
    busy = generate(Arrivals(30, 8, Lengths(10, 10), Lengths(20, 20)), 5)
    result = simulate(busy, world(), policy)
    assert [round(at) for at, _ in result.settings] == [7]  # the fifth tick is at 5 s
    assert "maxActiveSeqs 1" in result.settings[0][1]
    assert seen[3].signals.active_limit == 8
    assert seen[9].signals.active_limit == 1
    assert seen[3].signals.completed_per_s == pytest.approx(8, rel=0.6)
    assert max(context.signals.waiting or 0 for context in seen) > 3


def test_windows_add_up_to_the_whole() -> None:
    result = simulate(generate(Arrivals(50, 10, SAME, SAME), 6), world(), PLAIN)
    windows = result.windows(10.0)
    assert len(windows) == 5
    assert sum(w["arrivals"] for w in windows) == len(result.workload)
    assert sum(w["arrivals"] * w["attainment"] for w in windows) == pytest.approx(result.attained.sum())


def test_rent_and_utilisation() -> None:
    result = simulate(rows((0.0, 10, 1), (0.99, 10, 1)), world(usd_per_hour=3600.0, replicas=2), PLAIN)
    assert result.rent_usd == pytest.approx(2.0)
    assert result.utilisation == pytest.approx(0.020 / 2.0)
    assert engine().blocks == 64
