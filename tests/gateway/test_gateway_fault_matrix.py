"""Each status and each broken answer, whole and streamed, from an own revision and from closed APIs of three forms:
what the client gets, and what is owed to the micro-dollar."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest
from google.genai import types as g

from moe_core.breaker import Breaker
from moe_core.config import GatewayConfig
from moe_gateway.openai_api import Endpoint, parse
from moe_gateway.upstream import TOKENS_PER_BYTE_PRIOR
from tests.gateway.fake_upstream import Behaviour, FakeUpstream, chunk
from tests.gateway.harness import KEY, Client, chat, config, running, until
from tests.gateway.test_gateway_provider_streams import gemini, started, text

SOON = {"firstTokenS": 1, "responseS": 1, "idleS": 1}
SHED = (408, 429, 503, 529)
SPOILT = (500, 502)
CLOSED = ("openai-compatible", "anthropic", "gemini")


def usd(prompt: int, output: int) -> Decimal:
    return (prompt * Decimal(5) + output * Decimal(30)) / 10**6


def asked(stream: bool) -> dict[str, object]:
    return chat(stream, max_tokens=50)


def unheard(stream: bool) -> Decimal:
    """A prompt that may have been read, and whose answer never came."""
    return usd(round(len(json.dumps(asked(stream)).encode()) * TOKENS_PER_BYTE_PRIOR), 0)


def paying(
    local: FakeUpstream, target: FakeUpstream, folder: Path, provider: str, limits: dict[str, float]
) -> GatewayConfig:
    """Without a weight on the revision: whoever asks must pay."""
    (folder / "key").write_text(KEY)
    made = config(
        local,
        target,
        price=("5", "30"),
        stateDir=str(folder),
        spill={"usdPerDay": "10"},
        limits=limits,
        weights={"r0": 100 if provider == "local" else 0},
    )
    base = target.board_url if provider == "anthropic" else target.url
    changed = {"provider": provider, "base_url": base, "api_key_file": str(folder / "key")}
    if provider == "local":
        return made
    return made.model_copy(update={"targets": (made.targets[0].model_copy(update=changed),)})


@asynccontextmanager
async def world(
    folder: Path, provider: str, **limits: float
) -> AsyncIterator[tuple[FakeUpstream, FakeUpstream, Client]]:
    async with (
        FakeUpstream() as local,
        FakeUpstream() as target,
        running(paying(local, target, folder, provider, limits)) as client,
    ):
        yield local, target, client


async def owed(client: Client) -> Decimal:
    """What the books say, once nothing is in flight and nothing reserved."""
    gateway = client.server.gateway
    await until(lambda: not gateway.calls)
    assert not gateway.budget._account.reserved
    for name in ("r0", "t0"):
        gateway.upstreams[name].breaker = Breaker()  # each fault by itself
        gateway.upstreams[name].tokens_per_byte = TOKENS_PER_BYTE_PRIOR
    spent = sum(
        amount for day in gateway.budget._account.spent.values() for of in day.values() for amount in of.values()
    )
    return Decimal(spent) / 10**12


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("provider", CLOSED)
async def test_an_error_of_a_closed_api_is_one_error_and_costs_nothing(
    provider: str, stream: bool, tmp_path: Path
) -> None:
    async with world(tmp_path, provider) as (local, target, client):
        for status in (*SHED, *SPOILT):
            target.behaviours = [Behaviour(status=status)]
            answer = await client.post(asked(stream))
            assert answer.status == (503 if status in SHED else 502), status
            assert ("Retry-After" in answer.headers) == (status in SHED)
            assert answer.error["type"] == "upstream_error"
            assert await owed(client) == 0, status
        target.behaviours = [Behaviour(status=422)]
        assert (await client.post(asked(stream))).status == 422, "the client's own mistake goes back to it"
        assert await owed(client) == 0
        assert len(target.requests) == 7, "one attempt each"
        assert await client.metric("moestack_gateway_spend_usd_total") == 0
        assert await client.metric("moestack_gateway_requests_total", outcome="error") == 6
        assert await client.metric("moestack_gateway_requests_total", outcome="client_error") == 1
        assert local.requests == []


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_an_error_of_an_own_revision_is_answered_by_the_closed_api_and_that_alone_is_paid(
    stream: bool, tmp_path: Path
) -> None:
    async with world(tmp_path, "local") as (local, target, client):
        for count, status in enumerate((*SHED, *SPOILT), 1):
            local.behaviours = [Behaviour(status=status)]
            assert (await client.post(asked(stream))).status == 200, status
            assert await owed(client) == count * usd(10, 3), status
        assert (len(local.requests), len(target.requests)) == (6, 6)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_an_error_of_an_own_revision_alone_is_told_once(stream: bool) -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        for status in (*SHED, *SPOILT):
            local.behaviours = [Behaviour(status=status)]
            answer = await client.post(asked(stream))
            want = 502 if status in SPOILT else 503 if status == 408 else 529
            assert (answer.status, "Retry-After" in answer.headers) == (want, want != 502), status
            client.server.gateway.upstreams["r0"].breaker = Breaker()
        assert len(local.requests) == 6


@dataclass(frozen=True)
class Broken:
    """A broken answer; `tokens` of output that came of it, None where nobody knows."""

    how: Behaviour
    status: int
    cost: Decimal
    cut: bool = False


def in_form(provider: str, *words: str) -> bytes:
    """The beginning of a provider's stream."""
    match provider:
        case "anthropic":
            return started() + text(0, *words)
        case "gemini":
            return b"".join(gemini(g.Part(text=word)) for word in words)
    return chunk() + b"".join(chunk(word) for word in words)


def of_what_came(provider: str, *words: str) -> Decimal:
    """What the beginning of a stream costs: by the provider's own count as far as it told it, else by events (OpenAI's
    form) or by bytes."""
    match provider:
        case "anthropic":
            return usd(15, -(-sum(len(word) for word in words) // 3))
        case "gemini":
            return usd(15, 1 + 3)
    return unheard(True) + usd(0, len(words))


ERRORS = {
    "openai-compatible": b'data: {"error": {"message": "busy", "code": 500}}\n\n',
    "anthropic": b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}\n\n',
    "gemini": b'data: {"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}\n\n',
}


@pytest.mark.parametrize("provider", CLOSED)
async def test_a_broken_stream_of_a_closed_api_costs_what_came_of_it(provider: str, tmp_path: Path) -> None:
    said, came, nothing = in_form(provider, "Hel", "lo "), of_what_came(provider, "Hel", "lo "), Decimal(0)
    cases = {
        "reset": Broken(Behaviour(reset=True), 502, unheard(True)),
        "stalled": Broken(Behaviour(stall=True), 503, unheard(True)),
        "empty": Broken(Behaviour(raw=b": ping\n\n"), 502, unheard(True)),
        "malformed": Broken(Behaviour(raw=b"data: {no\n\n"), 502, unheard(True)),
        "error in band": Broken(Behaviour(raw=ERRORS[provider]), 502, nothing),
        "ended in mid-stream": Broken(Behaviour(raw=said), 200, came, cut=True),
        "malformed in mid-stream": Broken(Behaviour(raw=said + b"data: {no\n\n"), 200, came, cut=True),
        "half an event in mid-stream": Broken(Behaviour(raw=said + said[: len(said) // 3]), 200, came, cut=True),
        "error in mid-stream": Broken(Behaviour(raw=said + ERRORS[provider]), 200, came, cut=True),
    }
    async with world(tmp_path, provider, **SOON) as (_, target, client):
        total = Decimal(0)
        for name, broken in cases.items():
            target.behaviours = [broken.how]
            answer = await client.post(asked(True))
            total += broken.cost
            assert (answer.status, answer.whole) == (broken.status, True), name
            if broken.cut:
                assert answer.text.startswith("Hello "), name
                assert "error" in answer.events[-1], name
                assert "[DONE]" not in answer.events, name
            assert await owed(client) == total, name
        assert len(target.requests) == len(cases)


@pytest.mark.parametrize("provider", CLOSED)
async def test_a_whole_answer_that_is_lost_counts_in_full_and_an_error_in_it_does_not(
    provider: str, tmp_path: Path
) -> None:
    error = {"type": "error", "error": {"type": "api_error", "message": "busy"}}
    cases = {
        "reset": (Behaviour(reset=True), 502, 1),
        "stalled": (Behaviour(stall=True), 503, 1),
        "no JSON": (Behaviour(body=b"<html>"), 502, 1),
        "no object": (Behaviour(body=b"[]"), 502, 1),
        "an error in a 200": (Behaviour(body=json.dumps(error).encode()), 502, 0),
    }
    async with world(tmp_path, provider, **SOON) as (_, target, client):
        gateway = client.server.gateway
        request = parse(Endpoint.CHAT, json.dumps(asked(False)).encode())
        bound, times = gateway.cost_bound_usd(request, gateway.upstreams["t0"]), 0
        for name, (how, status, share) in cases.items():
            target.behaviours = [how]
            answer = await client.post(asked(False))
            times += share
            assert answer.status == status, name
            assert await owed(client) == times * bound, name
