"""The tuner's HTTP side: status, history, metrics and health for all to read; orders of a person, signed."""

from __future__ import annotations

import asyncio

import orjson
from aiohttp import web
from pydantic import ValidationError

from moe_core.signing import CommandInvalid, SignatureRefused, describe
from moe_core.wire import Signed
from moe_tuner.daemon import Tuner
from moe_tuner.deployment import Deployment
from moe_tuner.exporter import Families
from moe_tuner.fleet import Fleet
from moe_tuner.live import OrdersRefused

HISTORY_DEFAULT, HISTORY_MAX = 50, 1000
MAX_BODY_BYTES = 128 * 1024


def application(fleet: Fleet, families: Families) -> web.Application:
    """The routes over all deployments. `?deployment=` names one; where there is only one, it need not be named."""

    def member(request: web.Request) -> Deployment | web.Response:
        name = request.query.get("deployment")
        found = fleet.find(name)
        if found is not None:
            return found
        if name is not None:
            return _json({"error": f"deployment: {name!r} is not tuned here"}, 404)
        return _json({"error": f"deployment: name one of {', '.join(fleet.names) or '(none)'}"}, 422)

    def tuner(request: web.Request) -> Tuner | web.Response:
        found = member(request)
        if isinstance(found, web.Response):
            return found
        return found.tuner or _json({"error": f"{found.name} has no tuner now: {found.problem}"}, 503)

    async def deployments(_: web.Request) -> web.Response:
        return _json({"deployments": [summary.to_json() for summary in fleet.summaries()]})

    async def status(request: web.Request) -> web.Response:
        found = tuner(request)
        return found if isinstance(found, web.Response) else _json(found.report().to_json())

    async def history(request: web.Request) -> web.Response:
        found = tuner(request)
        if isinstance(found, web.Response):
            return found
        text = request.query.get("limit", str(HISTORY_DEFAULT))
        if not text.isdecimal() or not 1 <= int(text) <= HISTORY_MAX:
            return _json({"error": f"limit: must be a whole number from 1 to {HISTORY_MAX}"}, 422)
        records = await asyncio.to_thread(found.history, int(text))
        return _json([record.to_json() for record in records])

    async def orders(request: web.Request) -> web.Response:
        found = member(request)
        if isinstance(found, web.Response):
            return found
        try:
            obeyed = found.obey(Signed.model_validate_json(await request.read()))
        except ValidationError as error:
            return _json({"error": describe(error)}, 422)
        except CommandInvalid as error:
            return _json({"error": str(error)}, 422)
        except SignatureRefused as error:
            return _json({"error": str(error)}, 403)
        except OrdersRefused as error:
            return _json({"error": str(error)}, 409 if error.older else 422)
        return _json(obeyed.to_json())

    async def metrics(_: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=families.exposition(), headers=headers)

    async def healthz(_: web.Request) -> web.Response:
        healthy = fleet.healthy
        return _json({"ok": healthy}, 200 if healthy else 503)

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_get("/v1/deployments", deployments)
    app.router.add_get("/v1/status", status)
    app.router.add_get("/v1/history", history)
    app.router.add_put("/v1/orders", orders)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", healthz)
    return app


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(document), status=status, content_type="application/json")
