"""The tuner's HTTP side: status, history, metrics and health; read only."""

from __future__ import annotations

import orjson
from aiohttp import web

from moe_tuner.daemon import Tuner

HISTORY_DEFAULT, HISTORY_MAX = 50, 1000


def application(tuner: Tuner) -> web.Application:
    """The routes over one tuner."""

    async def status(_: web.Request) -> web.Response:
        return _json(tuner.report().to_json())

    async def history(request: web.Request) -> web.Response:
        text = request.query.get("limit", str(HISTORY_DEFAULT))
        if not text.isdecimal() or not 1 <= int(text) <= HISTORY_MAX:
            return _json({"error": f"limit: must be a whole number from 1 to {HISTORY_MAX}"}, 422)
        return _json([record.to_json() for record in tuner.history(int(text))])

    async def metrics(_: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=tuner.exporter.exposition(), headers=headers)

    async def healthz(_: web.Request) -> web.Response:
        healthy = tuner.healthy
        return _json({"ok": healthy}, 200 if healthy else 503)

    app = web.Application()
    app.router.add_get("/v1/status", status)
    app.router.add_get("/v1/history", history)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", healthz)
    return app


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(document), status=status, content_type="application/json")
