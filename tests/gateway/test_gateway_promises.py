"""Promises by tier: each request is weighed, and judged, by what its own tier promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_api.v1alpha1 import MoEDeployment
from moe_cli.plan_local import gateway_config
from moe_core import process_config
from moe_core.config import SloConfig, TierConfig
from moe_core.forecast import RevisionView, SpillContext, Thresholds, forecast_local
from moe_core.latency import UNKNOWN, Ended, LatencyEstimate, observe_ttft
from moe_core.tiers import slo_of
from moe_gateway.upstream import PROMISES_MAX, Upstream
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import at, chat, config, running

COMMON = SloConfig(ttft_p95_s=5.0, itl_p95_s=1.0)
TIERS = [
    {"name": "gold", "tenants": ["acme"], "slo": {"ttftP95S": 0.2, "itlP95S": 1.0}},
    {"name": "batch", "tenants": ["etl"], "slo": {"ttftP95S": 60.0, "itlP95S": 1.0}},
    {"name": "plain", "tenants": ["initech"]},
]


def slow(ttft_s: float) -> LatencyEstimate:
    """An estimate that is sure of this TTFT."""
    known = UNKNOWN
    for _ in range(50):
        known = observe_ttft(known, 0.0, work_tokens=10, prompt_tokens=10, slot_wait_s=0, ttft_s=ttft_s)
    return known


@pytest.mark.parametrize(
    ("name", "own", "want"),
    [
        ("nothing", {}, None),
        ("both", {"ttftP95": "500ms", "itlP95": "40ms"}, (0.5, 0.04)),
        ("TTFT alone", {"ttftP95": "500ms"}, (0.5, 0.05)),
        ("ITL alone", {"itlP95": "1s"}, (0.8, 1.0)),
    ],
)
def test_a_tiers_promise_comes_from_the_resource_in_a_cluster_and_on_one_machine(
    name: str, own: dict[str, str], want: tuple[float, float] | None
) -> None:
    resource = MoEDeployment.model_validate(
        {
            "apiVersion": "moestack.dev/v1alpha1",
            "kind": "MoEDeployment",
            "metadata": {"name": "m"},
            "spec": {
                "model": {"id": "a/b"},
                "hardware": {"accelerator": "cpu", "gpusPerReplica": 1},
                "slo": {"ttftP95": "800ms", "itlP95": "50ms"},
                "tiers": [{"name": "gold", "slo": own}],
            },
        }
    )
    slo = None if want is None else SloConfig(ttft_p95_s=want[0], itl_p95_s=want[1])
    assert process_config.tiers(resource.spec) == (TierConfig(name="gold", slo=slo),)
    here = gateway_config(
        resource, url="http://e/v1", board_url="http://b", targets=(), trusted_keys=(), port=0, state_dir=Path("s")
    )
    assert here.tiers == (TierConfig(name="gold", slo=slo),)
    assert slo_of(here.tiers, "gold", here.slo) == (slo or here.slo)
    assert slo_of(here.tiers, "default", here.slo) == here.slo


@pytest.mark.parametrize(
    ("name", "tenant", "where"), [("strict", "acme", "t0"), ("patient", "etl", "r0"), ("common", "initech", "t0")]
)
async def test_a_request_spills_by_its_own_tiers_promise(name: str, tenant: str, where: str) -> None:
    async with FakeUpstream() as local, FakeUpstream() as api, running(config(local, api, tiers=TIERS)) as client:
        upstreams = client.server.gateway.upstreams
        upstreams["r0"].estimate = slow(9.0)
        upstreams["r0"].ledger.sent(99, 10.0)  # not idle: an idle revision would get a probe
        upstreams["t0"].estimate = LatencyEstimate(base_prior_s=0.05, slope_prior_s=0.0)
        answer = await client.post(chat(), x_moestack_tenant=tenant, x_moestack_explain="1")
    assert answer.headers["x-moestack-target"] == where


async def test_a_request_is_judged_by_its_own_tiers_promise() -> None:
    async with FakeUpstream(Behaviour(first_s=0.4)) as local, running(config(local, tiers=TIERS)) as client:
        for tenant in ("acme", "etl", "initech"):
            assert (await client.post(chat(), x_moestack_tenant=tenant)).status == 200
        for tier, met in (("gold", 0), ("batch", 1), ("plain", 1)):
            found = [
                await client.metric("moestack_gateway_slo_requests_total", tier=tier, result=result)
                for result in ("met", "missed")
            ]
            assert found == [met, 1 - met]
        assert (await client.digest())["sloAttained"] == pytest.approx(2 / 3)
        assert {key: (await at(client, "r0"))[key] for key in ("met", "missed")} == {"met": 2, "missed": 1}


def weighed(upstream: Upstream, own_s: float | None, itl_slo_s: float) -> Any:
    view = RevisionView("r", 100, running=8, estimate=upstream.estimate_for(own_s))
    return forecast_local(SpillContext(0.0, 10, 5.0, Thresholds(0.5, 1.0), (view,), itl_slo_s=itl_slo_s), view)


def test_what_is_learned_of_one_promise_does_not_bend_another() -> None:
    """Steps of 50 ms, always. The line alone cannot tell 47 from 53; what came true of each promise can."""
    upstream = Upstream("r", "http://r")
    promises = {None: 0.047, 0.053: 0.053}
    for _ in range(300):
        for own_s, slo_s in promises.items():
            told = weighed(upstream, own_s, slo_s)
            upstream.learn(Ended(0.05, 20, told.itl_s, told.p_slow, own_s), 0.0, promises[None])
    strict, loose = (weighed(upstream, own_s, slo_s) for own_s, slo_s in promises.items())
    assert strict.p_slow > 0.8
    assert loose.p_slow < 0.2
    assert upstream.estimate.slow_seen == pytest.approx(100, rel=0.1), "each request of the strict one missed"
    told, seen = upstream.odds[0.053]
    assert seen < 0.2
    assert loose.p_miss - weighed(upstream, None, 10.0).p_miss <= loose.p_slow
    assert told >= seen


def test_latency_is_learned_from_requests_of_every_tier() -> None:
    upstream = Upstream("r", "http://r")
    for _ in range(50):
        upstream.learn(Ended(0.2, 20, 8.0, 0.5, 0.1), 0.0, 1.0)
    assert upstream.estimate.itl_s == pytest.approx(0.2, rel=0.05)
    assert (upstream.estimate.slow_told, upstream.estimate.slow_seen) == (UNKNOWN.slow_told, UNKNOWN.slow_seen)


def test_promises_that_come_and_go_do_not_pile_up() -> None:
    upstream = Upstream("r", "http://r")
    for number in range(100):
        upstream.learn(Ended(0.05, 20, 8.0, 0.5, 0.1 + number), 0.0, 1.0)
    assert len(upstream.odds) == PROMISES_MAX
    assert 99.1 in upstream.odds
