"""HTTP of clients before it is a request: bounds on its head, and on how long that may take to come.

uvicorn bounds none of them: a client could send headers for ever, or a byte a minute, and hold memory and a place.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moe_gateway.exchange import Exchange
from moe_gateway.openai_api import ApiError

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers together."""
MAX_HEADERS = 100
MAX_URL_BYTES = 8 * 1024
HEAD_S = 10.0
"""From a head's first byte to its last."""
KEEP_ALIVE_S = 75
"""An idle connection is closed after so long."""
_PLAIN = re.compile(rb"/[A-Za-z0-9/._-]*")
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
}


class Front(HttpToolsProtocol):
    """One connection of a client. uvicorn's, with exchanges of our own in place of ASGI's messages."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._since_s = 0.0
        """Since when a head has been on its way, or the connection idle."""
        self._begun = False
        """Whether a head has begun and not ended."""
        self._idle = True
        """Whether nothing has come since the last answer."""
        self._head_bytes = self._field_bytes = 0
        self._refusal: ApiError | None = None
        self._closed = False
        self._now: Exchange | None = None
        """The exchange under way, or the last one."""
        self._coming: Exchange | None = None
        """The exchange whose body is on its way."""
        self._behind: deque[Exchange] = deque()
        """Those that wait for their turn, sent before the one before them was answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._since_s = self.loop.time()
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        if self._now is not None:
            self._now.lost()
        self.flow.resume_writing()
        if exc is None:
            self.transport.close()
        self.parser = None  # type: ignore[assignment]  # they hold one another

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        self._idle = False
        within = self._begun
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is spoken: the request is answered as it is
        # A head that began in these bytes is counted from the next ones on: what stood before it is no part of it.
        self._head_bytes = self._head_bytes + len(data) if within and self._begun else 0
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._since_s, self._begun, self._field_bytes = self.loop.time(), True, 0
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refusal = _refusal(414, f"the address is longer than {MAX_URL_BYTES} bytes")
            raise ValueError("the address is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_HEADERS:
            self._refusal = _refusal(431, f"the request has more than {MAX_HEADERS} headers")
            raise ValueError("too many headers")
        self._field_bytes += len(name) + len(value)
        if self._field_bytes > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            raise ValueError("headers too large")
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._begun = False
        parser = self.parser
        self._coming = exchange = Exchange(
            self,
            parser.get_method().decode("ascii"),
            _path_of(self.url),
            self.headers,
            keep_alive=parser.get_http_version() != "1.0" and parser.should_keep_alive(),
            expects=self.expect_100_continue,
        )
        if self._now is None or self._now.answered:
            self._start(exchange)
        else:
            self.flow.pause_reading()
            self._behind.append(exchange)

    def on_body(self, body: bytes) -> None:
        if self._coming is not None and not self._coming.answered and not self._coming.took(body):
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        if self._coming is not None:
            self._coming.whole()
            if self._coming.answered:  # before its body had come
                self._since_s, self._idle = self.loop.time(), True

    def _start(self, exchange: Exchange) -> None:
        self._now = exchange
        exchange.task = task = self.loop.create_task(exchange.run(self.app))
        self.tasks.add(task)

    def on_answered(self, exchange: Exchange) -> None:
        """An answer is whole: on with the next request."""
        self.server_state.total_requests += 1
        if not exchange.keep_alive:
            self.transport.close()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._behind:
            self._start(self._behind.popleft())
        elif not self._begun:
            self._since_s, self._idle = self.loop.time(), True

    def shutdown(self) -> None:
        """The server stops: an answer under way is the connection's last."""
        if self._now is None or self._now.answered:
            self.transport.close()
        else:
            self._now.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """What is no request gets its answer in the form of all errors, and the connection ends."""
        if self._closed:
            return
        self._closed = True
        if self._now is not None and self._now.started and not self._now.answered:
            self.transport.close()  # an answer is on its way: nothing may be written into it
            return
        error = self._refusal or _refusal(400, "the request is not valid HTTP")
        body = error.body()
        head = (
            f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def look(self, now_s: float) -> None:
        """End a connection whose head takes too long, or that is idle for too long. Called a few times a second."""
        if self._closed or self.transport is None or self.transport.is_closing():
            return
        if self._begun and now_s - self._since_s > HEAD_S:
            self._refusal = _refusal(408, "the head of the request did not arrive in time")
            self.send_400_response("")
        elif self._idle and now_s - self._since_s > KEEP_ALIVE_S:
            self._closed = True
            self.transport.close()


def _path_of(url: bytes) -> str:
    """The path that a request names, decoded. Raises for an address that is none."""
    if not _PLAIN.fullmatch(url):
        url = httptools.parse_url(url).path
    path = url.decode("ascii")
    return unquote(path) if "%" in path else path


def _head_too_large() -> ApiError:
    return _refusal(431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes")


def _refusal(status: int, message: str) -> ApiError:
    code = {408: "request_timeout", 414: "url_too_long", 431: "headers_too_large"}.get(status, "invalid_http")
    return ApiError(status, message, code=code, close=True)
