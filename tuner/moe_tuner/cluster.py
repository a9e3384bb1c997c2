"""The tuner of a cluster: watches, election, records, Events and one HTTP port, around the fleet.

A process that loses its lease lets every deployment go and stands by. From the moment at which the lease may be
another's it sends no knobs and writes nothing; the next leader goes on from `status.tuning` (docs/adr/0040).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web

from moe_core.clock import Clock, SystemClock
from moe_core.config import ClusterTunerConfig
from moe_core.http import session
from moe_core.log import configure, get_log
from moe_kube.access import AccessError
from moe_kube.api import Api
from moe_kube.connect import connect
from moe_kube.events import Recorder
from moe_kube.fence import FencedApi
from moe_kube.lease import Election, own_identity
from moe_kube.objects import LEASE, MOE_DEPLOYMENT, Ref
from moe_kube.throttle import Throttled
from moe_tuner.console.rights import LOOPBACK
from moe_tuner.console.routes import load_tokens, mount
from moe_tuner.deployment import Shared
from moe_tuner.exporter import Families
from moe_tuner.fleet import Fleet
from moe_tuner.follow import Follower, Key
from moe_tuner.journal import Kept
from moe_tuner.process import told_to_stop, why
from moe_tuner.record import kept_of
from moe_tuner.register import Register
from moe_tuner.report import DecisionRecord
from moe_tuner.resource import tuning_of
from moe_tuner.server import application
from moe_tuner.settings import ConfigRefused, load_cluster
from moe_tuner.told import BURST, REFILL_S, event_of
from moe_tuner.workers import Workers, share_evenly

LEASE_NAME = "moestack-tuner"
CONTROLLER = "moestack.dev/tuner"
"""Who reports its Events."""
SHUTDOWN_S = 3.0
WATCH_S = 1.0
"""How often the process looks whether one of its parts has died."""


class ClusterTuner:
    """A running tuner. `start`, then `port`; `stop` ends it. The caller closes `api` and `client`."""

    def __init__(self, config: ClusterTunerConfig, api: Api, client: aiohttp.ClientSession, *, clock: Clock) -> None:
        """Raises ConfigRefused for tokens of the console that cannot be read or are too short."""
        self.config = config
        self.port = 0
        self._client = client
        self._tokens = None if config.console is None else load_tokens(config.console)
        self._clock = clock
        self._log = get_log("tuner")
        self._writer = config.identity or socket.gethostname()
        self._workers, self._families = Workers(), Families()
        self.election = Election(
            api,
            Ref(LEASE, config.namespace, LEASE_NAME),
            clock=clock,
            identity=f"{config.identity}_{own_identity()}" if config.identity else None,
            duration_s=max(2, round(config.lease_s)),
            renew_deadline_s=config.lease_s * 2 / 3,
            retry_s=config.lease_s * 2 / 15,
            on_started=self._started,
            on_stopped=self._stopped,
        )
        fenced = FencedApi(api, self.election.held_for_s, margin_s=min(1.0, config.lease_s / 15))
        shared = Shared(client, clock, self._log, self._workers, self._families)
        hooks = {"may_send": lambda: self.election.leading, "told": self._told, "kept": self._kept}
        self.fleet = Fleet(replace(shared, **hooks))  # type: ignore[arg-type]
        self.follower = Follower(api, config, self.fleet, clock)
        self._register = Register(
            Throttled(fenced, qps=config.qps, burst=config.burst, clock=clock),
            self.follower,
            self.fleet,
            writer=self._writer,
            every_s=config.record_every_s,
            clock=clock,
            observe=self._families.recorded,
        )
        self._events = Recorder(
            fenced, clock, controller=CONTROLLER, instance=self._writer, burst=BURST, refill_s=REFILL_S
        )
        self._families.leads(lambda: self.election.leading)
        self._background: dict[str, asyncio.Task[None]] = {}
        self._recording: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen, follow the cluster, and stand for election. Raises OSError for a port that is not to be had."""
        app = application(self.fleet, self._families)
        app.router.add_get("/readyz", self._readyz)
        if self._tokens is not None and self.config.console is not None:
            loopback = self.config.host in LOOPBACK
            mount(
                app,
                self.fleet,
                self.config.console,
                self._tokens,
                client=self._client,
                clock=self._clock,
                log=self._log,
                loopback=loopback,
            )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.config.host, self.config.port).start()
        self.port = self._runner.addresses[0][1]
        self._background = {
            "caches": asyncio.create_task(self.follower.run(), name="caches"),
            "election": asyncio.create_task(self.election.run(), name="election"),
            "events": asyncio.create_task(self._events.run(), name="events"),
        }
        self._log.info("started", port=self.port, namespaces=self.config.namespaces or "all", writer=self._writer)

    async def stop(self) -> None:
        """Take back what is unproven while that is still ours to do, write the last Events, release the lease."""
        await self._stopped()
        if (election := self._background.get("election")) is not None:
            self.election.stop()
            done, _ = await asyncio.wait({election}, timeout=2 * self.config.lease_s)
            if not done:
                self._log.warning("the lease could not be released in time; it runs out by itself")
        for task in self._background.values():
            task.cancel()
        await asyncio.gather(*self._background.values(), return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        self._workers.close()
        self._log.info("stopped")

    @property
    def crashed(self) -> str:
        """The part that has ended although nothing stopped it; empty while all run."""
        ended = [name for name, task in self._background.items() if task.done()]
        if self.follower.broken:
            ended.append("followers")
        if self._recording is not None and self._recording.done():
            ended.append("records")
        return ", ".join(ended)

    async def _started(self) -> None:
        await self.follower.start()
        self._recording = asyncio.create_task(self._register.run(), name="records")

    async def _stopped(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.cancel()
            await asyncio.gather(recording, return_exceptions=True)
        await self.follower.stop()
        await self._events.flush()

    # -- what the fleet asks and tells

    def _kept(self, deployment: str) -> Kept | None:
        obj = self.follower.resource(_key(deployment))
        status = None if obj is None else tuning_of(obj)
        now = self._clock.time(), self._clock.monotonic()
        return kept_of(status, writer=self._writer, now_s=now[0], now_monotonic_s=now[1])

    def _told(self, deployment: str, record: DecisionRecord) -> None:
        key, told = _key(deployment), event_of(record)
        wanted = self.follower.wanted.get(key)
        if told is not None and wanted is not None:
            ref = Ref(MOE_DEPLOYMENT, *key)
            self._events.record(ref, wanted.uid, reason=told.reason, note=told.note, action="Tune", type=told.type)

    async def _readyz(self, _: web.Request) -> web.Response:
        """200 once every cache is filled; one that stands by is ready as well."""
        behind = [f"{kind.kind}: {why}" for kind, why in self.follower.behind()]
        answer = {"ok": not behind, "leader": self.election.leading, "holder": self.election.holder}
        body = orjson.dumps({**answer, **({"problems": behind} if behind else {})})
        return web.Response(body=body, status=503 if behind else 200, content_type="application/json")


def _key(deployment: str) -> Key:
    namespace, _, name = deployment.partition("/")
    return namespace, name


async def serve(config: ClusterTunerConfig, kubeconfig: Path | None) -> int:
    """Run one of a cluster's tuners until a signal; exit status 1 if a part of it dies. Raises AccessError."""
    stop, clock = told_to_stop(), SystemClock()
    async with session(connect_s=1.0, read_s=5.0) as client, await connect(kubeconfig, clock=clock) as api:
        tuner = ClusterTuner(config, api, client, clock=clock)
        try:
            await tuner.start()
            print(json.dumps({"ready": True, "port": tuner.port}), flush=True)  # noqa: T201  # the ready line
            while not stop.is_set() and not tuner.crashed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), WATCH_S)
            crashed = tuner.crashed
        finally:
            await tuner.stop()
    if crashed:
        get_log("tuner").error("a part of the tuner has died: restart it", part=crashed)
    return 1 if crashed else 0


def run(path: Path, kubeconfig: Path | None) -> int:
    """Exit status of a process with that configuration."""
    try:
        config = load_cluster(path)
        configure(config.log_level)
        share_evenly()
        return asyncio.run(serve(config, kubeconfig))
    except (ConfigRefused, AccessError) as refusal:
        print(f"tuner: {refusal}", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        print(f"tuner: {why(error, config.port)}", file=sys.stderr)  # noqa: T201
        return 1
