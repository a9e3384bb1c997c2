"""The official openai client for Python, unchanged, against the gateway over real sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
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
from tests.gateway.test_gateway_provider_streams import CLAUDE, GEMINI
from tests.gateway.test_gateway_providers import WHOLE

HELLO: Any = [{"role": "user", "content": "Say hello"}]
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


class Weather(BaseModel):
    city: str
    degrees: int


@asynccontextmanager
async def client_of(settings: GatewayConfig, key: str = CLIENT_KEY) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        running(settings) as here,
        openai.AsyncOpenAI(api_key=key, base_url=here.url + "/v1", max_retries=0) as client,
    ):
        yield client


async def test_chat(tmp_path: Path) -> None:
    async with FakeUpstream(completion()) as local, client_of(gateway(tmp_path, local)) as client:
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
        answer = raw.parse()
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello there", "stop")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        assert answer._request_id == raw.headers["x-request-id"] == local.headers[0]["X-Request-Id"]
        assert "Authorization" not in local.headers[0]


async def test_a_stream(tmp_path: Path) -> None:
    async with FakeUpstream(TEXT_STREAM) as local, client_of(gateway(tmp_path, local)) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(texts) == "Hello there"


async def test_the_stream_helper_gathers_an_answer(tmp_path: Path) -> None:
    async with FakeUpstream(TEXT_STREAM) as local, client_of(gateway(tmp_path, local)) as client:
        async with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
            answer = await stream.get_final_completion()
        assert answer.choices[0].message.content == "Hello there"


async def test_tools(tmp_path: Path) -> None:
    called = completion({"content": None, "tool_calls": [CALL]}, "tool_calls")
    async with FakeUpstream(called) as local, client_of(gateway(tmp_path, local)) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)
        calls = answer.choices[0].message.tool_calls
        assert calls is not None
        assert calls[0].type == "function"
        assert json.loads(calls[0].function.arguments) == {"city": "Oslo"}
        local.default = TOOL_STREAM
        async with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=TOOLS) as stream:
            gathered = (await stream.get_final_completion()).choices[0].message.tool_calls
        assert gathered is not None
        assert (gathered[0].id, gathered[0].function.arguments) == ("call_1", '{"city": "Oslo"}')


async def test_structured_output(tmp_path: Path) -> None:
    structured = completion({"content": ANSWER_JSON})
    async with FakeUpstream(structured) as local, client_of(gateway(tmp_path, local)) as client:
        answer = await client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Weather)
        assert answer.choices[0].message.parsed == Weather(city="Oslo", degrees=7)
        assert local.requests[0]["response_format"]["json_schema"]["schema"]["required"] == ["city", "degrees"]


async def test_other_calls(tmp_path: Path) -> None:
    async with FakeUpstream() as local, client_of(gateway(tmp_path, local)) as client:
        vector = {"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        local.default = _json({"object": "list", "model": MODEL, "data": [vector], "usage": usage})
        embedded = await client.embeddings.create(model=MODEL, input="a", encoding_format="float")
        assert embedded.data[0].embedding == [0.5, 1.0]
        choice = {"index": 0, "text": "Hello", "finish_reason": "stop", "logprobs": None}
        local.default = _json(
            {"id": "c", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice]}
        )
        assert (await client.completions.create(model=MODEL, prompt="a")).choices[0].text == "Hello"
        text = {"type": "output_text", "text": "Hello", "annotations": []}
        item = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
        local.default = _json({"id": "r", "object": "response", "created_at": 1, "model": MODEL, "output": [item]})
        assert (await client.responses.create(model=MODEL, input="a")).output_text == "Hello"
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL


ENGINE_SAYS = b'{"error": {"message": "too long", "type": "BadRequestError", "param": null, "code": 400}}'
ERRORS = [
    ("400", Behaviour(status=400, body=ENGINE_SAYS), {}, openai.BadRequestError, 400),
    ("404", Behaviour(), {"model": "another"}, openai.NotFoundError, 404),
    ("413", Behaviour(), {"messages": [{"role": "user", "content": "x" * 9000}]}, openai.APIStatusError, 413),
    ("overload", Behaviour(status=503), {}, openai.InternalServerError, 529),
    ("failure", Behaviour(status=500), {}, openai.InternalServerError, 502),
]


@pytest.mark.parametrize(("name", "how", "asked", "kind", "status"), ERRORS, ids=[row[0] for row in ERRORS])
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_clients_own(
    name: str,
    how: Behaviour,
    asked: dict[str, Any],
    kind: type[openai.APIStatusError],
    status: int,
    stream: bool,
    tmp_path: Path,
) -> None:
    async with (
        FakeUpstream(how) as local,
        client_of(gateway(tmp_path, local, limits={"maxBodyBytes": 5000})) as client,
    ):
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "stream": stream, **asked})
        assert caught.value.status_code == status
        assert caught.value.request_id
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["message"]


async def test_a_wrong_key_and_too_many_requests(tmp_path: Path) -> None:
    async with FakeUpstream(completion()) as local:
        settings = gateway(tmp_path, local, auth={"limits": {"requestsPerMinute": 1}})
        async with client_of(settings) as client:
            wrong = client.with_options(api_key="sk-moe-wrong-000000000000000000000000")
            with pytest.raises(openai.AuthenticationError):
                await wrong.chat.completions.create(model=MODEL, messages=HELLO)
            await client.chat.completions.create(model=MODEL, messages=HELLO)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model=MODEL, messages=HELLO)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert len(local.requests) == 1


async def test_a_stream_that_is_cut_raises_after_what_came(tmp_path: Path) -> None:
    async with FakeUpstream(CUT_STREAM) as local, client_of(gateway(tmp_path, local)) as client:
        got = []
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="the answer was cut"):  # noqa: PT012 (it raises after what came)
            async for chunk in stream:
                got.append(chunk.choices[0].delta.content)  # noqa: PERF401
        assert "".join(text or "" for text in got) == "Hello "


PROVIDERS = [
    ("anthropic", "", CLAUDE, "/v1/messages", "x-api-key"),
    ("gemini", "/v1", GEMINI, "/v1/models/closed-0:", "x-goog-api-key"),
]


@pytest.mark.parametrize(("provider", "base", "raw", "path", "header"), PROVIDERS, ids=["anthropic", "gemini"])
async def test_closed_apis_answer_as_openai_would(
    provider: str, base: str, raw: bytes, path: str, header: str, tmp_path: Path
) -> None:
    (answer,) = [answer for name, answer in WHOLE if name == provider]
    async with FakeUpstream() as local, FakeUpstream() as target:
        aimed = aimed_at(gateway(tmp_path, local, target), tmp_path, provider, f"http://127.0.0.1:{target.port}{base}")
        async with running(aimed) as here:
            client = openai.AsyncOpenAI(api_key=CLIENT_KEY, base_url=here.url + "/v1", max_retries=0)
            target.default = Behaviour(body=answer.model_dump_json(by_alias=True, exclude_none=True).encode(), raw=raw)
            got = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=50)
            assert got.choices[0].message.content == "Hello"
            async with client.chat.completions.stream(model=MODEL, messages=HELLO, max_tokens=50) as stream:
                streamed = await stream.get_final_completion()
            assert streamed.choices[0].message.content == "Hello ⛵"
            assert streamed.usage is None  # nobody asked for it
            assert all(sent.startswith(path) for sent in target.paths)
            assert target.headers[0][header] == PROVIDER_KEY
            # (15 × $1 + 7 × $2) / 1M, twice: the provider's own numbers
            assert await here.metric("moestack_gateway_spend_usd_total") == pytest.approx(58e-6)
            target.default = Behaviour(status=400, body=b'{"error": {"message": "no", "status": "INVALID_ARGUMENT"}}')
            with pytest.raises(openai.BadRequestError, match="no"):
                await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=50)
            assert local.requests == []
            await client.close()


LACKED = [("seed", 1, "seed"), ("logit_bias", {"1": 1}, "logit_bias"), ("a\r\nset-cookie: b", 1, "a??set-cookie:?b")]


@pytest.mark.parametrize(("field", "value", "named"), LACKED)
async def test_a_target_that_lacks_a_field_is_not_used_for_it(
    field: str, value: object, named: str, tmp_path: Path
) -> None:
    async with FakeUpstream(Behaviour(status=500)) as local, FakeUpstream() as target:
        aimed = aimed_at(gateway(tmp_path, local, target), tmp_path, "anthropic", target.board_url)
        async with client_of(aimed) as client:
            explain = {"x-moestack-explain": "1"}
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(
                    model=MODEL, messages=HELLO, extra_body={field: value}, extra_headers=explain
                )
        assert caught.value.response.headers["x-moestack-refused"] == f"t0: {named}"
        assert target.requests == []


def _json(document: dict[str, Any]) -> Behaviour:
    return Behaviour(body=json.dumps(document).encode())
