"""A fleet of tuners with its HTTP side, on fake boards and gateways over real sockets and the real clock."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from moe_core.clock import SystemClock
from moe_core.http import session
from moe_core.log import get_log
from moe_core.signing import Signer
from moe_core.wire import TuningOrders
from moe_tuner.deployment import Shared
from moe_tuner.exporter import Families
from moe_tuner.fleet import Fleet
from moe_tuner.report import DecisionRecord
from moe_tuner.server import application
from moe_tuner.settings import load
from moe_tuner.workers import Workers
from tests.tuner.fakes import FakeBoard, FakeGateway, served

NOWHERE = "http://127.0.0.1:9"


def entry(tmp_path: Path, name: str, board: str = NOWHERE, gateway: str = NOWHERE, **changes: Any) -> dict[str, Any]:
    return {
        "deployment": f"default/{name}",
        "boardUrl": board,
        "gatewayAdminUrls": [gateway],
        "prometheusUrl": NOWHERE,
        "signingKeyFile": str(tmp_path / "key.pem"),
        "storageUrl": f"sqlite:///{tmp_path / name}.db",
        "decisionLog": str(tmp_path / f"{name}.jsonl"),
        "slo": {"ttftP95S": 0.8, "itlP95S": 0.05},
        "bounds": {"capacityFactorMin": "1", "capacityFactorMax": "2", "activeSeqsMin": 4, "activeSeqsMax": 64},
        "tickS": 0.05,
        **changes,
    }


@dataclass
class Running:
    """A fleet with its HTTP side."""

    fleet: Fleet
    path: Path
    url: str
    client: aiohttp.ClientSession
    signer: Signer

    def decisions(self) -> tuple[DecisionRecord, ...]:
        member = self.fleet.find(None)
        return () if member is None or member.tuner is None else member.tuner.report().decisions

    async def follow(self, *entries: dict[str, Any]) -> None:
        self.path.write_text(json.dumps({"deployments": entries}))
        await self.fleet.follow(load(self.path))

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(self.url + path) as response:
            return response.status, await response.json()

    async def order(self, signer: Signer | None = None, name: str = "a", **orders: Any) -> tuple[int, Any]:
        order = TuningOrders(deployment=f"default/{name}", **orders)
        envelope = (signer or self.signer).sign(order).to_json()
        async with self.client.put(f"{self.url}/v1/orders?deployment=default/a", json=envelope) as response:
            return response.status, await response.json()

    async def status(self, name: str = "a") -> Any:
        return (await self.get(f"/v1/status?deployment=default/{name}"))[1]


@asynccontextmanager
async def running(tmp_path: Path, may_send: Callable[[], bool] = lambda: True) -> AsyncIterator[Running]:
    signer, families, workers = Signer.generate(), Families(), Workers()
    signer.save(tmp_path / "key.pem")
    async with session() as client:
        fleet = Fleet(Shared(client, SystemClock(), get_log("test"), workers, families, may_send))
        runner = web.AppRunner(application(fleet, families))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield Running(fleet, tmp_path / "tuners.json", url, client, signer)
        finally:
            await fleet.stop()
            await runner.cleanup()
            workers.close()


@asynccontextmanager
async def boards(signer: Signer, count: int) -> AsyncIterator[list[tuple[FakeBoard, FakeGateway, str, str]]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            board, gateway = FakeBoard(signer), FakeGateway()
            urls = [await stack.enter_async_context(served(part.routes())) for part in (board, gateway)]
            made.append((board, gateway, *urls))
        yield made  # type: ignore[misc]


def burst(board: FakeBoard, gateway: FakeGateway) -> None:
    board.waiting, board.running, board.skew = 20, 16, 1.8
    gateway.arrivals, gateway.ttft_p95_s = 200, 2.0


async def until(done: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
