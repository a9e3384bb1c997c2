"""What stands at both ends of a gateway: clients before it, engines, their boards and a closed API behind it.

    with edge_running() as edge:
        edge.behave(namespace, revision, first_s=1.5)        # from now on; the others keep what they had
        edge.asked(namespace, revision)                      # requests that came to that revision's engine
        edge.asked(namespace, CLOSED)                        # and to the closed API
        with edge.trickle(namespace, address, per_s=10) as trickle:   # real requests, through a gateway
            …
        trickle.failed()                                     # those without a whole good answer

One server in this process answers for all of them, by path: /NAMESPACE/REVISION/v1/chat/completions. Boards answer
where pod_network/sitecustomize.py leads the names of Services, by their Host header. `network` is 127.N, taken for
this process alone: gateways of several runs of the tests lie side by side.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

from moe_core.addresses import BOARD_PORT
from tests.cluster.pod_network.sitecustomize import SERVICES
from tests.gateway.fake_upstream import DONE, FINISH, SSE, chunk, usage_chunk

CLOSED = "closed"
"""Name of the closed API among revisions."""
MODEL = "Qwen/Qwen3-235B-A22B-FP8"
REQUEST_S = 30.0
IMBALANCE = 1.25
T = TypeVar("T")


@dataclass(frozen=True)
class Engine:
    """How a revision answers."""

    first_s: float = 0.0
    tokens: int = 3
    status: int = 200


@dataclass
class Request:
    """One request of a trickle, and what came of it."""

    at: float
    status: int = 0
    why: str = "no answer"
    good: bool = False


@dataclass
class Trickle:
    """Requests through one gateway, a few each second."""

    requests: list[Request] = field(default_factory=list)

    def failed(self) -> list[Request]:
        return [request for request in self.requests if not request.good]


class Edge:
    """The server and the clients, in a thread of their own. Its methods may be called from any thread."""

    def __init__(self, network: str, boards: socket.socket) -> None:
        self.network = network
        self._boards = boards
        self._engines: dict[tuple[str, str], Engine] = {}
        self._asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="edge", daemon=True)
        self._runners: list[web.AppRunner] = []
        self.url = ""
        self.client: aiohttp.ClientSession | None = None

    # -- what tests say and ask

    def behave(self, namespace: str, revision: str, **changes: Any) -> None:
        """Changes how a revision's engine answers: fields of Engine."""
        with self._lock:
            now = self._engines.get((namespace, revision), Engine())
            self._engines[namespace, revision] = dataclasses.replace(now, **changes)

    def asked(self, namespace: str, revision: str) -> int:
        with self._lock:
            return self._asked[namespace, revision]

    def engine_url(self, namespace: str, revision: str) -> str:
        """OpenAI base of a revision's engine."""
        return f"{self.url}/{namespace}/{revision}/v1"

    @contextmanager
    def trickle(self, address: str, per_s: float = 10.0) -> Iterator[Trickle]:
        """Requests to the gateway at `address` (host:port) while the block lasts; by its end all are answered."""
        trickle, stop = Trickle(), asyncio.Event()
        flow = asyncio.run_coroutine_threadsafe(self._flow(trickle, address, per_s, stop), self._loop)
        try:
            yield trickle
        finally:
            self._loop.call_soon_threadsafe(stop.set)
            flow.result(REQUEST_S + 10)

    # -- clients

    async def _flow(self, trickle: Trickle, address: str, per_s: float, stop: asyncio.Event) -> None:
        under_way: set[asyncio.Task[None]] = set()
        while not stop.is_set():
            request = Request(time.monotonic())
            trickle.requests.append(request)
            under_way.add(asyncio.create_task(self._ask(request, f"http://{address}/v1/chat/completions")))
            await asyncio.sleep(1 / per_s)
        await asyncio.gather(*under_way)

    async def _ask(self, request: Request, url: str) -> None:
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Say hello"}]}
        assert self.client is not None
        try:
            async with asyncio.timeout(REQUEST_S), self.client.post(url, json=body) as answer:
                text = await answer.text()
                request.status = answer.status
                request.good = answer.status == 200 and text.rstrip().endswith("[DONE]") and '"error"' not in text
                request.why = "" if request.good else text[-300:]
        except (aiohttp.ClientError, TimeoutError) as error:
            request.why = repr(error)

    # -- engines, the closed API and boards

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        key = (request.match_info["namespace"], request.match_info["revision"])
        await request.read()
        with self._lock:
            self._asked[key] += 1
            how = self._engines.get(key, Engine())
        await asyncio.sleep(how.first_s)
        if how.status != 200:
            return web.json_response({"error": {"message": "told to fail"}}, status=how.status)
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        await response.write(chunk())
        for number in range(how.tokens):
            await response.write(chunk(f"w{number} "))
        await response.write(FINISH + usage_chunk(10, how.tokens) + DONE)
        return response

    async def _board(self, request: web.Request) -> web.Response:
        """One replica of two EP ranks, with traffic."""
        layer = {"layer": 0, "hooked": True, "slotsTotal": 100, "rankMaxOverMean": IMBALANCE}
        limits = {"maxActiveSeqs": 8, "maxBatchedTokens": 512, "ceilingActiveSeqs": 8, "ceilingBatchedTokens": 512}
        revision = request.host.split("-board.")[0]
        digest = {"replica": "r0", "revision": revision, "startedAtS": 1, "atS": 2, "seq": 1, "ranks": 2}
        return web.json_response([{**digest, "engine": limits, "layers": [layer]}])

    # -- life

    async def _begin(self) -> None:
        self.client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        application = web.Application()
        application.router.add_post("/{namespace}/{revision}/v1/chat/completions", self._answer)
        runner = await self._serve(application)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        boards = web.Application()
        boards.router.add_get("/v1/digests", self._board)
        await web.SockSite(await self._serve(boards), self._boards).start()

    async def _serve(self, application: web.Application) -> web.AppRunner:
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def _end(self) -> None:
        if self.client is not None:
            await self.client.close()
        for runner in self._runners:
            await runner.cleanup()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def start(self) -> None:
        self._thread.start()
        self._run(self._begin())

    def stop(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def _network() -> tuple[str, socket.socket]:
    """A 127.N that nobody else has: the address of its Services is bound as the sign of it."""
    for number in random.SystemRandom().sample(range(2, 250), 100):
        taken = socket.socket()
        try:
            taken.bind((f"127.{number}{SERVICES}", BOARD_PORT))
        except OSError:
            taken.close()
            continue
        taken.listen()
        taken.setblocking(False)
        return f"127.{number}", taken
    raise AssertionError("no network of loopback addresses is free")


@contextmanager
def edge_running() -> Iterator[Edge]:
    """An edge on a network of its own, stopped in the end."""
    network, boards = _network()
    edge = Edge(network, boards)
    edge.start()
    try:
        yield edge
    finally:
        edge.stop()
