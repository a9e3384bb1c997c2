"""Stands in for the tuner, and for the gateway where its own work is not the point: ready, two ports, nothing else."""

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
    for _ in range(2):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    port, admin_port = (address[1] for address in runner.addresses)
    sys.stdout.write(json.dumps({"ready": True, "port": port, "adminPort": admin_port}) + "\n")
    sys.stdout.flush()
    await stop.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
