"""The console on the tuner's own server: who may ask is decided in one place, before any handler runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import aiohttp
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import Field, ValidationError

from moe_api.base import Model
from moe_core.clock import Clock
from moe_core.config import ConsoleConfig
from moe_core.expert_load import Of
from moe_core.log import Log
from moe_core.signing import CommandInvalid, SignatureRefused, describe
from moe_core.wire import TuningOrders
from moe_tuner.console import answers, pages
from moe_tuner.console.answers import Deployments, SeriesAnswer
from moe_tuner.console.guard import API, ORDERS, PUBLIC, ROOT, SESSION, cookie_name, guard, right_of
from moe_tuner.console.rights import LASTS_S, Right, TokenRefused, Tokens
from moe_tuner.console.series import COARSE_S, COLUMNS, FINE_S, Series, sample
from moe_tuner.console.sources import Sources, Unanswered
from moe_tuner.daemon import Tuner
from moe_tuner.deployment import Deployment
from moe_tuner.fleet import Fleet
from moe_tuner.live import OrdersRefused
from moe_tuner.settings import ConfigRefused

FILES = {f"{ROOT}console.mjs": "console.mjs", f"{ROOT}draw.mjs": "draw.mjs"}
SAMPLE_S = 1.0
DECISIONS_DEFAULT, DECISIONS_MAX = 50, 200
COSTS_ASKED = 20
"""Deployments of the list whose spend is asked for; of the others it is shown once they are chosen."""
Json = tuple[Model | dict[str, object], int]


class SignIn(Model):
    """`POST session`."""

    token: str = Field(max_length=512)


class Change(Model):
    """`PUT orders`: what changes of a person's orders; the rest stays."""

    deployment: str = Field(max_length=512)
    seen: int = Field(ge=0, description="version of the orders that the page showed; 0: none")
    paused: bool | None = None
    pins: dict[str, Decimal | None] = Field(default_factory=dict, max_length=16)
    unpin: Annotated[tuple[str, ...], Field(max_length=16)] = ()


def load_tokens(config: ConsoleConfig) -> Tokens:
    """Read the tokens. Raises ConfigRefused, and never quotes one."""

    def read(name: str, path: str) -> str:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigRefused(f"console.{name} {path}: cannot be read") from None

    operate = None if config.operate_token_file is None else read("operateTokenFile", config.operate_token_file)
    try:
        return Tokens(read("readTokenFile", config.read_token_file), operate)
    except TokenRefused as error:
        raise ConfigRefused(str(error)) from None


def mount(
    app: web.Application,
    fleet: Fleet,
    config: ConsoleConfig,
    tokens: Tokens,
    *,
    client: aiohttp.ClientSession,
    clock: Clock,
    log: Log,
    loopback: bool,
) -> None:
    """Put the console below /console/. `loopback`: the server listens there alone, so that any name but loopback's in a
    request, to whatever route, is a page elsewhere that wants to read what lies here."""
    console = Console(fleet, config, tokens, client=client, clock=clock, log=log)
    app.middlewares.append(guard(tokens, frozenset(name.lower() for name in config.hosts), clock, everywhere=loopback))
    app.cleanup_ctx.append(console.running)
    app.router.add_get(ROOT, console.page)
    app.router.add_get(ROOT.rstrip("/"), console.page)
    for path in (*PUBLIC, *FILES):
        app.router.add_get(path, console.file)
    app.router.add_route("GET", SESSION, console.session)
    app.router.add_route("POST", SESSION, console.sign_in)
    app.router.add_route("DELETE", SESSION, console.sign_out)
    for name in ("deployments", "status", "series", "decisions", "experts", "costs"):
        app.router.add_get(API + name, console.asked(getattr(console, name)))
    app.router.add_put(ORDERS, console.asked(console.orders))


class Console:
    """Handlers over a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        config: ConsoleConfig,
        tokens: Tokens,
        *,
        client: aiohttp.ClientSession,
        clock: Clock,
        log: Log,
    ) -> None:
        self._fleet, self._config, self._tokens, self._clock, self._log = fleet, config, tokens, clock, log
        self._sources = Sources(client, clock, config.usd_per_gpu_hour, fleet.shown)
        self._series: dict[str, Series] = {}
        self._pages = pages.load()

    # What runs beside

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """For aiohttp's cleanup_ctx: samples while the server is up."""
        sampling = asyncio.create_task(self._sample())
        yield
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
        await self._sources.close()

    async def _sample(self) -> None:
        while True:
            self.sample()
            await self._clock.sleep(SAMPLE_S)

    def sample(self) -> None:
        """Write down what each deployment's last tick saw; forget those that are gone."""
        at_s, names = self._clock.time(), self._fleet.names
        for gone in self._series.keys() - set(names):
            self._series.pop(gone)
        for name in names:
            member = self._fleet.find(name)
            if member is not None and (tuner := member.tuner) is not None:
                cap = None if (knobs := tuner.in_force) is None else knobs.prefill_cap
                row = sample(tuner.signals, None if cap is None else float(cap), tuner.version)
                self._series.setdefault(name, Series()).add(at_s, row)

    # Pages

    async def page(self, request: web.Request) -> web.Response:
        """The page itself, or for a stranger the way to sign in."""
        if not request.path.endswith("/"):
            return web.Response(status=308, headers={"Location": ROOT})
        if self._right(request) is Right.NONE:
            return pages.answer(request, self._pages["signin.html"], 401)
        return pages.answer(request, self._pages["index.html"])

    async def file(self, request: web.Request) -> web.Response:
        return pages.answer(request, self._pages[{**PUBLIC, **FILES}[request.path]])

    async def session(self, request: web.Request) -> web.Response:
        may = self._tokens.operate is not None
        return _json(request, {"right": self._right(request).name.lower(), "operators": may})

    async def sign_in(self, request: web.Request) -> web.Response:
        try:
            given = SignIn.model_validate_json(await request.read())
        except ValidationError as error:
            return pages.error(describe(error), 422)
        right = self._tokens.of_token(given.token)
        if right is Right.NONE:
            self._log.warning("console: a sign-in was refused", remote=request.remote)
            return pages.error("this is not the token", 401)
        response = web.Response(status=204)
        for granted in Right:
            if Right.NONE < granted <= right:
                response.set_cookie(
                    cookie_name(request, granted),
                    self._tokens.cookie(granted, self._clock.time()),
                    max_age=LASTS_S[granted],
                    path=ROOT,
                    httponly=True,
                    samesite="Strict",
                )
        return response

    async def sign_out(self, request: web.Request) -> web.Response:
        """Of the right to operate alone (`?only=operate`), or altogether."""
        response = web.Response(status=204)
        rights = (Right.OPERATE,) if request.query.get("only") == "operate" else (Right.OPERATE, Right.READ)
        for right in rights:
            response.del_cookie(cookie_name(request, right), path=ROOT, httponly=True, samesite="Strict")
        return response

    # Endpoints

    def asked(self, ask: Callable[[web.Request], object]) -> Handler:
        """A handler that answers with a document and a status."""

        async def handler(request: web.Request) -> web.StreamResponse:
            document, status = await ask(request)  # type: ignore[misc]
            return _json(request, document, status)

        return handler

    async def deployments(self, _: web.Request) -> Json:
        summaries = self._fleet.summaries()
        shown = summaries[: answers.DEPLOYMENTS]
        spends = await asyncio.gather(*(self._spent(row.deployment) for row in shown[:COSTS_ASKED]))
        rows = []
        for index, summary in enumerate(shown):
            member = self._fleet.find(summary.deployment)
            tuner = None if member is None else member.tuner
            usd = spends[index] if index < len(spends) else None
            rows.append(answers.deployment_row(summary, None if tuner is None else tuner.signals, usd))
        more = len(summaries) - len(shown)
        return Deployments(at_s=self._clock.time(), rows=tuple(rows), more=more), 200

    async def status(self, request: web.Request) -> Json:
        found = self._tuner(request)
        if not isinstance(found, Tuner):
            return found
        return answers.detail(found.report(), found.live.config, self._config.plan, self._clock.time()), 200

    async def series(self, request: web.Request) -> Json:
        """`?span=fine` (the default) or `coarse`; `?since=` unix seconds gives what came later alone."""
        member = self._member(request)
        if not isinstance(member, Deployment):
            return member
        coarse = request.query.get("span", "fine") == "coarse"
        since_s = _number(request.query.get("since", "0"))
        if since_s is None or request.query.get("span", "fine") not in ("fine", "coarse"):
            return {"error": "since must be a number, and span fine or coarse"}, 422
        kept = self._series.get(member.name)
        rows = [] if kept is None else kept.rows(since_s, coarse=coarse)
        step_s = COARSE_S if coarse else FINE_S
        return SeriesAnswer(at_s=self._clock.time(), step_s=step_s, columns=COLUMNS, rows=rows), 200

    async def decisions(self, request: web.Request) -> Json:
        found = self._tuner(request)
        if not isinstance(found, Tuner):
            return found
        text = request.query.get("limit", str(DECISIONS_DEFAULT))
        if not text.isdecimal() or not 1 <= int(text) <= DECISIONS_MAX:
            return {"error": f"limit must be a whole number from 1 to {DECISIONS_MAX}"}, 422
        records = await asyncio.to_thread(found.history, int(text))
        return answers.Decisions(rows=tuple(answers.decision(record) for record in records)), 200

    async def experts(self, request: web.Request) -> Json:
        """`?of=` a kind of load, `?replica=`, `?window=start` for all since the replica's start."""
        found = self._tuner(request)
        if not isinstance(found, Tuner):
            return found
        since_start = request.query.get("window") == "start"
        try:
            of = Of(request.query.get("of", Of.DEMAND.value))
            matrices = await self._sources.experts(found.live.config, since_start=since_start)
        except ValueError:
            return {"error": f"of must be one of {', '.join(Of)}"}, 422
        except Unanswered as error:
            return {"error": str(error)}, 503
        named = [m for m in matrices if request.query.get("replica") in (None, "", m.replica)]
        if not named:
            return {"error": "no such replica answers the board"}, 404
        return answers.heat(named[0], [m.replica for m in matrices], of, since_start=since_start), 200

    async def costs(self, request: web.Request) -> Json:
        found = self._tuner(request)
        if not isinstance(found, Tuner):
            return found
        try:
            return await self._sources.costs(found.live.config), 200
        except Unanswered as error:
            return {"error": str(error)}, 503

    async def orders(self, request: web.Request) -> Json:
        """Change what a person ordered; refused where somebody else has changed it since the page showed it."""
        try:
            change = Change.model_validate_json(await request.read())
        except ValidationError as error:
            return {"error": describe(error)}, 422
        member = self._fleet.find(change.deployment)
        if member is None or member.tuner is None:
            return {"error": "this deployment is not tuned here now"}, 404
        before = member.tuner.live.orders or TuningOrders(deployment=member.name, version=1)
        known = 0 if member.tuner.live.orders is None else before.version
        if change.seen != known:
            return {"error": "somebody has changed the orders meanwhile: look again"}, 409
        orders = TuningOrders(
            deployment=member.name,
            version=known + 1,
            paused=before.paused if change.paused is None else change.paused,
            pins={k: v for k, v in before.pins.items() if k not in change.unpin} | change.pins,
        )
        try:
            obeyed = member.order(orders)
        except (OrdersRefused, SignatureRefused, CommandInvalid) as error:
            return {"error": str(error)}, 422
        self._log.info(
            "console: a person's orders", deployment=member.name, version=obeyed.version, remote=request.remote
        )
        return obeyed, 200

    async def _spent(self, name: str) -> Decimal | None:
        member = self._fleet.find(name)
        if member is None or member.tuner is None:
            return None
        try:
            return (await self._sources.costs(member.tuner.live.config)).today_usd
        except Unanswered:
            return None

    def _right(self, request: web.Request) -> Right:
        return right_of(request, self._tokens, self._clock.time())

    def _member(self, request: web.Request) -> Deployment | Json:
        found = self._fleet.find(request.query.get("deployment"))
        return found or ({"error": "no such deployment is tuned here"}, 404)

    def _tuner(self, request: web.Request) -> Tuner | Json:
        found = self._member(request)
        if not isinstance(found, Deployment):
            return found
        return found.tuner or ({"error": answers.clip(f"not tuned now: {found.problem}")}, 503)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _json(request: web.Request, document: object, status: int = 200) -> web.Response:
    body = document.to_json() if isinstance(document, Model) else document
    return pages.json_answer(request, orjson.dumps(body), status)
