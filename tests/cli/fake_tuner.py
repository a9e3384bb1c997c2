"""Stands in for `python -m moe_tuner`: ready, a status with one decision, nothing else."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

from aiohttp import web

DECISION = {"loop": "fast", "action": "tighten", "reason": "queue of 9 above 4", "version": 2, "time": 0.0}
REPORT = {"exploringReason": "no trial: a spike runs", "decisions": [DECISION]}


async def status(_: web.Request) -> web.Response:
    return web.json_response(REPORT)


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    app = web.Application()
    app.router.add_get("/v1/status", status)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(json.dumps({"ready": True, "port": runner.addresses[0][1]}) + "\n")
    sys.stdout.flush()
    await stop.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
