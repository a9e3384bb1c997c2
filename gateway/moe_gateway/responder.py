"""The client's side of one request: an answer that is started once, finished once, or broken off honestly."""

from __future__ import annotations

from collections.abc import Awaitable, Generator, Iterable
from typing import Any

from moe_gateway.exchange import Exchange, Header
from moe_gateway.openai_api import ApiError


class Responder:
    """Sends an answer. Writing waits while the client reads slowly: that is the back-pressure of a stream."""

    def __init__(self, exchange: Exchange, request_id: str) -> None:
        self._exchange = exchange
        self._headers: list[Header] = [(b"x-request-id", request_id.encode())]
        self.native = False
        """Whether what follows is in the client's own form already, where that is not OpenAI's."""
        self.started = False
        self.finished = False

    def add_header(self, name: bytes, value: str) -> None:
        """A header for the answer that has not started yet; a second value of a name replaces the first."""
        self._headers = [header for header in self._headers if header[0] != name]
        self._headers.append((name, value.encode("latin-1", "replace")))

    async def start(self, status: int, headers: Iterable[Header]) -> None:
        self._exchange.start(status, (*self._headers, *headers))
        self.started = True

    async def write(self, data: bytes) -> None:
        await self._exchange.write(data)

    def write_soon(self, data: bytes) -> Awaitable[None] | None:
        """Send at once, outside any task. None where that was done; else the client reads slowly, and the rest of the
        sending is to be awaited before anything else is sent."""
        return None if self._exchange.put(data) else _Rest(self._exchange, data)

    async def finish(self, data: bytes = b"") -> None:
        self.finished = True
        await self._exchange.write(data, more=False)

    async def whole(self, status: int, content_type: bytes, body: bytes, headers: Iterable[Header] = ()) -> None:
        """An answer in one piece."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, [(b"content-type", content_type), length, *headers])
        await self.finish(body)

    async def error(self, error: ApiError) -> None:
        """An error in OpenAI's form. In a stream it is the last event, without [DONE] after it: one error that clients
        know how to raise. A body that breaks off after it would be a second one."""
        if self.finished:
            return
        if self.started:
            await self.finish(error.event())
            return
        headers: list[Header] = []
        if error.retry_after_s is not None:
            headers.append((b"retry-after", str(error.retry_after_s).encode()))
        if error.close:
            headers.append((b"connection", b"close"))
        await self.whole(error.status, b"application/json", error.body(), headers)


class _Rest:
    """A sending that is to wait for the client to read on."""

    def __init__(self, exchange: Exchange, data: bytes) -> None:
        self._exchange = exchange
        self._data = data

    def __await__(self) -> Generator[Any, Any, None]:
        return self._exchange.write(self._data).__await__()
