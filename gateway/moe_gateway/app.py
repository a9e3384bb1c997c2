"""The client-facing application: paths, limits, request bodies, and the end that every request gets."""

from __future__ import annotations

import asyncio
import os
import re
from functools import partial

import orjson

from moe_gateway import openapi
from moe_gateway.call import Call, Outcome, Phase, Stop
from moe_gateway.egress import HEADER as EGRESS_HEADER
from moe_gateway.exchange import Exchange
from moe_gateway.messages_in import parse_messages
from moe_gateway.messages_out import MessagesResponder
from moe_gateway.openai_api import ApiError, Endpoint, parse
from moe_gateway.openapi import OPENAPI_PATH
from moe_gateway.proxy import route
from moe_gateway.responder import Responder
from moe_gateway.sessions import session_of
from moe_gateway.state import Gateway
from moe_gateway.tiers import check_arguments, tier_from
from moe_gateway.tracing import onward
from moe_gateway.upstream import Rejected

PREFIX = "/v1"
_POST = {PREFIX + endpoint.value: endpoint for endpoint in Endpoint}
_MODELS = PREFIX + "/models"
_MESSAGES = PREFIX + Endpoint.MESSAGES.value
_NOT_SERVED = {
    PREFIX + Endpoint.MESSAGES.value + "/": "the usage of an answer: tokens are counted by the engine alone",
    PREFIX + Endpoint.RESPONSES.value + "/": "input with the whole conversation: no response is stored",
}
"""Calls that the engine would answer and the gateway does not pass: what to use instead."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


BODY_BYTES_PER_S = 1024
"""A body that comes more slowly is not waited for, once `limits.clientStallS` have passed."""
PROMPTS = ("messages", "input", "prompt")
"""Where calls have their prompt."""


class ClientGone(Exception):
    """The client left before its request was whole."""


class App:
    """Answers exchanges from one `Gateway`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._created = int(gateway.clock.time())

    async def __call__(self, exchange: Exchange) -> None:
        headers = exchange.headers
        if EGRESS_HEADER in headers:  # The last of several would win, and widen what another one forbids.
            headers[EGRESS_HEADER] = b";".join(value for name, value in exchange.fields if name == EGRESS_HEADER)
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if given and _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        path = exchange.path
        out = (MessagesResponder if path.startswith(_MESSAGES) else Responder)(exchange, request_id)
        endpoint = _POST.get(path)
        if endpoint is not None and exchange.method == "POST":
            await self._call(endpoint, headers, request_id, exchange, out)
        elif path == _MODELS or path.startswith(_MODELS + "/"):
            await self._models(exchange.method, path, headers, out)
        elif endpoint is not None:
            await out.error(_wrong_method("POST"))
        elif path == OPENAPI_PATH and exchange.method == "GET":
            await out.whole(200, b"application/json", openapi.document(self._gateway.config.model))
        elif path == OPENAPI_PATH:
            await out.error(_wrong_method("GET"))
        elif (instead := _instead_of(path)) is not None:
            message = f"{path[:200]} is not served; use {instead}"
            await out.error(ApiError(404, message, code="unsupported_url"))
        else:
            await out.error(ApiError(404, f"unknown path {path[:200]}", code="unknown_url"))

    async def _call(
        self, endpoint: Endpoint, headers: dict[bytes, bytes], request_id: str, exchange: Exchange, out: Responder
    ) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request is served outside a task")
        call = self._gateway.begin(request_id, task)
        call.endpoint = endpoint.value
        tracing = self._gateway.tracing
        if tracing is not None:
            call.trace = tracing.begin(call, endpoint.value, headers)
        else:
            call.traceparent = onward(headers)
        try:
            await self._gateway.access.enter(call, headers, self._gateway.client, out)
            call.tier = tier_from(self._gateway.config, headers, call.tenant)
            egress = headers.get(EGRESS_HEADER)
            call.egress = None if egress is None else egress.decode("latin-1")
            await self._answer(endpoint, headers, exchange, out, call)
        except ClientGone:
            call.outcome = Outcome.CANCELLED
        except asyncio.CancelledError:
            if call.stop is None:
                call.outcome = call.outcome or Outcome.CANCELLED
                raise
            task.uncancel()
            await self._stopped(call, out)
        except ApiError as error:
            client_error = error.status < 500
            call.outcome = call.outcome or (Outcome.CLIENT_ERROR if client_error else Outcome.ERROR)
            call.status = error.status
            call.error = call.error or error.code
            await out.error(error)
        except Exception as error:
            call.outcome, call.status, call.error = Outcome.ERROR, 500, type(error).__name__
            self._gateway.log.exception("a request failed inside the gateway", request_id=request_id)
            await out.error(ApiError(500, "internal error of the gateway", kind="server_error", code="internal_error"))
        finally:
            self._gateway.end(call)
            if tracing is not None and call.trace is not None:
                tracing.end(call.trace, call)

    async def _answer(
        self, endpoint: Endpoint, headers: dict[bytes, bytes], exchange: Exchange, out: Responder, call: Call
    ) -> None:
        gateway = self._gateway
        if gateway.draining:
            call.outcome = Outcome.SHED
            raise _stopping()
        body = await self._body(headers, exchange, call)
        request = parse_messages(body) if endpoint is Endpoint.MESSAGES else parse(endpoint, body)
        if request.model != gateway.config.model:
            message = f"the model {request.model[:200]!r} does not exist; there is {gateway.config.model!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        check_arguments(request, call.tier, ours=any(upstream.ours for upstream in gateway.fleet.revisions))
        gateway.access.charge(call, gateway.fleet.prompt_tokens(len(request.raw)) + (request.output_limit or 0), out)
        call.model, call.stream = request.model, request.stream
        if gateway.config.sessions:
            call.session = session_of(gateway.config.sessions, headers, request, call.tenant)
        if gateway.config.log_prompts:
            call.prompt = next((request.document[name] for name in PROMPTS if name in request.document), None)
        call.enter(Phase.DECIDING, gateway.clock.monotonic())
        exchange.when_gone(partial(_left, call, out))
        try:
            await route(gateway, request, call, out, headers.get(b"x-moestack-explain") == b"1")
        except Rejected as rejected:
            call.outcome, call.status = Outcome.CLIENT_ERROR, rejected.status
            kept = {name.lower(): value for name, value in rejected.headers.items()}
            kind = kept.pop("content-type", "application/json").encode()
            await out.whole(rejected.status, kind, rejected.body, [(n.encode(), v.encode()) for n, v in kept.items()])

    async def _body(self, headers: dict[bytes, bytes], exchange: Exchange, call: Call) -> bytes:
        """The whole request body. One that is too large is read on for a while, so that the answer gets through."""
        limit = self._gateway.config.limits.max_body_bytes
        declared = headers.get(b"content-length", b"")
        too_large = declared.isdigit() and int(declared) > limit
        if too_large and int(declared) > 2 * limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            came = await exchange.body()
            if came is None:
                raise ClientGone
            part, more = came
            size += len(part)
            if size > limit:
                too_large = True
                parts.clear()
            elif part:
                parts.append(part)
            if too_large and size > 2 * limit:
                raise _too_large(limit)
            if not more:
                break
            # Each byte buys time, so that one now and then does not hold a place for ever.
            call.since_s = min(self._gateway.clock.monotonic(), call.arrived_s + size / BODY_BYTES_PER_S)
        if too_large:
            raise _too_large(limit)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _stopped(self, call: Call, out: Responder) -> None:
        """The end of a request that was stopped from outside before, or after, its stream ran."""
        if call.outcome is not None:
            return
        if call.stop is Stop.DRAINING:
            call.outcome, call.status = Outcome.ERROR, 503
            await out.error(_stopping())
        elif call.stop is Stop.CLIENT_STALLED and call.phase is Phase.RECEIVING:
            call.outcome, call.status = Outcome.CLIENT_ERROR, 408
            await out.error(ApiError(408, "the request did not arrive in time", code="request_timeout", close=True))
        else:
            call.outcome = Outcome.CANCELLED
            call.error = call.error or (None if call.stop is None else call.stop.value)

    async def _models(self, method: str, path: str, headers: dict[bytes, bytes], out: Responder) -> None:
        try:
            await self._gateway.access.identify(headers, self._gateway.client, out)
        except ApiError as error:
            await out.error(error)
            return
        name = self._gateway.config.model
        entry = {"id": name, "object": "model", "created": self._created, "owned_by": "moestack"}
        if method != "GET":
            await out.error(_wrong_method("GET"))
        elif path == _MODELS:
            await out.whole(200, b"application/json", orjson.dumps({"object": "list", "data": [entry]}))
        elif path == f"{_MODELS}/{name}":
            await out.whole(200, b"application/json", orjson.dumps(entry))
        else:
            message = f"the model does not exist; there is {name!r}"
            await out.error(ApiError(404, message, code="model_not_found", param="model"))


def _left(call: Call, out: Responder) -> None:
    """The client has left: stop its request, which frees the engine's place at once."""
    if not out.finished:
        call.cancel(Stop.CLIENT_GONE)


def _instead_of(path: str) -> str | None:
    """The call to use in place of one that is known and not served; None for any other path."""
    return next((use for known, use in _NOT_SERVED.items() if path.startswith(known)), None)


def _wrong_method(allowed: str) -> ApiError:
    return ApiError(405, f"this path takes {allowed} alone", code="method_not_allowed")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large", close=True)


def _stopping() -> ApiError:
    return ApiError(
        503, "the gateway is stopping; try again", kind="server_error", code="stopping", retry_after_s=1, close=True
    )
