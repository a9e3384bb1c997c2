"""The board: one named Ray actor of an application, with an HTTP side for tuner, gateway and Prometheus.

Replicas reach it by actor calls, which Ray authenticates; a change of knobs comes by HTTP and must be signed, and who
asks there for more than health, metrics and digests shows a pass.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError

from moe_core.clock import Clock, SystemClock
from moe_core.config import ServingConfig
from moe_core.door import guard
from moe_core.log import configure, get_log
from moe_core.passes import Door
from moe_core.signing import CommandInvalid, SignatureRefused, Verifier, describe
from moe_core.wire import Ack, ReplicaDigest, Signed
from moe_serving.board_metrics import registry
from moe_serving.board_state import BoardState, OlderVersion, WrongDeployment

MATRIX_WAIT_S = 3.0
MAX_BODY_BYTES = 128 * 1024
START_S = 60.0
"""Longest wait for a new board to listen."""
GATEWAYS_READ = frozenset({"/v1/digests"})
"""Open to gateways, which have no key and have to outlive operator and tuner. It tells what /metrics tells: loads."""

log = get_log("board")


class Board:
    """State of the board with its HTTP server. The Ray actor is this class, made by `actor`."""

    def __init__(
        self,
        deployment: str,
        revision: str,
        trusted_keys: list[str],
        host: str,
        port: int,
        clock: Clock | None = None,
    ) -> None:
        configure()
        self._clock = clock or SystemClock()
        verifier = Verifier(trusted_keys)
        self.state = BoardState(deployment, revision, verifier)
        self._door = Door(deployment, lambda: verifier, self._clock)
        self._host, self._port = host, port
        self._runner: web.AppRunner | None = None
        self._changed = asyncio.Event()
        self._matrix_wishes = 0
        self._matrices: dict[str, dict[str, Any]] = {}
        self._metrics = registry(deployment, revision, lambda: self.state.digests(self._clock.monotonic()))

    # Calls of replicas

    async def start(self) -> str:
        """Listen, once; returns the base URL."""
        if self._runner is None:
            door = guard(self._door, frozenset({("POST", "/v1/knobs")}), GATEWAYS_READ)
            app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[door])
            app.add_routes(
                [
                    web.post("/v1/knobs", self._post_knobs),
                    web.get("/v1/knobs", self._get_knobs),
                    web.get("/v1/acks", self._get_acks),
                    web.get("/v1/digests", self._get_digests),
                    web.get("/v1/experts", self._get_experts),
                    web.get("/metrics", self._get_metrics),
                    web.get("/healthz", self._healthz),
                ]
            )
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, self._host, self._port)
            await site.start()
            self._port = int(runner.addresses[0][1])
            self._runner = runner
            log.info("board listens", deployment=self.state.deployment, port=self._port)
        return f"http://{self._host}:{self._port}"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def register(self, replica: str, ranks: int, has: dict[str, Any] | None) -> None:
        """A replica of that many ranks is there, with these knobs (a signed envelope) in force."""
        self.state.register(
            replica, ranks, self._clock.monotonic(), None if has is None else Signed.model_validate(has)
        )
        self._wake()

    async def wait(self, replica: str, version: int, timeout_s: float) -> dict[str, Any]:
        """Wait for knobs newer than `version`, or for a wish: {"knobs": envelope?, "matrix": bool, "known": bool}."""
        deadline = self._clock.monotonic() + timeout_s
        while True:
            newer = self.state.newer_than(version)
            matrix = self._matrix_wishes > 0 and replica not in self._matrices
            known = self.state.known(replica)
            left = deadline - self._clock.monotonic()
            if newer is not None or matrix or not known or left <= 0:
                return {"knobs": None if newer is None else newer.to_json(), "matrix": matrix, "known": known}
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue

    async def acknowledge(self, asked: int, acks: list[dict[str, Any]]) -> None:
        """Acks of a replica's ranks for a version."""
        self.state.acknowledge([Ack.model_validate(ack) for ack in acks], asked)

    async def report(self, digest: dict[str, Any]) -> bool:
        """A replica's digest; False tells a replica that it must register first."""
        parsed = ReplicaDigest.model_validate(digest)
        self.state.report(parsed, self._clock.monotonic())
        return self.state.known(parsed.replica)

    async def matrix(self, replica: str, matrix: dict[str, Any]) -> None:
        """A replica's full expert matrix, as asked for."""
        self._matrices[replica] = matrix

    # HTTP

    async def _post_knobs(self, request: web.Request) -> web.Response:
        try:
            envelope = Signed.model_validate_json(await request.read())
            new = self.state.offer(envelope)
        except ValidationError as error:
            return _json({"error": describe(error)}, 422)
        except CommandInvalid as error:
            return _json({"error": str(error)}, 422)
        except WrongDeployment as error:
            return _json({"error": str(error)}, 422)
        except SignatureRefused as error:
            log.warning("knobs refused", reason=str(error))
            return _json({"error": str(error)}, 403)
        except OlderVersion as error:
            return _json({"error": str(error), "version": error.current}, 409)
        if new:
            self._wake()
        return _json({"version": self.state.version}, 202 if new else 200)

    async def _get_knobs(self, _: web.Request) -> web.Response:
        if self.state.envelope is None:
            return _json({"error": "no knobs were sent yet: replicas run with what they booted with"}, 404)
        return _json(self.state.envelope.to_json())

    async def _get_acks(self, request: web.Request) -> web.Response:
        try:
            version = int(request.query.get("version", self.state.version))
        except ValueError:
            return _json({"error": "version: a whole number is wanted"}, 422)
        return _json(self.state.acks(version, self._clock.monotonic()))

    async def _get_digests(self, _: web.Request) -> web.Response:
        return _json([digest.to_json() for digest in self.state.digests(self._clock.monotonic())])

    async def _get_experts(self, _: web.Request) -> web.Response:
        """The full matrix, asked from the replicas now. Who asks while another waits gets the same answers."""
        if not self._matrix_wishes:
            self._matrices.clear()
        self._matrix_wishes += 1
        self._wake()
        try:
            expected = {digest.replica for digest in self.state.digests(self._clock.monotonic())}
            deadline = self._clock.monotonic() + MATRIX_WAIT_S
            while not expected <= self._matrices.keys() and self._clock.monotonic() < deadline:
                await self._clock.sleep(0.02)
            return _json([matrix for _, matrix in sorted(self._matrices.items())])
        finally:
            self._matrix_wishes -= 1

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthz(self, _: web.Request) -> web.Response:
        return _json({"ok": True, "replicas": len(self.state.digests(self._clock.monotonic()))})

    def _wake(self) -> None:
        """Wake everyone who waits now; later ones wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()


def actor_name(deployment: str, revision: str) -> str:
    """Name of the board's actor in the namespace `moestack`."""
    return f"board:{deployment}:{revision}"


def actor(deployment: str, revision: str, trusted_keys: list[str], host: str, port: int) -> Any:
    """The board's actor of this application, made where it does not exist; pinned to the head node."""
    import ray

    return (
        ray.remote(Board)
        .options(
            name=actor_name(deployment, revision),
            namespace="moestack",
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=1000,
        )
        .remote(deployment, revision, trusted_keys, host, port)
    )


def ensure(config: ServingConfig) -> str:
    """The application's board, made where it does not exist, and listening; returns its base URL."""
    import ray

    handle = actor(config.deployment, config.revision, list(config.trusted_keys), config.board_host, config.board_port)
    return str(ray.get(handle.start.remote(), timeout=START_S))


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
