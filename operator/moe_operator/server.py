"""The process: caches, election, workers, events and one small HTTP port, and an orderly end.

A process that loses its lease goes back to standing by and does not exit: its caches stay warm, so that a slow API
server is not met by a crowd of operators that restart and list everything anew. What makes that safe is that the fence
refuses each write from that moment on, and that leadership is given up only when no call is under way.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import orjson
from aiohttp import web

from moe_core.clock import Clock
from moe_core.config import OperatorConfig
from moe_core.log import get_log
from moe_kube.api import Api
from moe_kube.events import Recorder
from moe_kube.fence import FencedApi
from moe_kube.lease import Election
from moe_kube.objects import LEASE, Ref
from moe_kube.throttle import Throttled
from moe_operator.controller import Controller
from moe_operator.exporter import Exporter
from moe_operator.fleet import HttpFleet
from moe_operator.requests import Tell
from moe_operator.shell import Fleet

LEASE_NAME = "moestack-operator"
CONTROLLER = "moestack.dev/operator"
"""Who reports its Events."""
STUCK_S = 600.0
"""A reconcile that takes longer hangs: each of its calls has a time-out, and it makes some dozens."""
SHUTDOWN_S = 3.0


class OperatorServer:
    """A running operator. `start`, then `port`; `stop` ends it. `api` is the bare client; the caller closes it."""

    def __init__(
        self,
        config: OperatorConfig,
        api: Api,
        *,
        clock: Clock,
        exporter: Exporter | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        self.config = config
        self.port = 0
        self._clock = clock
        self._exporter = exporter or Exporter()
        identity = config.identity or f"{socket.gethostname()}-{os.getpid()}"
        self.election = Election(
            api,
            Ref(LEASE, config.namespace, LEASE_NAME),
            clock=clock,
            identity=identity,
            duration_s=max(2, round(config.lease_s)),
            renew_deadline_s=config.lease_s * 2 / 3,
            retry_s=config.lease_s * 2 / 15,
            on_started=self._started,
            on_stopped=self._stopped,
        )
        fenced = FencedApi(api, self.election.held_for_s, margin_s=min(1.0, config.lease_s / 15))
        throttled = Throttled(fenced, qps=config.qps, burst=config.burst, clock=clock)
        self._fleet = fleet or HttpFleet(config.signing_key_file)
        # Events have a pace of their own: they must not take that of reconciles.
        self._recorder = Recorder(fenced, clock, controller=CONTROLLER, instance=identity)
        self.controller = Controller(
            throttled,
            config,
            clock=clock,
            fleet=self._fleet,
            teller=Events(self._recorder),
            observe=self._exporter.reconciled,
        )
        self._exporter.reads(
            self.controller,
            leading=lambda: self.election.leading,
            throttled_s=lambda: throttled.waited_s_total,
            dropped=lambda: self._recorder.dropped_total,
        )
        self._background: dict[str, asyncio.Task[None]] = {}
        self._runner: web.AppRunner | None = None
        self._log = get_log("operator")

    async def start(self) -> None:
        """Listen, follow the cluster, and stand for election. Raises OSError for a port that is not to be had."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.config.host, self.config.port).start()
        self.port = self._runner.addresses[0][1]
        self._background = {
            "caches": asyncio.create_task(self.controller.follow(), name="caches"),
            "election": asyncio.create_task(self.election.run(), name="election"),
            "events": asyncio.create_task(self._recorder.run(), name="events"),
        }
        self._log.info(
            "started", port=self.port, namespaces=self.config.namespaces or "all", lease=self.config.namespace
        )

    async def stop(self) -> None:
        """Take no more keys, let what is under way end, write the last events, release the lease."""
        election = self._background.get("election")
        if election is not None:
            self.election.stop()
            # Longer than any call under way; the fence ends each in time.
            done, _ = await asyncio.wait({election}, timeout=2 * self.config.lease_s)
            if not done:
                self._log.warning("the lease could not be released in time; it runs out by itself")
        for task in self._background.values():
            task.cancel()
        await asyncio.gather(*self._background.values(), return_exceptions=True)
        await self.controller.stop()
        if isinstance(self._fleet, HttpFleet):
            await self._fleet.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._log.info("stopped")

    @property
    def crashed(self) -> str:
        """The part that has ended although nothing stopped it; empty while all run."""
        ended = [name for name, task in self._background.items() if task.done()]
        if self.controller.broken:
            ended.append("workers")
        return ", ".join(ended)

    async def _started(self) -> None:
        await self.controller.start()

    async def _stopped(self) -> None:
        await self.controller.stop()

    # -- HTTP

    async def _healthz(self, _: web.Request) -> web.Response:
        """200 while this process can go on: its loop answers, its parts run, no worker hangs."""
        problems = [f"ended: {self.crashed}"] if self.crashed else []
        longest_s = self.controller.longest_work_s()
        if longest_s > STUCK_S:
            problems.append(f"a reconcile has taken {longest_s:.0f} s")
        return _answer(problems, {"leader": self.election.leading, "holder": self.election.holder})

    async def _readyz(self, _: web.Request) -> web.Response:
        """200 once every cache is filled; a standby is ready as well."""
        caches = self.controller.caches
        unfilled = [
            f"{behind.kind.kind}{f' in {behind.namespace}' if behind.namespace else ''}: {behind.reason}"
            for behind in caches.behind()
            if behind.blocks
        ]
        return _answer(unfilled, {"leader": self.election.leading, "objects": len(caches)})

    async def _metrics(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._exporter.exposition(), headers=headers)


class Events:
    """Events of the operator, through the recorder: written beside the reconciles."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def tell(self, tell: Tell) -> None:
        self._recorder.record(tell.resource, tell.uid, reason=tell.reason, note=tell.note, type=tell.type)


def _answer(problems: list[str], facts: dict[str, Any]) -> web.Response:
    document = {"ok": not problems, **facts, **({"problems": problems} if problems else {})}
    return web.Response(body=orjson.dumps(document), status=503 if problems else 200, content_type="application/json")
