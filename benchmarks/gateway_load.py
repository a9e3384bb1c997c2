"""A client for `benchmarks.gateway` that costs little: closed loops and open loops over kept connections."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import cast

import httptools

BODY_BYTES = 2048
KEY = "sk-bench-0123456789abcdef0123456789abcdef"


class LoadFailed(Exception):
    """An answer that is no whole 200."""


def body(stream: bool) -> bytes:
    """A chat request of `BODY_BYTES` bytes."""
    document = {"model": "bench", "stream": stream, "max_tokens": 100, "messages": [{"role": "user", "content": ""}]}
    filler = "x" * (BODY_BYTES - len(json.dumps(document)))
    document["messages"] = [{"role": "user", "content": filler}]
    return json.dumps(document).encode()


def request(stream: bool) -> bytes:
    data = body(stream)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {KEY}\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


@dataclass
class Seen:
    """Seconds of each answer: to its first byte of a body, and whole; and what was wrong."""

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    chunks: int = 0


class Connection(asyncio.Protocol):
    """One kept connection, one request at a time."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None
        self._sent_s = 0.0
        self._first_s: float | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has a class of its own

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(LoadFailed(f"connection lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._first_s = None

    def on_body(self, part: bytes) -> None:
        if self._first_s is None:
            self._first_s = time.perf_counter()
        self._seen.chunks += part.count(b'"word ')
        self._tail = part

    def on_message_complete(self) -> None:
        now_s, done = time.perf_counter(), self._done
        if done is None or done.done():
            return
        if self._parser.get_status_code() != 200:
            done.set_exception(LoadFailed(f"HTTP {self._parser.get_status_code()}: {self._tail[:300]!r}"))
            return
        self._seen.first_s.append((self._first_s or now_s) - self._sent_s)
        self._seen.whole_s.append(now_s - self._sent_s)
        done.set_result(None)
        if not self._parser.should_keep_alive():
            self._transport = None

    @property
    def open(self) -> bool:
        return self._transport is not None

    async def ask(self, data: bytes) -> None:
        if self._transport is None:
            raise LoadFailed("connection closed")
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._sent_s = time.perf_counter()
        self._transport.write(data)
        await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def _connect(port: int, seen: Seen) -> Connection:
    _, made = await asyncio.get_running_loop().create_connection(lambda: Connection(seen), "127.0.0.1", port)
    return made


async def closed_loop(port: int, stream: bool, requests: int, connections: int) -> Seen:
    """So many requests, each connection sending the next one when it has its answer. Raises LoadFailed."""
    seen, left, data = Seen(), iter(range(requests)), request(stream)

    async def loop() -> None:
        connection = await _connect(port, seen)
        for _ in left:
            if not connection.open:
                connection = await _connect(port, seen)
            await connection.ask(data)
        connection.close()

    await asyncio.gather(*(loop() for _ in range(connections)))
    return seen


async def open_loop(port: int, stream: bool, rps: float, seconds: float) -> Seen:
    """A request every 1/rps seconds, whatever became of those before. Raises LoadFailed."""
    seen, data = Seen(), request(stream)
    idle: list[Connection] = []
    tasks = []

    async def one() -> None:
        connection = idle.pop() if idle else await _connect(port, seen)
        if not connection.open:
            connection = await _connect(port, seen)
        await connection.ask(data)
        idle.append(connection)

    # Connections are made before the clock starts: what is measured is a request's way, not a handshake.
    idle.extend([await _connect(port, seen) for _ in range(16)])
    start_s = time.perf_counter()
    for index in range(int(rps * seconds)):
        await asyncio.sleep(max(0.0, start_s + index / rps - time.perf_counter()))
        tasks.append(asyncio.create_task(one()))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return seen
