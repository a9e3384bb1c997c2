"""A fleet with a console on real sockets: a board that knows its experts, a gateway that knows its books."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from moe_core.clock import SystemClock
from moe_core.config import ConsoleConfig
from moe_core.costs import CostReport, CostRow, TargetPriceRow
from moe_core.http import session
from moe_core.log import get_log
from moe_core.signing import Signer
from moe_core.wire import ExpertMatrix, LayerLoad
from moe_tuner.console.routes import load_tokens, mount
from moe_tuner.deployment import Shared
from moe_tuner.exporter import Families
from moe_tuner.fleet import Fleet
from moe_tuner.server import application
from moe_tuner.settings import load
from moe_tuner.workers import Workers
from tests.tuner.fakes import FakeBoard, FakeGateway, served
from tests.tuner.tuner_fleet import burst, entry, until

READ, OPERATE = "reader-" + "r" * 32, "operator-" + "o" * 32
MARK = {"X-Moestack-Console": "1"}
LAYERS, EXPERTS = 6, 16


@dataclass
class Books:
    """What board and gateway say beside what the tuner's own tests need."""

    report: CostReport
    layers: int = LAYERS
    experts: int = EXPERTS
    asked: int = 0
    down: bool = False
    began_s: float = field(default_factory=time.time)

    def board(self) -> list[web.RouteDef]:
        return [web.get("/v1/experts", self._experts)]

    def gateway(self) -> list[web.RouteDef]:
        return [web.get("/v1/costs", self._costs)]

    async def _experts(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.down:
            return web.json_response({"error": "secret of the board"}, status=500)
        return web.json_response([matrix(self.layers, self.experts, self.asked, self.began_s).to_json()])

    async def _costs(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.down:
            return web.json_response({"error": "secret of the gateway"}, status=500)
        return web.json_response(self.report.to_json())


def costs(**changes: Any) -> CostReport:
    rows = (CostRow(tenant="acme", target="gpt", model="gpt-5.5", usd=Decimal("1.25")),)
    price = TargetPriceRow(
        target="gpt", model="gpt-5.5", input_usd_per_m=Decimal(5), output_usd_per_m=Decimal(30), source="letter"
    )
    told: dict[str, Any] = {"deployment": "default/a", "at_s": time.time(), "today": rows, "month": rows}
    return CostReport(**{**told, "usd_per_day": Decimal(200), "prices": (price,), **changes})


def matrix(layers: int, experts: int, turn: int, began_s: float) -> ExpertMatrix:
    """Load that grows by expert, one layer idle and one not hooked."""
    rows = []
    for layer in range(layers):
        demand = tuple(turn * (1 + layer + expert) for expert in range(experts))
        half = experts // 2
        ranks = (sum(demand[:half]), sum(demand[half:]))
        rows.append(
            LayerLoad(
                layer=layer, tokens=turn * 100, demand=demand, assigned=demand, rank_demand=ranks, rank_assigned=ranks
            )
        )
    rows[-1] = LayerLoad(layer=layers - 1, hooked=False)
    return ExpertMatrix(replica="r0", model="tiny", started_at_s=began_s, at_s=time.time(), ranks=2, layers=tuple(rows))


@dataclass
class Here:
    """A console that runs."""

    url: str
    port: int
    fleet: Fleet
    client: aiohttp.ClientSession
    board: FakeBoard
    gateway: FakeGateway
    books: Books
    folder: Path

    async def ask(
        self, path: str, token: str | None = None, method: str = "GET", body: object = None, **headers: str
    ) -> tuple[int, Any, Any]:
        """Status, headers, and the body: parsed where it is JSON."""
        sent = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        data = json.dumps(body).encode() if body is not None else None
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.request(
            method, self.url + path, headers=sent, data=data, allow_redirects=False
        ) as response:
            raw = await response.read()
            is_json = response.content_type == "application/json" and raw and "Content-Encoding" not in response.headers
            return response.status, response.headers, json.loads(raw) if is_json else raw


@asynccontextmanager
async def console(
    tmp_path: Path,
    *names: str,
    port: int = 0,
    loopback: bool = True,
    config: dict[str, Any] | None = None,
    others: tuple[dict[str, Any], ...] = (),
    **entries: Any,
) -> AsyncIterator[Here]:
    """A tuner of `default/a` (and others, whose board is nowhere) with a console, after a burst that it answered."""
    (tmp_path / "read").write_text(READ + "\n")
    (tmp_path / "operate").write_text(OPERATE)
    told = {"readTokenFile": str(tmp_path / "read"), "operateTokenFile": str(tmp_path / "operate")}
    settings = ConsoleConfig.model_validate({**told, **(config or {})})
    signer, families, workers, books = Signer.generate(), Families(), Workers(), Books(costs())
    signer.save(tmp_path / "key.pem")
    board, gateway, clock = FakeBoard(signer), FakeGateway(), SystemClock()
    async with (
        session() as client,
        served([*board.routes(), *books.board()]) as board_url,
        served([*gateway.routes(), *books.gateway()]) as gateway_url,
    ):
        fleet = Fleet(Shared(client, clock, get_log("test"), workers, families))
        app = application(fleet, families)
        mount(
            app,
            fleet,
            settings,
            load_tokens(settings),
            client=client,
            clock=clock,
            log=get_log("test"),
            loopback=loopback,
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        bound = runner.addresses[0][1]
        path = tmp_path / "tuners.json"
        mine = entry(tmp_path, "a", board_url, gateway_url, **entries)
        path.write_text(json.dumps({"deployments": [mine, *(entry(tmp_path, name) for name in names), *others]}))
        try:
            await fleet.follow(load(path))
            burst(board, gateway)
            await until(lambda: bool(board.applied))
            yield Here(f"http://127.0.0.1:{bound}", bound, fleet, client, board, gateway, books, tmp_path)
        finally:
            await fleet.stop()
            await runner.cleanup()
            workers.close()
