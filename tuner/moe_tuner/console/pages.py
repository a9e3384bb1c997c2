"""The console's files as they are served: read once, packed once, named by their content."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from importlib import resources

import orjson
from aiohttp import web

TYPES = {
    "index.html": "text/html",
    "signin.html": "text/html",
    "console.css": "text/css",
    "console.mjs": "text/javascript",
    "draw.mjs": "text/javascript",
    "signin.mjs": "text/javascript",
}
SAFETY = {
    # Own files alone, nothing inline, no frame around it; and strings never become code or markup.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
PACKED_FROM = 700
"""Bytes below which packing saves no packet."""


@dataclass(frozen=True)
class Page:
    """One file."""

    kind: str
    plain: bytes
    packed: bytes
    etag: str


def load() -> dict[str, Page]:
    """Every file of the console."""
    folder = resources.files(__package__) / "static"
    found = {}
    for name, kind in TYPES.items():
        plain = (folder / name).read_bytes()
        etag = f'"{hashlib.sha256(plain).hexdigest()[:20]}"'
        found[name] = Page(kind, plain, gzip.compress(plain, 9, mtime=0), etag)
    return found


def answer(request: web.Request, page: Page, status: int = 200) -> web.Response:
    """A file, or 304 where the browser has it. It asks each time, so that a new release shows at once."""
    headers = {"ETag": page.etag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding, Cookie"}
    if status == 200 and request.headers.get("If-None-Match") == page.etag:
        return web.Response(status=304, headers=headers)
    return _body(request, page.plain, page.packed, page.kind, status, headers)


def json_answer(request: web.Request, document: bytes, status: int = 200) -> web.Response:
    """JSON that nothing may keep."""
    packed = gzip.compress(document, 5, mtime=0) if len(document) > PACKED_FROM else document
    return _body(request, document, packed, "application/json", status, {"Cache-Control": "no-store"})


def error(message: str, status: int) -> web.Response:
    """A refusal in a sentence."""
    body = orjson.dumps({"error": message})
    headers = {"Cache-Control": "no-store"}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def _body(
    request: web.Request, plain: bytes, packed: bytes, kind: str, status: int, headers: dict[str, str]
) -> web.Response:
    accepts = request.headers.get("Accept-Encoding", "")
    body = packed if "gzip" in accepts and len(packed) < len(plain) else plain
    if body is not plain:
        headers = {**headers, "Content-Encoding": "gzip"}
    charset = None if kind == "application/json" else "utf-8"
    return web.Response(body=body, status=status, headers=headers, content_type=kind, charset=charset)
