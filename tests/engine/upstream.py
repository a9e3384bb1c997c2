"""A closed API for tests, on a real socket: answers every chat and completion at once, with a mark in the text."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

MARK = "from the closed API"
FIRST_TOKEN_S = 0.3


class ClosedApi:
    """Counts what it answered."""

    def __init__(self) -> None:
        self.requests = 0
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests += 1
        await asyncio.sleep(FIRST_TOKEN_S)
        chat = request.path.endswith("chat/completions")
        usage = {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}
        base = {"id": "closed-1", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {"message": {"role": "assistant", "content": MARK}} if chat else {"text": MARK}
            return web.json_response(
                {**base, "choices": [{"index": 0, "finish_reason": "stop", **choice}], "usage": usage}
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        piece = {"delta": {"role": "assistant", "content": MARK}} if chat else {"text": MARK}
        for choices, extra in (
            ([{"index": 0, "finish_reason": None, **piece}], {}),
            ([{"index": 0, "finish_reason": "stop", **({"delta": {}} if chat else {"text": ""})}], {}),
            ([], {"usage": usage}),
        ):
            await response.write(f"data: {json.dumps({**base, 'choices': choices, **extra})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


@contextmanager
def closed_api() -> Iterator[ClosedApi]:
    """Serve on a free port in a thread of its own until the block ends."""
    api, loop, ready = ClosedApi(), asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", api.answer)
        app.router.add_post("/v1/completions", api.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        api.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    yield api
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
