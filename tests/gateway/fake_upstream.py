"""A small OpenAI-compatible upstream over real sockets that does what a test tells it, and remembers what it got."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

SSE = {"Content-Type": "text/event-stream; charset=utf-8"}


def chunk(text: str | None = None, **more: Any) -> bytes:
    """One streamed chat event; no text makes a role-only one."""
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": more.pop("finish", None)}
    document = {"id": "c1", "object": "chat.completion.chunk", "choices": [choice], **more}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def text_chunk(text: str) -> bytes:
    """One streamed event of a completions call."""
    document = {"id": "c1", "object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": None}]}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def usage_chunk(prompt: int, output: int) -> bytes:
    document = {"id": "c1", "choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
FINISH = b'data: {"id": "c1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'


@dataclass
class Behaviour:
    """How a request is answered. Defaults: a good answer of `tokens` tokens."""

    status: int = 200
    body: bytes | None = None
    tokens: int = 3
    words: tuple[str, ...] = ()
    """The tokens themselves, in place of w0, w1…"""
    prompt_tokens: int = 10
    reset: bool = False
    """Close the connection without an answer."""
    stall: bool = False
    """Never answer."""
    role_then_stall: bool = False
    stall_after: int | None = None
    """Fall silent after so many tokens."""
    cut_after: int | None = None
    """Break the connection after so many tokens."""
    after: bytes | None = None
    """Bytes in place of what follows the first token."""
    raw: bytes | None = None
    """The whole stream, byte for byte, in pieces of `raw_step` bytes."""
    raw_step: int = 37
    repeat: int = 1
    """Send `raw` so many times."""
    gap_s: float = 0.0
    gate: asyncio.Event | None = None
    """Closed until set: an answer in one piece waits before it, a stream before its last event, or before it
    is cut."""
    first_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


class FakeUpstream:
    """`async with FakeUpstream() as upstream`: its `url` ends in /v1. `behaviours` are used up one by one; then
    `default` answers."""

    def __init__(self, default: Behaviour | None = None) -> None:
        self.default = default or Behaviour()
        self.behaviours: list[Behaviour] = []
        self.requests: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.paths: list[str] = []
        self.gone = asyncio.Event()
        self.sent_bytes = 0
        self.digests: Any = []
        self.port = 0

    async def __aenter__(self) -> FakeUpstream:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Serve, on the port of before where there was one."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/{tail:.*}", self._answer)
        app.router.add_get("/v1/digests", self._digests)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def board_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _digests(self, _: web.Request) -> web.Response:
        return web.json_response(self.digests)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        document = json.loads(raw)
        self.bodies.append(raw)
        self.requests.append(document)
        self.headers.append(request.headers.copy())
        self.paths.append(request.path_qs)
        how = self.behaviours.pop(0) if self.behaviours else self.default
        try:
            return await self._behave(request, document, how)
        except (asyncio.CancelledError, ConnectionResetError):
            self.gone.set()
            raise

    async def _behave(self, request: web.Request, document: dict[str, Any], how: Behaviour) -> web.StreamResponse:
        if how.reset:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        await asyncio.sleep(3600 if how.stall else how.first_s)
        if how.status != 200:
            body = how.body if how.body is not None else b'{"error":{"message":"told to fail"}}'
            return web.Response(status=how.status, body=body, content_type="application/json", headers=how.headers)
        if not (document.get("stream") or "stream" in request.path):
            if how.gate is not None:
                await how.gate.wait()
            return self._whole(document, how)
        return await self._stream(request, document, how)

    def _whole(self, document: dict[str, Any], how: Behaviour) -> web.Response:
        answer = {
            "id": "c1",
            "model": document.get("model"),
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello " * how.tokens}}],
            "usage": {"prompt_tokens": how.prompt_tokens, "completion_tokens": how.tokens},
        }
        body = json.dumps(answer).encode() if how.body is None else how.body
        return web.Response(body=body, content_type="application/json")

    async def _stream(self, request: web.Request, document: dict[str, Any], how: Behaviour) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)

        async def write(data: bytes) -> None:
            await response.write(data)
            self.sent_bytes += len(data)

        if how.raw is not None:
            for start in list(range(0, len(how.raw), how.raw_step)) * how.repeat:
                await write(how.raw[start : start + how.raw_step])
                await asyncio.sleep(0)
            return response
        await write(chunk())
        if how.role_then_stall:
            await asyncio.sleep(3600)
        words = how.words or tuple(f"w{index} " for index in range(how.tokens))
        for index, word in enumerate(words):
            if how.stall_after == index:
                await asyncio.sleep(3600)
            if how.cut_after == index:
                await (asyncio.sleep(0.02) if how.gate is None else how.gate.wait())
                assert request.transport is not None
                request.transport.abort()
                return response
            await write(chunk(word) if "messages" in document else text_chunk(word))
            if how.after is not None:
                await write(how.after)
                return response
            await asyncio.sleep(how.gap_s)
        if how.gate is not None:
            await how.gate.wait()
        await write(FINISH)
        if (document.get("stream_options") or {}).get("include_usage"):
            await write(usage_chunk(how.prompt_tokens, len(words)))
        await write(DONE)
        return response
