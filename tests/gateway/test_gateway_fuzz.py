"""Nonsense from clients and from upstreams, over real sockets: no crash, one honest answer, no secret in an error."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_core.config import GatewayConfig
from moe_gateway import front
from tests.gateway.fake_upstream import DONE, FINISH, SSE, chunk
from tests.gateway.threaded import KEY, Bench, RawUpstream, Reply, threaded

CLIENT_KEY = "acme-key-0a1b2c3d4e5f6071829"
GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Say hello"}]}
WHOLE = json.dumps(
    {
        "id": "c",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }
).encode()
STREAM = chunk() + chunk("hello ") + FINISH + DONE
MANY = [pytest.param(150, id="150"), pytest.param(10_000, id="10000", marks=pytest.mark.full)]
CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def http(body: bytes, kind: str = "application/json", status: str = "200 OK", *more: bytes) -> bytes:
    head = [f"HTTP/1.1 {status}".encode(), f"Content-Type: {kind}".encode(), b"Content-Length: %d" % len(body), *more]
    return b"\r\n".join([*head, b"", body])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder: Path = tmp_path_factory.mktemp("keys")
    (folder / "tenants").mkdir()
    (folder / "tenants" / "acme").write_text(CLIENT_KEY)
    (folder / "key").write_text(KEY)

    def made(upstream: RawUpstream) -> GatewayConfig:
        url = f"http://127.0.0.1:{upstream.port}/v1"
        return GatewayConfig.model_validate(
            {
                "deployment": "default/tiny",
                "model": "tiny",
                "revisions": [{"name": "r0", "url": url}],
                "weights": {"r0": 100},
                "targets": [
                    {
                        "name": "t0",
                        "provider": "openai-compatible",
                        "model": "closed",
                        "baseUrl": url,
                        "apiKeyFile": str(folder / "key"),
                    }
                ],
                "slo": {"ttftP95S": 5.0, "itlP95S": 1.0},
                "limits": {"maxBodyBytes": 20_000, "firstTokenS": 1, "responseS": 2, "idleS": 1, "clientStallS": 1},
                "auth": {"mode": "APIKeys", "keysDir": str(folder / "tenants")},
            }
        )

    with threaded(made) as running:
        yield running
        assert running.crashes == []


AUTH = f"Authorization: Bearer {CLIENT_KEY}".encode()


def honest(bench: Bench, reply: Reply, *statuses: int) -> None:
    """One answer, an error in OpenAI's form unless it is a 200, and no secret in it."""
    assert reply.raw.count(b"HTTP/1.1 ") == 1, reply
    assert reply.status in statuses, reply
    assert CLIENT_KEY.encode() not in reply.raw
    assert KEY.encode() not in reply.raw
    if reply.status != 200:
        assert reply.code != "internal_error", reply


def alive(bench: Bench) -> None:
    bench.heal()
    bench.upstream.answer = http(WHOLE)
    assert bench.post(json.dumps(GOOD).encode(), "/v1/chat/completions", AUTH).status == 200
    assert bench.crashes == []
    assert not any(secret in line for line in bench.lines for secret in (CLIENT_KEY, KEY))
    bench.lines.clear()


# What clients send

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    [
        *("model", "messages", "stream", "stream_options", "n", "best_of", "prompt", "input", "max_tokens", "tools"),
        *("max_completion_tokens", "vllm_xargs", "use_beam_search", "temperature", "response_format", "logprobs"),
    ]
)
DOCUMENTS = st.dictionaries(NAMES, JSON, max_size=6).map(lambda odd: {**GOOD, **odd})
BODIES = st.one_of(
    DOCUMENTS.map(lambda document: json.dumps(document).encode()),
    JSON.map(lambda document: json.dumps(document).encode()),
    st.binary(max_size=200),
    st.binary(max_size=40).map(lambda noise: json.dumps(GOOD).encode() + noise),
    st.integers(1, 1500).map(lambda deep: b'{"model":"tiny","messages":' + b"[" * deep + b"]" * deep + b"}"),
    st.just(b'{"model":"tiny","model":"other","messages":[],"stream":false,"stream":true}'),
    st.just(b'{"model":"tiny","messages":[{"role":"user","content":"\xff\xfe"}]}'),
    st.just(b'{"model":"tiny","temperature":NaN}'),
    st.just(b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}'),
    st.just(b'{"model":"tiny","max_tokens":1e400,"n":99999999999999999999999}'),
    st.just(b'{"model":"tiny","x":"' + b"a" * 30_000 + b'"}'),
)
PATHS = st.sampled_from(
    [
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/models"),
        *("/v1/models/..%2f..", "/v1/%ff", "/", "/v1//chat/completions", "/openapi.json", "/v1/files", "/metrics"),
    ]
)
HEADERS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(
                [
                    *(b"x-moestack-tier", b"x-moestack-tenant", b"x-request-id", b"traceparent", b"x-moestack-explain"),
                    *(b"authorization", b"x-api-key", b"content-type", b"accept-encoding", b"expect", b"cookie"),
                ]
            ),
            st.binary(max_size=40).map(lambda value: value.translate(None, b"\r\n\0")),
        ),
        st.just((b"x-request-id", b"a b\tc")),
        st.just((b"content-encoding", b"gzip")),
    ),
    max_size=5,
)


@pytest.mark.parametrize("cases", MANY)
def test_nonsense_in_requests_gets_one_honest_answer(bench: Bench, cases: int) -> None:
    bench.upstream.answer = http(WHOLE)

    @settings(max_examples=cases, **CALM)
    @given(body=BODIES, path=PATHS, headers=HEADERS, method=st.sampled_from(["POST", "POST", "GET", "PUT", "BREW"]))
    def check(body: bytes, path: str, headers: list[tuple[bytes, bytes]], method: str) -> None:
        bench.heal()
        head = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close", AUTH]
        head += [name + b": " + value for name, value in headers]
        reply = bench.ask(b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", body]))
        # A document that is in order but for its stream is answered by the upstream's one piece: no stream, so 502.
        honest(bench, reply, 200, 400, 401, 403, 404, 405, 413, 502, 503)

    check()
    alive(bench)


RAW = st.one_of(
    st.binary(min_size=1, max_size=300),
    st.binary(max_size=60).map(
        lambda noise: b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + noise + b"\r\n\r\n"
    ),
    st.sampled_from(
        [
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nX-A: b\r\n folded\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nX-A : b\r\n\r\n",
            b"GET /v1/models HTTP/1.1\nHost: x\n\n",
            b"GET http://evil.example.com/v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            b"CONNECT evil.example.com:443 HTTP/1.1\r\nConnection: close\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ]
    ),
)


@pytest.mark.parametrize("cases", MANY)
def test_bytes_that_are_no_http_end_the_connection_with_an_error_at_most(bench: Bench, cases: int) -> None:
    @settings(max_examples=cases, **CALM)
    @given(RAW)
    def check(data: bytes) -> None:
        reply = bench.ask(data, end=True)
        assert reply.whole, "the connection was left open"
        # An incomplete head gets no answer: nobody is there to read it.
        if reply.raw:
            honest(bench, reply, 400, 401, 404, 405)

    check()
    alive(bench)


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("an address without end", b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", "url_too_long"),
        ("a header without end", b"GET / HTTP/1.1\r\nX-A: " + b"a" * 2_000_000, "headers_too_large"),
        ("a large header", b"GET / HTTP/1.1\r\nX-A: " + b"a" * 70_000 + b"\r\n\r\n", "headers_too_large"),
        ("headers without end", b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 200, "headers_too_large"),
        ("many long headers", b"GET / HTTP/1.1\r\n" + (b"X-A: " + b"a" * 1500 + b"\r\n") * 90, "headers_too_large"),
    ],
)
def test_heads_are_bounded(bench: Bench, name: str, data: bytes, code: str) -> None:
    reply = bench.ask(data)
    assert reply.whole
    if reply.raw:  # a reset may overtake the answer where more was sent than was read
        assert (reply.status, reply.code) == (414 if code == "url_too_long" else 431, code)
    alive(bench)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a head that drips", b"POST /v1/chat/completions HTTP/1.1\r\n"),
        ("a body that drips", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 900\r\n" + AUTH + b"\r\n\r\n"),
    ],
)
def test_a_slow_client_is_told_408_however_steadily_it_drips(
    bench: Bench, name: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "HEAD_S", 0.5)
    with socket.create_connection(("127.0.0.1", bench.server.port), timeout=10) as sock:
        sock.sendall(data)
        sock.setblocking(False)
        got, deadline = b"", time.monotonic() + 8
        while not got and time.monotonic() < deadline:
            time.sleep(0.1)
            try:
                sock.sendall(b"a")
                got = sock.recv(65536)
            except BlockingIOError:
                continue
    assert b" 408 " in got.split(b"\r\n")[0]
    assert b"request_timeout" in got
    alive(bench)


def test_no_header_of_a_client_can_write_one_of_its_own(bench: Bench) -> None:
    odd = b"x-request-id: a\r\nx-moestack-explain: 1\r\nx-moestack-tier: \xff\xfe%0d%0aset-cookie: a=b"
    reply = bench.post(json.dumps(GOOD).encode(), "/v1/chat/completions", AUTH, odd)
    assert b"set-cookie" not in reply.head.lower()
    alive(bench)


# What upstreams answer

GZIP_BOMB = gzip.compress(b"\0" * (20 << 20))
ODD_EVENTS = st.sampled_from(
    [
        *(b"data: {not json\n\n", b"data: null\n\n", b"data: []\n\n", b"data: 7\n\n", b"data: {}\n\n", b": ping\n\n"),
        *(b'data: {"choices": 7}\n\n', b'data: {"choices": [7]}\n\n', b'data: {"choices": [{"delta": 7}]}\n\n'),
        *(b"data: \xff\xfe\n\n", b"event: error\ndata: {}\n\n", b'data: {"error": "' + KEY.encode() + b'"}\n\n'),
        *(b'data: {"usage": {"prompt_tokens": -1, "completion_tokens": "x"}}\n\n', b"\r\n\r\n", b"data:"),
        *(b'data: {"usage": {"prompt_tokens": 1e99}}\n\n', b"data: " + b"[" * 2000 + b"\n\n", DONE, FINISH),
        *(chunk("hello "), chunk(), b"id: 1\nretry: 5\n\n", b'data: {"choices":[{"delta":{"content":7}}]}\n\n'),
    ]
)
STATUSES = st.sampled_from(
    [
        *(
            "200 OK",
            "201 Created",
            "204 No Content",
            "206 Partial Content",
            "301 Moved",
            "302 Found",
            "304 Not Modified",
        ),
        *(
            "307 Temporary",
            "400 Bad",
            "401 No",
            "403 No",
            "404 No",
            "408 T",
            "413 L",
            "429 T",
            "500 E",
            "529 O",
            "999 X",
        ),
    ]
)
KINDS = st.sampled_from(
    ["application/json", SSE["Content-Type"], "text/html", "text/event-stream", "", "application/json; charset=utf-16"]
)
ANSWERS = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.binary(max_size=200), KINDS, STATUSES).map(lambda given_: http(*given_)),
    st.tuples(JSON.map(lambda value: json.dumps(value).encode()), KINDS, STATUSES).map(lambda given_: http(*given_)),
    st.tuples(st.lists(ODD_EVENTS, max_size=8).map(b"".join), st.just("text/event-stream")).map(
        lambda given_: http(*given_)
    ),
    st.lists(ODD_EVENTS, max_size=5).map(
        lambda events: (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
        )
    ),
    st.sampled_from(
        [
            b"",
            b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
            b"HTTP/1.1 100 Continue\r\n\r\n" + http(WHOLE),
            b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + http(STREAM, "text/event-stream"),
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxx",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\nContent-Type: application/json\r\n\r\n{",
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Type: application/json\r\n\r\n" + WHOLE,
            b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF1\r\n{}",
            b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 3_000_000,
            b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 20_000,
            b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n",
            http(GZIP_BOMB, "application/json", "200 OK", b"Content-Encoding: gzip"),
            http(WHOLE) + http(WHOLE),
            http(WHOLE, "application/json", "200 OK", b"Set-Cookie: a=b", b"Retry-After: never"),
            http(b"{}", "application/json", "429 T", b"Retry-After: -5"),
            http(b"{}", "application/json\x0b", "200 OK"),
            http(b'{"error": {"message": "wrong key ' + KEY.encode() + b'"}}', "application/json", "400 Bad"),
            http(b'{"error": {"message": "wrong key ' + KEY.encode() + b'"}}'),
            http(STREAM, "text/event-stream"),
            http(WHOLE),
        ]
    ),
)


def one_end(reply: Reply) -> None:
    """A stream that began ends once: by [DONE], or by one error event that is its last."""
    body = reply.body
    if reply.status == 200 and b"text/event-stream" in reply.head:
        assert body.count(b'"stream_cut"') <= (b"data: [DONE]" not in body), body
        assert any(end in body for end in (b"data: [DONE]", b'"error"', b'"finish_reason"')), body
        assert body.endswith((b"\n\n", b"\r\n\r\n")) or b'"stream_cut"' not in body, body


@pytest.mark.parametrize("cases", MANY)
def test_nonsense_in_answers_becomes_one_honest_error(bench: Bench, cases: int) -> None:
    def asked(stream: bool) -> bytes:
        document: dict[str, Any] = {**GOOD, "stream": stream}
        return json.dumps(document).encode()

    @settings(max_examples=cases, **CALM)
    @given(answer=ANSWERS, stream=st.booleans())
    def check(answer: bytes, stream: bool) -> None:
        bench.heal()
        bench.upstream.answer = answer
        reply = bench.post(asked(stream), "/v1/chat/completions", AUTH)
        assert reply.whole
        # Client errors of an upstream pass on as they came; keys of ours are taken out, and none of its headers come.
        assert reply.raw.count(b"HTTP/1.1 ") <= 2, reply
        assert reply.status in {200, 400, 401, 403, 404, 413, 502, 503, 529} or 400 <= reply.status < 500, reply
        assert b"set-cookie" not in reply.head.lower()
        assert b"169.254" not in reply.raw
        assert b'"internal_error"' not in reply.raw
        assert KEY.encode() not in reply.raw or reply.status == 400 or b"text/event-stream" in reply.head
        if reply.status >= 500:
            assert reply.code in {"bad_gateway", "unavailable", "overloaded"}
        if stream:
            one_end(reply)
        elif reply.status == 200:
            assert isinstance(json.loads(reply.body), dict)

    check()
    alive(bench)
