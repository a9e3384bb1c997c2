"""The one HTTP client: aiohttp sessions with time limits, and JSON calls that fail with a sentence."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson

MAX_ERROR_CHARS = 300


class HttpError(Exception):
    """A call that got no usable answer. `status` is 0 where there was no answer at all."""

    def __init__(self, method: str, url: str, status: int, detail: str) -> None:
        self.status = status
        self.detail = detail
        super().__init__(f"{method} {url}: {detail}" if status == 0 else f"{method} {url}: HTTP {status}: {detail}")


def session(
    *,
    connect_s: float = 2.0,
    read_s: float | None = 30.0,
    total_s: float | None = None,
    limit: int = 0,
    dead_peer_s: int | None = None,
) -> aiohttp.ClientSession:
    """A session with limits on connecting and on the wait between two reads; `limit` 0 is no limit on connections.

    With `dead_peer_s` the kernel ends a connection whose peer has answered nothing for that long, neither data nor
    probes of an idle connection: for streams that may rightly be silent.
    """
    timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=connect_s, sock_read=read_s)
    # Servers commonly close idle connections after 5 s; a POST sent into that closing would be lost, and not retried.
    connector = aiohttp.TCPConnector(
        limit=limit,
        ttl_dns_cache=30,
        keepalive_timeout=4.0,
        socket_factory=_probing(dead_peer_s) if dead_peer_s is not None else None,
    )
    # No cookie of one answer may travel with a request of somebody else.
    return aiohttp.ClientSession(
        timeout=timeout, connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    )


def _probing(dead_peer_s: int) -> Callable[[Any], socket.socket]:
    """Sockets that probe an idle peer four times within the limit. What a system does not offer is left out."""
    step_s = max(1, dead_peer_s // 4)
    options = {
        "TCP_KEEPIDLE": step_s,
        "TCP_KEEPINTVL": step_s,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": dead_peer_s * 1000,
    }

    def make(address: Any) -> socket.socket:
        family, kind, protocol = address[:3]
        sock = socket.socket(family=family, type=kind, proto=protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return sock

    return make


async def call_json(
    client: aiohttp.ClientSession,
    method: str,
    url: str,
    body: object = None,
    *,
    total_s: float = 5.0,
    max_bytes: int | None = None,
    token: str | None = None,
) -> Any:
    """Send JSON, return JSON. Raises HttpError: no answer, a status of 300 or above, an answer that is no JSON.

    `max_bytes` is for a server that is not trusted: a longer answer is an error, and no redirect is followed.
    `token` travels as a bearer's, which a redirect to elsewhere would not get.
    """
    data = None if body is None else orjson.dumps(body)
    headers = {"Content-Type": "application/json"} if data is not None else {}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    try:
        async with client.request(
            method,
            url,
            data=data,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=total_s),
            allow_redirects=max_bytes is None,
        ) as response:
            raw = await response.read() if max_bytes is None else await _at_most(response, max_bytes)
            if raw is None:
                raise HttpError(method, url, response.status, f"the answer is longer than {max_bytes} bytes")
            if response.status >= 300:
                raise HttpError(method, url, response.status, raw[:MAX_ERROR_CHARS].decode("utf-8", "replace"))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise HttpError(method, url, 0, str(error) or type(error).__name__) from None
    if not raw:
        return None
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise HttpError(method, url, response.status, "the answer is not JSON") from None


async def _at_most(response: aiohttp.ClientResponse, max_bytes: int) -> bytes | None:
    """The body, or None where it is longer; no more than a chunk beyond the limit is read."""
    parts, size = [], 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > max_bytes:
            response.close()
            return None
        parts.append(chunk)
    return b"".join(parts)
