"""The process: two ports, one event loop, a watch over stalls, the board poller, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from aiohttp import web

from moe_core.clock import Clock, SystemClock
from moe_core.config import GatewayConfig
from moe_gateway.admin import Admin
from moe_gateway.app import App
from moe_gateway.boards import BoardPoller
from moe_gateway.boot import Inherited
from moe_gateway.budget import BudgetUnavailable
from moe_gateway.external import ExternalCollector, ExternalPoller
from moe_gateway.front import KEEP_ALIVE_S, Front
from moe_gateway.reload import ConfigWatch
from moe_gateway.settings import ConfigRefused
from moe_gateway.siblings import Telling
from moe_gateway.state import Gateway

STALL_CHECK_S = 0.25
ABORT_GRACE_S = 2.0
GC_ALLOCATIONS = 20_000
"""Objects made and kept before cycles among them are looked for; 700 is Python's own figure."""
LOOPBACK = "127.0.0.1"


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: the process has its own, and drains before it stops."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class GatewayServer:
    """A running gateway. `start`, then `port` and `admin_port`; `stop` drains and closes. Where the configuration came
    from a file, that is followed. A worker of a pod is given its sockets; its admin port is for its parent alone."""

    def __init__(
        self,
        config: GatewayConfig,
        clock: Clock | None = None,
        *,
        file: Path | None = None,
        file_hash: str = "",
        inherited: Inherited | None = None,
    ) -> None:
        self._file = file
        self._inherited = inherited
        self._clients: socket.socket | None = None
        self.gateway = Gateway(config, clock or SystemClock(), config_hash=file_hash)
        self._background: list[asyncio.Task[None]] = []
        self._runner: web.AppRunner | None = None
        self._uvicorn: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self.port = 0
        self.admin_port = 0

    async def start(self) -> None:
        """Bind both ports and serve. Raises ConfigRefused by field for a port or a store that is not to be had."""
        await self.open()
        await self.serve()

    async def open(self) -> None:
        """Bind both ports and answer on the admin port. Raises as `start`."""
        gateway, config, given = self.gateway, self.gateway.config, self._inherited
        try:
            await gateway.budget.open()
        except BudgetUnavailable as error:
            if config.budget_store.kind == "SQLite":
                raise ConfigRefused(f"stateDir: {error}; name a writable folder") from None
            # A store elsewhere may come back; until then requests are answered by what costs nothing.
        client_socket = bind("port", config.host, config.port) if given is None else given.listen
        try:
            where = (config.admin_host, config.admin_port) if given is None else (LOOPBACK, 0)
            admin_socket = bind("adminPort", *where)
        except ConfigRefused:
            client_socket.close()
            raise
        self._clients = client_socket
        self.port, self.admin_port = client_socket.getsockname()[1], admin_socket.getsockname()[1]
        gateway.name = f"{socket.gethostname()}:{self.admin_port}"
        self._runner = web.AppRunner(Admin(gateway).application(), access_log=None, handle_signals=False)
        await self._runner.setup()
        await web.SockSite(self._runner, admin_socket).start()

    async def serve(self) -> None:
        """Take requests of clients."""
        gateway, given = self.gateway, self._inherited
        if self._clients is None:
            raise RuntimeError("open comes before serve")
        await self._serve(self._clients)
        external = ExternalPoller(gateway)
        gateway.telemetry.registry.register(ExternalCollector(gateway.config.deployment, external))
        self._background = [
            asyncio.create_task(BoardPoller(gateway).run(), name="boards"),
            asyncio.create_task(external.run(), name="external"),
            asyncio.create_task(self._watch_stalls(), name="stalls"),
            asyncio.create_task(gateway.budget.run(), name="budget"),
            asyncio.create_task(gateway.keep_record(), name="record"),
            asyncio.create_task(gateway.access.run(gateway.client), name="access"),
        ]
        siblings = gateway.config.siblings if given is None else given.siblings
        if siblings is not None:
            telling = Telling(gateway, siblings, *(() if given is None else (given.tell, given.tell_key)))
            self._background.append(asyncio.create_task(telling.run(), name="siblings"))
        if self._file is not None:
            watch = ConfigWatch(gateway, self._file)
            self._background.append(asyncio.create_task(watch.run(), name="configuration"))

    async def stop(self, drain_s: float | None = None) -> None:
        """Stop accepting, let requests in flight end for `drain_s`, end the rest honestly, close everything."""
        gateway = self.gateway
        gateway.draining = True
        gateway.held.release_all()
        drain_s = gateway.config.limits.drain_s if drain_s is None else drain_s
        gateway.log.info("draining", in_flight=len(gateway.calls), deadline_s=drain_s)
        if self._uvicorn is not None and self._serving is not None:
            self._uvicorn.should_exit = True
            done, _ = await asyncio.wait({self._serving}, timeout=drain_s)
            if not done:
                gateway.stop_all()
                done, _ = await asyncio.wait({self._serving}, timeout=ABORT_GRACE_S)
            if not done:
                self._uvicorn.force_exit = True
                await asyncio.wait({self._serving}, timeout=ABORT_GRACE_S)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await gateway.close()
        if self._runner is not None:
            await self._runner.cleanup()
        gateway.log.info("stopped")

    @property
    def crashed(self) -> asyncio.Task[None] | None:
        """A part that has ended although nothing stopped it."""
        parts = [*self._background, *([self._serving] if self._serving is not None else [])]
        return next((part for part in parts if part.done()), None)

    async def _serve(self, client_socket: socket.socket) -> None:
        for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):
            # What goes wrong in a request is in our own log, with the request's id.
            logging.getLogger(name).disabled = True
        server = uvicorn.Config(
            App(self.gateway),
            loop="none",
            http=Front,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=2048,
        )
        self._uvicorn = _Uvicorn(server)
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[client_socket]), name="uvicorn")
        listening = asyncio.ensure_future(self._uvicorn.listening.wait())
        await asyncio.wait({listening, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._serving.done():
            raise RuntimeError("the HTTP server did not start")

    async def _watch_stalls(self) -> None:
        while True:
            await self.gateway.clock.sleep(STALL_CHECK_S)
            self.gateway.stop_stalled()
            self.gateway.looks.take(self.gateway, self.gateway.clock.monotonic())
            if self._uvicorn is not None:
                now_s = asyncio.get_running_loop().time()
                for connection in list(self._uvicorn.server_state.connections):
                    if isinstance(connection, Front):
                        connection.look(now_s)


async def run(server: GatewayServer, announce: Callable[[GatewayServer], None]) -> int:
    """Serve until SIGTERM or SIGINT. `announce(server)` is called once both ports answer. Returns the exit status."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await server.start()
    settle_memory()
    announce(server)
    return await until_stopped(server, stopping)


async def until_stopped(server: GatewayServer, stopping: asyncio.Event) -> int:
    """Serve until told to stop, or until a part dies; then drain. Returns the exit status."""
    status = 0
    while not stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), 1.0)
        part = server.crashed
        if part is not None and not stopping.is_set():
            error = None if part.cancelled() else part.exception()
            server.gateway.log.error("a part of the gateway died; stopping", part=part.get_name(), error=repr(error))
            status = 1
            break
    await server.stop()
    return status


def settle_memory() -> None:
    """What start-up made stays for good: not looked through again by each collection of garbage. A request leaves next
    to no cycles, so that collections, which stop everything, may be rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 20, 20)


def bind(field: str, host: str, port: int) -> socket.socket:
    """A socket of an address of the configuration. Raises ConfigRefused with the field."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigRefused(f"{field}: {host}:{port}: {error.strerror}; take another port, or 0 for any") from None
    sock.setblocking(False)
    return sock
