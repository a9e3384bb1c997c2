"""The Responses API over real sockets: passed to our own engine alone, counted as any other call."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import MODEL, config, running

PATH = "/v1/responses"
USAGE = {"input_tokens": 7, "output_tokens": 2, "total_tokens": 9}
ASKED: dict[str, Any] = {"model": MODEL, "input": "Say hello", "max_output_tokens": 8}


def events(*kinds: tuple[str, dict[str, Any]]) -> bytes:
    """A stream as vLLM writes it: each event with its type, and no [DONE]."""
    return b"".join(f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n".encode() for kind, more in kinds)


BEGIN = (("response.created", {"response": {"usage": None, "error": None}}), ("response.in_progress", {}))
TOKENS = (
    ("response.reasoning_text.delta", {"delta": "hm"}),
    ("response.output_text.delta", {"delta": "hello"}),
    ("response.output_text.done", {"text": "hello"}),
)
END = ("response.completed", {"response": {"usage": USAGE, "error": None}})


async def test_an_answer_in_one_piece_passes_and_its_usage_is_counted() -> None:
    answer = json.dumps({"object": "response", "output": [], "error": None, "usage": USAGE}).encode()
    async with FakeUpstream(Behaviour(body=answer)) as local, running(config(local)) as client:
        got = await client.post(ASKED, PATH)
        assert (got.status, got.body) == (200, answer)
        assert await client.metric("moestack_gateway_prompt_tokens_total") == 7
        assert await client.metric("moestack_gateway_output_tokens_total") == 2


@pytest.mark.parametrize("end", [END, ("response.incomplete", END[1])], ids=["completed", "cut by its own limit"])
async def test_a_stream_passes_byte_for_byte_and_ends_without_done(end: tuple[str, dict[str, Any]]) -> None:
    raw = events(*BEGIN, *TOKENS, end)
    async with FakeUpstream(Behaviour(raw=raw)) as local, running(config(local)) as client:
        got = await client.post({**ASKED, "stream": True}, PATH)
        assert (got.status, got.body, got.whole) == (200, raw, True)
        assert await client.metric("moestack_gateway_requests_total", outcome="ok") == 1
        assert await client.metric("moestack_gateway_output_tokens_total") == 2
        assert (await client.digest())["ttftP50S"] is not None


async def test_a_stream_that_stops_before_its_end_is_cut_honestly() -> None:
    raw = events(*BEGIN, *TOKENS)
    async with FakeUpstream(Behaviour(raw=raw)) as local, running(config(local)) as client:
        got = await client.post({**ASKED, "stream": True}, PATH)
        assert got.body.startswith(raw)
        assert got.events[-1]["error"]["code"] == "stream_cut"


@pytest.mark.parametrize("failure", [("response.failed", {"response": {}}), ("error", {"message": "no"})])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_failed_response_is_tried_elsewhere_among_our_own_and_never_at_a_closed_api(
    failure: tuple[str, dict[str, Any]], stream: bool
) -> None:
    broken = Behaviour(raw=events(*BEGIN, failure)) if stream else Behaviour(status=500)
    whole = json.dumps({"object": "response", "error": None, "usage": USAGE}).encode()
    good = Behaviour(raw=events(*BEGIN, *TOKENS, END), body=whole)
    async with FakeUpstream(broken) as first, FakeUpstream(good) as second, FakeUpstream() as target:
        made = config([first, second], target).model_copy(update={"weights": {"r0": 50, "r1": 50}})
        async with running(made) as client:
            answers = [await client.post({**ASKED, "stream": stream}, PATH) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]
        assert first.requests
        alone = config(first, target)
        async with running(alone) as client:
            assert (await client.post({**ASKED, "stream": stream}, PATH)).status == 502
        assert target.requests == []
