"""Stands in for `python -m moe_serving.run`: the same lines, the same API and board, no engine.

Behaviour by the environment variable FAKE_SERVING (set by the test for the whole stack): "ok", "refuse" (a fault in
words, exit code 3), "crash" (dies while it starts), "stubborn" (ignores SIGTERM), "litter" (leaves a detached child
that has lost its mark), "needs-its-child" (says in a file whether its child was still there when it was told to end).
A POST to /crash ends it with exit code 9.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from moe_core.clock import SystemClock
from moe_core.config import ServingConfig
from moe_core.door import guard
from moe_core.passes import Door
from moe_core.signing import Verifier
from moe_core.wire import EngineDigest, ExpertKnobs, LayerDigest, ReplicaDigest
from moe_serving.board import GATEWAYS_READ

TOKENS = 4


def tell(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def litter() -> None:
    """As Ray's daemons may: a session of its own, an environment without the mark, a parent that is gone."""
    command = f"{sys.executable} -c 'import time; time.sleep(600)' >/dev/null 2>&1 & echo $! > litter.pid"
    subprocess.run(["setsid", "sh", "-c", command], env={"PATH": os.environ["PATH"]}, check=True)


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "600"])


def look_at(child: subprocess.Popen[bytes]) -> None:
    Path("child.txt").write_text("there" if child.poll() is None else "gone")


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(min(TOKENS, body.get("max_tokens", TOKENS))):
        await _event(response, {"choices": [{"index": 0, "delta": {"content": f"t{number} "}}]})
        await asyncio.sleep(0.002)
    await _event(response, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    await _event(response, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": TOKENS}})
    await response.write(b"data: [DONE]\n\n")
    return response


async def _event(response: web.StreamResponse, event: dict[str, Any]) -> None:
    whole = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", **event}
    await response.write(b"data: " + json.dumps(whole).encode() + b"\n\n")


async def crash(_: web.Request) -> web.Response:
    complain("the engine saw a NaN")
    os._exit(9)


def digests(config: ServingConfig) -> list[dict[str, Any]]:
    knobs = config.boot_knobs.experts if config.boot_knobs is not None else ExpertKnobs()
    layer = LayerDigest(layer=0, hooked=True, slots_total=8, expert_max_over_mean=3.0, rank_max_over_mean=1.5)
    engine = EngineDigest(
        max_active_seqs=config.max_active_seqs,
        max_batched_tokens=config.max_batched_tokens,
        ceiling_active_seqs=config.max_active_seqs,
        ceiling_batched_tokens=config.max_batched_tokens,
    )
    now = time.time()
    replica = ReplicaDigest(
        replica="r0",
        started_at_s=now,
        at_s=now,
        seq=1,
        ranks=config.tensor_parallel,
        knobs_version=1,
        knobs=knobs,
        engine=engine,
        layers=(layer,),
    )
    return [replica.to_json()]


async def listen(app: web.Application) -> int:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return int(runner.addresses[0][1])


async def serve(config: ServingConfig, mode: str) -> None:
    stop = asyncio.Event()
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    tell(stage="engine", state="start", detail=config.source)
    api = web.Application()
    api.router.add_post("/v1/chat/completions", chat)
    api.router.add_post("/crash", crash)
    api.router.add_get("/v1/models", lambda _: _json({"data": [{"id": config.model}]}))
    verifier = Verifier(config.trusted_keys)
    door = guard(Door(config.deployment, lambda: verifier, SystemClock()), frozenset(), GATEWAYS_READ)
    board = web.Application(middlewares=[door])
    board.router.add_get("/v1/digests", lambda _: _json(digests(config)))
    board.router.add_get("/metrics", lambda _: _text("fake_board 1\n"))
    port, board_port = await listen(api), await listen(board)
    tell(stage="engine", state="done")
    if mode == "litter":
        litter()
    child = sleeper() if mode == "needs-its-child" else None
    tell(ready=True, url=f"http://127.0.0.1:{port}/v1", boardUrl=f"http://127.0.0.1:{board_port}", pids=[os.getpid()])
    await stop.wait()
    if child is not None:
        await asyncio.sleep(0.3)  # a signal to the whole group would have reached it by now
        look_at(child)


async def _json(value: Any) -> web.Response:
    return web.json_response(value)


async def _text(value: str) -> web.Response:
    return web.Response(text=value)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    config = ServingConfig.model_validate_json(parser.parse_args().config.read_text())
    mode = os.environ.get("FAKE_SERVING", "ok")
    tell(stage="ray", state="start")
    sys.stdout.write("a line that is no announcement\n")
    tell(stage="ray", state="done")
    if mode == "refuse":
        tell(error={"field": "spec.model.id", "message": "no such architecture", "remedy": "use another one"})
        return 3
    if mode == "crash":
        complain("segfault in the expert kernel")
        return 139
    asyncio.run(serve(config, mode))
    return 0


if __name__ == "__main__":
    sys.exit(main())
