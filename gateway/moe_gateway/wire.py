"""HTTP/1.1 to upstreams on the hot path: kept connections, bodies as they come, next to nothing between two tokens.

The one HTTP client of the project costs 25 microseconds for each chunk of a stream, which is more than everything else
that the gateway does with it (docs/adr/0027). This one does what a proxy's hop needs and no more: POST, no redirects,
no cookies, no decompression. Messages are parsed by llhttp, as the server's are. Whoever calls sets the time limits of
what follows the connection (`asyncio.timeout`); a call that is cancelled closes its connection.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import cast
from urllib.parse import urlsplit

import httptools

from moe_gateway.deadlines import Deadlines

IDLE_S = 4.0
"""Servers commonly close idle connections after 5 s; a POST sent into that closing would be lost, and not retried."""
HIGH_WATER, LOW_WATER = 1 << 18, 1 << 16
"""Bytes of a body kept for a slow reader: above the first the upstream is not read on, until below the second."""
MAX_HEAD_BYTES = 1 << 16
_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")

Endpoint = tuple[str, int, bool]
"""Host, port, whether over TLS."""


class WireError(OSError):
    """The exchange with an upstream failed."""


class ConnectFailed(WireError):
    """No connection; nothing was sent."""


class ConnectTimeout(ConnectFailed):
    """No connection in time; nothing was sent."""


class ConnectionLost(WireError):
    """The connection broke, or what came is no HTTP: nobody knows what the upstream has done."""


class Response:
    """An answer whose head has come. Its body is read by `readany` until b"", or `close`d."""

    def __init__(self, connection: _Connection, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = headers
        """By lower-case name; of a name that came twice, the last."""
        self._connection = connection

    @property
    def content_type(self) -> str:
        """Without its parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def readany(self) -> bytes:
        """What has come of the body and was not read; waits for some. b"" at its end. Raises ConnectionLost."""
        return await self._connection.readany()

    async def pump(self, take: Callable[[bytes], bool]) -> bool:
        """Hand the body on piece by piece as it comes, with no task woken in between; `take` says whether it wants the
        next. True at the body's end, False where `take` wanted no more. Raises ConnectionLost, and what `take` raises.
        """
        return await self._connection.pump(take)

    async def read(self, most: int) -> bytes:
        """The body, or the first `most` bytes of it. Raises ConnectionLost."""
        parts, size = [], 0
        while size < most and (part := await self.readany()):
            parts.append(part)
            size += len(part)
        return b"".join(parts)[:most]

    def close(self) -> None:
        """Done with it. The connection is kept where the answer was whole, else closed. May be called again."""
        self._connection.release()


class _Connection(asyncio.Protocol):
    """One connection: a request at a time."""

    def __init__(self, wire: Wire, endpoint: Endpoint) -> None:
        self._wire = wire
        self.endpoint = endpoint
        self.loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self.idle_since_s = 0.0
        self._fresh()
        self._busy = False

    def _fresh(self) -> None:
        """State of an exchange that has not begun."""
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._headed = False
        self._status = 0
        self._kept = False
        self._until_close = False
        self._ended = False
        self._error: ConnectionLost | None = None
        self._parts: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[bytes], bool] | None = None
        self._wanted = True
        self._raised: Exception | None = None

    # The exchange

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, data: bytes) -> Response:
        """Send a request and wait for the head of its answer."""
        if self._transport is None:
            raise ConnectionLost("closed before the request was sent")
        self._fresh()
        self._busy = True
        try:
            self._transport.write(data)
            while not self._headed:
                if self._error is not None:
                    raise self._error
                await self._wait()
        except BaseException:
            self.abort()
            raise
        return Response(self, self._status, self._headers)

    async def readany(self) -> bytes:
        while not self._parts:
            if self._ended:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._taken()

    async def pump(self, take: Callable[[bytes], bool]) -> bool:
        self._wanted = True
        if self._parts and not take(self._taken()):
            return False
        self._take = take
        try:
            while self._wanted and not self._ended:
                if self._error is not None:
                    raise self._error
                await self._wait()
        finally:
            self._take = None
        if self._raised is not None:
            raise self._raised
        return self._wanted

    def _taken(self) -> bytes:
        """What has come and was not read."""
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def _push(self, take: Callable[[bytes], bool]) -> None:
        try:
            self._wanted = take(self._taken())
        except Exception as error:
            self._raised, self._wanted = error, False
        if not self._wanted:
            self._take = None

    def release(self) -> None:
        """The answer is not wanted any more: keep the connection where nothing of it is left, else close it."""
        if not self._busy:
            return
        self._busy = False
        if self._ended and self.usable and self._error is None and self._kept:
            self._parts.clear()
            if self._paused and self._transport is not None:
                self._paused = False
                self._transport.resume_reading()
            self._wire.keep(self)
        else:
            self.abort()

    def abort(self) -> None:
        self._busy = False
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has a class of its own

    def data_received(self, data: bytes) -> None:
        if not self._busy or self._ended:
            # What nobody asked for: an answer to come would be taken for another one's.
            self.abort()
            return
        if not self._headed:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("the upstream changes the protocol")
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
        if not self._headed and self._head_bytes > MAX_HEAD_BYTES:
            self._fail("the head of the answer is too large")
        if self._take is not None and self._parts:
            self._push(self._take)
            if self._take is not None and not self._ended and self._error is None:
                return
        if self._size > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._end_of_bytes()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._wire.forget(self)
        self._end_of_bytes()

    def _end_of_bytes(self) -> None:
        """No more comes: the end of a body that has no other end, or a break."""
        if self._busy and not self._ended and self._error is None:
            if self._headed and self._until_close:
                self._ended = True
            else:
                self._error = ConnectionLost("the upstream closed the connection")
        self._wake()

    def _fail(self, detail: str) -> None:
        if self._error is None and not self._ended:
            self._error = ConnectionLost(detail)
        if self._transport is not None:
            self._transport.abort()

    # The parser's side

    def on_message_begin(self) -> None:
        if self._ended:  # a second answer to one request: nothing of it may be taken for the next one's
            self._kept = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._ended:
            return
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        if self._ended or 100 <= self._parser.get_status_code() < 200:
            return
        self._status = self._parser.get_status_code()
        self._headed = True
        self._kept = bool(self._parser.should_keep_alive())
        self._until_close = (
            "content-length" not in self._headers
            and "chunked" not in self._headers.get("transfer-encoding", "").lower()
        )

    def on_body(self, body: bytes) -> None:
        if self._ended:
            return
        self._parts.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        if self._headed:
            self._ended = True
        else:  # 100 Continue or its like: the answer is still to come
            self._headers = {}


class Wire:
    """Connections to upstreams, kept for a while. One for each event loop."""

    def __init__(self, *, connect_s: float = 2.0, tls: ssl.SSLContext | None = None) -> None:
        self._connect_s = connect_s
        self._tls = tls
        self.deadlines = Deadlines()
        """For the limits of whoever calls."""
        self._idle: dict[Endpoint, list[_Connection]] = {}
        self._all: set[_Connection] = set()

    async def post(self, url: str, data: bytes, headers: Mapping[str, str]) -> Response:
        """POST, and the head of the answer. Raises ConnectFailed while nothing was sent, ConnectionLost after it,
        ValueError for an address or a header that cannot be."""
        endpoint, first = _place(url)
        request = _head(first, headers, len(data)) + data
        connection = self._take(endpoint) or await self._connect(endpoint)
        return await connection.ask(request)

    def close(self) -> None:
        for connection in list(self._all):
            connection.abort()

    # Connections

    def keep(self, connection: _Connection) -> None:
        connection.idle_since_s = connection.loop.time()
        self._idle.setdefault(connection.endpoint, []).append(connection)

    def forget(self, connection: _Connection) -> None:
        self._all.discard(connection)
        idle = self._idle.get(connection.endpoint)
        if idle is not None and connection in idle:
            idle.remove(connection)

    def _take(self, endpoint: Endpoint) -> _Connection | None:
        """The connection that was used last; those that were idle for too long are closed."""
        idle, now_s = self._idle.get(endpoint), asyncio.get_running_loop().time()
        if not idle:
            return None
        connection = idle.pop()
        if now_s - connection.idle_since_s < IDLE_S:
            # The oldest is looked at too, so that a burst's connections do not stay for ever.
            if idle and now_s - idle[0].idle_since_s >= IDLE_S:
                idle.pop(0).abort()
            if connection.usable:
                return connection
            return self._take(endpoint)
        for old in (*idle, connection):
            old.abort()
        idle.clear()
        return None

    async def _connect(self, endpoint: Endpoint) -> _Connection:
        host, port, tls = endpoint
        loop = asyncio.get_running_loop()
        context = (self._tls or _default_tls()) if tls else None
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self, endpoint), host, port, ssl=context
                )
        except TimeoutError:
            raise ConnectTimeout("no connection in time") from None
        except (OSError, ssl.SSLError) as error:
            raise ConnectFailed(type(error).__name__) from None
        self._all.add(connection)
        return connection


@lru_cache(maxsize=256)  # a gateway has a handful of upstreams, and this takes longer than the request itself
def _place(url: str) -> tuple[Endpoint, str]:
    """Where an address leads, and the lines that a request begins with there. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{url[:200]!r}: an http or https address is wanted")
    tls = parts.scheme == "https"
    endpoint = (parts.hostname, parts.port or (443 if tls else 80), tls)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if b" " in target.encode() or any(character < 33 for character in target.encode()):
        raise ValueError(f"{target[:200]!r}: blanks or control characters in an address")
    return endpoint, f"POST {target} HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n"


def _head(first: str, headers: Mapping[str, str], length: int) -> bytes:
    lines = [first]
    for name, value in headers.items():
        if not _is_name(name):
            raise ValueError(f"header {name[:60]!r}: not a name")
        if "\r" in value or "\n" in value or "\0" in value:
            raise ValueError(f"header {name}: a line break in its value")
        lines.append(f"{name}: {value}\r\n")
    lines.append(f"content-length: {length}\r\n\r\n")
    return "".join(lines).encode("latin-1")


@lru_cache(maxsize=256)
def _is_name(name: str) -> bool:
    return bool(name) and _TOKEN.issuperset(name.encode("latin-1"))


_TLS: list[ssl.SSLContext] = []


def _default_tls() -> ssl.SSLContext:
    """Made once: reading the certificate authorities takes tens of milliseconds."""
    if not _TLS:
        _TLS.append(ssl.create_default_context())
    return _TLS[0]
