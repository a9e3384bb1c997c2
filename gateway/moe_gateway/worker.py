"""One worker of a pod: a gateway process whose sockets, configuration and commands of before come from its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import orjson

from moe_gateway.boot import SERVE, Boot, inherited
from moe_gateway.server import GatewayServer, settle_memory, until_stopped


def boot_line() -> Boot:
    """What the parent says first."""
    return Boot.model_validate_json(sys.stdin.buffer.readline())


async def run(boot: Boot, file: Path) -> int:
    """Serve once the parent says so, until SIGTERM or the parent's end. Returns the exit status."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    server = GatewayServer(boot.config, file=file, file_hash=boot.hash, inherited=inherited(boot))
    await server.open()
    settle_memory()
    _say({"adminPort": server.admin_port})
    if await _word(reader, stopping) != SERVE:
        await server.stop(drain_s=0.0)
        return 0
    await server.serve()
    _say({"ready": True})
    orphaned = asyncio.create_task(_end_with_parent(reader, stopping))
    try:
        return await until_stopped(server, stopping)
    finally:
        orphaned.cancel()


async def _word(reader: asyncio.StreamReader, stopping: asyncio.Event) -> bytes:
    """The parent's next line; nothing where it ended, or this process is told to."""
    said, told = asyncio.ensure_future(reader.readline()), asyncio.ensure_future(stopping.wait())
    await asyncio.wait({said, told}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if said.done():
        return said.result()
    said.cancel()
    return b""


async def _end_with_parent(reader: asyncio.StreamReader, stopping: asyncio.Event) -> None:
    while await reader.readline():
        pass
    stopping.set()


def _say(document: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # a parent that has gone is noticed on stdin
        os.write(1, orjson.dumps(document) + b"\n")
