"""A `Door` before an HTTP server: health and metrics are open, commands prove themselves, all else wants a pass."""

from __future__ import annotations

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from moe_core.passes import Door

OPEN = frozenset({"/metrics", "/healthz", "/readyz"})
"""Asked by Prometheus and by kubelets, which bring no proof."""


def guard(door: Door, commands: frozenset[tuple[str, str]], open_too: frozenset[str] = frozenset()) -> Middleware:
    """`commands`: (method, path) of what is signed in its body. `open_too`: paths that anybody may read here."""
    readable = OPEN | open_too

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        free = request.method in ("GET", "HEAD") and request.path in readable
        signed = (request.method, request.path) in commands
        if free or signed or door.admits(request.headers.get("Authorization", "")):
            return await handler(request)
        said = {"error": "a read pass is needed, signed by a key that is trusted here for this deployment"}
        headers = {"WWW-Authenticate": "Bearer"}
        return web.Response(status=401, body=orjson.dumps(said), headers=headers, content_type="application/json")

    return guarded
