"""The admin port: signed knobs and weights in, digest, metrics and health out. Not for clients."""

from __future__ import annotations

from typing import TypeVar

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import ValidationError

from moe_api.base import Model
from moe_core.signing import CommandInvalid, SignatureRefused, Verifier, describe
from moe_core.wire import Ack, Knobs, Signed, Weights
from moe_gateway.state import Gateway
from moe_gateway.telemetry import WINDOW_MAX_S

MAX_COMMAND_BYTES = 128 * 1024
WINDOW_S = 10.0
C = TypeVar("C", Knobs, Weights)


class AdminError(Exception):
    """A command that is refused, with the status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Admin:
    """Handlers over one `Gateway`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._verifier = Verifier(gateway.config.trusted_keys)
        self._weights: Weights | None = None

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_COMMAND_BYTES, middlewares=[_errors])
        app.router.add_post("/v1/knobs", self.knobs)
        app.router.add_put("/v1/weights", self.weights)
        app.router.add_get("/v1/digest", self.digest)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/healthz", self.healthz)
        app.router.add_get("/readyz", self.readyz)
        return app

    async def knobs(self, request: web.Request) -> web.Response:
        knobs = await self._command(request, Knobs)
        gateway = self._gateway
        if _is_new(knobs, gateway.knobs):
            gateway.apply_knobs(knobs)
        return self._ack(knobs.version)

    async def weights(self, request: web.Request) -> web.Response:
        weights = await self._command(request, Weights)
        unknown = sorted(set(weights.percent) - {upstream.name for upstream in self._gateway.revisions})
        if unknown:
            raise AdminError(422, f"percent.{unknown[0]}: no such revision")
        if sum(weights.percent.values()) != 100:
            raise AdminError(422, f"percent: sums to {sum(weights.percent.values())}; it must be 100")
        if _is_new(weights, self._weights):
            self._gateway.apply_weights(weights)
            self._weights = weights
        return self._ack(weights.version)

    async def digest(self, request: web.Request) -> web.Response:
        try:
            window_s = float(request.query.get("window", WINDOW_S))
        except ValueError:
            window_s = 0.0
        if not 0 < window_s <= WINDOW_MAX_S:
            raise AdminError(422, f"window: must be above 0 and at most {WINDOW_MAX_S:g} seconds")
        return _json(self._gateway.digest(window_s))

    async def metrics(self, _: web.Request) -> web.Response:
        body = self._gateway.telemetry.exposition()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(self, _: web.Request) -> web.Response:
        if self._gateway.draining:
            return web.Response(status=503, text="draining\n")
        return web.Response(text="ok\n")

    async def _command(self, request: web.Request, kind: type[C]) -> C:
        try:
            envelope = Signed.model_validate_json(await request.read())
        except ValidationError as error:
            raise AdminError(422, describe(error)) from None
        try:
            command = self._verifier.open(envelope, kind)
        except SignatureRefused as error:
            raise AdminError(403, str(error)) from None
        except CommandInvalid as error:
            raise AdminError(422, str(error)) from None
        if command.deployment != self._gateway.config.deployment:
            raise AdminError(422, f"deployment: this gateway serves {self._gateway.config.deployment!r}")
        return command

    def _ack(self, version: int) -> web.Response:
        return _json(Ack(replica=self._gateway.name, rank=0, version=version, applied_at_s=self._gateway.clock.time()))


def _is_new(command: C, current: C | None) -> bool:
    """Whether a command is to be applied; False for a repetition. Raises AdminError 409 for an older version, and for
    another content under the version in force."""
    if current is None or command.version > current.version:
        return True
    if command.version < current.version:
        raise AdminError(409, f"version {command.version} is older than {current.version}, which is in force")
    if command != current:
        raise AdminError(409, f"version {command.version} is in force with another content; send a higher one")
    return False


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except AdminError as error:
        return web.Response(
            status=error.status, body=orjson.dumps({"error": str(error)}), content_type="application/json"
        )


def _json(document: Model) -> web.Response:
    return web.Response(body=orjson.dumps(document.to_json()), content_type="application/json")
