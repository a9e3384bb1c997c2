"""Gateways and boards as they may be: honest, slow, gone, lying, endless, or pointing elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from moe_core.clock import SystemClock
from moe_core.passes import Door
from moe_core.signing import Signer, Verifier
from moe_core.wire import Signed, Weights
from moe_operator.fleet import MAX_BOARD_BYTES, MAX_DIGEST_BYTES, HttpFleet
from moe_operator.requests import AskGateways, SendWeights

KEY = ("serving", "moe")
WEIGHTS = Weights(deployment="serving/moe", version=4, percent={"a": 20, "b": 80})
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[..., Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a server with one handler for each `METHOD /path`; its host:port."""
    runners: list[web.AppRunner] = []

    async def start(**routes: Handler) -> str:
        app = web.Application()
        for route, handler in routes.items():
            method, _, path = route.partition(" ")
            app.router.add_route(method, path, handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def fleet() -> AsyncIterator[HttpFleet]:
    made = HttpFleet(None)
    yield made
    await made.close()


def digest(**more: Any) -> dict[str, Any]:
    row = {"name": "a", "local": True, "requests": 3, "met": 2, "missed": 1, "inFlight": 1}
    return {"gateway": "g", "atS": 1.0, "windowS": 30.0, "weightsVersion": 2, "targets": [row], **more}


def answers(document: Any, status: int = 200) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        body = document if isinstance(document, bytes) else orjson.dumps(document)
        return web.Response(body=body, status=status, content_type="application/json")

    return handler


def replica(name: str, *ratios: float | None, ranks: int = 4) -> dict[str, Any]:
    engine = {"maxActiveSeqs": 1, "maxBatchedTokens": 1, "ceilingActiveSeqs": 1, "ceilingBatchedTokens": 1}
    layers = [{"layer": i, "hooked": True, "slotsTotal": 1, "rankMaxOverMean": ratio} for i, ratio in enumerate(ratios)]
    return {
        "replica": name,
        "startedAtS": 0.0,
        "atS": 1.0,
        "seq": 1,
        "ranks": ranks,
        "engine": engine,
        "layers": layers,
    }


def ask(*pods: str, boards: tuple[str, ...] = (), window_s: float = 30.0) -> AskGateways:
    return AskGateways(KEY, pods, boards, window_s)


async def test_every_gateway_is_asked_for_the_window_at_once(serve: Serve, fleet: HttpFleet) -> None:
    windows: list[str] = []
    together = asyncio.Barrier(3)

    async def handler(request: web.Request) -> web.Response:
        windows.append(request.query["window"])
        await together.wait()  # answers only when all three are asked
        return web.Response(body=orjson.dumps(digest()), content_type="application/json")

    pods = [await serve(**{"GET /v1/digest": handler}) for _ in range(3)]
    found = await fleet.ask(ask(*pods, window_s=12.5))
    assert (len(found.digests), found.silent, found.imbalance) == (3, 0, None)
    assert windows == ["12.5"] * 3
    assert found.digests[0].targets[0].missed == 1


async def hangs(_: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


async def cut(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"gateway"')
    assert request.transport is not None
    request.transport.close()
    return response


BAD: dict[str, Handler] = {
    "an error": answers({"error": "no"}, 500),
    "no JSON": answers(b"<html>"),
    "a list": answers([digest()]),
    "a field of another type": answers(digest(arrivals="many")),
    "an unknown field": answers(digest(secret=1)),
    "a negative count": answers(digest(arrivals=-1)),
    "a count that no status can hold": answers(digest(weightsVersion=2**40)),
    "a negative count of a target": answers(digest(targets=[{"name": "a", "local": True, "met": -5}])),
    "a window of nothing": answers(digest(windowS=0)),
    "a time that is none": answers(digest(ttftP95S=-1.0)),
    "more than a digest can be": answers(b" " * MAX_DIGEST_BYTES + orjson.dumps(digest())),
    "a redirect": answers(b"", 307),
    "silence": hangs,
    "half an answer": cut,
}


@pytest.mark.parametrize("handler", BAD.values(), ids=BAD.keys())
async def test_a_bad_answer_counts_as_silent_and_the_others_stand(
    handler: Handler, serve: Serve, fleet: HttpFleet
) -> None:
    good = await serve(**{"GET /v1/digest": answers(digest())})
    bad = await serve(**{"GET /v1/digest": handler})
    began = time.monotonic()
    found = await fleet.ask(ask(good, bad, "127.0.0.1:1"))
    assert (len(found.digests), found.silent) == (1, 2)
    assert time.monotonic() - began < 4.0


async def test_no_redirect_of_a_gateway_is_followed(serve: Serve, fleet: HttpFleet) -> None:
    asked: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(body=orjson.dumps(digest()), content_type="application/json")

    other = await serve(**{"GET /latest/credentials": elsewhere})

    async def points(_: web.Request) -> web.Response:
        raise web.HTTPFound(f"http://{other}/latest/credentials")

    pod = await serve(**{"GET /v1/digest": points})
    assert (await fleet.ask(ask(pod))).silent == 1
    assert asked == []


async def test_imbalance_is_the_mean_over_replicas_of_the_largest_layer(serve: Serve, fleet: HttpFleet) -> None:
    one = await serve(**{"GET /v1/digests": answers([replica("r1", 1.2, 2.0), replica("r2", None, 1.5)])})
    two = await serve(**{"GET /v1/digests": answers([replica("r3", 1.1), replica("idle", None)])})
    found = await fleet.ask(ask(boards=(f"http://{one}", f"http://{two}", "http://127.0.0.1:1")))
    assert found.imbalance == pytest.approx((2.0 + 1.5 + 1.1) / 3)
    assert found.silent == 0


@pytest.mark.parametrize(
    "document",
    [
        pytest.param([replica("r", 9.0, ranks=4)], id="more than all of the load on one rank"),
        pytest.param([replica("r", -1.0)], id="less than nothing"),
        pytest.param({"not": "a list"}, id="no list"),
        pytest.param(b" " * (MAX_BOARD_BYTES + 1), id="endless"),
    ],
)
async def test_an_imbalance_that_cannot_be_is_none(document: Any, serve: Serve, fleet: HttpFleet) -> None:
    board = await serve(**{"GET /v1/digests": answers(document)})
    assert (await fleet.ask(ask(boards=(f"http://{board}",)))).imbalance is None


# -- weights


async def test_weights_are_signed_and_those_who_took_them_are_counted(serve: Serve, tmp_path: Path) -> None:
    signer, got = Signer.generate(), []
    signer.save(tmp_path / "key")

    async def take(request: web.Request) -> web.Response:
        got.append(await request.read())
        return web.Response(body=b"{}", content_type="application/json")

    good = await serve(**{"PUT /v1/weights": take})
    old = await serve(**{"PUT /v1/weights": answers({"error": "older"}, 409)})
    made = HttpFleet(str(tmp_path / "key"))
    assert await made.send(SendWeights((good, old, "127.0.0.1:1"), WEIGHTS)) == 1
    await made.close()
    envelope = Signed.model_validate_json(got[0])
    assert Verifier([signer.public_pem()]).open(envelope, Weights) == WEIGHTS


async def test_without_a_key_nothing_is_sent_and_it_is_said_once(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        got.append(await request.read())
        return web.Response(body=b"{}")

    pod = await serve(**{"PUT /v1/weights": take})
    made = HttpFleet(str(tmp_path / "none"))
    for _ in range(3):
        assert await made.send(SendWeights((pod,), WEIGHTS)) == 0
    assert got == []
    assert [r.getMessage() for r in caplog.records].count("weights are not sent") == 1
    Signer.generate().save(tmp_path / "none")
    assert await made.send(SendWeights((pod,), WEIGHTS)) == 1
    await made.close()


async def test_a_key_that_was_changed_is_read_again(serve: Serve, tmp_path: Path) -> None:
    got: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        got.append(await request.read())
        return web.Response(body=b"{}")

    pod, path = await serve(**{"PUT /v1/weights": take}), tmp_path / "key"
    signers = [Signer.generate(), Signer.generate()]
    made = HttpFleet(str(path))
    for signer in signers:
        path.unlink(missing_ok=True)
        signer.save(path)
        await made.send(SendWeights((pod,), WEIGHTS))
    await made.close()
    assert [Signed.model_validate_json(raw).key_id for raw in got] == [signer.key_id for signer in signers]


async def test_who_is_asked_is_shown_a_pass_for_that_deployment_alone(serve: Serve, tmp_path: Path) -> None:
    signer = Signer.generate()
    signer.save(tmp_path / "key")
    verifier, seen = Verifier([signer.public_pem()]), []

    async def take(request: web.Request) -> web.Response:
        shown = request.headers["Authorization"]
        names = ("/".join(KEY), "another/moe")
        seen.append([Door(name, lambda: verifier, SystemClock()).admits(shown) for name in names])
        return web.json_response(digest() if request.path == "/v1/digest" else [replica("r1", 1.5)])

    pod = await serve(**{"GET /v1/digest": take})
    board = await serve(**{"GET /v1/digests": take})
    made = HttpFleet(str(tmp_path / "key"))
    found = await made.ask(ask(pod, boards=(f"http://{board}",)))
    await made.close()
    assert (len(found.digests), found.imbalance) == (1, 1.5)
    assert seen == [[True, False]] * 2
