"""One request of a client and its answer, as the connection gives them to the application.

It stands where an ASGI server has `scope`, `receive` and `send`, with no message, task or event for each step: those
cost more than the bytes do (docs/adr/0027). A head waits for the first bytes of its body, and both leave in one write.
"""

from __future__ import annotations

import asyncio
import http
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_gateway.front import Front

Header = tuple[bytes, bytes]
App = Callable[["Exchange"], Awaitable[None]]
READ_AHEAD_BYTES = 65_536
"""Bytes of a body that wait for the application before the client's socket is read no more."""
_CONTROL = bytes(byte for byte in (*range(32), 127) if byte not in b"\t\r\n")
_NAME = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~-]+")
_STATUS = {status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode()) for status in http.HTTPStatus}
_INTERNAL = b"Internal Server Error"

_NAMES = frozenset(
    {b"date", b"x-request-id", b"content-type", b"content-length", b"cache-control", b"connection", b"retry-after"}
)
"""Names that nearly every answer has."""


def _is_name(name: bytes) -> bool:
    return _NAME.fullmatch(name) is not None


class Exchange:
    """A request whose head has come. `headers`: by lower-case name; of a name that came twice, the last."""

    __slots__ = (
        "_body",
        "_chunked",
        "_front",
        "_gone",
        "_head",
        "_left",
        "_more",
        "_size",
        "_waiter",
        "answered",
        "disconnected",
        "expects",
        "fields",
        "headers",
        "keep_alive",
        "method",
        "path",
        "started",
        "task",
    )

    def __init__(
        self, front: Front, method: str, path: str, fields: list[Header], *, keep_alive: bool, expects: bool
    ) -> None:
        self._front = front
        self.method, self.path = method, path
        self.fields = fields
        """All headers in order."""
        self.headers = dict(fields)
        self.keep_alive = keep_alive
        self.expects = expects
        """Whether the client waits for 100 Continue before it sends its body."""
        self.disconnected = self.started = self.answered = False
        self.task: asyncio.Task[None] | None = None
        self._body: list[bytes] = []
        self._size = 0
        self._more = True
        self._waiter: asyncio.Future[None] | None = None
        self._gone: Callable[[], None] | None = None
        self._head: bytes | None = None
        self._chunked = False
        self._left = 0

    # The connection's side

    def took(self, part: bytes) -> bool:
        """A part of the body has come. False: enough waits for the application."""
        self._body.append(part)
        self._size += len(part)
        self._wake()
        return self._size <= READ_AHEAD_BYTES

    def whole(self) -> None:
        """The body has come."""
        self._more = False
        self._wake()

    def lost(self) -> None:
        """The client has left."""
        if not self.answered:
            self.disconnected = True
            if self._gone is not None:
                self._gone()
        self._wake()

    async def run(self, app: App) -> None:
        """Have it answered. Whatever the application does, the client gets an end."""
        front = self._front
        try:
            await app(self)
        except BaseException:  # the application has logged what it was; a cancelled one is to end, like any other
            self._end()
        else:
            if not self.answered and not self.disconnected:
                self._end()
        finally:
            self._gone = None
            if self.task is not None:
                front.tasks.discard(self.task)

    def _end(self) -> None:
        """The application ended without a whole answer."""
        if self.started or self.disconnected:
            self._front.transport.close()
            return
        length = (b"content-length", str(len(_INTERNAL)).encode())
        self.start(500, [(b"content-type", b"text/plain"), length, (b"connection", b"close")])
        if not self.put(_INTERNAL, more=False):
            self._front.transport.close()

    # The application's side

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Call back if the client leaves before its answer is whole."""
        self._gone = callback
        if self.disconnected:
            callback()

    async def body(self) -> tuple[bytes, bool] | None:
        """What has come of the body since the last call, and whether there is more; None: the client has left."""
        front = self._front
        if self.expects and not front.transport.is_closing():
            front.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.expects = False
        while not self._body and self._more and not self.disconnected:
            front.flow.resume_reading()
            self._waiter = front.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.disconnected:
            return None
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._size = 0
        return data, self._more

    def start(self, status: int, headers: Iterable[Header]) -> None:
        """The head of the answer. It leaves with the first bytes of the body. Raises ValueError for a header that could
        be read as something else."""
        lines = [_STATUS[status] if status in _STATUS else b"HTTP/1.1 %d \r\n" % status]
        length: bytes | None = None
        closes = False
        for name, value in (*self._front.server_state.default_headers, *headers):
            if name == b"content-length":
                length = value
            elif name == b"connection":
                closes = b"close" in value.lower()
            lines.append(b"%b: %b\r\n" % (name, value))
            if name not in _NAMES and not _is_name(name):
                raise ValueError("a header's name is none")
        if closes:
            self.keep_alive = False
        elif not self.keep_alive:
            lines.append(b"connection: close\r\n")
        self._chunked = length is None and status not in {204, 304} and self.method != "HEAD"
        self._left = 0 if length is None else int(length)
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        if len(head.translate(None, _CONTROL)) != len(head) or not head.count(b"\n") == head.count(b"\r") == len(lines):
            raise ValueError("a header's value holds a control character")
        self._head = head
        self.started, self.expects = True, False

    def put(self, data: bytes, *, more: bool = True) -> bool:
        """Send a part of the body, the last one without `more`. False: nothing was sent, because the client reads
        slowly; `drain` first. Raises ValueError for a body that is not as long as was said."""
        front = self._front
        if self.disconnected or self.answered:
            return True
        if front.flow.write_paused:
            return False
        head, self._head = self._head or b"", None
        if self.method == "HEAD":
            out = head
        elif self._chunked:
            out = b"%b%x\r\n%b\r\n" % (head, len(data), data) if data else head
            if not more:
                out += b"0\r\n\r\n"
        else:
            self._left -= len(data)
            if self._left < 0 or (self._left and not more):
                raise ValueError("the answer is not as long as its content-length says")
            out = head + data
        if out:
            front.transport.write(out)
        if not more:
            self.answered = True
            self._wake()
            front.on_answered(self)
        return True

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """The same; waits while the client reads slowly."""
        while not self.put(data, more=more):
            await self._front.flow.drain()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
