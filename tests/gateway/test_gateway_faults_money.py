"""The gateway's row of faults with its money: every request ends once, and what it cost is what was accounted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from moe_core.clock import SystemClock
from moe_core.config import GatewayConfig
from moe_core.prices import PICO
from moe_gateway.budget import Budget
from moe_gateway.money import Limits, total
from moe_gateway.money_store import SqliteStore
from tests.gateway.fake_upstream import Behaviour, FakeUpstream, chunk
from tests.gateway.harness import KEY, chat, config, read, running, until
from tests.gateway.test_gateway_budget import paid, settled
from tests.gateway.test_gateway_process import Process, started, written

ASKED = chat(max_tokens=50)
PROMPT = round(len(json.dumps(ASKED).encode()) * 0.25)
"""What the gateway takes a prompt for where no usage tells it."""
IN_BAND = b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'
SOON = {"firstTokenS": 0.3, "responseS": 0.5, "idleS": 0.3, "clientStallS": 0.5}


def usd(prompt: int, output: int) -> Decimal:
    return (prompt * Decimal(5) + output * Decimal(30)) / 10**6


FREE, UNHEARD = usd(0, 0), usd(PROMPT, 0)
FAULTS = [
    *(
        pytest.param(Behaviour(status=status), status_out, FREE, id=str(status))
        for status, status_out in ((408, 503), (429, 529), (500, 502), (502, 502), (503, 529), (529, 529))
    ),
    pytest.param(Behaviour(reset=True), 502, UNHEARD, id="reset: it may have done the work"),
    pytest.param(Behaviour(stall=True), 503, UNHEARD, id="stalled before the first token"),
    pytest.param(Behaviour(role_then_stall=True), 503, UNHEARD, id="stalled after a role"),
    pytest.param(Behaviour(tokens=9, stall_after=2), 200, usd(PROMPT, 2), id="stalled after the first token"),
    pytest.param(Behaviour(tokens=9, cut_after=2), 200, usd(PROMPT, 2), id="cut in mid-stream"),
    pytest.param(Behaviour(raw=b"data: {no\n\n"), 502, UNHEARD, id="malformed at once"),
    pytest.param(Behaviour(after=b"data: {no\n\n"), 200, usd(PROMPT, 1), id="malformed in mid-stream"),
    pytest.param(Behaviour(raw=IN_BAND), 502, FREE, id="an error in band at once"),
    pytest.param(Behaviour(after=IN_BAND), 200, usd(PROMPT, 1), id="an error in band in mid-stream"),
]


@pytest.mark.parametrize(("fault", "status", "cost"), FAULTS)
async def test_a_fault_ends_once_and_costs_what_is_accounted(
    fault: Behaviour, status: int, cost: Decimal, tmp_path: Path
) -> None:
    async with FakeUpstream() as local, FakeUpstream(fault) as target:
        await local.close()
        async with running(paid(local, target, tmp_path, "1", limits=SOON)) as client:
            answer = await client.post(ASKED)
            wanted = {status, 503} if status in {502, 529} else {status}  # both sides failed, each in its own way
            assert answer.status in wanted
            assert answer.whole
            if answer.status == 200:
                assert "error" in answer.events[-1]
            else:
                assert ("Retry-After" in answer.headers) == (answer.status != 502)
            assert await settled(client) == cost
            assert await client.metric("moestack_gateway_spend_usd_total", target="t0") == pytest.approx(float(cost))


async def test_both_attempts_of_a_failover_are_billed(tmp_path: Path) -> None:
    async with (
        FakeUpstream() as local,
        FakeUpstream(Behaviour(role_then_stall=True)) as first,
        FakeUpstream(Behaviour(prompt_tokens=40, tokens=3)) as second,
    ):
        await local.close()
        settings = config(
            local, first, second, price=("5", "30"), stateDir=str(tmp_path), spill={"usdPerDay": "1"}, limits=SOON
        )
        async with running(settings) as client:
            answer = await client.post(ASKED)
            assert (answer.status, answer.events[-1]) == (200, "[DONE]")
            assert await settled(client) == usd(PROMPT, 0) + usd(40, 3)


async def test_a_client_that_reads_nothing_is_let_go_and_pays_for_what_came(tmp_path: Path) -> None:
    event = chunk("x" * 60_000)
    async with FakeUpstream() as local, FakeUpstream(Behaviour(raw=event, raw_step=len(event), repeat=3000)) as target:
        await local.close()
        async with running(paid(local, target, tmp_path, "20", limits=SOON)) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.server.port, limit=1024)
            writer.write(_raw(ASKED))
            await reader.readexactly(100)
            await until(lambda: not client.server.gateway.calls, 60)
            writer.transport.abort()
            cost = await settled(client)
            assert usd(PROMPT, 1) < cost < usd(PROMPT, 3000)
            assert (cost - usd(PROMPT, 0)) % usd(0, 1) == 0, "whole events"


@pytest.mark.parametrize(
    "before", [False, True], ids=["in mid-stream", "before a request: to a fourth day, the oldest"]
)
async def test_a_clock_that_jumps_loses_no_request_and_no_money(before: bool, tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream(Behaviour(tokens=6, gap_s=0.05)) as target:
        await local.close()
        clock = _Jumping()
        async with running(paid(local, target, tmp_path, "1"), clock) as client:
            for asked, jump_s in enumerate((2 * 86_400.0, -4 * 86_400.0, 3600.0, -1e9), 1):
                clock.offset_s += jump_s if before else 0
                stream = asyncio.create_task(client.post(ASKED))
                await until(partial(_asked, target, asked))  # its money is set aside: on the day that it is now
                clock.offset_s += 0 if before else jump_s
                answer = await stream
                assert (answer.status, answer.events[-1]) == (200, "[DONE]")
            await until(lambda: not client.server.gateway.calls)
        assert await _spent(client.server.gateway.config) == 4 * usd(10, 6)


def _asked(target: FakeUpstream, times: int) -> bool:
    return len(target.requests) == times


class _Jumping(SystemClock):
    """The machine's clock, whose wall time is set by somebody."""

    offset_s = 0.0

    def time(self) -> float:
        return super().time() + self.offset_s


async def _spent(settings: GatewayConfig) -> Decimal:
    """What the store says after the process has ended, over all its days, and those that were folded into months."""
    assert settings.state_dir is not None
    store = SqliteStore(Path(settings.state_dir) / "budget.sqlite", settings.deployment)
    budget = Budget(store, Limits(Decimal(10**6)), SystemClock())
    await budget.open()
    try:
        book = await budget.books()
        folded = sum(total(month) for month in book.months.values())
        return Decimal(folded + sum(total(day.known()) for day in book.days.values())) / PICO
    finally:
        await budget.close()


async def test_sigterm_with_500_streams_ends_each_of_them_once_and_counts_its_money(tmp_path: Path) -> None:
    """Half of them end while it drains; the others never would, and are told so."""
    count, gate = 500, asyncio.Event()
    async with FakeUpstream() as local, FakeUpstream(Behaviour(gate=gate)) as target:
        target.behaviours = [Behaviour(tokens=9, stall_after=2) for _ in range(count // 2)]
        settings = paid(local, target, tmp_path, "100", weights={"r0": 0}, limits={"drainS": 10})
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            started(written(tmp_path, settings)) as gateway,
            aiohttp.ClientSession(connector=connector, auto_decompress=False) as session,
        ):

            async def stream() -> Any:
                async with session.post(gateway.url, json=ASKED) as response:
                    return await read(response)

            streams: list[asyncio.Task[Any]] = []

            def arrived() -> bool:
                return len(target.requests) == len(streams)

            while len(streams) < count:  # by and by: all clients and the upstream share one busy process here
                streams += [asyncio.create_task(stream()) for _ in range(50)]
                await until(arrived, 60)
            await until(_quiet(target), 120)
            ended = asyncio.create_task(gateway.terminate())
            await until(lambda: any(line["msg"] == "draining" for line in gateway.lines), 60)
            gate.set()
            answers = await asyncio.gather(*streams)
            assert await ended == 0
        assert {answer.status for answer in answers} == {200}
        assert all(answer.whole for answer in answers)
        last = [answer.events[-1] for answer in answers]
        assert last.count("[DONE]") == count // 2
        assert sum(end != "[DONE]" and end["error"]["code"] == "stream_cut" for end in last) == count // 2
        wanted = count // 2 * (usd(10, 3) + usd(PROMPT, 2))
        assert await _spent(settings) == wanted
        logged = [line for line in gateway.lines if line["msg"] == "request"]
        assert len(logged) == count
        assert sum(Decimal(line["usd"]) for line in logged) == wanted


def _quiet(target: FakeUpstream) -> Callable[[], bool]:
    """Whether every stream has sent its tokens: the bytes have stopped growing."""
    seen = {"bytes": -1, "looks": 0}

    def still() -> bool:
        seen["looks"] = seen["looks"] + 1 if seen["bytes"] == target.sent_bytes else 0
        seen["bytes"] = target.sent_bytes
        return seen["looks"] > 20

    return still


async def test_slow_clients_cost_a_bounded_amount_of_memory(tmp_path: Path) -> None:
    event = chunk("x" * 60_000)
    big = Behaviour(raw=event, raw_step=len(event), repeat=5000)  # 300 MB each
    async with FakeUpstream(big) as local, started(written(tmp_path, config(local))) as gateway:
        before = _rss(gateway)
        clients = [await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024) for _ in range(10)]
        for _, writer in clients:
            writer.write(_raw(chat()))
        for reader, _ in clients:
            await reader.readexactly(100)
        await until(_quiet(local), 120)
        assert _rss(gateway) - before < 10 * (4 << 20)
        for _, writer in clients:
            writer.transport.abort()
        assert await gateway.terminate() == 0


def _rss(gateway: Process) -> int:
    return int(psutil.Process(gateway.process.pid).memory_info().rss)


def _raw(document: dict[str, Any]) -> bytes:
    body = json.dumps(document).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def test_the_table_of_faults_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "gateway.md").read_text()
    defined = "".join(file.read_text() for file in Path(__file__).parent.glob("test_gateway_*.py"))
    named = [part for part in text.split("`") if part.startswith("test_")]
    assert len(named) >= 15
    for name in named:
        assert f"def {name}(" in defined, name


async def test_an_error_in_mid_stream_that_quotes_our_key_does_not_reach_the_client(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    quoting = b'data: {"error": {"message": "bad key ' + KEY.encode() + b'"}}\n\n'
    async with FakeUpstream() as local, FakeUpstream(Behaviour(after=quoting)) as target:
        await local.close()
        async with running(config(local, target, key_file=tmp_path / "key")) as client:
            answer = await client.post(ASKED)
            assert answer.events[-1]["error"]["code"] == "stream_cut"
            assert KEY not in answer.body.decode()
