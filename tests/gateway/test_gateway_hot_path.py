"""What a request's way is made of where it has to be cheap: exchanges, counts, windows, lines of the log."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from moe_core import log
from moe_core import metrics as table
from moe_core.config import GatewayConfig
from moe_core.log import line_of, redact
from moe_gateway.deadlines import Deadlines
from moe_gateway.lazily import Lazily
from moe_gateway.tallies import Counts, Spread
from moe_gateway.windows import Instants, Requests
from tests.gateway.threaded import Bench, RawUpstream, threaded

WHOLE = json.dumps({"id": "c", "choices": [{"index": 0, "message": {"content": "hello"}}]}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(WHOLE), WHOLE)
BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}).encode()
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
LIST = b"GET /v1/models HTTP/1.1\r\nHost: g\r\n\r\n"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    def made(upstream: RawUpstream) -> GatewayConfig:
        url = f"http://127.0.0.1:{upstream.port}/v1"
        revisions = [{"name": "r0", "url": url}]
        slo = {"ttftP95S": 5.0, "itlP95S": 1.0}
        return GatewayConfig.model_validate(
            {"deployment": "default/tiny", "model": "tiny", "revisions": revisions, "weights": {"r0": 100}, "slo": slo}
        )

    with threaded(made) as running:
        running.upstream.answer = ANSWER
        yield running
        assert running.crashes == []


def talk(bench: Bench, data: bytes, until: bytes, times: int = 1) -> bytes:
    """All that comes on one connection until `until` was seen so many times, or the connection ended."""
    got = b""
    with socket.create_connection(("127.0.0.1", bench.server.port), timeout=10) as sock:
        sock.sendall(data)
        while got.count(until) < times and (part := sock.recv(65536)):
            got += part
    return got


def test_requests_sent_at_once_are_answered_in_order(bench: Bench) -> None:
    got = talk(bench, CHAT + LIST + CHAT, WHOLE, 2)
    assert got.count(b"HTTP/1.1 200 OK") == 3
    assert got.index(WHOLE) < got.index(b'"object":"list"') < got.rindex(WHOLE)


def test_a_client_that_waits_for_100_continue_is_told_so_once(bench: Bench) -> None:
    head, _, body = CHAT.partition(b"\r\n\r\n")
    got = talk(bench, head + b"\r\nExpect: 100-continue\r\n\r\n" + body, WHOLE)
    assert got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("name", "head", "closed"),
    [
        ("kept", b"POST /v1/chat/completions HTTP/1.1\r\n", False),
        ("the client closes", b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\n", True),
        ("HTTP/1.0", b"POST /v1/chat/completions HTTP/1.0\r\n", True),
    ],
)
def test_a_connection_is_kept_unless_the_client_ends_it(bench: Bench, name: str, head: bytes, closed: bool) -> None:
    request = head + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    got = talk(bench, request + CHAT, WHOLE, 1 if closed else 2)
    assert (got.count(WHOLE), b"connection: close" in got) == ((1, True) if closed else (2, False))


def test_a_body_in_many_small_pieces_is_one_body(bench: Bench) -> None:
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert WHOLE in talk(bench, head + pieces + b"0\r\n\r\n", WHOLE)


# Windows


@given(st.lists(st.floats(0, 100), max_size=40).map(sorted), st.integers(1, 12), st.floats(0, 100))
def test_a_window_holds_the_newest_events(instants: list[float], most: int, since_s: float) -> None:
    window = Instants(most)
    for at_s in instants:
        window.add(at_s)
    assert [window.at_s[place] for place in window.since(since_s)] == [
        at_s for at_s in reversed(instants[-most:]) if at_s >= since_s
    ]


def test_a_request_without_a_first_token_has_no_ttft_and_any_count_of_tokens_is_taken() -> None:
    requests = Requests(4)
    kind = ("r0", (), "ok", False, True)
    requests.ended(1.0, kind, 0.5, None, 10**30, 7)
    requests.ended(2.0, kind, None, 0.1, 5, 7)
    places = list(requests.since(0.0))
    assert requests.times(places) == ([0.5], [0.1])
    assert requests.kind[places[0]] is requests.kind[places[1]]
    assert math.isnan(requests.ttft_s[places[0]])


# Counts


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["r0", "r1"]), st.floats(0, 400)), min_size=1, max_size=30))
def test_what_is_scraped_is_what_the_metrics_library_would_show(seen: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    spread, counts = Spread(table.GATEWAY_DURATION), Counts(table.GATEWAY_PROMPT_TOKENS)
    ours.register(spread)
    ours.register(counts)
    histogram = table.histogram(table.GATEWAY_DURATION, theirs)
    counter = table.counter(table.GATEWAY_PROMPT_TOKENS, theirs)
    for target, value in seen:
        spread.observe(("a/b", target), value)
        counts.add(("a/b", target), value)
        histogram.labels("a/b", target).observe(value)
        counter.labels("a/b", target).inc(value)
    assert generate_latest(ours) == generate_latest(theirs)


# Lines of the log

SECRET = "sk-0123456789abcdef"
TEXT = st.sampled_from(["plain", SECRET, f"with {SECRET} inside", "Bearer 0123456789", "a{b", "task-1", ""])
NAMES = st.sampled_from(["target", "api_key", "tokens", "password", "prompt", "number"])
VALUES = st.recursive(
    TEXT | st.integers(0, 9) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@given(TEXT, st.dictionaries(NAMES, VALUES, max_size=5))
def test_a_line_holds_its_fields_without_secrets(message: str, fields: dict[str, object]) -> None:
    line = line_of(1_700_000_000.25, "INFO", "moestack.x", message, fields)
    assert SECRET not in line
    head = {"time": "2023-11-14T22:13:20.250Z", "level": "info", "logger": "moestack.x", "msg": redact(message)}
    assert json.loads(line) == {**head, **redact(fields)}


def test_a_quiet_line_waits_and_the_next_loud_one_writes_it_first() -> None:
    stream, root = io.StringIO(), logging.getLogger("moestack")
    before = list(root.handlers), root.propagate, root.level
    try:
        log.configure("INFO", stream)
        quiet = log.get_log("test", deployment="a/b")
        assert quiet.info_soon("request", {"number": 1, "api_key": SECRET})
        assert stream.getvalue() == ""
        quiet.warning("attempt failed")
        assert [json.loads(line)["msg"] for line in stream.getvalue().splitlines()] == ["request", "attempt failed"]
        for number in range(log.KEPT_MAX - 1):
            assert quiet.info_soon("request", {"number": number})
        assert not quiet.info_soon("request", {"number": 64})  # enough of them: written
        quiet.info_soon("request", {"number": 65})
        log.flush()
        assert len(stream.getvalue().splitlines()) == 2 + log.KEPT_MAX + 1
        assert SECRET not in stream.getvalue()
    finally:
        root.handlers[:], root.propagate = before[:2]
        root.setLevel(before[2])


# Limits


async def test_a_limit_ends_what_takes_longer_and_nothing_else() -> None:
    deadlines = Deadlines()
    with pytest.raises(TimeoutError), deadlines.within(0.0):
        await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with deadlines.within(60.0):
        await asyncio.sleep(0)


async def test_a_cancellation_from_outside_stays_one() -> None:
    deadlines, inside = Deadlines(), asyncio.Event()

    async def limited() -> None:
        with deadlines.within(60.0):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(limited())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# What most decisions never ask


def test_what_is_not_looked_at_is_not_made_and_what_is_made_is_made_once() -> None:
    made: list[int] = []
    each = Lazily(lambda: (made.append(number) or number for number in range(3)))
    assert made == []
    assert (len(each), each[1], each[1:], list(each)) == (3, 1, (1, 2), [0, 1, 2])
    assert each == (0, 1, 2)
    assert made == [0, 1, 2]
