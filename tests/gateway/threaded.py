"""A gateway and a raw upstream in a thread of their own, for tests that are not asyncio's: hypothesis, schemathesis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moe_core.breaker import Breaker
from moe_core.config import GatewayConfig
from moe_core.log import JsonFormatter
from moe_gateway.server import GatewayServer

KEY = "sk-upstream-0123456789abcdef"


@dataclass
class Reply:
    """An HTTP answer as it came over the socket, byte for byte."""

    raw: bytes
    whole: bool = True
    """Whether the server ended it, and no time limit did."""

    @property
    def status(self) -> int:
        return int(self.raw.split(b" ", 2)[1]) if self.raw.startswith(b"HTTP/1.1 ") else 0

    @property
    def head(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[0]

    @property
    def body(self) -> bytes:
        body = self.raw.partition(b"\r\n\r\n")[2]
        if b"transfer-encoding: chunked" not in self.head.lower():
            return body
        parts = []
        while body:
            size, _, rest = body.partition(b"\r\n")
            length = int(size, 16)
            parts.append(rest[:length])
            body = rest[length + 2 :]
        return b"".join(parts)

    @property
    def code(self) -> str | None:
        """The code of the one error that it holds; fails where it holds none."""
        document = json.loads(self.body)
        error = document["error"]
        if document.get("type") == "error":  # in Anthropic's form
            assert {"type", "message"} <= set(error)
            return str(error["type"])
        assert set(error) == {"message", "type", "code", "param"}
        code: str | None = error["code"]
        return code


class RawUpstream:
    """Answers each request with `answer`, byte for byte, and closes."""

    def __init__(self) -> None:
        self.answer = b""
        self.stream: bytes | None = None
        """What a request for a stream gets; None: the same."""
        self.asked = 0
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            body = await reader.readexactly(length)
            self.asked += 1
            streamed = self.stream is not None and json.loads(body).get("stream") is True
            answer = self.stream if streamed and self.stream is not None else self.answer
            for start in range(0, len(answer), 65536):
                writer.write(answer[start : start + 65536])
                await writer.drain()
        writer.close()


@dataclass
class Bench:
    """A running gateway, its upstream, and the lines that it logged."""

    server: GatewayServer
    upstream: RawUpstream
    loop: asyncio.AbstractEventLoop
    lines: list[str] = field(default_factory=list)

    def ask(self, data: bytes, *, wait_s: float = 5.0, end: bool = False) -> Reply:
        """Send bytes on a connection of their own and read to its end; `end` closes our side after them."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=wait_s) as sock:
            got = b""
            try:
                sock.sendall(data)
                if end:
                    sock.shutdown(socket.SHUT_WR)
                while part := sock.recv(65536):
                    got += part
            except TimeoutError:
                return Reply(got, whole=False)
            except (BrokenPipeError, ConnectionResetError):
                pass
            return Reply(got)

    def post(self, body: bytes, path: str = "/v1/chat/completions", *headers: bytes) -> Reply:
        lines = [f"POST {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close", *headers]
        return self.ask(b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body]))

    def heal(self) -> None:
        """Forget what the upstream did before."""
        for upstream in self.server.gateway.upstreams.values():
            upstream.breaker = Breaker()

    @property
    def crashes(self) -> list[str]:
        """Lines that tell of an exception inside the gateway."""
        return [line for line in self.lines if '"exception"' in line or "failed inside the gateway" in line]


@contextmanager
def threaded(settings: Callable[[RawUpstream], GatewayConfig]) -> Iterator[Bench]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(30)

    lines: list[str] = []
    handler, formatter = logging.Handler(), JsonFormatter()
    handler.emit = lambda record: lines.append(formatter.format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("moestack")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    upstream = RawUpstream()
    try:
        run(upstream.start())
        server = GatewayServer(settings(upstream))
        run(server.start())
        yield Bench(server, upstream, loop, lines)
        run(server.stop(drain_s=0.2))
        loop.call_soon_threadsafe(upstream.stop)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
