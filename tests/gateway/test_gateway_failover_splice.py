"""A stream that broke at one side and goes on at the other, over real sockets: text, rights, outcome and money."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from google.genai import types as g

from moe_core.config import GatewayConfig
from moe_gateway.joining import GO_ON, spliced
from moe_gateway.openai_api import Endpoint, parse
from moe_gateway.takeover import Sent
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import KEY, chat, running, until
from tests.gateway.test_gateway_budget import settled
from tests.gateway.test_gateway_failover import IN_BAND, REST, assert_nothing_is_owed, assert_one_stream, paying, usd
from tests.gateway.test_gateway_provider_streams import gemini, started, stopped
from tests.gateway.test_gateway_provider_streams import text as claude_text


@pytest.mark.parametrize("rest", [("w2 ", "w3 ", "w4 "), ("w0 w1 ", "w2 w3", " w4 "), ("w", "0 w1 w2 ", "w3 w4 ")])
async def test_where_no_revision_can_a_closed_api_goes_on_and_says_nothing_twice(
    rest: tuple[str, ...], tmp_path: Path
) -> None:
    async with FakeUpstream(Behaviour(status=503)) as local, FakeUpstream() as target:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        target.default = Behaviour(words=rest, prompt_tokens=80)
        async with running(paying(local, target, folder=tmp_path)) as client:
            answer = await client.post(chat(max_tokens=50))
            assert_one_stream(answer)
            (asked,) = target.requests
            assert asked["messages"][-2:] == [
                {"role": "assistant", "content": "w0 w1 "},
                {"role": "user", "content": GO_ON},
            ]
            assert (asked["model"], asked["max_tokens"]) == ("closed-0", 48)
            assert await settled(client) == usd(80, 3)
            reason = {"target": "t0", "reason": "stream_broken"}
            assert await client.metric("moestack_gateway_spilled_requests_total", **reason) == 1
            assert await client.metric("moestack_gateway_requests_total", outcome="ok", target="t0") == 1
            assert await client.metric("moestack_gateway_output_tokens_total", target="r0") == 2
            assert await client.metric("moestack_gateway_output_tokens_total", target="t0") == 3
            assert await client.metric("moestack_gateway_egress_requests_total", target="t0", result="sent") == 1
            assert client.server.gateway.upstreams["r0"].breaker.failures == 1, "503 is no failure, the break is one"


async def test_a_stream_that_breaks_at_a_closed_api_is_continued_by_an_own_revision(tmp_path: Path) -> None:
    async with FakeUpstream(REST) as local, FakeUpstream(Behaviour(cut_after=2, tokens=5)) as target:
        local.behaviours = [Behaviour(status=503)]
        async with running(paying(local, target, folder=tmp_path)) as client:
            asked = chat(max_tokens=50)
            assert_one_stream(await client.post(asked))
            assert local.requests[1]["messages"][-1] == {"role": "assistant", "content": "w0 w1"}
            prompt = round(len(json.dumps(asked).encode()) * 0.25)
            assert await settled(client) == usd(prompt, 2)
            assert await client.metric("moestack_gateway_spilled_requests_total", target="t0") == 1
            assert await client.metric("moestack_gateway_requests_total", outcome="ok", target="r0") == 1


async def test_both_attempts_are_paid_where_the_second_breaks_too(tmp_path: Path) -> None:
    """Spilled and broken, continued and broken: what came is shown, paid, and told to be cut."""
    async with FakeUpstream() as local, FakeUpstream(Behaviour(cut_after=2, tokens=5)) as target:
        local.behaviours = [Behaviour(status=503), Behaviour(words=("w2 ", "w3 "), cut_after=1)]
        async with running(paying(local, target, folder=tmp_path)) as client:
            asked = chat(max_tokens=50)
            answer = await client.post(asked)
            assert answer.text == "w0 w1 w2 "
            assert answer.events[-1]["error"]["code"] == "stream_cut"
            assert "[DONE]" not in answer.events
            assert (len(local.requests), len(target.requests)) == (2, 1), "one takeover, and no more"
            assert await settled(client) == usd(round(len(json.dumps(asked).encode()) * 0.25), 2)
            assert await client.metric("moestack_gateway_requests_total", outcome="cut") == 1
            why = {"how": "stop", "why": "takeovers_spent"}
            assert await client.metric("moestack_gateway_broken_streams_total", **why) == 1


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(Behaviour(status=500), id="500"),
        pytest.param(Behaviour(status=400), id="400: it does not take the form"),
        pytest.param(Behaviour(reset=True), id="reset"),
        pytest.param(Behaviour(stall=True), id="silent"),
        pytest.param(Behaviour(role_then_stall=True), id="a role alone"),
        pytest.param(Behaviour(raw=IN_BAND), id="an error in band"),
        pytest.param(Behaviour(raw=b"data: {no\n\n"), id="malformed"),
    ],
)
@pytest.mark.parametrize("spliced", [False, True])
async def test_a_second_attempt_that_gives_no_token_ends_in_one_honest_error(
    second: Behaviour, spliced: bool, tmp_path: Path
) -> None:
    async with FakeUpstream(Behaviour(status=503) if spliced else second) as local, FakeUpstream(second) as target:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        async with running(paying(local, target, folder=tmp_path, limits={"firstTokenS": 1})) as client:
            answer = await client.post(chat(max_tokens=50))
            assert (answer.status, answer.text, answer.whole) == (200, "w0 w1 ", True)
            assert answer.events[-1]["error"]["code"] == "stream_cut"
            assert len(local.requests) == 2
            assert len(target.requests) == 1
            assert await client.metric("moestack_gateway_requests_total", outcome="cut", target="r0") == 1
            maybe = second.reset or second.stall or second.role_then_stall or second.raw == b"data: {no\n\n"
            raw = spliced_bytes(chat(max_tokens=50))
            assert await settled(client) == (usd(round(raw * 0.25), 0) if maybe else 0)


def spliced_bytes(document: dict[str, Any]) -> int:
    """Size of the request that goes on after two words."""
    return len(spliced(parse(Endpoint.CHAT, json.dumps(document).encode()), Sent("w0 w1 ", 2)).raw)


async def test_a_client_that_leaves_between_two_attempts_ends_both(tmp_path: Path) -> None:
    async with FakeUpstream(Behaviour(stall=True)) as local, FakeUpstream() as target:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        async with running(paying(local, target, folder=tmp_path, limits={"firstTokenS": 60})) as client:
            async with client.session.post(client.url + "/v1/chat/completions", json=chat()) as response:
                await response.content.readany()
                await until(lambda: len(local.requests) == 2)
            await until(lambda: not client.server.gateway.calls)
            assert (len(local.requests), target.requests) == (2, [])
            await assert_nothing_is_owed(client)
            assert await client.metric("moestack_gateway_requests_total", outcome="cancelled") == 1
            assert client.server.gateway.fleet.in_flight("r0") == 0


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"mode": "Continue"}, id="the resource wants no splice"),
        pytest.param({"usd_per_day": "0.00001"}, id="the budget is too small"),
        pytest.param({"egress": {"deployment": {"egress": "Never"}}}, id="nothing may leave"),
        pytest.param({"tiers": [{"name": "default", "fallback": "Never"}]}, id="its tier may not spill"),
    ],
)
async def test_nothing_is_spliced_that_may_not_leave_or_be_paid(more: dict[str, Any], tmp_path: Path) -> None:
    async with FakeUpstream(Behaviour(status=503)) as local, FakeUpstream() as target:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        async with running(paying(local, target, folder=tmp_path, **more)) as client:
            answer = await client.post(chat(max_tokens=50))
            assert answer.events[-1]["error"]["code"] == "stream_cut"
            assert target.requests == []
            await assert_nothing_is_owed(client)


CLOSED = [
    pytest.param("anthropic", started() + claude_text(0, "w2 ", "w3 ", "w4 ") + stopped("end_turn"), id="Claude"),
    pytest.param(
        "gemini",
        b"".join(gemini(g.Part(text=w)) for w in ("w2 ", "w3 ")) + gemini(g.Part(text="w4 "), reason="STOP", output=4),
        id="Gemini",
    ),
]


@pytest.mark.parametrize(("provider", "raw"), CLOSED)
async def test_closed_apis_of_other_forms_go_on_in_the_clients_own(provider: str, raw: bytes, tmp_path: Path) -> None:
    async with FakeUpstream(Behaviour(status=503)) as local, FakeUpstream(Behaviour(raw=raw)) as target:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        settings = aimed(paying(local, target, folder=tmp_path), tmp_path, provider, target)
        async with running(settings) as client:
            assert_one_stream(await client.post(chat(max_tokens=50)))
            assert len(target.requests) == 1
            assert await settled(client) == usd(15, 7)


def aimed(settings: GatewayConfig, folder: Path, provider: str, fake: FakeUpstream) -> GatewayConfig:
    """Its target as one of another provider."""
    (folder / "key").write_text(KEY)
    base = fake.board_url if provider == "anthropic" else fake.url
    changed = {"provider": provider, "base_url": base, "api_key_file": str(folder / "key")}
    return settings.model_copy(update={"targets": (settings.targets[0].model_copy(update=changed),)})


async def test_a_replica_that_dies_loses_none_of_its_streams(tmp_path: Path) -> None:
    """Thirty streams break at once; the replicas that are left, or the closed API, go on with each, and all is paid."""
    async with FakeUpstream(REST) as local, FakeUpstream() as target:
        dies = asyncio.Event()
        local.behaviours = [Behaviour(cut_after=2, tokens=5, gate=dies)] * 30
        async with running(paying(local, target, folder=tmp_path)) as client:
            target.default = Behaviour(words=("w2 ", "w3 ", "w4 "), prompt_tokens=80)
            streams = [asyncio.create_task(client.post(chat(max_tokens=50))) for _ in range(30)]
            await until(lambda: len(local.requests) == 30)
            dies.set()
            answers = await asyncio.gather(*streams)
            for answer in answers:
                assert_one_stream(answer)
            assert len(local.requests) + len(target.requests) == 60
            assert await settled(client) == len(target.requests) * usd(80, 3)
