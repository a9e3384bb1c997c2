"""The client on real sockets: what it sends, what it makes of each answer, and that no connection holds it for ever."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from moe_core import http
from moe_core.clock import SystemClock
from moe_kube import errors
from moe_kube.access import Access, Credentials
from moe_kube.api import WatchEvent
from moe_kube.calls import Call
from moe_kube.client import KubeApi
from moe_kube.objects import DEPLOYMENT, MOE_DEPLOYMENT, NAMESPACE, POD, Ref
from tests.kube.api_server import StandIn, answer, stand_in, status

REF = Ref(DEPLOYMENT, "ns", "x")
IDENTITY = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x", "namespace": "ns"}}


def client(url: str, **options: Any) -> KubeApi:
    access = Access(host=url, authorization="Bearer t0ken-t0ken")

    async def load(anew: bool) -> Access:
        return access

    credentials = Credentials(access, load, SystemClock())
    return KubeApi(credentials, http.session(read_s=None, dead_peer_s=30), **options)


@pytest.fixture
async def server() -> AsyncIterator[StandIn]:
    async with stand_in() as it:
        yield it


@pytest.fixture
async def api(server: StandIn) -> AsyncIterator[KubeApi]:
    async with client(server.url) as it:
        yield it


SENT = {
    "get": (lambda api: api.get(REF), "GET", "/apis/apps/v1/namespaces/ns/deployments/x", {}, None, None),
    "get of a cluster-scoped kind": (
        lambda api: api.get(Ref(NAMESPACE, "", "ns")),
        *("GET", "/api/v1/namespaces/ns", {}, None, None),
    ),
    "list over all namespaces": (
        lambda api: api.list(POD, labels="a=b", limit=7),
        *("GET", "/api/v1/pods", {"limit": "7", "labelSelector": "a=b"}, None, None),
    ),
    "list continued": (
        lambda api: api.list(POD, namespace="ns", continue_token="t", resource_version="5"),
        *("GET", "/api/v1/namespaces/ns/pods", {"limit": "500", "continue": "t"}, None, None),
    ),
    "apply": (
        lambda api: api.apply(REF, {"spec": {"replicas": 1}}, manager="me"),
        "PATCH",
        "/apis/apps/v1/namespaces/ns/deployments/x",
        {"fieldManager": "me", "force": "true"},
        "application/apply-patch+yaml",
        {**IDENTITY, "spec": {"replicas": 1}},
    ),
    "apply of status without force": (
        lambda api: api.apply(REF, {"status": {}}, manager="me", force=False, subresource="status"),
        "PATCH",
        "/apis/apps/v1/namespaces/ns/deployments/x/status",
        {"fieldManager": "me", "force": "false"},
        "application/apply-patch+yaml",
        {**IDENTITY, "status": {}},
    ),
    "create": (
        lambda api: api.create(REF, {"metadata": {"labels": {"a": "b"}}}),
        *("POST", "/apis/apps/v1/namespaces/ns/deployments", {}, "application/json"),
        {**IDENTITY, "metadata": {"name": "x", "namespace": "ns", "labels": {"a": "b"}}},
    ),
    "replace": (
        lambda api: api.replace(REF, {"metadata": {"resourceVersion": "4"}}),
        *("PUT", "/apis/apps/v1/namespaces/ns/deployments/x", {}, "application/json"),
        {**IDENTITY, "metadata": {"name": "x", "namespace": "ns", "resourceVersion": "4"}},
    ),
    "JSON patch": (
        lambda api: api.json_patch(REF, [{"op": "remove", "path": "/a"}]),
        *("PATCH", "/apis/apps/v1/namespaces/ns/deployments/x", {}, "application/json-patch+json"),
        [{"op": "remove", "path": "/a"}],
    ),
    "delete of one uid": (
        lambda api: api.delete(REF, uid="u", propagation="Foreground"),
        *("DELETE", "/apis/apps/v1/namespaces/ns/deployments/x", {}, "application/json"),
        {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": "u"},
        },
    ),
}


@pytest.mark.parametrize("name", SENT)
async def test_what_is_sent(server, api, name):
    call, method, path, query, content_type, body = SENT[name]
    await call(api)
    asked = server.asked[0]
    assert (asked.method, asked.path, asked.body) == (method, path, body)
    assert asked.query == {**query, "timeout": "15000ms"}
    assert asked.headers["Authorization"] == "Bearer t0ken-t0ken"
    assert asked.headers["Accept-Encoding"] == "identity"
    assert content_type is None or asked.headers["Content-Type"] == content_type


REFUSED = {
    "missing object": (status(404, "x not found", name="x"), errors.NotFound, {"kind_missing": False}),
    "kind not served, plain": (answer("404 page not found\n", 404), errors.NotFound, {"kind_missing": True}),
    "kind not served, Status": (status(404, "no such resource"), errors.NotFound, {"kind_missing": True}),
    "a proxy's own 404": (answer("<html>404 Not Found</html>", 404), errors.NotFound, {"kind_missing": False}),
    "taken name": (status(409, "exists", reason="AlreadyExists"), errors.Conflict, {"reason": "AlreadyExists"}),
    "old version": (status(410, "too old", reason="Expired"), errors.Gone, {}),
    "bad field": (status(422, "spec.x: Required value"), errors.Invalid, {}),
    "bad request": (status(400, "unknown field"), errors.Invalid, {}),
    "no right": (status(403, "forbidden"), errors.Forbidden, {"status": 403}),
    "unknown user": (status(401, "Unauthorized"), errors.Forbidden, {"status": 401}),
    "busy, header": (answer("slow down", 429, Retry_After="7"), errors.Busy, {"retry_after_s": 7.0}),
    "busy, details": (status(429, "slow down", retryAfterSeconds=3), errors.Busy, {"retry_after_s": 3.0}),
    "server error": (status(500, "etcd is down"), errors.ServerError, {"status": 500}),
    "unavailable": (answer("", 503), errors.ServerError, {"status": 503}),
    "a redirect": (answer("", 302, Location="http://evil"), errors.ApiError, {"status": 302}),
    "no API server": (answer("<html>hello</html>"), errors.Unreachable, {}),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_an_answer_means(server, api, name):
    reply, error, attributes = REFUSED[name]
    server.answers = [reply]
    with pytest.raises(error) as raised:
        await api.get(REF)
    for key, value in attributes.items():
        assert getattr(raised.value, key) == value
    assert len(server.asked) == 1


async def test_the_message_is_the_servers_without_secrets_and_of_bounded_length(server, api):
    server.answers = [status(422, "spec.key: Invalid value: sk-abcdefgh12345678 " + "x" * 5000)]
    with pytest.raises(errors.Invalid) as raised:
        await api.create(REF, {"spec": {"key": "sk-abcdefgh12345678"}})
    assert str(raised.value).startswith("spec.key: Invalid value: [redacted]")
    assert len(str(raised.value)) <= 1000


@pytest.mark.parametrize("name", ["..", "a/b", "a%2fb", "a?b", "é"])
async def test_a_name_that_could_leave_its_path_is_not_sent(server, api, name):
    with pytest.raises(errors.Invalid, match="cannot be the name"):
        await api.get(Ref(POD, "ns", name))
    assert server.asked == []


async def test_items_of_a_list_say_what_they_are(server, api):
    server.answers = [
        answer({"metadata": {"resourceVersion": "9", "continue": "c"}, "items": [{"metadata": {"name": "a"}}]}),
        answer({"metadata": {"resourceVersion": "9"}, "items": None}),
    ]
    first = await api.list(MOE_DEPLOYMENT, limit=1)
    assert (first.resource_version, first.continue_token) == ("9", "c")
    assert first.items[0]["kind"] == "MoEDeployment"
    assert first.items[0]["apiVersion"] == "moestack.dev/v1alpha1"
    last = await api.list(MOE_DEPLOYMENT, limit=1, continue_token="c")
    assert (last.items, last.continue_token) == ((), "")


async def test_observers_are_told_of_every_call(server):
    told: list[tuple[Call, int, float]] = []
    async with client(server.url, observers=(lambda *call: told.append(call),)) as api:
        server.answers = [answer({}), status(409, "no"), answer("")]
        await api.get(REF)
        with pytest.raises(errors.Conflict):
            await api.apply(REF, {}, manager="m", subresource="status")
        assert [event async for event in api.watch(POD, resource_version="1")] == []
        server.answers = [hang]
        with pytest.raises(errors.Unreachable):
            await api.get(REF, timeout_s=0.05)
    assert [(str(call), code) for call, code, _ in told] == [
        ("get Deployment ns/x", 200),
        ("patch Deployment ns/x/status", 409),
        ("watch Pod", 200),
        ("get Deployment ns/x", 0),
    ]
    assert all(0 <= seconds < 5 for _, _, seconds in told)


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


async def test_a_call_ends_at_its_time_out_which_the_server_knows(server, api):
    server.answers = [hang]
    began = time.monotonic()
    with pytest.raises(errors.Unreachable, match="get Deployment ns/x: no answer in time"):
        await api.get(REF, timeout_s=0.2)
    assert time.monotonic() - began < 2
    assert server.asked[0].query == {"timeout": "200ms"}


async def test_nobody_listening():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    async with client(url) as api:
        with pytest.raises(errors.Unreachable):
            await api.get(REF)


async def test_reset_after_the_request(server, api):
    async def reset(request: web.Request) -> web.StreamResponse:
        request.transport.abort()
        return web.Response()

    server.answers = [reset] * 4
    with pytest.raises(errors.Unreachable):
        await api.create(REF, {})
    assert len(server.asked) == 1


def stream(*chunks: bytes, then: str = "end") -> Any:
    """A watch that sends these pieces, then ends, stays silent or drops the connection."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0.01)
        if then == "silence":
            await asyncio.sleep(30)
        if then == "drop":
            request.transport.abort()
        return response

    return handle


LINE = b'{"type":"ADDED","object":{"metadata":{"name":"a","resourceVersion":"8"}}}\n'
EVENT = WatchEvent("ADDED", {"metadata": {"name": "a", "resourceVersion": "8"}})


async def read(api: KubeApi, **options: Any) -> list[WatchEvent]:
    return [event async for event in api.watch(POD, resource_version="7", **options)]


async def test_a_watch_is_lines_however_they_are_cut(server, api):
    big = b'{"type":"MODIFIED","object":{"x":"' + b"y" * 1_000_000 + b'"}}\n'
    server.answers = [stream(LINE + LINE[:10], LINE[10:30], LINE[30:] + b"\n" + big + LINE)]
    events = await read(api, namespace="ns", labels="a=b", timeout_s=120.0)
    assert [event.type for event in events] == ["ADDED", "ADDED", "MODIFIED", "ADDED"]
    assert events[1] == EVENT
    assert server.asked[0].path == "/api/v1/namespaces/ns/pods"
    assert server.asked[0].query == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "7",
        "labelSelector": "a=b",
        "timeoutSeconds": "120",
    }


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (stream(LINE, then="silence"), errors.Unreachable),
        (stream(LINE, then="drop"), errors.Unreachable),
        (stream(LINE, LINE[:20] + b"\n"), errors.Unreachable),
        (stream(LINE, b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}\n'), errors.Gone),
        (stream(LINE, b'{"type":"ERROR","object":{"kind":"Status","code":500}}\n'), errors.ServerError),
    ],
    ids=["silent half-open connection", "dropped", "cut line", "410 in the stream", "error in the stream"],
)
async def test_how_a_watch_fails(server, reply, error):
    server.answers = [reply]
    async with client(server.url, silence_s=0.3) as api:
        watch = api.watch(POD, resource_version="7")
        assert await anext(watch) == EVENT
        with pytest.raises(error):
            await anext(watch)


async def test_a_refused_watch(server, api):
    server.answers = [answer("404 page not found\n", 404), status(410, "too old")]
    with pytest.raises(errors.NotFound) as raised:
        await read(api)
    assert raised.value.kind_missing
    with pytest.raises(errors.Gone):
        await read(api)


async def test_closing_a_watch_ends_its_connection(server, api):
    ended = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(LINE)
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    server.answers = [endless]
    watch = api.watch(POD, resource_version="7")
    assert await anext(watch) == EVENT
    await watch.aclose()
    await asyncio.wait_for(ended.wait(), 5)


async def test_the_kernel_is_asked_to_find_dead_peers(server):
    made: list[socket.socket] = []
    factory = http._probing(30)

    def keep(address: Any) -> socket.socket:
        made.append(factory(address))
        return made[-1]

    async with client(server.url) as api:
        api._session.connector._socket_factory = keep  # type: ignore[union-attr]
        await api.get(REF)
        option = made[0].getsockopt
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 10
        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
