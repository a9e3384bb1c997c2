"""The official Node clients of OpenAI and Anthropic, unchanged, against the gateway over real sockets."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import MODEL, running
from tests.gateway.sdk import (
    ANSWER_JSON,
    CALL,
    CLIENT_KEY,
    CUT_STREAM,
    TEXT_STREAM,
    TOOL_STREAM,
    completion,
    gateway,
)

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("node_sdks.mjs")
REFUSAL = b'{"error": {"message": "too long", "type": "BadRequestError", "param": null, "code": 400}}'
TOOL = completion({"content": None, "tool_calls": [CALL]}, "tool_calls")
BY_TEXT = {
    "hello": replace(completion(), raw=TEXT_STREAM.raw),
    "tools": replace(TOOL, raw=TOOL_STREAM.raw),
    "json": completion({"content": ANSWER_JSON}),
    "refuse": Behaviour(status=400, body=REFUSAL),
    "overload": Behaviour(status=503),
    "fail": Behaviour(status=500),
    "cut": CUT_STREAM,
}
OSLO = {"city": "Oslo"}


class Told(FakeUpstream):
    """Does what the last message of a request says."""

    async def _behave(self, request: web.Request, document: dict[str, Any], how: Behaviour) -> web.StreamResponse:
        return await super()._behave(request, document, BY_TEXT[document["messages"][-1]["content"]])


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    out, err = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0, err.decode()
    return out.decode().strip()


async def test_the_node_clients_run_unchanged(tmp_path: Path) -> None:
    sdks = await run(sys.executable, str(ROOT / "tools" / "node_sdks.py"))
    async with Told() as local, running(gateway(tmp_path, local, limits={"maxBodyBytes": 5000})) as here:
        asked = {"sdks": sdks, "url": here.url, "key": CLIENT_KEY, "model": MODEL}
        got = json.loads(await run("node", str(SCRIPT), json.dumps(asked)))
    assert got["openai"] == {
        "chat": "Hello there",
        "stream": "Hello there",
        "tool": OSLO,
        "streamed_tool": OSLO,
        "parsed": json.loads(ANSWER_JSON),
        "models": [MODEL],
        "errors": {
            "400": ["BadRequestError", 400],
            "401": ["AuthenticationError", 401],
            "404": ["NotFoundError", 404],
            "413": ["APIError", 413],
            "502": ["InternalServerError", 502],
            "529": ["InternalServerError", 529],
            "cut": ["APIError", None],
        },
    }
    assert got["anthropic"] == {
        "message": ["Hello there", "end_turn", 3],
        "request_id": "string",
        "stream": "Hello there",
        "tool": OSLO,
        "streamed_tool": [OSLO, "tool_use"],
        "parsed": json.loads(ANSWER_JSON),
        "errors": {
            "400": ["BadRequestError", 400],
            "401": ["AuthenticationError", 401],
            "404": ["NotFoundError", 404],
            "413": ["ContentTooLargeError", 413],
            "502": ["InternalServerError", 502],
            "529": ["OverloadedError", 529],
            "count": ["NotFoundError", 404],
            "cut": ["APIError", None],
        },
    }
