"""What was spent, as the gateway reports it and `moectl costs` shows it: to the micro-dollar, by tenant and target."""

from __future__ import annotations

import json
import sqlite3
from decimal import Decimal
from pathlib import Path

import pytest

from moe_cli.costs import show
from moe_cli.outcome import Exit, Refusal
from moe_cli.say import Say
from moe_cli.showing import NO_KEY, Key
from moe_core.costs import CostReport, CostRow, forecast, rent
from moe_core.wire import EngineDigest, ReplicaDigest, Utilisation
from moe_gateway.costs_api import report
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import SIGNER, chat, config, running, until

CALL_USD = (1000 * Decimal(5) + 7 * Decimal(30)) / 10**6


async def test_costs_by_tenant_and_target_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SIGNER.save(tmp_path / "key")
    key = Key(tmp_path / "key", "default/tiny")
    async with FakeUpstream() as local, FakeUpstream(Behaviour(prompt_tokens=1000, tokens=7)) as closed:
        await local.close()
        made = config(local, closed, price=("5", "30"), stateDir=str(tmp_path), spill={"usdPerDay": "1"})
        async with running(made) as client:
            for tenant in ("acme", "acme", "umbrella"):
                assert (await client.post(chat(max_tokens=9), x_moestack_tenant=tenant)).status == 200
            assert (await client.post(chat(max_tokens=9))).status == 200
            await until(lambda: not client.server.gateway.calls)
            code = await show(tmp_path, Say(), url=client.admin_url, usd_per_gpu_hour=None, as_json=True, key=key)
            found = json.loads(capsys.readouterr().out)
            assert code is Exit.OK
            rows = {row.get("tenant"): (row["target"], row["model"], Decimal(row["usd"])) for row in found["today"]}
            assert rows == {
                "acme": ("t0", "closed-0", 2 * CALL_USD),
                "umbrella": ("t0", "closed-0", CALL_USD),
                None: ("t0", "closed-0", CALL_USD),
            }
            assert found["month"] == found["today"]
            assert Decimal(found["leftTodayUsd"]) == 1 - 4 * CALL_USD
            assert found["prices"][0]["source"] == "the resource"
            assert found["forecast"]["dayUsd"] >= float(4 * CALL_USD)
            for stranger, says in (
                (NO_KEY, "give --key FILE"),
                (Key(tmp_path / "key", "default/other"), "give --key FILE"),
                (Key(tmp_path / "key"), "--deployment"),
                (Key(tmp_path / "none", "default/tiny"), "--key"),
            ):
                with pytest.raises(Refusal, match=says):
                    await show(
                        tmp_path, Say(), url=client.admin_url, usd_per_gpu_hour=None, as_json=False, key=stranger
                    )
            await show(tmp_path, Say(), url=client.admin_url, usd_per_gpu_hour=None, as_json=False, key=key)
            text = capsys.readouterr().out
            assert "by tenant: acme $0.01042, (not known) $0.00521, umbrella $0.00521" in text
            assert "by model: closed-0 $0.02084" in text


async def test_a_store_that_is_gone_is_said_and_the_last_figures_stay(tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream(Behaviour(prompt_tokens=1000, tokens=7)) as closed:
        await local.close()
        made = config(local, closed, price=("5", "30"), stateDir=str(tmp_path), spill={"usdPerDay": "1"})
        async with running(made) as client:
            assert (await client.post(chat(max_tokens=9))).status == 200
            gateway = client.server.gateway
            await until(lambda: not gateway.calls)
            assert (await report(gateway)).store_error is None
            with sqlite3.connect(tmp_path / "budget.sqlite") as db:
                db.execute("DROP TABLE books")
            db.close()
            told = await report(gateway)
            assert told.store_error is not None
            assert (told.left_today_usd, [row.usd for row in told.today]) == (0, [CALL_USD])


async def test_where_nothing_answers_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="moectl up"):
        await show(tmp_path, Say(), url=None, usd_per_gpu_hour=None, as_json=False)
    with pytest.raises(Refusal, match="admin port"):
        await show(tmp_path, Say(), url="http://127.0.0.1:9", usd_per_gpu_hour=None, as_json=False)


NOON = 1_795_435_200.0  # 2026-11-23T12:00Z
MIDNIGHT = NOON - 43_200
SPENT = (CostRow(target="t", usd=Decimal(10)),)
FORECASTS = {
    "half of the day gone": ({"at_s": NOON}, (20.0, 30.0 + 20 * 8)),
    "the budget bounds the day": ({"at_s": NOON, "usd_per_day": Decimal(15)}, (15.0, 30.0 + 15 * 8)),
    "and the month": ({"at_s": NOON, "usd_per_month": Decimal(50)}, (20.0, 50.0)),
    "what was spent is never taken back": ({"at_s": NOON, "usd_per_day": Decimal(5)}, (10.0, 30.0 + 10 * 8)),
    "a day that has just begun": ({"at_s": MIDNIGHT + 60}, (240.0, 30.0 + 240 * 8)),
}


@pytest.mark.parametrize(("given", "expected"), FORECASTS.values(), ids=FORECASTS)
def test_forecasts(given: dict[str, object], expected: tuple[float, float]) -> None:
    month = (CostRow(target="t", usd=Decimal(40)),)
    made = CostReport.model_validate({"deployment": "d", "today": SPENT, "month": month, **given})
    ahead = forecast(made)
    assert (ahead.day_usd, ahead.month_usd) == pytest.approx((expected[0], expected[1]))


def _replica(elapsed_s: float, busy_s: float, decode_s: float | None, ranks: int = 2) -> ReplicaDigest:
    engine = EngineDigest(
        max_active_seqs=1,
        max_batched_tokens=1,
        ceiling_active_seqs=1,
        ceiling_batched_tokens=1,
        busy_s_total=busy_s,
        prompt_tokens_total=600_000,
        generation_tokens_total=400_000,
    )
    use = None if decode_s is None else Utilisation(decode_busy_s_total=decode_s)
    return ReplicaDigest(
        replica="r", started_at_s=0, at_s=elapsed_s, seq=0, ranks=ranks, engine=engine, utilisation=use
    )


def test_rent_is_split_by_what_the_gpus_did() -> None:
    found = rent([_replica(3600, 1800, 1200)], usd_per_gpu_hour=3.0)
    assert found is not None
    assert (found.prefill_usd, found.decode_usd, found.idle_usd) == pytest.approx((1.0, 2.0, 3.0))
    assert found.usd_per_m_tokens == pytest.approx(6.0)


def test_rent_is_not_split_where_nobody_tells_decode_passes_apart() -> None:
    assert rent([_replica(3600, 1800, None)], usd_per_gpu_hour=3.0) is None


@pytest.mark.parametrize("busy_s", [0.0, 1e9])
def test_the_parts_of_rent_are_the_rent(busy_s: float) -> None:
    found = rent([_replica(7200, busy_s, 2 * busy_s, ranks=4)], usd_per_gpu_hour=2.5)
    assert found is not None
    assert found.usd == pytest.approx(20.0)
    assert min(found.prefill_usd, found.decode_usd, found.idle_usd) >= 0


async def test_rent_is_exported_by_what_the_gpus_did() -> None:
    async with FakeUpstream() as local:
        local.digests = [_replica(3600, 1800, 1200).to_json()]
        async with running(config(local, gpuUsdPerHour=3.0)) as client:
            gateway = client.server.gateway
            await until(lambda: gateway.upstreams["r0"].replicas)
            name = "moestack_gateway_local_rent_usd_total"
            told = {
                phase: await client.metric(name, target="r0", phase=phase) for phase in ("prefill", "decode", "idle")
            }
            assert told == pytest.approx({"prefill": 1.0, "decode": 2.0, "idle": 3.0})
