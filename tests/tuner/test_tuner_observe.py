"""Digests folded into signals: sums, rates over restarts, silence, and what is unknown staying unknown."""

from __future__ import annotations

from decimal import Decimal

import pytest

from moe_core.wire import GatewayDigest, ReplicaDigest, TargetDigest
from moe_tuner.observe import Folded, Observation, Track, fold
from tests.tuner.fakes import replica_digest


def seconds(*ticks: tuple[ReplicaDigest, ...] | None) -> Folded:
    """Fold one reading a second; the last result."""
    track, folded = Track(), None
    for now, replicas in enumerate(ticks):
        folded, track = fold(Observation(replicas, None), track, float(now))
    assert folded is not None
    return folded


def test_lost_gate_mass_is_per_token_over_the_last_seconds_not_since_the_start() -> None:
    ticks = [(replica_digest(seq=n, tokens=1000 * n, lost=900.0),) for n in range(1, 6)]
    last = (replica_digest(seq=6, tokens=6000, lost=950.0),)
    assert seconds(*ticks, last).signals.lost_gate_mass == pytest.approx(50 / 5000)


def test_a_replica_that_restarts_gives_no_negative_rate_and_is_named() -> None:
    before = [(replica_digest(seq=n, tokens=50_000 + n, preemptions=40),) for n in range(1, 4)]
    after = (replica_digest(seq=0, tokens=10, started_at_s=99.0),)
    folded = seconds(*before, after)
    assert folded.restarted == ("r0",)
    assert folded.signals.lost_gate_mass is None
    assert folded.signals.preemptions_per_s is None
    assert folded.signals.running == 2


def test_two_replicas_are_summed_and_the_worst_imbalance_counts() -> None:
    pair = (
        replica_digest(seq=1, replica="a", running=3, waiting=1, limit=8, skew=1.2),
        replica_digest(seq=1, replica="b", running=5, waiting=2, limit=16, skew=1.6),
    )
    read = seconds(pair).signals
    assert (read.replicas, read.running, read.waiting, read.active_limit) == (2, 8, 3, 8)
    assert read.rank_demand == pytest.approx(1.6)


def test_a_digest_that_stands_still_is_no_news() -> None:
    frozen = (replica_digest(seq=5),)
    folded = seconds(*[frozen] * 8)
    assert folded.signals.running is None
    assert folded.signals.missing == ("replica r0: its digest stands still",)


def test_a_board_that_is_gone_leaves_everything_of_it_unknown() -> None:
    folded, _ = fold(Observation(None, None, ("board at http://b",)), Track(), 0.0)
    read = folded.signals
    assert (read.running, read.rank_demand, read.arrivals_per_s) == (None, None, None)
    assert read.missing == ("board at http://b",)


def gateway(**changes: object) -> GatewayDigest:
    base = GatewayDigest(gateway="g", at_s=0.0, window_s=10.0, arrivals=50, completed=40, prompt_tokens=4000)
    return base.model_copy(update={"output_tokens": 800, "ttft_p95_s": 0.4, "slo_attained": 0.9, **changes})


def test_gateways_are_summed_and_the_worst_percentile_counts() -> None:
    pair = (gateway(), gateway(gateway="h", arrivals=30, completed=10, ttft_p95_s=0.7, slo_attained=0.4, spilled=8))
    read = fold(Observation(None, pair), Track(), 0.0)[0].signals
    assert read.arrivals_per_s == pytest.approx(8.0)
    assert read.prompt_tokens == pytest.approx(8000 / 50)
    assert read.ttft_p95_s == 0.7
    assert read.slo_attained == pytest.approx((0.9 * 40 + 0.4 * 10) / 50)
    assert read.spill_share == pytest.approx(8 / 80)


def test_what_a_closed_api_answered_is_no_work_of_the_replicas() -> None:
    targets = (
        TargetDigest(name="r0", local=True, requests=9, failures=1),
        TargetDigest(name="r1", local=True, requests=12),
        TargetDigest(name="gpt", local=False, requests=20),
    )
    read = fold(Observation(None, (gateway(targets=targets),)), Track(), 0.0)[0].signals
    assert (read.completed_per_s, read.local_per_s) == (pytest.approx(4.0), pytest.approx(2.0))


def test_an_idle_gateway_has_a_rate_and_no_lengths() -> None:
    idle = gateway(arrivals=0, completed=0, prompt_tokens=0, output_tokens=0, ttft_p95_s=None, slo_attained=None)
    read = fold(Observation(None, (idle,)), Track(), 0.0)[0].signals
    assert read.arrivals_per_s == 0.0
    assert (read.prompt_tokens, read.ttft_p95_s, read.spill_share) == (None, None, None)


API = [
    pytest.param(10, 2, False, id="two failures are bad luck"),
    pytest.param(10, 5, True, id="half of them fail"),
    pytest.param(100, 10, False, id="one in ten is not an outage"),
]


@pytest.mark.parametrize(("requests", "failures", "failing"), API)
def test_an_outage_of_a_closed_api_is_seen(requests: int, failures: int, failing: bool) -> None:
    target = TargetDigest(name="gpt", local=False, requests=requests, failures=failures, usd=Decimal(1))
    read = fold(Observation(None, (gateway(targets=(target,)),)), Track(), 0.0)[0].signals
    assert read.can_spill
    assert read.api_failing is failing
