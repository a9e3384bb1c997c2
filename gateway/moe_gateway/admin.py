"""The admin port: signed knobs and weights in, digest, metrics and health out. Not for clients."""

from __future__ import annotations

from typing import TypeVar

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import ValidationError

from moe_api.base import Model
from moe_core import foreign
from moe_core.door import guard
from moe_core.signing import CommandInvalid, SignatureRefused, describe
from moe_core.wire import Ack, Knobs, Signed, Weights
from moe_gateway import costs_api
from moe_gateway.state import Gateway
from moe_gateway.telemetry import WINDOW_MAX_S
from moe_gateway.weights import given, newest

MAX_COMMAND_BYTES = 128 * 1024
WINDOW_S = 10.0
COMMANDS = {"/v1/knobs": "POST", "/v1/weights": "PUT"}
"""What is signed, and how it is sent."""
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

    def application(self) -> web.Application:
        guarded = guard(self._gateway.door, frozenset((method, path) for path, method in COMMANDS.items()))
        app = web.Application(client_max_size=MAX_COMMAND_BYTES, middlewares=[guarded, _errors])
        app.router.add_post("/v1/knobs", self.knobs)
        app.router.add_put("/v1/weights", self.weights)
        app.router.add_get("/v1/digest", self.digest)
        app.router.add_get("/v1/window", self.window)
        app.router.add_get("/v1/forecasts", self.forecasts)
        app.router.add_get("/metrics", self.metrics)
        costs_api.register(app, self._gateway)
        app.router.add_get("/healthz", self.healthz)
        app.router.add_get("/readyz", self.readyz)
        return app

    async def knobs(self, request: web.Request) -> web.Response:
        knobs = await self._command(request, Knobs)
        gateway = self._gateway
        current = gateway.knobs
        if current is None or _is_new(knobs.version, current.version, same=knobs == current):
            gateway.apply_knobs(knobs)
        external = any(revision.metrics is not None for revision in gateway.config.revisions)
        return self._ack(knobs.version, foreign.unsupported(knobs) if external else None)

    async def weights(self, request: web.Request) -> web.Response:
        weights = await self._command(request, Weights)
        gateway = self._gateway
        unknown = sorted(given(weights.percent).keys() - {upstream.name for upstream in gateway.fleet.revisions})
        if unknown:
            raise AdminError(422, f"percent.{unknown[0]}: no such revision")
        current = newest(gateway.config, gateway.commanded_weights)
        if current is None or _is_new(
            weights.version, current.version, same=given(weights.percent) == given(current.percent)
        ):
            gateway.apply_weights(weights)
        return self._ack(weights.version)

    async def digest(self, request: web.Request) -> web.Response:
        return _json(self._gateway.digest(_window_s(request)))

    async def window(self, request: web.Request) -> web.Response:
        """For the parent of a pod's workers."""
        gateway, window_s = self._gateway, _window_s(request)
        digest, now_s = gateway.digest(window_s), gateway.clock.monotonic()
        return _json(gateway.telemetry.window(digest, now_s))

    async def forecasts(self, _: web.Request) -> web.Response:
        gateway = self._gateway
        return _json(gateway.forecasts.report(gateway.name, gateway.shadow, shadowed=gateway.config.spill.shadow))

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
            command = self._gateway.verifier.open(envelope, kind)
        except SignatureRefused as error:
            raise AdminError(403, str(error)) from None
        except CommandInvalid as error:
            raise AdminError(422, str(error)) from None
        if command.deployment != self._gateway.config.deployment:
            raise AdminError(422, f"deployment: this gateway serves {self._gateway.config.deployment!r}")
        return command

    def _ack(self, version: int, unsupported: tuple[str, ...] | None = None) -> web.Response:
        gateway = self._gateway
        ack = Ack(replica=gateway.name, rank=0, version=version, applied_at_s=gateway.clock.time())
        return _json(ack.model_copy(update={"unsupported": unsupported or None}))


def _window_s(request: web.Request) -> float:
    """Length of the window that is asked for. Raises AdminError."""
    try:
        window_s = float(request.query.get("window", WINDOW_S))
    except ValueError:
        window_s = 0.0
    if not 0 < window_s <= WINDOW_MAX_S:
        raise AdminError(422, f"window: must be above 0 and at most {WINDOW_MAX_S:g} seconds")
    return window_s


def _is_new(version: int, current: int, *, same: bool) -> bool:
    """Whether a command is to be applied; False for a repetition. Raises AdminError 409 for an older version, and for
    another content under the current one."""
    if version > current:
        return True
    if version < current:
        raise AdminError(409, f"version {version} is older than {current}, the newest one known here")
    if not same:
        raise AdminError(409, f"version {version} is known here with another content; send a higher one")
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
