"""The parent of a pod's workers: it holds their port, starts them, starts anew what died, and ends them together.

One listening socket, bound here and inherited by every worker: a connection that waits in it is taken by whoever lives,
so that a worker that dies loses its own and no other. docs/adr/0034-workers-of-a-pod.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web

from moe_core import http
from moe_core.clock import Clock, SystemClock
from moe_core.config import GatewayConfig, SiblingsConfig, config_hash
from moe_core.log import get_log
from moe_core.retry import Backoff
from moe_gateway import merging
from moe_gateway.boot import SERVE, Boot
from moe_gateway.pod_admin import PodAdmin, ask
from moe_gateway.reload import at_runtime
from moe_gateway.server import ABORT_GRACE_S, LOOPBACK, bind
from moe_gateway.settings import ConfigRefused, Loaded, load

BACKLOG = 2048
TICK_S = 1.0
HANGS_S = 30.0
"""A worker that has not answered for so long is killed."""
BACKOFF = Backoff(initial_s=0.1, max_s=30.0)
STEADY_S = 60.0
"""A worker that has served for so long begins with a short back-off again."""
END_S = 5.0
"""Beyond the drain, for a worker to close its books."""
GROUPS_TRIED = 50


@dataclass
class Slot:
    """One worker's place: its process, if there is one, and what it last told."""

    index: int
    tell: socket.socket
    process: asyncio.subprocess.Process | None = None
    url: str | None = None
    serving: bool = False
    metrics: bytes = b""
    answered_s: float = 0.0
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Supervisor:
    """The workers of one pod. `start`, then `port` and `admin_port`; `stop` drains them all within one deadline."""

    def __init__(self, loaded: Loaded, file: Path, clock: Clock | None = None) -> None:
        self._first, self._file = loaded.config, file
        self._loaded = loaded
        self._clock = clock or SystemClock()
        self._log = get_log("gateway.supervisor", deployment=loaded.config.deployment)
        self._slots: list[Slot] = []
        self._listen: socket.socket | None = None
        self._runner: web.AppRunner | None = None
        self._client: aiohttp.ClientSession | None = None
        self._admin = PodAdmin(self)
        self._watch: asyncio.Task[None] | None = None
        self._siblings: SiblingsConfig | None = None
        self._tell_key: str | None = None
        self._draining = False
        self._begun = asyncio.Event()
        """Every worker has served once, or one could not."""
        self._failed: int | None = None
        self._hearing = asyncio.Lock()
        self._ended = b""
        """Counters of workers that are no more."""
        self.name = ""
        self.port = 0
        self.admin_port = 0

    # What the admin port asks

    @property
    def client(self) -> aiohttp.ClientSession:
        if self._client is None:
            self._client = http.session(connect_s=2.0)
        return self._client

    @property
    def urls(self) -> list[str]:
        return [slot.url for slot in self._slots if slot.url is not None and slot.serving]

    @property
    def ready(self) -> str | None:
        if self._draining:
            return "draining"
        missing = [slot.index for slot in self._slots if not slot.serving]
        return f"workers that do not serve: {', '.join(map(str, missing))}" if missing else None

    @property
    def pids(self) -> list[int]:
        """Of the workers that live."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    # Life

    async def start(self) -> int | None:
        """Bind the ports and wait until every worker serves. Raises ConfigRefused by field; returns the exit status of
        a worker that could not begin, or None."""
        config = self._first
        self._listen = bind("port", config.host, config.port)
        try:
            self._listen.listen(BACKLOG)
            admin_socket = bind("adminPort", config.admin_host, config.admin_port)
            self._siblings, tells = _tell_sockets(config)
        except ConfigRefused:
            self._listen.close()
            raise
        if config.siblings is None:
            self._tell_key = secrets.token_hex(32)
        self.port, self.admin_port = self._listen.getsockname()[1], admin_socket.getsockname()[1]
        self.name = f"{socket.gethostname()}:{self.admin_port}"
        self._runner = web.AppRunner(self._admin.application(), access_log=None, handle_signals=False)
        await self._runner.setup()
        await web.SockSite(self._runner, admin_socket).start()
        self._slots = [Slot(index, tell) for index, tell in enumerate(tells)]
        for slot in self._slots:
            slot.task = asyncio.create_task(self._keep(slot), name=f"worker {slot.index}")
        self._watch = asyncio.create_task(self._follow(), name="watch")
        await self._begun.wait()
        return self._failed

    async def stop(self) -> None:
        """Every worker drains, all within one deadline; who does not end by then is killed."""
        self._draining = True
        drain_s = self._loaded.config.limits.drain_s
        self._log.info("draining", workers=len(self.pids), deadline_s=drain_s)
        for slot in self._slots:
            _signal(slot, signal.SIGTERM)
        if self._listen is not None:
            self._listen.close()  # the workers close theirs: then nobody waits for an answer that will not come
        tasks = {slot.task for slot in self._slots if slot.task is not None}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=drain_s + 2 * ABORT_GRACE_S + END_S)
            for slot in self._slots:
                if slot.task in late:
                    self._log.error("a worker did not end in time and is killed", worker=slot.index)
                    _signal(slot, signal.SIGKILL)
            if late:
                await asyncio.wait(late, timeout=END_S)
        if self._watch is not None:
            self._watch.cancel()
        for slot in self._slots:
            slot.tell.close()
        if self._client is not None:
            await self._client.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._log.info("stopped")

    @property
    def broken(self) -> bool:
        """Whether a part of the parent itself has ended, which is a bug."""
        parts = [self._watch, *(slot.task for slot in self._slots)]
        return any(part is not None and part.done() for part in parts)

    async def _keep(self, slot: Slot) -> None:
        """Run a worker, and another one in its place whenever it ends."""
        failures = 0
        while not self._draining:
            began_s = self._clock.monotonic()
            status = await self._live(slot)
            served = slot.serving
            if served:
                self._ended = merging.retired(self._ended, slot.metrics)
            slot.process, slot.url, slot.serving, slot.metrics = None, None, False, b""
            if self._draining:
                return
            if not self._begun.is_set():
                self._failed = status if status > 0 else 1
                self._begun.set()
            if self._failed is not None:
                return
            failures = 1 if served and self._clock.monotonic() - began_s >= STEADY_S else failures + 1
            wait_s = BACKOFF.bound_s(failures)
            self._log.error("a worker ended; another takes its place", worker=slot.index, status=status, in_s=wait_s)
            await self._clock.sleep(wait_s)

    async def _live(self, slot: Slot) -> int:
        """One process, from its start to its end. Returns its exit status, or the negative number of a signal."""
        if self._listen is None:
            return 1
        fds = (self._listen.fileno(), slot.tell.fileno())
        process = slot.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moe_gateway", "--config", str(self._file), "--worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=fds,
        )
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a worker was started without pipes")
        boot = Boot(
            config=self._loaded.config,
            hash=self._loaded.hash,
            listen_fd=fds[0],
            siblings=self._siblings,
            tell_fd=fds[1],
            tell_key=self._tell_key,
        )
        try:
            process.stdin.write(orjson.dumps(boot.to_json()) + b"\n")
            hello = await process.stdout.readline()
            if hello:
                slot.url = f"http://{LOOPBACK}:{orjson.loads(hello)['adminPort']}"
                slot.answered_s = self._clock.monotonic()
                async with self._admin.turn:
                    await self._admin.replay(slot.url)
                    process.stdin.write(SERVE)
                    slot.serving = bool(await process.stdout.readline())
                if all(one.serving for one in self._slots):
                    self._begun.set()
        except OSError:
            _signal(slot, signal.SIGKILL)
        return await process.wait()

    async def _follow(self) -> None:
        """Keep the newest configuration that can be served, and what each worker has counted; kill one that hangs."""
        while True:
            await self._clock.sleep(TICK_S)
            self._look()
            await self._hear_all()

    async def metrics(self) -> bytes:
        """What all have counted. A worker that does not answer counts as it last did: a sum never goes back."""
        await self._hear_all()
        return merging.expositions([slot.metrics for slot in self._slots], self._ended)

    async def _hear_all(self) -> None:
        async with self._hearing:  # so that no older answer takes a newer one's place
            await asyncio.gather(*(self._hear(slot) for slot in self._slots))

    async def _hear(self, slot: Slot) -> None:
        process, url = slot.process, slot.url
        if process is None or url is None:
            return
        answer = await ask(self.client, url, "GET", "/metrics")
        now_s = self._clock.monotonic()
        if slot.process is not process:
            return
        if answer.status == 200:
            slot.metrics, slot.answered_s = answer.body, now_s
        elif now_s - slot.answered_s > HANGS_S:
            self._log.error("a worker hangs and is killed", worker=slot.index, silent_s=round(now_s - slot.answered_s))
            _signal(slot, signal.SIGKILL)

    def _look(self) -> None:
        """What a worker that begins from now on is given: the file, as far as the running ones have taken it up."""
        with contextlib.suppress(OSError, ConfigRefused):
            if config_hash(self._file.read_bytes()) != self._loaded.hash:
                found = load(self._file)
                config, _ = at_runtime(self._first, found.config)
                self._loaded = Loaded(config, found.hash)


def _signal(slot: Slot, number: signal.Signals) -> None:
    if slot.process is not None and slot.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            slot.process.send_signal(number)


def _tell_sockets(config: GatewayConfig) -> tuple[SiblingsConfig, list[socket.socket]]:
    """The ports on which workers hear one another, a worker each: those of the configuration, where other pods tell
    them too, else any that follow one another. Raises ConfigRefused."""
    told = config.siblings
    if told is not None:
        socks = _group(told.host, told.port, config.workers)
        if socks is None:
            last = told.port + config.workers - 1
            raise ConfigRefused(f"siblings.port: {told.port} to {last} on {told.host} are not all free; take others")
        return told, socks
    for _ in range(GROUPS_TRIED):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((LOOPBACK, 0))
            port: int = probe.getsockname()[1]
        socks = _group(LOOPBACK, port, config.workers)
        if socks is not None:
            return SiblingsConfig(host=LOOPBACK, port=port, workers=config.workers), socks
    raise ConfigRefused(f"workers: no {config.workers} UDP ports in a row are free; set siblings.port")


def _group(host: str, first: int, count: int) -> list[socket.socket] | None:
    """UDP sockets on ports in a row; None where one is not to be had."""
    made: list[socket.socket] = []
    try:
        for port in range(first, first + count):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.append(sock)
            sock.bind((host, port))
    except (OSError, OverflowError):
        for sock in made:
            sock.close()
        return None
    return made


async def run(loaded: Loaded, file: Path, announce: Callable[[Supervisor], None]) -> int:
    """Serve by several workers until SIGTERM or SIGINT. Returns the exit status, as of a gateway of one worker."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    pod = Supervisor(loaded, file)
    starting = asyncio.ensure_future(pod.start())
    told = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
    status = starting.result() if starting.done() else None
    if not starting.done():
        starting.cancel()
    elif status is None:
        announce(pod)
        while not stopping.is_set() and not pod.broken:
            await asyncio.wait({told}, timeout=1.0)
        status = 0 if stopping.is_set() else 1
    told.cancel()
    await pod.stop()
    return status or 0
