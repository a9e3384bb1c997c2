"""An engine for `benchmarks.gateway`: answers at once, a whole answer or a stream of even chunks, at next to no cost.

    python -m benchmarks.gateway_mock --chunks 100 --gap-ms 2

Prints its port as the first line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import cast

import httptools
import uvloop

METRICS = b"vllm:num_requests_running 1.0\nvllm:num_requests_waiting 0.0\nvllm:kv_cache_usage_perc 0.1\n"
MODELS = json.dumps({"object": "list", "data": [{"id": "bench", "object": "model", "owned_by": "mock"}]}).encode()
USAGE = {"prompt_tokens": 512, "completion_tokens": 100, "total_tokens": 612}
WHOLE = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "bench",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 100}, "finish_reason": "stop"}],
        "usage": USAGE,
    }
).encode()


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    document = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "bench",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _answer(body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (kind, len(body), body)


_WHOLE = _answer(WHOLE)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_ROLE = _chunk(_event({"role": "assistant", "content": ""}))
_WORD = _chunk(_event({"content": "word "}))
_LAST = _chunk(_event({}, "stop"))
_USAGE = _chunk(
    b"data: "
    + json.dumps(
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "bench", "choices": []}
        | {"usage": USAGE}
    ).encode()
    + b"\n\n"
)
_DONE = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Mock(asyncio.Protocol):
    """One connection."""

    def __init__(self, chunks: int, gap_s: float) -> None:
        self._chunks, self._gap_s = chunks, gap_s
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has a class of its own

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url.startswith(b"/metrics"):
            self._write(_answer(METRICS, b"text/plain"))
        elif self._url.startswith(b"/v1/models"):
            self._write(_answer(MODELS))
        elif self._url.startswith(b"/v1/chat"):
            options = json.loads(self._body)
            if options.get("stream"):
                usage = (options.get("stream_options") or {}).get("include_usage") is True
                self._write(_HEAD + _ROLE)
                self._next(self._chunks, usage)
            else:
                self._write(_WHOLE)
        else:
            self._write(_answer(b"{}"))

    def _next(self, left: int, usage: bool) -> None:
        if not left:
            self._write(_LAST + (_USAGE if usage else b"") + _DONE)
        elif self._transport is not None:
            self._write(_WORD)
            asyncio.get_running_loop().call_later(self._gap_s, self._next, left - 1, usage)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def serve(chunks: int, gap_s: float, port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Mock(chunks, gap_s), "127.0.0.1", port, backlog=2048)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--gap-ms", type=float, default=2.0)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.chunks, arguments.gap_ms / 1e3, arguments.port))


if __name__ == "__main__":
    main()
