"""The official anthropic client for Python, unchanged, against the gateway over real sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from moe_core.config import GatewayConfig
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import MODEL, running
from tests.gateway.sdk import (
    ANSWER_JSON,
    CALL,
    CLIENT_KEY,
    CUT_STREAM,
    PROVIDER_KEY,
    TEXT_STREAM,
    TOOL_STREAM,
    aimed_at,
    completion,
    gateway,
)
from tests.gateway.test_gateway_provider_streams import CLAUDE, started, stopped, text
from tests.gateway.test_gateway_providers import WHOLE

HELLO: Any = [{"role": "user", "content": "Say hello"}]
WEATHER: Any = {"name": "weather", "description": "of a city", "input_schema": {"type": "object"}}
ASKED: Any = {"model": MODEL, "max_tokens": 50, "messages": HELLO}


class Weather(BaseModel):
    city: str
    degrees: int


@asynccontextmanager
async def client_of(settings: GatewayConfig, key: str = CLIENT_KEY) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with (
        running(settings) as here,
        anthropic.AsyncAnthropic(api_key=key, base_url=here.url, max_retries=0) as client,
    ):
        yield client


async def test_a_message(tmp_path: Path) -> None:
    thought = completion({"reasoning": "hm"})
    async with FakeUpstream(thought) as local, client_of(gateway(tmp_path, local)) as client:
        message = await client.messages.create(**ASKED, system="Be brief.", stop_sequences=["END"])
        thinking, said = message.content
        assert thinking.type == "thinking"
        assert said.type == "text"
        assert (thinking.thinking, said.text, message.role) == ("hm", "Hello there", "assistant")
        assert (message.stop_reason, message.stop_sequence, message.model) == ("end_turn", None, MODEL)
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (6, 4, 3)
        assert message._request_id == local.headers[0]["X-Request-Id"]
        sent = local.requests[0]
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (sent["stop"], sent["max_tokens"]) == (["END"], 50)


STOPS = [
    ("length", {}, "max_tokens", None),
    ("content_filter", {}, "refusal", None),
    ("stop", {"stop_reason": "END"}, "stop_sequence", "END"),
]


@pytest.mark.parametrize(("finish", "more", "reason", "sequence"), STOPS)
async def test_stop_reasons(
    finish: str, more: dict[str, str], reason: str, sequence: str | None, tmp_path: Path
) -> None:
    async with (
        FakeUpstream(completion(finish=finish, **more)) as local,
        client_of(gateway(tmp_path, local)) as client,
    ):
        message = await client.messages.create(**ASKED)
        assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


async def test_a_stream(tmp_path: Path) -> None:
    async with FakeUpstream(TEXT_STREAM) as local, client_of(gateway(tmp_path, local)) as client:
        async with client.messages.stream(**ASKED) as stream:
            texts = [part async for part in stream.text_stream]
            message = await stream.get_final_message()
        assert texts == ["Hello ", "there"]
        assert [block.type for block in message.content] == ["thinking", "text"]
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (6, 4, 3)
        assert message.stop_reason == "end_turn"
        assert local.requests[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_there_and_back(stream: bool, tmp_path: Path) -> None:
    called = TOOL_STREAM if stream else completion({"content": None, "tool_calls": [CALL]}, "tool_calls")
    async with FakeUpstream(called) as local, client_of(gateway(tmp_path, local)) as client:
        options: Any = {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
        if stream:
            async with client.messages.stream(**ASKED, **options) as events:
                message = await events.get_final_message()
        else:
            message = await client.messages.create(**ASKED, **options)
        (use,) = message.content
        assert use.type == "tool_use"
        assert (use.id, use.name, use.input, message.stop_reason) == ("call_1", "weather", {"city": "Oslo"}, "tool_use")
        sent = local.requests[0]
        assert (sent["tool_choice"], sent["parallel_tool_calls"]) == ("required", False)
        assert sent["tools"][0]["function"]["name"] == "weather"
        local.default = completion()
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
        result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "rain"}]}
        back: Any = [
            *HELLO,
            {"role": "assistant", "content": [block.model_dump() for block in message.content]},
            {"role": "user", "content": [result, image, {"type": "text", "text": "And now?"}]},
        ]
        await client.messages.create(**{**ASKED, "messages": back}, tools=[WEATHER])
        assistant, tool, user = local.requests[1]["messages"][1:]
        assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo"}
        assert tool == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
        assert user["content"][0]["image_url"]["url"] == "data:image/png;base64,AAAA"


async def test_structured_output(tmp_path: Path) -> None:
    structured = completion({"content": ANSWER_JSON})
    async with FakeUpstream(structured) as local, client_of(gateway(tmp_path, local)) as client:
        message = await client.messages.parse(**ASKED, output_format=Weather)
        assert message.parsed_output == Weather(city="Oslo", degrees=7)
        schema = local.requests[0]["response_format"]["json_schema"]["schema"]
        assert set(schema["properties"]) == {"city", "degrees"}


THINKING = [
    ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"thinking_token_budget": 1024}),
    ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, {"reasoning_effort": "high"}),
    ({"metadata": {"user_id": "u1"}}, {"user": "u1"}),
]


@pytest.mark.parametrize(("more", "want"), THINKING)
async def test_options_in_the_engines_words(more: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    async with FakeUpstream(completion()) as local, client_of(gateway(tmp_path, local)) as client:
        await client.messages.create(**{**ASKED, "max_tokens": 4096, **more})
        assert {name: local.requests[0].get(name) for name in want} == want


ENGINE_SAYS = b'{"error": {"message": "too long", "type": "BadRequestError", "param": null, "code": 400}}'
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
ERRORS = [
    ("400", Behaviour(status=400, body=ENGINE_SAYS), {}, anthropic.BadRequestError, 400, "invalid_request_error"),
    ("field", Behaviour(), {"speed": "fast"}, anthropic.BadRequestError, 400, "invalid_request_error"),
    ("server tool", Behaviour(), {"tools": [SEARCH]}, anthropic.BadRequestError, 400, "invalid_request_error"),
    ("404", Behaviour(), {"model": "another"}, anthropic.NotFoundError, 404, "not_found_error"),
    ("413", Behaviour(), {"system": "x" * 9000}, anthropic.APIStatusError, 413, "request_too_large"),
    ("overload", Behaviour(status=503), {}, anthropic.APIStatusError, 529, "overloaded_error"),
    ("failure", Behaviour(status=500), {}, anthropic.InternalServerError, 502, "api_error"),
]


@pytest.mark.parametrize(("name", "how", "asked", "kind", "status", "type_"), ERRORS, ids=[row[0] for row in ERRORS])
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_clients_own(
    name: str,
    how: Behaviour,
    asked: dict[str, Any],
    kind: type[anthropic.APIStatusError],
    status: int,
    type_: str,
    stream: bool,
    tmp_path: Path,
) -> None:
    async with (
        FakeUpstream(how) as local,
        client_of(gateway(tmp_path, local, limits={"maxBodyBytes": 5000})) as client,
    ):
        with pytest.raises(kind) as caught:
            await client.messages.create(**{**ASKED, **asked, "stream": stream})
        assert caught.value.status_code == status
        assert isinstance(caught.value.body, dict)
        assert (caught.value.body["type"], caught.value.body["error"]["type"]) == ("error", type_)
        assert caught.value.request_id == caught.value.body["request_id"]
        if status == 529:
            assert type(caught.value).__name__ == "OverloadedError"
            assert int(caught.value.response.headers["retry-after"]) >= 1


async def test_a_wrong_key_too_many_requests_and_calls_that_are_not_served(tmp_path: Path) -> None:
    async with FakeUpstream(completion()) as local:
        settings = gateway(tmp_path, local, auth={"limits": {"requestsPerMinute": 1}})
        async with client_of(settings) as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.with_options(api_key="sk-moe-wrong-0000000000000000000000").messages.create(**ASKED)
            with pytest.raises(anthropic.NotFoundError, match="is not served"):
                await client.messages.count_tokens(model=MODEL, messages=HELLO)
            await client.messages.create(**ASKED)
            with pytest.raises(anthropic.RateLimitError):
                await client.messages.create(**ASKED)


async def test_a_stream_that_is_cut_raises_after_what_came(tmp_path: Path) -> None:
    async with FakeUpstream(CUT_STREAM) as local, client_of(gateway(tmp_path, local)) as client:
        got = []
        with pytest.raises(anthropic.APIStatusError, match="the answer was cut"):  # noqa: PT012
            async with client.messages.stream(**ASKED) as stream:
                async for part in stream.text_stream:
                    got.append(part)  # noqa: PERF401
        assert got == ["Hello "]


async def test_anthropics_own_answers_pass_as_they_are(tmp_path: Path) -> None:
    (answer,) = [answer for name, answer in WHOLE if name == "anthropic"]
    whole = answer.model_dump_json(exclude_none=True).encode()
    async with FakeUpstream() as local, FakeUpstream(Behaviour(body=whole, raw=CLAUDE)) as target:
        aimed = aimed_at(gateway(tmp_path, local, target), tmp_path, "anthropic", target.board_url)
        async with running(aimed) as here:
            for stream, want in ((False, whole), (True, CLAUDE)):
                asked = {**ASKED, "stream": stream, "top_k": 5, "cache_control": {"type": "ephemeral"}}
                got = await here.post(asked, "/v1/messages", x_api_key=CLIENT_KEY)
                assert (got.status, got.body) == (200, want)
                assert target.requests[-1] == {**asked, "model": "closed-0"}
            assert target.headers[0]["x-api-key"] == PROVIDER_KEY
            assert await here.metric("moestack_gateway_output_tokens_total", target="t0") == 14
            target.default = Behaviour(raw=CLAUDE[: CLAUDE.index(b"message_delta") - 20])
            client = anthropic.AsyncAnthropic(api_key=CLIENT_KEY, base_url=here.url, max_retries=0)
            with pytest.raises(anthropic.APIStatusError, match="the answer was cut"):
                async with client.messages.stream(**ASKED) as events:
                    await events.get_final_message()
            target.default = Behaviour(status=529)
            with pytest.raises(anthropic.APIStatusError) as caught:
                await client.messages.create(**ASKED)
            assert caught.value.status_code in {503, 529}
            await client.close()


async def test_another_models_thinking_does_not_go_to_anthropic(tmp_path: Path) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    talk: Any = [*HELLO, {"role": "assistant", "content": [thought, {"type": "text", "text": "Hi"}]}, *HELLO]
    claude = Behaviour(raw=started() + text(0, "Hi") + stopped("end_turn"))
    async with FakeUpstream(Behaviour(status=500)) as local, FakeUpstream(claude) as target:
        aimed = aimed_at(gateway(tmp_path, local, target), tmp_path, "anthropic", target.board_url)
        async with client_of(aimed) as client:
            with pytest.raises(anthropic.InternalServerError):
                await client.messages.create(**{**ASKED, "messages": talk})
        assert target.requests == []
