"""HTTP of clients before it is a request: bounds on its head, and on how long that may take to come.

uvicorn bounds none of them: a client could send headers for ever, or a byte a minute, and hold memory and a place.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moe_gateway.openai_api import ApiError

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers together."""
MAX_HEADERS = 100
MAX_URL_BYTES = 8 * 1024
HEAD_S = 10.0
"""From a head's first byte to its last."""
KEEP_ALIVE_S = 75
"""An idle connection is closed after so long."""
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
}


class Front(HttpToolsProtocol):
    """One connection of a client."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._since_s = 0.0
        self._begun = False
        """Whether a head has begun and not ended."""
        self._seen = False
        """Whether any byte has come."""
        self._head_bytes = self._field_bytes = 0
        self._refusal: ApiError | None = None
        self._closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._since_s = self.loop.time()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        self._seen = True
        within = self._begun
        super().data_received(data)
        # A head that began in these bytes is counted from the next ones on: what stood before it is no part of it.
        self._head_bytes = self._head_bytes + len(data) if within and self._begun else 0
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._since_s, self._begun, self._field_bytes = self.loop.time(), True, 0
        super().on_message_begin()

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
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._begun = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no request gets its answer in the form of all errors, and the connection ends."""
        if self._closed:
            return
        self._closed = True
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
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
        """End a connection whose head takes too long, or that never sent one. Called a few times a second."""
        if self._closed or self.transport is None or self.transport.is_closing():
            return
        if self._begun and now_s - self._since_s > HEAD_S:
            self._refusal = _refusal(408, "the head of the request did not arrive in time")
            self.send_400_response("")
        elif not self._seen and now_s - self._since_s > KEEP_ALIVE_S:
            self._closed = True
            self.transport.close()


def _head_too_large() -> ApiError:
    return _refusal(431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes")


def _refusal(status: int, message: str) -> ApiError:
    code = {408: "request_timeout", 414: "url_too_long", 431: "headers_too_large"}.get(status, "invalid_http")
    return ApiError(status, message, code=code, close=True)
