"""Builders for the gateway's tests: a configuration, a running gateway, and a client's view of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from moe_core.clock import Clock, SystemClock
from moe_core.config import GatewayConfig
from moe_core.passes import Passes
from moe_core.signing import Signer
from moe_core.wire import FallbackKnobs, Knobs, Weights
from moe_gateway.server import GatewayServer
from tests.gateway.fake_upstream import FakeUpstream

MODEL = "tiny"
KEY = "sk-test-0123456789abcdef"
SIGNER = Signer.generate()
KEYS = (SIGNER.public_pem(),)
PASS = {"Authorization": f"Bearer {Passes(SIGNER, SystemClock()).token('default/tiny')}"}
"""For processes: theirs is the machine's clock."""


def chat(stream: bool = True, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Say hello"}], "stream": stream, **more}


def config(local: FakeUpstream | list[FakeUpstream], *targets: FakeUpstream, **more: Any) -> GatewayConfig:
    """A configuration for fakes: revisions r0, r1… and targets t0, t1… Prices with `price=(input, output)`."""
    locals_ = local if isinstance(local, list) else [local]
    price = more.pop("price", ("0", "0"))
    key_file = more.pop("key_file", None)
    document = {
        "deployment": "default/tiny",
        "model": MODEL,
        "revisions": [{"name": f"r{i}", "url": fake.url, "boardUrl": fake.board_url} for i, fake in enumerate(locals_)],
        "weights": {f"r{i}": 100 if i == 0 else 0 for i in range(len(locals_))},
        "slo": {"ttftP95S": 5.0, "itlP95S": 1.0},
        "targets": [
            {
                "name": f"t{i}",
                "provider": "openai-compatible",
                "model": f"closed-{i}",
                "baseUrl": fake.url,
                "apiKeyFile": None if key_file is None else str(key_file),
                "usdPerMInput": price[0],
                "usdPerMOutput": price[1],
            }
            for i, fake in enumerate(targets)
        ],
        "limits": {"firstTokenS": 5, "drainS": 5},
        **({} if {"trusted_keys", "trustedKeys"} & more.keys() else {"trustedKeys": list(KEYS)}),
        **more,
    }
    return GatewayConfig.model_validate(document)


@dataclass
class Answer:
    """An HTTP answer as a client got it. `whole` is False where the connection broke before the end of the body."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    whole: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "code", "param"}
        return error

    @property
    def events(self) -> list[Any]:
        """Data of each event; [DONE] as a string."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    @property
    def text(self) -> str:
        choices = [event["choices"][0] for event in self.events if event != "[DONE]" and event.get("choices")]
        return "".join(choice["delta"].get("content", "") for choice in choices)


async def read(response: aiohttp.ClientResponse) -> Answer:
    """The whole answer, or what came before the connection broke."""
    parts, whole = [], True
    try:
        while part := await response.content.readany():
            parts.append(part)
    except aiohttp.ClientPayloadError:
        whole = False
    return Answer(response.status, b"".join(parts), response.headers.copy(), whole)


class Client:
    """Talks to a running gateway."""

    def __init__(self, server: GatewayServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.server.admin_port}"

    async def post(self, body: object, path: str = "/v1/chat/completions", **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.call("POST", self.url + path, data, **headers)

    async def call(self, method: str, url: str, data: bytes | None = None, **headers: str) -> Answer:
        sent = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        async with self.session.request(method, url, data=data, headers=sent) as response:
            return await read(response)

    async def admin(self, method: str, path: str, body: object = None) -> Answer:
        """With a pass, as operator and tuner ask."""
        shown = Passes(SIGNER, self.server.gateway.clock).token(self.server.gateway.config.deployment)
        data = None if body is None else json.dumps(body).encode()
        return await self.call(method, self.admin_url + path, data, Authorization=f"Bearer {shown}")

    async def digest(self, window_s: float = 60) -> dict[str, Any]:
        document: dict[str, Any] = (await self.admin("GET", f"/v1/digest?window={window_s}")).json
        return document

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a name whose labels include these."""
        total = 0.0
        for line in (await self.admin("GET", "/metrics")).body.decode().splitlines():
            if line.split("{")[0] == name and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total


@asynccontextmanager
async def running(settings: GatewayConfig, clock: Clock | None = None) -> AsyncIterator[Client]:
    """A gateway on free ports, stopped at the end."""
    server = GatewayServer(settings, clock)
    await server.start()
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        try:
            yield Client(server, session)
        finally:
            await server.stop(drain_s=1.0)


async def until(condition: Any, within_s: float = 20.0) -> None:
    """Wait for a condition that another task brings about."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 (what is awaited lies in another process or library)
            await asyncio.sleep(0.01)


def knobs(version: int, deployment: str = "default/tiny", **fallback: float) -> Knobs:
    return Knobs(deployment=deployment, version=version, fallback=FallbackKnobs.model_validate(fallback))


def weights(version: int, deployment: str = "default/tiny", **percent: int) -> Weights:
    return Weights(deployment=deployment, version=version, percent=percent)


async def send(client: Client, command: Knobs | Weights, signer: Signer = SIGNER, **changed: Any) -> Answer:
    """Sign and send a command; `changed` fields of the envelope are put in after signing."""
    envelope = signer.sign(command).model_copy(update=changed)
    method, path = ("POST", "/v1/knobs") if isinstance(command, Knobs) else ("PUT", "/v1/weights")
    return await client.admin(method, path, envelope.to_json())


async def at(client: Client, name: str) -> dict[str, Any]:
    """What the digest says of one upstream."""
    (found,) = [target for target in (await client.digest())["targets"] if target["name"] == name]
    return dict(found)
