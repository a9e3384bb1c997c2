"""Money over real sockets and in the store: to the micro-dollar, never beyond the limit, and kept over restarts."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moe_core.clock import FakeClock
from moe_core.config import GatewayConfig, TargetConfig
from moe_core.prices import Price, cost_usd
from moe_gateway.budget import Budget, BudgetStore, BudgetUnavailable, utc_day
from moe_gateway.openai_api import Endpoint, parse, prompt_bound
from moe_gateway.providers import adapter_of
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import Client, chat, config, running, until

PRICE = ("5", "30")  # dollars per million tokens, in and out


def paid(local: FakeUpstream, target: FakeUpstream, folder: Path, usd_per_day: str, **more: Any) -> GatewayConfig:
    """The local side is down, so that every request wants to be paid for."""
    spill = {"usdPerDay": usd_per_day}
    return config(local, target, price=PRICE, stateDir=str(folder), spill=spill, **more)


async def settled(client: Client) -> Decimal:
    """What the store says was spent today, once nothing is reserved."""
    budget = client.server.gateway.budget
    await until(lambda: not budget._settling)
    store = BudgetStore(Path(client.server.gateway.config.state_dir or "") / "budget.sqlite")
    day = utc_day(client.server.gateway.clock.time())
    spent, used = sum(store.spent_usd(day).values(), Decimal(0)), store.used_usd(day)
    store.close()
    assert spent == used, "something stayed reserved"
    return spent


@pytest.mark.parametrize("stream", [True, False])
async def test_usage_is_settled_exactly(stream: bool, tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream(Behaviour(prompt_tokens=1234, tokens=7)) as target:
        await local.close()
        async with running(paid(local, target, tmp_path, "1")) as client:
            for _ in range(3):
                assert (await client.post(chat(stream, max_tokens=50))).status == 200
            assert await settled(client) == 3 * (1234 * Decimal(5) + 7 * Decimal(30)) / 10**6
            assert await client.metric("moestack_gateway_spend_usd_total", target="t0") == pytest.approx(0.01914)
            usd = {item["name"]: Decimal(item["usd"]) for item in (await client.digest())["targets"]}
            assert usd == {"r0": 0, "t0": Decimal("0.01914")}


async def test_a_cut_stream_is_settled_by_what_was_counted(tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream(Behaviour(tokens=9, cut_after=4)) as target:
        await local.close()
        async with running(paid(local, target, tmp_path, "1")) as client:
            answer = await client.post(chat(max_tokens=50))
            assert answer.events[-1]["error"]["code"] == "stream_cut"
            prompt = client.server.gateway.upstreams["t0"].prompt_tokens(len(_sent(chat(max_tokens=50))))
            assert await settled(client) == (prompt * Decimal(5) + 4 * Decimal(30)) / 10**6


def _sent(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


async def test_a_client_that_leaves_is_billed_for_what_came(tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream(Behaviour(tokens=1000, gap_s=0.02)) as target:
        await local.close()
        async with running(paid(local, target, tmp_path, "1")) as client:
            async with client.session.post(client.url + "/v1/chat/completions", json=chat(max_tokens=1000)) as response:
                await response.content.readany()
            await until(lambda: not client.server.gateway.calls)
            assert Decimal(0) < await settled(client) < Decimal("0.01")


@pytest.mark.parametrize(
    ("fault", "share_of_bound"),
    [
        pytest.param(Behaviour(status=500), 0, id="an error is free"),
        pytest.param(Behaviour(status=429), 0, id="a refusal is free"),
        pytest.param(Behaviour(status=400), 0, id="a client error is free"),
        pytest.param(Behaviour(body=b"<html>"), 1, id="an answer that was lost counts in full"),
        pytest.param(Behaviour(stall=True), 1, id="an answer that never came counts in full"),
    ],
)
async def test_what_a_failure_costs(fault: Behaviour, share_of_bound: int, tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream(fault) as target:
        await local.close()
        async with running(paid(local, target, tmp_path, "1", limits={"responseS": 0.3})) as client:
            await client.post(chat(False, max_tokens=10))
            bound = cost_usd(len(_sent(chat(False, max_tokens=10))), 10, Price(Decimal(5), Decimal(30)))
            assert await settled(client) == share_of_bound * bound


async def test_no_budget_is_passed_by_a_crowd(tmp_path: Path) -> None:
    """A hundred at once, each of which may cost about a cent, against ten cents."""
    async with FakeUpstream() as local, FakeUpstream(Behaviour(tokens=300, prompt_tokens=100)) as target:
        await local.close()
        async with running(paid(local, target, tmp_path, "0.1")) as client:
            answers = await asyncio.gather(*(client.post(chat(False, max_tokens=300)) for _ in range(100)))
            statuses = [answer.status for answer in answers]
            assert set(statuses) == {200, 503}
            spent = await settled(client)
            assert spent == statuses.count(200) * Decimal("0.0095") <= Decimal("0.1")
            assert statuses.count(200) == len(target.requests) >= 5


@pytest.mark.parametrize(("budget", "price"), [(None, PRICE), ("0", PRICE)])
async def test_without_money_nothing_is_spent(budget: str | None, price: tuple[str, str], tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream() as target:
        await local.close()
        settings = config(local, target, price=price, stateDir=str(tmp_path), spill={"usdPerDay": budget})
        async with running(settings) as client:
            assert (await client.post(chat())).status == 503
            assert target.requests == []


async def test_a_free_target_needs_no_budget() -> None:
    async with FakeUpstream() as local, FakeUpstream() as target, running(config(local, target)) as client:
        await local.close()
        assert (await client.post(chat())).status == 200


async def test_a_store_that_is_gone_spends_nothing(tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream() as target:
        await local.close()
        async with running(paid(local, target, tmp_path, "1")) as client:
            assert (await client.post(chat(max_tokens=5))).status == 200
            await until(lambda: not client.server.gateway.budget._settling)
            with sqlite3.connect(tmp_path / "budget.sqlite") as db:
                db.execute("DROP TABLE spend")
                db.execute("CREATE TABLE spend (nonsense TEXT)")
            db.close()
            assert (await client.post(chat(max_tokens=5))).status == 503
            assert len(target.requests) == 1


async def test_a_request_without_a_limit_gets_one_where_it_costs() -> None:
    target = TargetConfig(name="t", provider="openai", model="gpt", usd_per_m_output=Decimal(30))
    compatible = target.model_copy(update={"provider": "openai-compatible"})
    bare = parse(Endpoint.CHAT, _sent(chat()))
    limited = parse(Endpoint.CHAT, _sent(chat(max_tokens=9)))
    assert b'"max_completion_tokens":4096' in adapter_of(target, FakeClock()).body(bare, 4096)
    assert b'"max_tokens":4096' in adapter_of(compatible, FakeClock()).body(bare, 4096)
    assert b'"max_completion_tokens":9' in adapter_of(target, FakeClock()).body(limited, 4096)
    assert b'"max_tokens"' not in adapter_of(target, FakeClock()).body(limited, 4096)
    assert b'"max_tokens":9' in adapter_of(compatible, FakeClock()).body(limited, 4096)
    assert b"max_" not in adapter_of(compatible, FakeClock()).body(bare, None)


def test_images_are_reserved_for() -> None:
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
    request = parse(Endpoint.CHAT, _sent(chat(messages=[{"role": "user", "content": parts}])))
    assert prompt_bound(request) > 8192


def test_reservations_outlive_a_process_that_died(tmp_path: Path) -> None:
    store = BudgetStore(tmp_path / "b.sqlite")
    assert store.reserve("a", "d1", "t", Decimal("0.6"), Decimal(1))
    store.close()
    again = BudgetStore(tmp_path / "b.sqlite")
    assert not again.reserve("b", "d1", "t", Decimal("0.5"), Decimal(1))
    assert again.reserve("c", "d2", "t", Decimal("0.5"), Decimal(1)), "the next day is new"
    again.settle("a", Decimal("0.1"))
    again.settle("a", Decimal("0.1"))
    assert again.used_usd("d1") == Decimal("0.1")
    again.close()


def test_processes_share_one_limit(tmp_path: Path) -> None:
    granted: list[bool] = []

    def work(number: int) -> None:
        store = BudgetStore(tmp_path / "b.sqlite")
        granted.extend(store.reserve(f"{number}/{i}", "d", "t", Decimal("0.1"), Decimal(1)) for i in range(20))
        store.close()

    BudgetStore(tmp_path / "b.sqlite").close()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(granted), sum(granted)) == (80, 10)


async def test_the_limit_is_of_a_day_and_a_clock_step_back_opens_none(tmp_path: Path) -> None:
    clock = FakeClock()
    budget = Budget(tmp_path / "b.sqlite", Decimal(1), clock)
    await budget.open()
    assert await budget.reserve("a", "t", Decimal("0.9"))
    clock.jump(-3600)
    assert not await budget.reserve("b", "t", Decimal("0.9"))
    clock.jump(86_400)
    assert budget.left_usd() == 1
    assert await budget.reserve("c", "t", Decimal("0.9"))
    await budget.close()


async def test_an_unusable_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    budget = Budget(tmp_path / "file" / "b.sqlite", Decimal(1), FakeClock())
    with pytest.raises(BudgetUnavailable, match="file"):
        await budget.open()
    await budget.close()
