"""The proxy over real sockets: bytes pass unchanged, errors are OpenAI's, a client that leaves frees the engine."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from tests.gateway.fake_upstream import DONE, FINISH, Behaviour, FakeUpstream, chunk
from tests.gateway.harness import MODEL, chat, config, running, until

STREAM = b": keep-alive\n\n" + chunk() + chunk("Grüße ") + b"event: x\ndata: {}\n\n" + chunk("b") + FINISH + DONE


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("unix line ends, comments, named events", STREAM),
        ("dos line ends", STREAM.replace(b"\n", b"\r\n")),
        ("no [DONE] but a finish reason", STREAM.removesuffix(DONE)),
    ],
)
async def test_a_stream_passes_byte_for_byte(name: str, stream: bytes) -> None:
    async with FakeUpstream(Behaviour(raw=stream)) as local, running(config(local)) as client:
        answer = await client.post(chat())
        assert (answer.status, answer.body, answer.whole) == (200, stream, True), name
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert "x-moestack-target" not in answer.headers


async def test_a_last_event_without_its_blank_line_gets_it() -> None:
    async with FakeUpstream(Behaviour(raw=STREAM[:-2])) as local, running(config(local)) as client:
        assert (await client.post(chat())).body == STREAM


async def test_the_request_body_passes_byte_for_byte() -> None:
    raw = b'{"messages": [{"role":"user","content":"h\\u00e9"}],\n "model":"tiny", "seed" : 1.50}'
    async with FakeUpstream() as local, running(config(local)) as client:
        answer = await client.post(raw, Authorization="Bearer of-the-client")
        assert answer.status == 200
        assert local.bodies == [raw]
        assert "Authorization" not in local.headers[0]
        assert answer.json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_other_endpoints_pass(path: str) -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        answer = await client.post({"model": MODEL, "prompt": "a", "input": "a"}, path)
        assert answer.status == 200
        assert len(local.requests) == 1


async def test_embeddings_never_go_to_another_model() -> None:
    async with (
        FakeUpstream(Behaviour(status=500)) as local,
        FakeUpstream() as target,
        running(config(local, target)) as client,
    ):
        answer = await client.post({"model": MODEL, "input": "a"}, "/v1/embeddings")
        assert answer.status == 502
        assert target.requests == []


async def test_models_are_listed_without_an_upstream() -> None:
    local = FakeUpstream()
    local.port = 1
    async with running(config(local)) as client:
        listed = await client.call("GET", client.url + "/v1/models")
        assert [model["id"] for model in listed.json["data"]] == [MODEL]
        assert (await client.call("GET", client.url + f"/v1/models/{MODEL}")).json["object"] == "model"
        assert (await client.call("GET", client.url + "/v1/models/other")).error["code"] == "model_not_found"


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("method", "path", "body", "want"),
    [
        pytest.param("POST", CHAT, b'{"model": ', (400, "invalid_json", None), id="malformed JSON"),
        pytest.param("POST", CHAT, b"[1]", (400, "invalid_json", None), id="not an object"),
        pytest.param("POST", CHAT, b"", (400, "invalid_json", None), id="empty"),
        pytest.param("POST", CHAT, b"{}", (400, "missing_required_parameter", "model"), id="no model"),
        pytest.param(
            "POST", CHAT, b'{"model":"tiny","stream":"yes"}', (400, "invalid_type", "stream"), id="bad stream"
        ),
        pytest.param("POST", CHAT, b'{"model":"x"}', (404, "model_not_found", "model"), id="another model"),
        pytest.param("POST", CHAT, b"x" * 3000, (413, "request_too_large", None), id="too large"),
        pytest.param("POST", CHAT, b"x" * 9000, (413, "request_too_large", None), id="far too large"),
        pytest.param("POST", "/v1/nothing", b"{}", (404, "unknown_url", None), id="unknown path"),
        pytest.param("GET", CHAT, None, (405, "method_not_allowed", None), id="another method"),
    ],
)
async def test_a_bad_request_gets_an_error_in_openais_form(
    method: str, path: str, body: bytes | None, want: tuple[int, str, str | None]
) -> None:
    async with FakeUpstream() as local, running(config(local, limits={"maxBodyBytes": 2048})) as client:
        answer = await client.call(method, client.url + path, body)
        assert (answer.status, answer.error["code"], answer.error["param"]) == want
        assert local.requests == []


async def test_a_chunked_body_is_limited_too() -> None:
    async def endless():  # type: ignore[no-untyped-def]
        for _ in range(100):
            yield b"x" * 1024

    async with FakeUpstream() as local, running(config(local, limits={"maxBodyBytes": 2048})) as client:
        response = await client.session.post(client.url + CHAT, data=endless())
        assert response.status == 413
        response.close()


async def test_a_client_error_of_the_engine_passes_and_never_spills() -> None:
    body = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'
    async with (
        FakeUpstream(Behaviour(status=400, body=body)) as local,
        FakeUpstream() as target,
        running(config(local, target)) as client,
    ):
        for stream in (False, True):
            answer = await client.post(chat(stream))
            assert (answer.status, answer.body) == (400, body)
        assert target.requests == []
        assert await client.metric("moestack_gateway_requests_total", outcome="client_error", target="r0") == 2


async def test_a_client_that_leaves_cancels_the_upstream() -> None:
    async with FakeUpstream(Behaviour(tokens=10_000, gap_s=0.01)) as local, running(config(local)) as client:
        async with client.session.post(client.url + "/v1/chat/completions", json=chat()) as response:
            await response.content.readany()
        await asyncio.wait_for(local.gone.wait(), 5)
        await until(lambda: not client.server.gateway.calls)
        assert await client.metric("moestack_gateway_requests_total", outcome="cancelled") == 1
        assert client.server.gateway.upstreams["r0"].ledger.in_flight == 0


async def test_a_client_that_leaves_before_the_first_token_cancels_the_upstream() -> None:
    async with FakeUpstream(Behaviour(stall=True)) as local, running(config(local)) as client:
        asking = asyncio.create_task(client.session.post(client.url + "/v1/chat/completions", json=chat(False)))
        await until(lambda: local.requests)
        asking.cancel()
        await until(local.gone.is_set)


async def test_a_slow_client_holds_the_upstream_back() -> None:
    event = chunk("x" * 60_000)  # far more of them than the kernel's buffers on the way can hold
    big = Behaviour(raw=event, raw_step=len(event), repeat=5000)
    async with FakeUpstream(big) as local, running(config(local)) as client:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", client.server.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
        body = json.dumps(chat()).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.readexactly(100)
        sent = -1
        while sent != local.sent_bytes:  # until nothing moves
            sent = local.sent_bytes
            await asyncio.sleep(0.3)
        writer.transport.abort()
        assert 0 < sent < len(event) * 5000 * 0.5


async def test_explanations_are_given_on_request() -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        answer = await client.post(chat(False), x_moestack_explain="1", x_request_id="my-id.1")
        assert answer.headers["x-moestack-target"] == "r0"
        assert answer.headers["x-moestack-reason"] == "within_slo"
        assert answer.headers["x-request-id"] == "my-id.1"
        assert local.headers[0]["X-Request-Id"] == "my-id.1"


async def test_ttft_counts_content_alone() -> None:
    slow = Behaviour(tokens=3, gap_s=0.1)
    async with FakeUpstream(slow) as local, running(config(local)) as client:
        local.behaviours = [Behaviour(raw=b": hi\n\n" + chunk() + FINISH + DONE), slow]
        await client.post(chat())
        assert (await client.digest()).get("ttftP50S") is None
        await client.post(chat())
        digest = await client.digest()
        assert digest["ttftP50S"] < 0.1
        assert digest["itlP95S"] == pytest.approx(0.1, rel=0.5)
        assert digest["completed"] == digest["arrivals"] == 2
