"""A stream of the real engine that is cut and continued: at temperature 0 the text is that of an answer in one go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests
from aiohttp import web

from tests.engine.stack import environment
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.harness import MODEL, Answer, Client, config, running

pytestmark = [pytest.mark.engine, pytest.mark.full]

SHAPE = {"hidden_size": 128, "moe_intermediate_size": 256, "num_hidden_layers": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.\n"
"""All that may be written: of all bytes, random weights would write broken UTF-8, which no text tells."""
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""What a turn begins with is what is generated from, as in real models; the tiny one's own has a space more."""
ASKED: dict[str, Any] = {
    "model": MODEL,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0,
    "max_tokens": 32,
    "ignore_eos": True,
}
CALLS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Tell me a story"}]},
    "/v1/completions": {"prompt": "Once upon a time"},
}


class Cutter(FakeUpstream):
    """Passes an engine's answers on; those that `cuts` names break after so many events."""

    def __init__(self, engine: str) -> None:
        super().__init__()
        self.engine = engine
        self.cuts: list[int | None] = []
        self.asked: list[dict[str, Any]] = []

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        cut = self.cuts.pop(0) if self.cuts else None
        async with aiohttp.ClientSession() as session, session.post(self.engine + request.path, json=body) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            events = 0
            async for line in answer.content:
                await response.write(line)
                events += line.startswith(b"data: ") and b'"content":""' not in line
                if cut is not None and events == cut and not line.strip():
                    await asyncio.sleep(0.05)
                    assert request.transport is not None
                    request.transport.abort()
                    break
        return response


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a plain vLLM server with the tiny checkpoint."""
    from moe_serving.tiny import cached_checkpoint

    folder = tmp_path_factory.mktemp("engine")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--model", str(cached_checkpoint("qwen3_moe", **SHAPE)), "--served-model-name", MODEL]
    command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
    command += ["--chat-template", TEMPLATE]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        "VLLM_RPC_BASE_PATH": str(folder),
    }
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        command, env={**os.environ, **environment(), **settings}, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield _ready(f"http://127.0.0.1:{port}", process, folder / "log")
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(url + "/health", timeout=10).status_code == 200:
                return url
        time.sleep(0.5)
    raise RuntimeError(log.read_text()[-3000:])


@asynccontextmanager
async def gateway(engine: str) -> AsyncIterator[tuple[Cutter, Client]]:
    async with Cutter(engine) as cutter, running(config(cutter, midStream={"mode": "Continue"})) as client:
        yield cutter, client


def seen(answer: Answer) -> tuple[str, Any, Any]:
    """Text, finish reason and usage."""
    choices = [choice for event in answer.events[:-1] for choice in event["choices"]]
    text = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
    usage = [event["usage"] for event in answer.events[:-1] if event.get("usage")]
    counts = [(one["prompt_tokens"], one["completion_tokens"], one["total_tokens"]) for one in usage]
    return text, [choice["finish_reason"] for choice in choices if choice["finish_reason"]], counts


async def letters(engine: str) -> list[int]:
    body = {"model": MODEL, "prompt": LETTERS, "add_special_tokens": False}
    async with aiohttp.ClientSession() as session, session.post(engine + "/tokenize", json=body) as answer:
        return list((await answer.json())["tokens"])


@pytest.mark.parametrize("path", CALLS)
async def test_an_answer_that_was_cut_is_the_answer_in_one_go(engine: str, path: str) -> None:
    asked = {**ASKED, **CALLS[path], "allowed_token_ids": await letters(engine)}
    async with gateway(engine) as (cutter, client):
        whole = await client.post(asked, path=path)
        assert whole.events[-1] == "[DONE]"
        assert seen(whole)[1] == ["length"]
        for cut in (1, 9, 20, 31):
            cutter.cuts, cutter.asked = [cut], []
            answer = await client.post(asked, path=path)
            assert answer.events[-1] == "[DONE]"
            assert len(cutter.asked) == 2, "it was cut, and continued"
            assert seen(answer) == seen(whole), cut
