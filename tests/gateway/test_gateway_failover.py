"""A stream that breaks in mid-answer and is gone on with, over real sockets: text, form, outcome and money."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest

from moe_core.config import GatewayConfig
from tests.gateway.fake_upstream import DONE, FINISH, Behaviour, FakeUpstream, chunk
from tests.gateway.harness import Answer, Client, chat, config, running, until

PATIENT = {"firstTokenS": 20, "idleS": 20}
IN_BAND = b'data: {"error": {"message": "out of memory", "type": "server_error", "code": 500, "param": null}}\n\n'
REST = Behaviour(words=("w2 ", "w3 ", "w4 "), prompt_tokens=12)
"""What follows two words, where it is asked for."""
WHOLE = "w0 w1 w2 w3 w4 "


def usd(prompt: int, output: int) -> Decimal:
    return (prompt * Decimal(5) + output * Decimal(30)) / 10**6


def going_on(
    local: FakeUpstream | list[FakeUpstream], *targets: FakeUpstream, mode: str = "Continue", **more: Any
) -> GatewayConfig:
    return config(local, *targets, **{"midStream": {"mode": mode}, "limits": PATIENT, **more})


def paying(
    local: FakeUpstream, *targets: FakeUpstream, folder: Path, mode: str = "Splice", usd_per_day: str = "1", **more: Any
) -> GatewayConfig:
    spill = {"usdPerDay": usd_per_day}
    return going_on(local, *targets, mode=mode, price=("5", "30"), stateDir=str(folder), spill=spill, **more)


async def assert_nothing_is_owed(client: Client) -> None:
    """Nothing was spent, and nothing stays reserved."""
    await until(lambda: not client.server.gateway.calls)
    assert not client.server.gateway.budget._account.reserved
    assert await client.metric("moestack_gateway_spend_usd_total") == 0


def assert_one_stream(answer: Answer, text: str = WHOLE) -> None:
    """One id, one model, one role, one finish reason, one end: a client cannot tell that there were two."""
    assert (answer.status, answer.text, answer.whole) == (200, text, True)
    assert answer.events[-1] == "[DONE]"
    assert answer.events.count("[DONE]") == 1
    chunks = answer.events[:-1]
    assert len({event.get("id") for event in chunks}) == 1
    assert len({event.get("model") for event in chunks}) == 1
    choices = [choice for event in chunks for choice in event["choices"]]
    assert sum("role" in choice["delta"] for choice in choices) == 1
    assert [choice["finish_reason"] for choice in choices if choice.get("finish_reason")] == ["stop"]
    assert choices[-1]["finish_reason"] == "stop"


BREAKS = [
    pytest.param(Behaviour(cut_after=2, tokens=5), id="connection broken"),
    pytest.param(Behaviour(stall_after=2, tokens=5), id="silent"),
    pytest.param(Behaviour(raw=chunk() + chunk("w0 ") + chunk("w1 ")), id="ended without a finish reason"),
    pytest.param(Behaviour(raw=chunk() + chunk("w0 ") + chunk("w1 ") + b"data: {no\n\n" + chunk("x")), id="malformed"),
    pytest.param(Behaviour(raw=chunk() + chunk("w0 ") + chunk("w1 ") + IN_BAND + DONE), id="an error in band"),
    pytest.param(Behaviour(raw=chunk() + chunk("w0 ") + chunk("w1 ") + IN_BAND, raw_step=999), id="error, one piece"),
    pytest.param(Behaviour(raw=chunk() + chunk("w0 ") + chunk("w1 ") + chunk("w2 ")[:-2]), id="cut at an event's end"),
    pytest.param(
        Behaviour(raw=(chunk() + chunk("w0 ") + chunk("w1 ") + chunk("é").replace(b"\\u00e9", b"\xc3"))[:-8]),
        id="cut inside a character",
    ),
]


@pytest.mark.parametrize("fault", BREAKS)
async def test_a_stream_that_breaks_is_continued_by_the_revision_as_if_nothing_had_been(fault: Behaviour) -> None:
    if fault.raw is not None and fault.raw.endswith(chunk("w2 ")[:-2]):
        rest, text = Behaviour(words=("w3 ", "w4 ")), WHOLE  # its last event was whole but for the blank line
    else:
        rest, text = REST, WHOLE
    limits = {"idleS": 0.5} if fault.stall_after is not None else PATIENT
    async with FakeUpstream(rest) as local, running(going_on(local, limits=limits)) as client:
        local.behaviours = [fault]
        answer = await client.post(chat(max_tokens=50))
        assert_one_stream(answer, text)
        first, second = local.requests
        assert second["messages"][-1] == {"role": "assistant", "content": text.split(rest.words[0])[0].rstrip()}
        assert second["messages"][:-1] == first["messages"]
        assert (second["continue_final_message"], second["add_generation_prompt"]) == (True, False)
        assert second["max_tokens"] == 50 - (5 - len(rest.words))
        assert await client.metric("moestack_gateway_requests_total", outcome="ok", target="r0") == 1
        assert await client.metric("moestack_gateway_broken_streams_total", target="r0", how="continue") == 1
        targets = {item["name"]: item for item in (await client.digest())["targets"]}
        assert (targets["r0"]["requests"], targets["r0"]["failures"], targets["r0"]["missed"]) == (2, 1, 1)


async def test_usage_is_told_once_for_both_attempts() -> None:
    async with FakeUpstream(REST) as local, running(going_on(local)) as client:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        answer = await client.post(chat(stream_options={"include_usage": True}))
        told = [event["usage"] for event in answer.events if event != "[DONE]" and event.get("usage")]
        assert told == [{"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}]
        assert await client.metric("moestack_gateway_output_tokens_total", target="r0") == 5
        assert await client.metric("moestack_gateway_prompt_tokens_total", target="r0") > 0


async def test_another_revision_is_asked_before_the_one_that_broke() -> None:
    async with (
        FakeUpstream(Behaviour(cut_after=2, tokens=5)) as bad,
        FakeUpstream(REST) as good,
        running(going_on([bad, good], weights={"r0": 99, "r1": 1})) as client,
    ):
        assert_one_stream(await client.post(chat()))
        assert (len(bad.requests), len(good.requests)) == (1, 1)
        assert await client.metric("moestack_gateway_output_tokens_total", target="r0") == 2
        assert await client.metric("moestack_gateway_output_tokens_total", target="r1") == 3


async def test_a_completion_is_continued_by_its_prompt_with_the_text_behind_it() -> None:
    async with FakeUpstream(REST) as local, running(going_on(local)) as client:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        asked = {"model": "tiny", "prompt": "Count:", "stream": True, "max_tokens": 9}
        answer = await client.post(asked, path="/v1/completions")
        texts = [event["choices"][0].get("text", "") for event in answer.events[:-1]]
        assert ("".join(texts), answer.events[-1]) == (WHOLE, "[DONE]")
        assert (local.requests[1]["prompt"], local.requests[1]["max_tokens"]) == ("Count:w0 w1", 7)


async def test_more_takeovers_where_more_are_allowed() -> None:
    settings = {"mode": "Continue", "takeovers": 2}
    async with FakeUpstream(Behaviour(words=("w3 ", "w4 "))) as local:
        local.behaviours = [Behaviour(cut_after=2, tokens=5), Behaviour(words=("w2 ", "x"), cut_after=1)]
        async with running(config(local, limits=PATIENT, midStream=settings)) as client:
            assert_one_stream(await client.post(chat(max_tokens=50)))
            assert local.requests[2]["messages"][-1]["content"] == "w0 w1 w2"
            assert local.requests[2]["max_tokens"] == 47


TOOL = b'data: {"id": "c1", "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "x"}]}}]}\n\n'
THOUGHT = b'data: {"id": "c1", "choices": [{"index": 0, "delta": {"reasoning": "hm"}}]}\n\n'


@pytest.mark.parametrize(
    ("more", "how", "why"),
    [
        pytest.param({}, Behaviour(raw=chunk("w0 ") + TOOL), "answer", id="a tool call was begun"),
        pytest.param({}, Behaviour(raw=chunk() + THOUGHT), "answer", id="it reasons"),
        pytest.param({"n": 2}, Behaviour(cut_after=2), "request", id="two choices"),
        pytest.param({"logprobs": True}, Behaviour(cut_after=2), "request", id="logprobs"),
        pytest.param({"response_format": {"type": "json_object"}}, Behaviour(cut_after=2), "request", id="a grammar"),
        pytest.param({"max_tokens": 2}, Behaviour(cut_after=2), "output_limit", id="nothing more was asked for"),
        pytest.param(
            {},
            Behaviour(raw=chunk("w0 ") + IN_BAND.replace(b"500", b"400")),
            "refused",
            id="the model refuses the request",
        ),
    ],
)
async def test_what_cannot_be_joined_ends_as_it_always_did(more: dict[str, Any], how: Behaviour, why: str) -> None:
    async with FakeUpstream(how) as local, running(going_on(local)) as client:
        answer = await client.post(chat(**more))
        assert (answer.status, len(local.requests)) == (200, 1)
        error = answer.events[-1]["error"]
        assert error["code"] == (400 if why == "refused" else "stream_cut"), "the model's own words where it has some"
        assert await client.metric("moestack_gateway_broken_streams_total", how="stop", why=why) == 1


async def test_a_stream_that_was_complete_is_not_gone_on_with() -> None:
    whole = Behaviour(raw=chunk() + chunk("w0 ") + FINISH)
    async with FakeUpstream(whole) as local, running(going_on(local)) as client:
        assert (await client.post(chat())).text == "w0 "
        assert len(local.requests) == 1


async def test_an_answer_that_lacked_its_end_alone_gets_it() -> None:
    async with FakeUpstream(Behaviour(raw=chunk() + FINISH + DONE)) as local, running(going_on(local)) as client:
        local.behaviours = [Behaviour(raw=chunk() + chunk("w0 "))]
        assert_one_stream(await client.post(chat()), "w0 ")


async def test_a_gateway_that_drains_starts_no_second_attempt() -> None:
    async with FakeUpstream(Behaviour(cut_after=2, first_s=0.3)) as local, running(going_on(local)) as client:
        stream = asyncio.create_task(client.post(chat()))
        await until(lambda: bool(local.requests))
        client.server.gateway.draining = True
        answer = await stream
        assert answer.events[-1]["error"]["code"] == "stream_cut"
        assert len(local.requests) == 1
        why = {"how": "stop", "why": "draining"}
        assert await client.metric("moestack_gateway_broken_streams_total", **why) == 1


async def test_a_drain_that_is_over_ends_a_second_attempt_honestly() -> None:
    async with FakeUpstream(Behaviour(stall=True)) as local:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        async with running(going_on(local, limits={"firstTokenS": 60})) as client:
            stream = asyncio.create_task(client.post(chat()))
            await until(lambda: len(local.requests) == 2)
            client.server.gateway.stop_all()
            answer = await stream
            assert (answer.text, answer.events[-1]["error"]["code"]) == ("w0 w1 ", "stream_cut")
            assert await client.metric("moestack_gateway_requests_total", outcome="cut") == 1


async def test_without_the_opt_in_nobody_goes_on() -> None:
    async with FakeUpstream() as local, FakeUpstream() as target, running(config(local, target)) as client:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        assert (await client.post(chat())).events[-1]["error"]["code"] == "stream_cut"
        assert (len(local.requests), target.requests) == (1, [])
        assert await client.metric("moestack_gateway_broken_streams_total", how="stop", why="off") == 1


async def test_a_message_in_anthropics_form_goes_on_as_one_message() -> None:
    asked = {"model": "tiny", "max_tokens": 50, "stream": True, "messages": [{"role": "user", "content": "Count"}]}
    async with FakeUpstream(REST) as local, running(going_on(local)) as client:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        answer = await client.post(asked, path="/v1/messages")
        kinds = [event["type"] for event in answer.events]
        assert kinds.count("message_start") == kinds.count("content_block_start") == kinds.count("message_stop") == 1
        said = [event["delta"]["text"] for event in answer.events if event["type"] == "content_block_delta"]
        assert "".join(said) == WHOLE
        (end,) = [event for event in answer.events if event["type"] == "message_delta"]
        assert (end["usage"]["input_tokens"], end["usage"]["output_tokens"]) == (10, 5)


async def test_the_official_client_reads_a_joined_stream_as_one() -> None:
    async with FakeUpstream(REST) as local, running(going_on(local)) as here:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        async with openai.AsyncOpenAI(base_url=here.url + "/v1", api_key="x", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "Count"}]
            async with client.chat.completions.stream(
                model="tiny", messages=messages, stream_options={"include_usage": True}
            ) as stream:
                answer = await stream.get_final_completion()
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (WHOLE, "stop")
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 15)
