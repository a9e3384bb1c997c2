"""Streams of closed APIs, built by the official SDKs' own types, become OpenAI's chunks, however the bytes are cut."""

from __future__ import annotations

import json
from typing import Any

import anthropic.types as a
import openai.types.chat as o
import pytest
from google.genai import types as g
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from moe_gateway.openai_api import Usage
from moe_gateway.providers.anthropic import MessagesStream
from moe_gateway.sse import MAX_EVENT_BYTES, StreamReader
from tests.gateway.test_gateway_providers import adapter, asked

PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def event(one: BaseModel) -> bytes:
    kind = getattr(one, "type", None)
    data = one.model_dump_json(by_alias=True, exclude_none=True).encode()
    return (b"" if kind is None else b"event: " + kind.encode() + b"\n") + b"data: " + data + b"\n\n"


def started() -> bytes:
    usage = a.Usage(input_tokens=10, output_tokens=1, cache_read_input_tokens=4, cache_creation_input_tokens=1)
    made = a.Message(id="m1", type="message", role="assistant", model="claude-x", content=[], usage=usage)
    return event(a.RawMessageStartEvent(type="message_start", message=made))


def block(index: int, begin: Any, *deltas: Any) -> bytes:
    parts = [event(a.RawContentBlockStartEvent(type="content_block_start", index=index, content_block=begin))]
    parts += [
        event(a.RawContentBlockDeltaEvent(type="content_block_delta", index=index, delta=delta)) for delta in deltas
    ]
    return b"".join([*parts, event(a.RawContentBlockStopEvent(type="content_block_stop", index=index))])


def thinking(text: str) -> bytes:
    begin = a.ThinkingBlock(type="thinking", thinking="", signature="")
    signature = a.SignatureDelta(type="signature_delta", signature="s")
    return block(0, begin, a.ThinkingDelta(type="thinking_delta", thinking=text), signature)


def text(index: int, *words: str) -> bytes:
    begin = a.TextBlock(type="text", text="")
    return block(index, begin, *[a.TextDelta(type="text_delta", text=word) for word in words])


def tool(index: int, id_: str, *pieces: str) -> bytes:
    begin = a.ToolUseBlock(type="tool_use", id=id_, name="weather", input={})
    return block(index, begin, *[a.InputJSONDelta(type="input_json_delta", partial_json=piece) for piece in pieces])


def stopped(reason: Any) -> bytes:
    delta = {"stop_reason": reason, "stop_sequence": None}
    usage = a.MessageDeltaUsage(output_tokens=7, output_tokens_details=a.OutputTokensDetails(thinking_tokens=3))
    made = a.RawMessageDeltaEvent.model_validate({"type": "message_delta", "delta": delta, "usage": usage})
    return event(made) + event(a.RawMessageStopEvent(type="message_stop"))


def gemini(*parts: g.Part, reason: str | None = None, output: int = 1) -> bytes:
    finish = None if reason is None else g.FinishReason(reason)
    one = g.Candidate(content=g.Content(role="model", parts=list(parts)), finish_reason=finish, index=0)
    usage = g.GenerateContentResponseUsageMetadata(
        prompt_token_count=15, candidates_token_count=output, thoughts_token_count=3, cached_content_token_count=4
    )
    made = g.GenerateContentResponse(candidates=[one], usage_metadata=usage, response_id="r1", model_version="gemini-x")
    return event(made).replace(b"\n\n", b"\r\n\r\n")


def call(id_: str) -> g.Part:
    function = g.FunctionCall(id=id_, name="weather", args={"city": "Oslo"})
    return g.Part(function_call=function, thought_signature=b"sig")


CLAUDE = started() + PING + thinking("hm") + text(1, "Hel", "lo ⛵") + stopped("end_turn")
GEMINI = gemini(g.Part(text="hm", thought=True)) + gemini(g.Part(text="Hel")) + gemini(
    g.Part(text="lo ⛵"), reason="STOP", output=4
)  # fmt: skip
CLAUDE_TOOLS = started() + tool(0, "t1", '{"city": ', '"Oslo"}') + tool(1, "t2") + stopped("tool_use")
GEMINI_TOOLS = gemini(call("t1")) + gemini(call("t2")) + gemini(reason="STOP", output=4)


def reader(provider: str, **more: Any) -> StreamReader:
    options = {"include_usage": True}
    return adapter(provider).stream(asked(stream=True, stream_options=options, **more))


def run(stream: StreamReader, raw: bytes, cuts: tuple[int, ...] = ()) -> bytes:
    out, last = b"", 0
    for cut in [*sorted(cuts), len(raw)]:
        out += stream.feed(raw[last:cut])
        last = cut
    return out + stream.flush()


def chunks(out: bytes) -> list[o.ChatCompletionChunk]:
    """What an OpenAI client reads; the stream ends with [DONE]."""
    assert out.endswith(b"data: [DONE]\n\n")
    lines = [line.removeprefix(b"data: ") for line in out.split(b"\n\n") if line]
    return [o.ChatCompletionChunk.model_validate_json(line) for line in lines[:-1]]


@pytest.mark.parametrize(("provider", "raw"), [("anthropic", CLAUDE), ("gemini", GEMINI)])
@given(cuts=st.lists(st.integers(0, len(CLAUDE)), max_size=12))
def test_a_stream_is_the_same_however_its_bytes_are_cut(provider: str, raw: bytes, cuts: list[int]) -> None:
    stream = reader(provider)
    got = chunks(run(stream, raw, tuple(cuts)))
    deltas = [choice.delta for chunk in got for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Hello ⛵"
    assert "".join((delta.model_extra or {}).get("reasoning", "") for delta in deltas) == "hm"
    assert [choice.finish_reason for chunk in got for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert stream.usage == Usage(15, 7, 4)
    assert got[-1].usage is not None
    assert (got[-1].usage.prompt_tokens, got[-1].usage.completion_tokens) == (15, 7)
    assert (stream.content_events, stream.complete, stream.broken) == (3, True, False)


@pytest.mark.parametrize(("provider", "raw"), [("anthropic", CLAUDE_TOOLS), ("gemini", GEMINI_TOOLS)])
def test_tool_calls_come_in_pieces_and_whole(provider: str, raw: bytes) -> None:
    got = chunks(run(reader(provider), raw))
    calls: dict[int, list[str]] = {}
    for chunk in got:
        for choice in chunk.choices:
            for one in choice.delta.tool_calls or ():
                assert one.function is not None
                calls.setdefault(one.index, [one.id or ""])
                calls[one.index].append(one.function.arguments or "")
    arguments = [(parts[0], json.loads("".join(parts[1:]))) for parts in calls.values()]
    assert arguments[0] == ("t1", {"city": "Oslo"})
    assert arguments[1] == ("t2", {} if provider == "anthropic" else {"city": "Oslo"})
    assert [choice.finish_reason for chunk in got for choice in chunk.choices][-1] == "tool_calls"
    if provider == "gemini":
        assert b'"thought_signature":"c2ln"' in run(reader(provider), raw)


def test_pings_starts_and_signatures_are_no_content() -> None:
    stream = reader("anthropic")
    stream.feed(PING + b": comment\n\n" + started() + PING)
    begin = a.TextBlock(type="text", text="")
    stream.feed(event(a.RawContentBlockStartEvent(type="content_block_start", index=0, content_block=begin)))
    signature = a.SignatureDelta(type="signature_delta", signature="s")
    stream.feed(event(a.RawContentBlockDeltaEvent(type="content_block_delta", index=0, delta=signature)))
    assert stream.content_events == 0
    stream.feed(text(0, "x"))
    assert stream.content_events == 1


def test_a_role_or_an_empty_part_is_no_content_of_geminis() -> None:
    stream = reader("gemini")
    stream.feed(gemini() + gemini(g.Part(text="")))
    assert stream.content_events == 0
    stream.feed(gemini(g.Part(text="x", thought=True)))
    assert stream.content_events == 1


@pytest.mark.parametrize(
    ("provider", "raw"),
    [
        ("anthropic", b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}\n\n'),
        ("gemini", b'data: {"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}\n\n'),
    ],
)
def test_an_error_in_band_is_openais_and_ends_the_stream(provider: str, raw: bytes) -> None:
    stream = reader(provider)
    out = run(stream, raw + CLAUDE)
    assert json.loads(out.removeprefix(b"data: "))["error"]["message"] == "the model failed"
    assert stream.broken
    assert not stream.complete


def test_a_client_in_anthropics_form_does_not_get_the_providers_words() -> None:
    stream = MessagesStream(created=0, include_usage=True, raw=True)
    whole = started() + text(0, "a")
    error = {"type": "error", "error": {"type": "authentication_error", "message": "sk-ant-ours is no key"}}
    assert run(stream, whole + b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n") == whole
    assert stream.broken
    assert not stream.keep_error, "the gateway writes an error of its own"


@pytest.mark.parametrize("reason", ["MALFORMED_FUNCTION_CALL", "MISSING_THOUGHT_SIGNATURE"])
def test_an_answer_that_gemini_spoilt_is_an_error(reason: str) -> None:
    stream = reader("gemini")
    stream.feed(gemini(g.Part(text="x")) + gemini(reason=reason))
    assert stream.broken


@pytest.mark.parametrize(("provider", "raw"), [("anthropic", CLAUDE), ("gemini", GEMINI)])
def test_a_stream_that_breaks_is_not_complete_and_its_tokens_are_counted(provider: str, raw: bytes) -> None:
    stream = reader(provider)
    out = run(stream, raw[: raw.index("lo ⛵".encode())])
    assert not stream.complete
    assert b"[DONE]" not in out
    assert stream.prompt_tokens == 15
    assert stream.counted_tokens == 2
    assert stream.usage == (None if provider == "anthropic" else Usage(15, 4, 4))


def test_tokens_of_a_long_event_are_counted_by_its_bytes() -> None:
    stream = reader("anthropic")
    stream.feed(started() + text(0, "x" * 300))
    assert stream.counted_tokens == 100


@pytest.mark.parametrize("provider", ["anthropic", "gemini"])
@pytest.mark.parametrize(
    "raw",
    [
        b"data: {not json\n\n",
        b"data: [1]\n\n",
        b'data: {"type": "message_start", "candidates": 3}\n\n',
        b'data: {"type": "content_block_delta", "candidates": [{"content": {"parts": [{"functionCall": 1}]}}]}\n\n',
        b"x" * (MAX_EVENT_BYTES + 1),
    ],
)
def test_what_is_no_event_of_the_providers_is_malformed(provider: str, raw: bytes) -> None:
    stream = reader(provider)
    assert run(stream, raw) == b""
    assert stream.malformed


@pytest.mark.parametrize("provider", ["anthropic", "gemini"])
@given(raw=st.binary(max_size=200))
def test_no_bytes_are_too_much(provider: str, raw: bytes) -> None:
    stream = reader(provider)
    run(stream, b"data: " + raw + b"\n\n")
    assert not stream.complete
