"""Money over real sockets and in the store: to the micro-dollar, never beyond the limit, and kept over restarts."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from moe_core.clock import FakeClock, SystemClock
from moe_core.config import GatewayConfig, TargetConfig
from moe_core.prices import PICO, Price, cost_usd
from moe_gateway import money_journal
from moe_gateway.budget import Budget, BudgetUnavailable
from moe_gateway.money import DEPLOYMENT, Book, Limits, total, utc_day
from moe_gateway.money_store import MemoryStore, SqliteStore
from moe_gateway.openai_api import Endpoint, parse, prompt_bound
from moe_gateway.providers import adapter_of
from moe_gateway.server import GatewayServer
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import Client, chat, config, running, until

PRICE = ("5", "30")  # dollars per million tokens, in and out


def paid(local: FakeUpstream, target: FakeUpstream, folder: Path, usd_per_day: str, **more: Any) -> GatewayConfig:
    """The local side is down, so that every request wants to be paid for."""
    spill = {"usdPerDay": usd_per_day}
    return config(local, target, price=PRICE, stateDir=str(folder), spill=spill, **more)


async def settled(client: Client) -> Decimal:
    """What the store says was spent today, once nothing is reserved."""
    gateway = client.server.gateway
    await until(lambda: not gateway.calls)
    assert not gateway.budget._account.reserved, "something stayed reserved"
    for _ in range(2):  # The first look keeps a tranche for what comes next.
        book = await gateway.budget.books()
    today = book.days[utc_day(gateway.clock.time())]
    assert total(today.known()) == today.used(DEPLOYMENT), "something is still held"
    return total(today.known()) / PICO


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
            with sqlite3.connect(tmp_path / "budget.sqlite") as db:
                db.execute("ALTER TABLE books RENAME TO elsewhere")
            db.close()
            await until(lambda: client.server.gateway.budget.gone is not None)
            assert (await client.post(chat(max_tokens=5))).status == 503
            assert len(target.requests) == 1
            with sqlite3.connect(tmp_path / "budget.sqlite") as db:
                db.execute("DROP TABLE IF EXISTS books")
                db.execute("ALTER TABLE elsewhere RENAME TO books")
            db.close()
            await until(lambda: client.server.gateway.budget.gone is None)
            assert (await client.post(chat(max_tokens=5))).status == 200
            assert await settled(client) == 2 * (10 * Decimal(5) + 3 * Decimal(30)) / 10**6


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


async def test_a_dead_process_gives_back_what_it_held_and_keeps_counting_what_it_may_have_spent(tmp_path: Path) -> None:
    clock = FakeClock()
    dead = Budget(SqliteStore(tmp_path / "b.sqlite", "d"), Limits(Decimal(1)), clock, tmp_path)
    await dead.open()
    assert await dead.reserve("a", "t", Decimal("0.6"))
    assert await dead.reserve("b", "t", Decimal("0.2"))
    dead.settle("b", Decimal("0.1"))
    _kill(dead)
    again = Budget(SqliteStore(tmp_path / "b.sqlite", "d"), Limits(Decimal(1)), clock, tmp_path)
    await again.open()
    assert again.left_usd() == Decimal("0.3")
    assert not await again.reserve("c", "t", Decimal("0.31"))
    assert await again.reserve("d", "t", Decimal("0.3"))
    await again.close()


async def test_a_journal_of_an_earlier_start_of_the_machine_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    dead = Budget(store, Limits(Decimal(1)), FakeClock(), tmp_path)
    await dead.open()
    assert await dead.reserve("a", "t", Decimal("0.6"))
    dead.settle("a", Decimal("0.1"))
    _kill(dead)
    monkeypatch.setattr(money_journal, "boot_id", lambda: "another")
    again = Budget(store, Limits(Decimal(1)), FakeClock(), tmp_path)
    await again.open()
    assert again.left_usd() == Decimal("0.4"), "all that it held counts"
    await again.close()


def _kill(budget: Budget) -> None:
    """As the end of a process does: its files are closed, and nothing else happens."""
    if budget._journal is not None:
        os.close(budget._journal._file)


async def test_processes_share_one_limit(tmp_path: Path) -> None:
    clock = FakeClock()
    budgets = [Budget(SqliteStore(tmp_path / "b.sqlite", "d"), Limits(Decimal(1)), clock, tmp_path) for _ in range(4)]
    await asyncio.gather(*(budget.open() for budget in budgets))

    async def work(number: int, budget: Budget) -> int:
        granted = 0
        for call in range(10):
            if await budget.reserve(f"{number}/{call}", "t", Decimal("0.1")):
                granted += 1
        return granted

    granted = await asyncio.gather(*(work(number, budget) for number, budget in enumerate(budgets)))
    # What one has taken beyond its need, another cannot have before it is given back.
    assert 8 <= sum(granted) <= 10
    for budget in budgets:
        await budget.tick()
    for number, budget in enumerate(budgets):
        while await budget.reserve(f"{number}/{sum(granted)}", "t", Decimal("0.1")):
            granted[number] += 1
            await budget.tick()
    assert sum(granted) == 10
    await asyncio.gather(*(budget.close() for budget in budgets))


async def test_of_those_who_wait_for_one_tranche_none_is_refused_what_there_is() -> None:
    """A tranche is taken for the first of them and serves it alone; the others lease their own."""
    budget = Budget(MemoryStore(), Limits(Decimal(1)), FakeClock())
    await budget.open()
    granted = await asyncio.gather(*(budget.reserve(str(number), "t", Decimal("0.04")) for number in range(30)))
    assert granted.count(True) == 25
    await budget.close()


async def test_the_limit_is_of_a_day_and_a_clock_step_back_opens_none(tmp_path: Path) -> None:
    clock = FakeClock()
    budget = Budget(MemoryStore(), Limits(Decimal(1)), clock, tmp_path)
    await budget.open()
    assert await budget.reserve("a", "t", Decimal("0.9"))
    clock.jump(-3600)
    assert not await budget.reserve("b", "t", Decimal("0.9"))
    clock.jump(86_400)
    assert budget.left_usd() == 1
    assert await budget.reserve("c", "t", Decimal("0.9"))
    await budget.close()


async def test_the_month_binds_where_it_is_tighter() -> None:
    clock = FakeClock()
    budget = Budget(MemoryStore(), Limits(Decimal(1), Decimal("2.5")), clock)
    await budget.open()
    spent = Decimal(0)
    for number in range(6):
        if await budget.reserve(str(number), "t", Decimal("0.9")):
            budget.settle(str(number), Decimal("0.9"))
            spent += Decimal("0.9")
        await budget.tick()
        clock.jump(86_400)
    assert spent == Decimal("1.8"), "a third 0.9 would pass 2.5"
    assert budget.left_usd() == Decimal("0.7")
    await budget.close()


async def test_a_tenant_has_a_limit_of_its_own_and_the_others_keep_theirs() -> None:
    limits = Limits(Decimal(10), tenant_usd_per_day=Decimal(2), tenants={"big": Decimal(5), "none": Decimal(0)})
    budget = Budget(MemoryStore(), limits, FakeClock())
    await budget.open()
    assert not await budget.reserve("0", "t", Decimal("0.01"), "none")
    assert await budget.reserve("1", "t", Decimal(2), "small")
    assert not await budget.reserve("2", "t", Decimal("0.01"), "small")
    assert await budget.reserve("3", "t", Decimal(5), "big")
    assert budget.left_usd("other") == 2
    assert budget.left_usd() == 3
    assert await budget.reserve("4", "t", Decimal(2), "other")
    assert budget.left_usd("another") == 1, "the deployment's limit binds"
    await budget.close()


async def test_a_tenant_limited_later_has_spent_what_it_spent() -> None:
    budget = Budget(MemoryStore(), Limits(Decimal(10)), FakeClock())
    await budget.open()
    assert await budget.reserve("1", "t", Decimal(3), "a")
    budget.settle("1", Decimal(3))
    await budget.limit(Limits(Decimal(10), tenants={"a": Decimal(4)}))
    assert budget.left_usd("a") == 1
    assert not await budget.reserve("2", "t", Decimal("1.01"), "a")
    assert await budget.reserve("3", "t", Decimal(1), "a")
    await budget.close()


async def test_a_call_that_cost_more_than_the_most_is_counted_whole() -> None:
    store = MemoryStore()
    budget = Budget(store, Limits(Decimal(1)), FakeClock())
    await budget.open()
    assert await budget.reserve("1", "t", Decimal("0.5"))
    budget.settle("1", Decimal("0.8"))
    assert not await budget.reserve("2", "t", Decimal("0.21"))
    assert await budget.reserve("3", "t", Decimal("0.2"))
    await budget.close()
    assert store.newest is not None
    (day,) = Book.read(store.newest.document).days.values()
    assert (total(day.spent), day.held) == (10**12, {})


async def test_an_unusable_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    budget = Budget(SqliteStore(tmp_path / "file" / "b.sqlite", "d"), Limits(Decimal(1)), FakeClock())
    with pytest.raises(BudgetUnavailable, match="file"):
        await budget.open()
    with pytest.raises(BudgetUnavailable, match="file"):
        await budget.reserve("a", "t", Decimal(1))
    assert budget.left_usd() == 0
    await budget.close()


async def test_both_attempts_of_a_failover_are_billed(tmp_path: Path) -> None:
    """The first API did the work of the prompt before its connection broke; the second one answered."""
    async with (
        FakeUpstream() as local,
        FakeUpstream(Behaviour(cut_after=0)) as first,
        FakeUpstream(Behaviour(prompt_tokens=100, tokens=7)) as second,
    ):
        await local.close()
        made = config(local, first, second, price=PRICE, stateDir=str(tmp_path), spill={"usdPerDay": "1"})
        async with running(made) as client:
            answer = await client.post(chat(max_tokens=50))
            assert (answer.status, len(first.requests), len(second.requests)) == (200, 1, 1)
            spent = await settled(client)
            book = await client.server.gateway.budget.books()
            (today,) = book.days.values()
            prompt = client.server.gateway.upstreams["t0"].prompt_tokens(len(_sent(chat(max_tokens=50))))
            assert today.known()[""] == {"t0": prompt * 5 * 10**6, "t1": (100 * 5 + 7 * 30) * 10**6}
            assert spent == (prompt * Decimal(5) + 100 * Decimal(5) + 7 * Decimal(30)) / 10**6


class Adjustable(SystemClock):
    """The machine's clock, with a wall clock that somebody sets."""

    offset_s = 0.0

    def time(self) -> float:
        return super().time() + self.offset_s


@pytest.mark.parametrize("hours", [-30, 30])
async def test_a_clock_that_jumps_in_mid_stream_loses_no_money(hours: int, tmp_path: Path) -> None:
    """A call counts against the day on which it was made, whenever it ends; and no day's budget is passed."""
    clock, gate = Adjustable(), asyncio.Event()
    async with FakeUpstream() as local, FakeUpstream(Behaviour(tokens=300, prompt_tokens=100, gate=gate)) as closed:
        await local.close()
        server = GatewayServer(paid(local, closed, tmp_path, "0.02"), clock)
        await server.start()
        try:
            async with aiohttp.ClientSession() as session:
                client = Client(server, session)
                before = utc_day(clock.time())
                waiting = asyncio.create_task(client.post(chat(max_tokens=300)))
                await until(lambda: closed.requests)
                clock.offset_s = hours * 3600
                after = utc_day(clock.time())
                gate.set()
                assert (await waiting).status == 200
                statuses = [(await client.post(chat(max_tokens=300))).status for _ in range(3)]
                assert statuses == [200, 200, 503], "two of 0.0095 fit into the 0.02 of a day, the most of a third not"
                await until(lambda: not server.gateway.calls)
                book = await server.gateway.budget.books()
                spent = {day: total(row.known()) for day, row in book.days.items()}
                assert spent == {before: 9_500 * 10**6, after: 19_000 * 10**6}
        finally:
            await server.stop(drain_s=1.0)


async def test_a_killed_process_leaves_its_call_counted_and_the_rest_to_its_successor(tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream(Behaviour(tokens=7, prompt_tokens=100)) as closed:
        await local.close()
        settings = paid(local, closed, tmp_path, "1")
        file = tmp_path / "gateway.json"
        file.write_text(json.dumps(settings.to_json()))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moe_gateway", "--config", str(file)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        url = f"http://127.0.0.1:{json.loads(await process.stdout.readline())['port']}/v1/chat/completions"
        async with aiohttp.ClientSession() as session:
            async with session.post(url, json=chat(False, max_tokens=50)) as response:
                assert response.status == 200
            closed.default = Behaviour(stall=True)
            body = chat(False, max_tokens=50)
            lost = asyncio.create_task(session.post(url, json=body))
            await until(lambda: len(closed.requests) == 2)
            process.kill()
            await process.wait()
            with pytest.raises(aiohttp.ClientError):
                await lost
        most = cost_usd(len(_sent(body)), 50, Price(Decimal(5), Decimal(30)))
        async with running(settings) as client:
            assert await settled(client) == (100 * Decimal(5) + 7 * Decimal(30)) / 10**6 + most
