"""Shadow mode: it tells what would have left and what that would have cost, and nothing leaves."""

from __future__ import annotations

import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from moe_core.clock import FakeClock
from moe_core.config import GatewayConfig
from moe_core.latency import LatencyEstimate
from moe_core.spill import Reason
from moe_gateway.call import Call, Would
from moe_gateway.shadow import Shadow
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import Client, chat, config, running
from tests.gateway.test_gateway_promises import slow

COUNTED = chat(stream_options={"include_usage": True})
QUICK = LatencyEstimate(base_prior_s=0.05, slope_prior_s=0.0)
SPILLED = "moestack_gateway_shadow_spilled_requests_total"
SPEND = "moestack_gateway_shadow_spend_usd_total"


def shadowed(local: FakeUpstream, api: FakeUpstream, folder: Path, usd: str = "1", **more: Any) -> GatewayConfig:
    spill = {"usdPerDay": usd, "mode": "Shadow"}
    return config(local, api, price=("1", "2"), stateDir=str(folder), spill=spill, **more)


def late(client: Client) -> None:
    """From now on the own model is sure to be late, and the closed API is not."""
    upstreams = client.server.gateway.upstreams
    upstreams["r0"].estimate, upstreams["t0"].estimate = slow(9.0), QUICK
    upstreams["r0"].ledger.sent(-1, 10.0)


async def test_what_would_be_spilled_stays_and_is_counted_with_its_dollars(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moestack.gateway")
    async with (
        FakeUpstream(Behaviour(tokens=5)) as local,
        FakeUpstream() as api,
        running(shadowed(local, api, tmp_path)) as client,
    ):
        assert (await client.post(COUNTED)).status == 200
        assert await client.metric(SPILLED) == 0, "a request that need not be spilled is not counted"
        late(client)
        assert (await client.post(COUNTED)).status == 200
        assert await client.metric(SPILLED, target="t0", reason="slo_predicted") == 1
        assert await client.metric(SPEND, target="t0") == pytest.approx(10e-6 + 5 * 2e-6)
        assert client.server.gateway.budget.left_usd() == Decimal(1)
        assert await client.metric("moestack_gateway_spilled_requests_total") == 0
    assert len(local.requests) == 2
    assert api.requests == []
    fields = [record.moe_fields for record in caplog.records if record.getMessage() == "request"]  # type: ignore[attr-defined]
    told = [{key: line[key] for key in line if key.startswith("shadow_")} for line in fields]
    assert told == [{}, {"shadow_target": "t0", "shadow_reason": Reason.SLO_PREDICTED, "shadow_usd": "0.00002"}]


FAULTS = {
    "overloaded": (Behaviour(status=503), True),
    "broken": (Behaviour(status=500), False),
    "reset": (Behaviour(reset=True), True),
    "malformed": (Behaviour(body=b"no json"), False),
    "cut": (Behaviour(cut_after=1), True),
}


@pytest.mark.parametrize(("how", "stream"), FAULTS.values(), ids=FAULTS)
async def test_whatever_happens_nothing_leaves_and_nothing_is_spent(
    how: Behaviour, stream: bool, tmp_path: Path
) -> None:
    """The client gets what a gateway without a closed API would give it."""
    async with FakeUpstream(how) as local, FakeUpstream() as api:
        async with running(config(local)) as plain:
            wanted = [(await plain.post(chat(stream))).status for _ in range(4)]
        async with running(shadowed(local, api, tmp_path, midStream={"mode": "Splice"})) as client:
            assert [(await client.post(chat(stream))).status for _ in range(4)] == wanted
            assert client.server.gateway.budget.left_usd() == Decimal(1)
            would, usd = await client.metric(SPILLED), await client.metric(SPEND)
    assert api.requests == []
    assert (would > 0) == (usd > 0)
    assert (would == 0) == (wanted[0] == 200), "what was lost before its first token would have been spilled"


async def test_the_budget_of_the_day_ends_what_would_be_spent(tmp_path: Path) -> None:
    async with (
        FakeUpstream() as local,
        FakeUpstream() as api,
        running(shadowed(local, api, tmp_path, "0.00045", limits={"spillOutputTokens": 100})) as client,
    ):
        for _ in range(30):
            late(client)
            await client.post(COUNTED)
        would = await client.metric(SPILLED)
        usd = await client.metric(SPEND)
    assert 0 < would < 30, "each is 16 µ$, and the most that one can cost must fit"
    assert usd == pytest.approx(would * 16e-6)
    assert usd <= 0.00045


async def test_active_and_shadow_are_turned_over_while_it_runs(tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream() as api:
        made = shadowed(local, api, tmp_path)
        async with running(made) as client:
            late(client)
            await client.post(chat())
            active = made.model_copy(update={"spill": made.spill.model_copy(update={"mode": None})})
            await client.server.gateway.reconfigure(active, "2")
            late(client)
            await client.post(chat())
            assert (len(local.requests), len(api.requests)) == (1, 1)
            await client.server.gateway.reconfigure(made, "3")
            late(client)
            await client.post(chat())
            assert (len(local.requests), len(api.requests)) == (2, 1)


def test_a_tenants_own_part_and_a_new_day() -> None:
    clock = FakeClock()
    shadow = Shadow("ns/d", CollectorRegistry(), clock)
    for tenant, usd in (("a", "0.3"), ("b", "0.1")):
        call = Call(1, "r", 0.0, None, tenant=tenant)  # type: ignore[arg-type]  # no task: nothing is stopped here
        shadow._add(tenant, Decimal(usd))
        call.would = Would("gone", Reason.SLO_PREDICTED, Decimal(0), 1, 1)
        shadow.ended(call, {})
    one, own = Decimal(1), Decimal("0.5")
    assert shadow.left_usd(one, own, "a") == Decimal("0.2")
    assert shadow.left_usd(one, one, "b") == Decimal("0.6")
    assert shadow.left_usd(one, one, None) == Decimal("0.6")
    assert shadow.left_usd(None, None, "a") is None
    clock.jump(2 * 86400)
    assert shadow.left_usd(one, own, "a") == own
