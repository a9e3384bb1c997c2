"""Tuner processes on a test control plane, with exactly the rights and the configuration of the chart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster.operators import pod_environment


@dataclass
class Tuner:
    """A running tuner process."""

    process: asyncio.subprocess.Process
    url: str
    log: Path

    async def get(self, path: str) -> Any:
        async with aiohttp.ClientSession() as client, client.get(self.url + path) as response:
            return await response.json()

    async def kill(self) -> None:
        """As a node that dies."""
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 30)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@asynccontextmanager
async def running(
    folder: Path, document: dict[str, Any], kubeconfig: Path, network: str, name: str
) -> AsyncIterator[Tuner]:
    """`python -m moe_tuner --cluster`, ready, in the pod of that name; ended with the block."""
    path, log = folder / f"{name}.json", folder / f"{name}.log"
    path.write_text(json.dumps({**document, "identity": name, "stateDir": str(folder / name)}))
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moe_tuner", "--cluster", str(path), "--kubeconfig", str(kubeconfig)),
            env=pod_environment(network),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        assert line, log.read_text()
        yield Tuner(process, f"http://127.0.0.1:{json.loads(line)['port']}", log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
