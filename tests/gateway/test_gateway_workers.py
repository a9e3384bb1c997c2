"""Several workers in a pod, as it is run: one port, one truth about commands and money, a crash that costs its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from moe_core.config import GatewayConfig
from moe_core.signing import Signer
from moe_core.wire import Knobs, Weights
from moe_gateway.settings import ConfigRefused, check
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import KEYS, PASS, SIGNER, Answer, chat, config, knobs, read, until, weights

PRICE = ("5", "30")
CALL_USD = Decimal("0.0095")  # 100 prompt tokens and 300 of output


@dataclass
class Pod:
    """A pod of several workers under test."""

    process: asyncio.subprocess.Process
    port: int
    admin_port: int
    session: aiohttp.ClientSession

    @property
    def workers(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children())

    async def post(self, body: object) -> Answer:
        async with self.session.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body) as response:
            return await read(response)

    async def admin(self, path: str) -> Answer:
        async with self.session.get(f"http://127.0.0.1:{self.admin_port}{path}", headers=PASS) as response:
            return await read(response)

    async def digest(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.admin("/v1/digest?window=60")).json
        return found

    async def send(self, command: Knobs | Weights, signer: Signer = SIGNER) -> Answer:
        method, path = ("POST", "/v1/knobs") if isinstance(command, Knobs) else ("PUT", "/v1/weights")
        url, body = f"http://127.0.0.1:{self.admin_port}{path}", signer.sign(command).to_json()
        async with self.session.request(method, url, json=body) as response:
            return await read(response)

    async def counted(self, name: str) -> float:
        lines = (await self.admin("/metrics")).body.decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] == name)


async def spawn(settings: GatewayConfig, folder: Path) -> asyncio.subprocess.Process:
    file = folder / "gateway.json"
    file.write_text(json.dumps(settings.to_json()))
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moe_gateway", "--config", str(file)),
        stdout=asyncio.subprocess.PIPE,
        stderr=(folder / "log").open("wb"),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@asynccontextmanager
async def pod(settings: GatewayConfig, folder: Path) -> AsyncIterator[Pod]:
    process = await spawn(settings, folder)
    assert process.stdout is not None
    try:
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 120))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            yield Pod(process, ready["port"], ready["adminPort"], session)
    finally:
        children = psutil.Process(process.pid).children() if process.returncode is None else []
        for child in children:
            child.kill()
        if process.returncode is None:
            process.kill()
        await process.wait()


def served_by(worker: psutil.Process, port: int) -> set[int]:
    """Ports of the clients whose connections a worker has."""
    found = worker.net_connections(kind="tcp")
    return {each.raddr.port for each in found if each.raddr and each.laddr.port == port}


async def ready(pod: Pod) -> None:
    while (await pod.admin("/readyz")).status != 200:  # noqa: ASYNC110 (of another process)
        await asyncio.sleep(0.05)


async def test_a_worker_that_dies_costs_its_own_streams_and_the_one_after_it_knows_all(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with FakeUpstream() as one, FakeUpstream(Behaviour(gate=gate)) as other:
        settings = config([one, other], workers=3, trustedKeys=KEYS)
        async with pod(settings, tmp_path) as gateway:
            assert (await gateway.send(knobs(5, miss_probability=0.9))).json["version"] == 5
            assert (await gateway.send(knobs(4))).status == 409
            assert (await gateway.send(knobs(6), Signer.generate())).status == 403
            assert (await gateway.send(weights(3, r1=100))).status == 200
            assert len(gateway.workers) == 3

            async def stream() -> tuple[int, Answer]:
                # A connection each: one that dies must not take a neighbour's request with it.
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
                    url = f"http://127.0.0.1:{gateway.port}/v1/chat/completions"
                    async with session.post(url, json=chat()) as response:
                        held = response.connection  # None where all of the answer has come
                        name = (
                            None
                            if held is None or held.transport is None
                            else held.transport.get_extra_info("sockname")
                        )
                        return 0 if name is None else name[1], await read(response)

            streams = [asyncio.create_task(stream()) for _ in range(60)]
            await until(lambda: len(other.requests) == 60)
            before = await gateway.digest()
            assert (before["inFlight"], before["knobsVersion"], before["weights"]) == (60, 5, {"r0": 0, "r1": 100})

            victim = max(gateway.workers, key=lambda worker: len(served_by(worker, gateway.port)))
            theirs = served_by(victim, gateway.port)
            assert theirs
            victim.send_signal(signal.SIGKILL)
            fresh = [asyncio.create_task(stream()) for _ in range(30)]  # while its place is empty
            await until(lambda: len(other.requests) == 90)
            gate.set()
            answers = await asyncio.gather(*streams)
            assert {port for port, answer in answers if not answer.whole} == theirs
            assert all(answer.events[-1] == "[DONE]" for port, answer in answers if port not in theirs)
            assert all(answer.events[-1] == "[DONE]" for _, answer in await asyncio.gather(*fresh))

            await asyncio.wait_for(ready(gateway), 60)
            assert len(gateway.workers) == 3
            after = await gateway.digest()
            assert (after["knobsVersion"], after["weightsVersion"]) == (5, 3), "given to it before it served"
            done = await gateway.counted("moestack_gateway_requests_total")
            assert done == 90 - len(theirs), "requests of the dead one that had not ended are counted by nobody"
            for _ in range(30):
                assert (await gateway.post(chat(False))).status == 200
            assert await gateway.counted("moestack_gateway_requests_total") == done + 30

            gate.clear()
            streams = [asyncio.create_task(stream()) for _ in range(20)]
            await until(lambda: len(other.requests) == 140)
            gateway.process.send_signal(signal.SIGTERM)
            while (await gateway.admin("/readyz")).status == 200:  # noqa: ASYNC110 (of another process)
                await asyncio.sleep(0.02)
            gate.set()
            assert all(answer.events[-1] == "[DONE]" for _, answer in await asyncio.gather(*streams))
            assert await asyncio.wait_for(gateway.process.wait(), 30) == 0


async def test_workers_share_one_budget_and_its_money_is_exact(tmp_path: Path) -> None:
    """A hundred calls at once against what ten and a bit cost; then a worker dies, and what it held comes back."""
    async with FakeUpstream() as local, FakeUpstream(Behaviour(tokens=300, prompt_tokens=100)) as closed:
        await local.close()
        spill = {"usdPerDay": "0.1"}
        settings = config(local, closed, price=PRICE, stateDir=str(tmp_path), spill=spill, workers=4)
        async with pod(settings, tmp_path) as gateway:
            answers = await asyncio.gather(*(gateway.post(chat(False, max_tokens=300)) for _ in range(100)))
            statuses = [answer.status for answer in answers]
            assert set(statuses) == {200, 503}
            (row,) = (await gateway.admin("/v1/costs")).json["today"]
            paid = statuses.count(200)
            assert Decimal(row["usd"]) == paid * CALL_USD <= Decimal("0.1")
            assert paid == len(closed.requests)
            gateway.workers[0].send_signal(signal.SIGKILL)
            await asyncio.sleep(1.2)  # the parent has noticed by then
            await asyncio.wait_for(ready(gateway), 60)
            while (await gateway.post(chat(False, max_tokens=300))).status == 200:
                paid += 1
            costs = (await gateway.admin("/v1/costs")).json
            assert Decimal(costs["today"][0]["usd"]) == paid * CALL_USD <= Decimal("0.1")
            assert paid == len(closed.requests)


async def test_a_pod_whose_workers_cannot_begin_says_why_and_ends(tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream() as closed:
        settings = config(local, closed, workers=2, key_file=tmp_path / "missing")
        process = await spawn(settings, tmp_path)
        assert await asyncio.wait_for(process.wait(), 60) == 2
    assert "targets[0] (t0).apiKeyFile" in (tmp_path / "log").read_text()


def test_fewer_ports_than_workers_are_refused_by_field() -> None:
    settings = config(FakeUpstream(), workers=4, siblings={"port": 9000, "workers": 2})
    with pytest.raises(ConfigRefused, match=r"^siblings\.workers: .* set it to workers, 4"):
        check(settings)
