"""The small parts by themselves: boards, ledger, events, request parsing; and the official SDK over the whole."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.wire import EngineDigest, ReplicaDigest
from moe_gateway.boards import Board, BoardPoller, summarise
from moe_gateway.ledger import Ledger
from moe_gateway.openai_api import ApiError, Endpoint, parse
from moe_gateway.sse import MAX_EVENT_BYTES, SseScanner
from moe_gateway.upstream import Upstream
from tests.gateway.fake_upstream import DONE, FINISH, Behaviour, FakeUpstream, chunk, usage_chunk
from tests.gateway.harness import chat, config, running

WHOLE = b": hello\n\n" + chunk() + chunk("a") + chunk("ü") + FINISH + usage_chunk(3, 2) + DONE


def digest(replica: str = "a", seq: int = 1, running: int = 0, waiting: int = 0) -> ReplicaDigest:
    engine = EngineDigest(
        running=running,
        waiting=waiting,
        kv_usage=0.5,
        max_active_seqs=8,
        max_batched_tokens=256,
        ceiling_active_seqs=16,
        ceiling_batched_tokens=256,
    )
    return ReplicaDigest(replica=replica, started_at_s=0, at_s=0, seq=seq, ranks=1, engine=engine)


def test_a_report_sums_replicas_and_ages_by_our_clock() -> None:
    board = Board("http://b", Upstream("r0", "http://r"))
    first = summarise(board, [digest("a", 1, 3, 2), digest("b", 7, 1, 0)], 100.0)
    assert (first.running, first.waiting, first.active_limit, first.age_s) == (4, 2, 16, 0.0)
    second = summarise(board, [digest("a", 2), digest("b", 7)], 104.0)
    assert second.age_s == 4.0, "b has said nothing new"
    assert summarise(board, [digest("a", 3)], 105.0).age_s == 0.0, "b is gone"


def test_a_load_of_others_counts_once_it_shows_in_several_polls() -> None:
    upstream = Upstream("r0", "http://r")
    board = Board("http://b", upstream)
    upstream.ledger.sent(1, 100)
    lagging = [summarise(board, [digest(seq=seq, waiting=waiting)], seq) for seq, waiting in enumerate((9, 9, 1), 1)]
    assert lagging[-1].foreign_waiting == 0, "our own, that the engine reported late"
    lasting = [summarise(board, [digest(seq=seq, waiting=9)], seq) for seq in range(4, 7)]
    assert lasting[-1].foreign_waiting == 8


@pytest.mark.parametrize("answer", [{"not": "a list"}, [{"replica": 1}], "text", None])
async def test_a_board_that_talks_nonsense_stops_nothing(answer: Any) -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        local.digests = answer
        poller = BoardPoller(client.server.gateway)
        await poller.poll(poller.boards[0])
        assert client.server.gateway.upstreams["r0"].report is None
        assert (await client.post(chat())).status == 200


async def test_what_the_board_says_moves_the_decision() -> None:
    """Others fill the engine: this gateway has sent nothing, and still knows better than to wait."""
    async with FakeUpstream() as local, FakeUpstream() as target, running(config(local, target)) as client:
        poller = BoardPoller(client.server.gateway)
        for seq in range(1, 5):
            local.digests = [digest(seq=seq, running=8, waiting=50).to_json()]
            await poller.poll(poller.boards[0])
        answer = await client.post(chat(), x_moestack_explain="1")
        assert (answer.headers["x-moestack-target"], answer.headers["x-moestack-reason"]) == ("t0", "slo_predicted")
        await local.close()
        await poller.poll(poller.boards[0])
        report = client.server.gateway.upstreams["r0"].report
        assert report is not None
        assert report.foreign_waiting == 50, "the last word stands, and ages"
        await local.start()


def test_the_ledger_lets_whole_answers_decode_from_when_they_are_due() -> None:
    ledger = Ledger()
    ledger.sent(1, 100)
    ledger.sent(2, 50, first_token_due_s=10.0)
    assert ledger.counts(9.0) == (2, 150, 0)
    assert ledger.counts(10.0) == (1, 100, 1)
    ledger.first_token(1)
    ledger.ended(2)
    assert (ledger.counts(11.0), ledger.in_flight) == ((0, 0, 1), 1)
    ledger.ended(1)
    ledger.ended(1)
    assert ledger.counts(12.0) == (0, 0, 0)


@given(st.lists(st.tuples(st.sampled_from("sfe"), st.integers(0, 5), st.floats(0, 1e6)), max_size=100))
def test_the_ledger_is_empty_when_all_have_ended(events: list[tuple[str, int, float]]) -> None:
    ledger = Ledger()
    for kind, call, tokens in events:
        if kind == "s":
            ledger.ended(call)
            ledger.sent(call, tokens)
        elif kind == "f":
            ledger.first_token(call)
        else:
            ledger.ended(call)
        waiting, waiting_tokens, decoding = ledger.counts(0.0)
        assert waiting_tokens >= -1e-6
        assert waiting + decoding == ledger.in_flight
    for call in range(6):
        ledger.ended(call)
    assert ledger.counts(0.0) == (0, 0, 0)


@given(st.lists(st.integers(1, 60), max_size=30), st.booleans())
def test_however_a_stream_is_split_it_passes_whole(sizes: list[int], dos: bool) -> None:
    data = WHOLE.replace(b"\n", b"\r\n") if dos else WHOLE
    scanner, got, rest = SseScanner(), b"", data
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        got += scanner.feed(piece)
    got += scanner.feed(rest) + scanner.flush()
    assert got == data
    assert (scanner.content_events, scanner.done, scanner.finished, scanner.broken) == (2, True, True, False)
    assert scanner.usage is not None
    assert (scanner.usage.prompt_tokens, scanner.usage.output_tokens) == (3, 2)


@given(st.lists(st.integers(1, 60), max_size=30))
def test_only_the_usage_event_is_stripped(sizes: list[int]) -> None:
    scanner, got, rest = SseScanner(strip_usage=True), b"", WHOLE
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        got += scanner.feed(piece)
    assert got + scanner.feed(rest) == WHOLE.replace(usage_chunk(3, 2), b"")


@given(
    st.lists(
        st.binary(max_size=200) | st.sampled_from([b"data: ", b"\n\n", b"\r\n\r\n", b"{}", b"[DONE]"]), max_size=30
    )
)
def test_any_bytes_are_read_without_an_exception_and_in_order(pieces: list[bytes]) -> None:
    scanner, got = SseScanner(), b""
    for piece in pieces:
        if scanner.broken:
            break
        got += scanner.feed(piece)
    assert b"".join(pieces).startswith(got)


def test_an_event_without_end_is_malformed() -> None:
    scanner = SseScanner()
    scanner.feed(b"data: " + b"x" * MAX_EVENT_BYTES)
    assert scanner.malformed


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10)
json_values = (
    scalars | st.lists(scalars, max_size=3) | st.lists(st.dictionaries(st.just("content"), scalars), max_size=2)
)
field_names = st.sampled_from(
    ["model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "best_of", "prompt", "messages"]
)


@given(st.sampled_from(Endpoint), st.binary(max_size=60) | st.dictionaries(field_names, json_values).map(json.dumps))
def test_any_body_is_a_request_or_a_400(endpoint: Endpoint, body: bytes | str) -> None:
    raw = body.encode() if isinstance(body, str) else body
    try:
        request = parse(endpoint, raw)
    except ApiError as error:
        if error.status != 400:
            raise
        return
    assert request.choices >= 1
    assert request.output_limit is None or request.output_limit >= 0


async def test_the_official_sdk_works_unchanged() -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        sdk = openai.AsyncOpenAI(base_url=client.url + "/v1", api_key="of-the-client", max_retries=0)
        assert [model.id async for model in await sdk.models.list()] == ["tiny"]
        ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        whole = await sdk.chat.completions.create(**ask)
        assert whole.choices[0].message.content == "hello hello hello "
        parts = [part async for part in await sdk.chat.completions.create(**ask, stream=True)]
        assert "".join(part.choices[0].delta.content or "" for part in parts) == "w0 w1 w2 "
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await sdk.chat.completions.create(**{**ask, "model": "other"})
        local.behaviours = [Behaviour(status=400), Behaviour(status=500), Behaviour(status=429), Behaviour(cut_after=1)]
        with pytest.raises(openai.BadRequestError, match="told to fail"):
            await sdk.chat.completions.create(**ask)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                await sdk.chat.completions.create(**ask)
        with pytest.raises(openai.APIError, match="the answer was cut"):
            async for _ in await sdk.chat.completions.create(**ask, stream=True):
                pass
        await sdk.close()


async def test_many_streams_at_once_leave_nothing_behind() -> None:
    async with FakeUpstream(Behaviour(gap_s=0.01)) as local, running(config(local)) as client:
        answers = await asyncio.gather(*(client.post(chat()) for _ in range(100)))
        assert {answer.text for answer in answers} == {"w0 w1 w2 "}
        gateway = client.server.gateway
        assert gateway.calls == {}
        assert gateway.upstreams["r0"].ledger.counts(0.0) == (0, 0, 0)
        assert gateway.upstreams["r0"].price.free
