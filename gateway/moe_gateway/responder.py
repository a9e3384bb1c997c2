"""The client's side of one request: an ASGI response that is started once, finished once, or broken off honestly."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, MutableMapping
from functools import partial
from typing import Any

from moe_gateway.openai_api import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]


class Responder:
    """Sends an answer. `send` waits while the client reads slowly: that is the back-pressure of a stream."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
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
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": [*self._headers, *headers]})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def write_soon(self, data: bytes) -> Awaitable[None] | None:
        """Send at once, outside any task. None where that was done; else the client reads slowly, and the rest of the
        sending is to be awaited before anything else is sent."""
        sending = self._send({"type": "http.response.body", "body": data, "more_body": True}).__await__()
        try:
            waits_for = next(sending)
        except StopIteration:
            return None
        return _Rest(sending, waits_for)

    async def finish(self, data: bytes = b"") -> None:
        self.finished = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

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
    """What is left of a sending that was begun outside a task and came to wait for something."""

    def __init__(self, sending: Generator[Any, Any, None], waits_for: object) -> None:
        self._sending = sending
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        while True:
            try:
                value = yield waits_for
            except BaseException as error:
                step = partial(self._sending.throw, error)
            else:
                step = partial(self._sending.send, value)
            try:
                waits_for = step()
            except StopIteration:
                return
