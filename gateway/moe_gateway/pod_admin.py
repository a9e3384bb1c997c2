"""The admin port of a pod of several workers: asks all of them and answers as one gateway.

Passes are shown to the workers as they came, and it is they who refuse a stranger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import aiohttp
import orjson
from aiohttp import web

from moe_api.base import Model
from moe_core.forecasts import ForecastReport, together
from moe_core.wire import Ack
from moe_gateway import merging
from moe_gateway.admin import COMMANDS, MAX_COMMAND_BYTES
from moe_gateway.merging import Window

ASK_S = 2.0


@dataclass(frozen=True)
class Answer:
    """What a worker said; status 0 where it said nothing."""

    status: int
    body: bytes


class Workers(Protocol):
    """The pod, as its admin port sees it."""

    @property
    def name(self) -> str: ...
    @property
    def urls(self) -> Sequence[str]:
        """Admin addresses of the workers that have begun to serve and live."""
        ...

    @property
    def ready(self) -> str | None:
        """None where every worker takes requests; else why not."""
        ...

    @property
    def client(self) -> aiohttp.ClientSession: ...
    async def metrics(self) -> bytes:
        """Of all workers together, those that have ended too."""
        ...


class PodAdmin:
    """Handlers over the workers of a pod, and the commands that all of them are to have."""

    def __init__(self, pod: Workers) -> None:
        self._pod = pod
        self.turn = asyncio.Lock()
        """Held while a command goes out, and while a worker that begins is given those of before."""
        self._commands: dict[str, bytes] = {}

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_COMMAND_BYTES)
        for path, method in COMMANDS.items():
            app.router.add_route(method, path, self.command)
        app.router.add_get("/v1/digest", self.digest)
        app.router.add_get("/v1/costs", self.costs)
        app.router.add_get("/v1/forecasts", self.forecasts)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/healthz", self.healthz)
        app.router.add_get("/readyz", self.readyz)
        return app

    async def replay(self, url: str) -> None:
        """Give a worker that does not serve yet the newest commands. Hold `turn` until it counts as one that serves.

        One that it refuses (weights of a revision that has gone) it would have refused among the others too.
        """
        for path, body in self._commands.items():
            answer = await self._ask(url, COMMANDS[path], path, body)
            if answer.status == 0:
                raise OSError("a worker that was just started does not answer")

    async def command(self, request: web.Request) -> web.Response:
        body = await request.read()
        async with self.turn:
            answers = await self._ask_all(request.method, request.path, body)
            if any(answer.status == 200 for answer in answers):
                self._commands[request.path] = body
        refused = next((answer for answer in answers if answer.status != 200), None)
        if not answers or (refused is not None and refused.status == 0):
            return _error(503, "not every worker of this pod has it yet; send it again")
        if refused is not None:
            return _passed_on(refused)
        return _json(merging.acks([Ack.model_validate_json(answer.body) for answer in answers], self._pod.name))

    async def digest(self, request: web.Request) -> web.Response:
        answers = await self._ask_all("GET", f"/v1/window?{request.query_string}", shown=_shown(request))
        refused = _refused(answers)
        if refused is not None:
            return _passed_on(refused)
        windows = [Window.model_validate_json(answer.body) for answer in answers if answer.status == 200]
        if not windows:
            return _error(503, "no worker of this pod answers")
        return _json(merging.digests(windows, self._pod.name))

    async def forecasts(self, request: web.Request) -> web.Response:
        answers = await self._ask_all("GET", request.path, shown=_shown(request))
        refused = _refused(answers)
        if refused is not None:
            return _passed_on(refused)
        reports = [ForecastReport.model_validate_json(answer.body) for answer in answers if answer.status == 200]
        if not reports:
            return _error(503, "no worker of this pod answers")
        return _json(together(reports, self._pod.name))

    async def costs(self, request: web.Request) -> web.Response:
        """From the books that all share: who is asked last sees what the others have written down for being asked."""
        urls, shown = self._pod.urls, _shown(request)
        await asyncio.gather(*(self._ask(url, "GET", request.path, shown=shown) for url in urls[1:]))
        answer = await self._ask(urls[0], "GET", request.path, shown=shown) if urls else Answer(0, b"")
        return _error(503, "no worker of this pod answers") if answer.status == 0 else _passed_on(answer)

    async def metrics(self, _: web.Request) -> web.Response:
        body = await self._pod.metrics()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(self, _: web.Request) -> web.Response:
        why = self._pod.ready
        return web.Response(text="ok\n") if why is None else web.Response(status=503, text=f"{why}\n")

    async def _ask_all(self, method: str, path: str, body: bytes | None = None, shown: str = "") -> list[Answer]:
        return await asyncio.gather(*(self._ask(url, method, path, body, shown) for url in self._pod.urls))

    async def _ask(self, url: str, method: str, path: str, body: bytes | None = None, shown: str = "") -> Answer:
        return await ask(self._pod.client, url, method, path, body, shown)


async def ask(
    client: aiohttp.ClientSession, url: str, method: str, path: str, body: bytes | None = None, shown: str = ""
) -> Answer:
    """A worker's answer, byte for byte. `shown`: the header `Authorization`."""
    headers = {"Authorization": shown} if shown else {}
    try:
        timeout = aiohttp.ClientTimeout(total=ASK_S)
        async with client.request(method, url + path, data=body, headers=headers, timeout=timeout) as response:
            return Answer(response.status, await response.read())
    except (aiohttp.ClientError, OSError, TimeoutError):
        return Answer(0, b"")


def _shown(request: web.Request) -> str:
    return request.headers.get("Authorization", "")


def _refused(answers: Sequence[Answer]) -> Answer | None:
    """The first worker's no; one that says nothing says no no."""
    return next((answer for answer in answers if answer.status not in (0, 200)), None)


def _passed_on(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    return web.Response(status=status, body=orjson.dumps({"error": message}), content_type="application/json")


def _json(document: Model) -> web.Response:
    return web.Response(body=orjson.dumps(document.to_json()), content_type="application/json")
