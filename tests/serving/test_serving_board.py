"""Board, link and control together: a real board over real HTTP, with a fake engine behind the replica."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from moe_core.clock import SystemClock
from moe_core.log import get_log
from moe_core.passes import Passes
from moe_core.signing import Signer, Verifier
from moe_core.wire import EngineKnobs, ExpertKnobs, ExpertMatrix, Knobs, Overflow
from moe_serving import link as link_module
from moe_serving.board import Board
from moe_serving.control import Control
from moe_serving.link import Link

SIGNER = Signer.generate()
DEPLOYMENT = "default/tiny"
PASS = {"Authorization": f"Bearer {Passes(SIGNER, SystemClock()).token(DEPLOYMENT)}"}


SHAPES = {
    "fixed_bytes": 100, "token_params": 40, "router_params": 8, "head_params": 10, "score_width": 0, "weight_bytes": 2,
    "experts": [{"bytes": 20.0, "params": 10.0, "whole": True}],
}  # fmt: skip
WORK = {"tokens": 5, "pairs": 15, "decode_steps": 2, "decode_busy_s": 0.25, "decode_kv_bytes": 30.0}


class FakeEngine:
    """Two ranks with the rules of the real one: limits are checked, an older version changes nothing."""

    def __init__(self) -> None:
        self.limits = (16, 512)
        self.version = 0
        self.knobs = ExpertKnobs()
        self.refuse = ""
        self.fails = 0

    async def ranks(self, method: str, *args: Any) -> list[dict[str, Any]]:
        if method == "moestack_start":
            return [[{"layer": 0, "name": "l0", "hooked": True}]] * 2  # type: ignore[list-item]
        if method == "moestack_shapes":
            return [SHAPES] * 2
        if self.fails:
            self.fails -= 1
            raise TimeoutError
        if method == "moestack_apply":
            if not self.refuse:
                self.knobs, self.version = ExpertKnobs.model_validate_json(args[0]), args[1]
            return [
                {"rank": r, "version": self.version, "step": 3, "at_s": 1.0, "error": self.refuse or None}
                for r in range(2)
            ]
        layer = {
            "layer": 0, "hooked": True, "demand": [6, 2, 1, 1], "assigned": [3, 3, 2, 2], "tokens": 5, "dropped": 0,
            "rerouted": 3, "overflow_kept": 0, "lost_gate_mass": 0.25, "max_prefill_load": 3, "touched": 4,
        }  # fmt: skip
        return [
            {
                "rank": r, "knobs": self.knobs.model_dump_json(by_alias=True), "version": self.version, "steps": 4,
                "prompt_tokens": 5, "generated_tokens": 2, "busy_s": 0.5, "moe_s": 0.1 * (r + 1), "work": WORK,
                "layers": [{**layer, "mine": [0, 1] if r == 0 else [2, 3]}],
            }
            for r in range(2)
        ]  # fmt: skip

    async def core(self, method: str, *args: Any) -> Any:
        if method == "moestack_set_limits":
            seqs, tokens = args[0] or 16, args[1] or 512
            if seqs > 16:
                raise RuntimeError("Call failed\nengine.maxActiveSeqs 99 is outside 1 to 16, the launch-time ceiling")
            self.limits = (seqs, tokens)
            return {}
        return {
            "running": 1, "waiting": 2, "kv_usage": 0.5, "active_seqs": self.limits[0],
            "batched_tokens": self.limits[1], "ceiling_active_seqs": 16, "ceiling_batched_tokens": 512,
        }  # fmt: skip


class World:
    """A board, a replica linked to it, and an HTTP client."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.board = self.new_board(0)
        self.url = ""
        self.refusals = 0

    @staticmethod
    def new_board(port: int) -> Board:
        return Board(DEPLOYMENT, "local", [SIGNER.public_pem()], "127.0.0.1", port)

    async def connect(self) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("the actor is restarting")
        self.url = await self.board.start()
        return self.board

    async def get(self, path: str) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as client, client.get(self.url + path, headers=PASS) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text

    async def post(self, body: object) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as client, client.post(self.url + "/v1/knobs", json=body) as answer:
            return answer.status, await answer.json()

    async def send(self, knobs: Knobs) -> tuple[int, Any]:
        return await self.post(SIGNER.sign(knobs).to_json())

    async def until(self, path: str, check: Any) -> Any:
        for _ in range(300):
            with contextlib.suppress(aiohttp.ClientError):
                value = (await self.get(path))[1]
                if check(value):
                    return value
            await asyncio.sleep(0.01)
        raise AssertionError(f"{path} never became right: {value}")


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(link_module, "DIGEST_EVERY_S", 0.02)
    monkeypatch.setattr(link_module, "RETRY_S", 0.02)
    it = World()
    await it.connect()
    control = Control(it.engine, "replica-1", "local")
    await control.start()
    task = asyncio.create_task(
        Link(control, it.connect, Verifier([SIGNER.public_pem()]), SystemClock(), get_log("test")).run()
    )
    await it.until("/v1/digests", lambda digests: digests)
    yield it
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await it.board.close()


EXPERTS = {
    "overflow": "Reroute",
    "capacityFactorPrefill": "1.25",
    "capacityFactorByLayer": {"1": {"prefill": "2", "decode": "1.5"}},
}


def knobs(version: int, **engine: int) -> Knobs:
    return Knobs(
        deployment=DEPLOYMENT,
        version=version,
        experts=ExpertKnobs.model_validate(EXPERTS),
        engine=EngineKnobs.model_validate(engine),
    )


async def test_knobs_reach_every_rank_and_are_acknowledged(world: World) -> None:
    assert (await world.get("/v1/knobs"))[0] == 404
    assert await world.send(knobs(5, max_active_seqs=4)) == (202, {"version": 5})
    acks = await world.until("/v1/acks?version=5", lambda value: value["complete"])
    assert sorted((ack["replica"], ack["rank"], ack["version"]) for ack in acks["acks"]) == [
        ("replica-1", 0, 5),
        ("replica-1", 1, 5),
    ]
    assert world.engine.knobs.overflow is Overflow.REROUTE
    assert world.engine.limits == (4, 512)
    digest = (await world.until("/v1/digests", lambda value: value[0]["knobsVersion"] == 5))[0]
    assert digest["engine"]["maxActiveSeqs"] == 4
    assert digest["knobs"] == {**EXPERTS, "perToken": {}}
    assert (await world.get("/v1/knobs"))[0] == 200


async def test_the_same_knobs_again_change_nothing_and_older_ones_are_refused(world: World) -> None:
    first = SIGNER.sign(knobs(5)).to_json()
    assert (await world.post(first))[0] == 202
    assert await world.post(first) == (200, {"version": 5})
    status, answer = await world.send(knobs(4))
    assert (status, answer["version"]) == (409, 5)
    status, answer = await world.send(knobs(5, max_active_seqs=3))
    assert (status, answer["version"]) == (409, 5)


async def test_only_trusted_keys_change_knobs(world: World) -> None:
    forged = Signer.generate().sign(knobs(9)).to_json()
    assert (await world.post(forged))[0] == 403
    changed = {**SIGNER.sign(knobs(9)).to_json(), "payload": knobs(10).model_dump_json(by_alias=True)}
    assert (await world.post(changed))[0] == 403
    assert (await world.get("/v1/knobs"))[0] == 404


@pytest.mark.parametrize("body", [{}, {"kind": "Knobs"}, [1], {"kind": "Knobs", "payload": 3}, "text"])
async def test_malformed_commands_are_refused(world: World, body: object) -> None:
    assert (await world.post(body))[0] == 422


async def test_knobs_for_another_deployment_are_refused(world: World) -> None:
    status, answer = await world.send(Knobs(deployment="default/other", version=1))
    assert status == 422
    assert "default/other" in answer["error"]


async def test_a_replica_that_restarts_gets_the_limits_in_force_and_each_version_acts_once(world: World) -> None:
    sent = SIGNER.sign(knobs(5, max_active_seqs=4, max_batched_tokens=64)).to_json()
    assert (await world.post(sent))[0] == 202
    await world.until("/v1/acks?version=5", lambda value: value["complete"])
    engine, calls = FakeEngine(), list[str]()
    core = engine.core

    async def counted(method: str, *args: Any) -> Any:
        calls.append(method)
        return await core(method, *args)

    engine.core = counted  # type: ignore[method-assign]
    control = Control(engine, "replica-2", "local")
    await control.start()
    link = Link(control, world.connect, Verifier([SIGNER.public_pem()]), SystemClock(), get_log("test"))
    task = asyncio.create_task(link.run())
    try:
        acks = await world.until("/v1/acks?version=5", lambda value: len(value["acks"]) == 4 and value["complete"])
        assert {ack["replica"] for ack in acks["acks"]} == {"replica-1", "replica-2"}
        assert engine.limits == world.engine.limits == (4, 64)
        assert engine.knobs == world.engine.knobs
        assert await world.post(sent) == (200, {"version": 5})
        again = await control.apply(Knobs.model_validate_json(sent["payload"]))
        assert [(ack.version, ack.error) for ack in again] == [(5, None)] * 2
        assert calls.count("moestack_set_limits") == 1
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_what_the_engine_refuses_is_not_half_applied(world: World) -> None:
    await world.send(knobs(1, max_active_seqs=8))
    await world.until("/v1/acks?version=1", lambda value: value["complete"])
    await world.send(knobs(2, max_active_seqs=99))
    acks = await world.until("/v1/acks?version=2", lambda value: len(value["acks"]) == 2)
    assert not acks["complete"]
    assert all("engine.maxActiveSeqs 99 is outside 1 to 16" in ack["error"] for ack in acks["acks"])
    world.engine.refuse = "experts.overflow: layer 3 bypasses the router"
    await world.send(knobs(3, max_active_seqs=2))
    acks = await world.until("/v1/acks?version=3", lambda value: len(value["acks"]) == 2)
    assert all("bypasses" in ack["error"] for ack in acks["acks"])
    assert (world.engine.limits, world.engine.version) == ((8, 512), 1)


async def test_a_board_that_died_gets_its_knobs_back_from_the_replica(world: World) -> None:
    await world.send(knobs(7))
    await world.until("/v1/acks?version=7", lambda value: value["complete"])
    port = int(world.url.rsplit(":", 1)[1])
    dead = world.board
    world.board = world.new_board(port)
    for name in ("wait", "report", "acknowledge"):
        setattr(dead, name, _gone)
    await dead.close()
    status = await world.until("/v1/knobs", lambda value: "payload" in value)
    assert json.loads(status["payload"])["version"] == 7
    assert (await world.send(knobs(6)))[0] == 409


async def test_the_link_outlives_a_board_that_is_slow_to_come_back_and_an_engine_that_is_slow_to_answer(
    world: World,
) -> None:
    world.refusals, world.engine.fails = 3, 1
    assert (await world.send(knobs(8)))[0] == 202
    acks = await world.until("/v1/acks?version=8", lambda value: value["complete"])
    assert len(acks["acks"]) == 2


async def test_a_refusal_is_told_again_to_a_board_that_forgot_it(world: World) -> None:
    world.engine.refuse = "experts.overflow: layer 3 bypasses the router"
    await world.send(knobs(3))
    await world.until("/v1/acks?version=3", lambda value: len(value["acks"]) == 2)
    port = int(world.url.rsplit(":", 1)[1])
    dead = world.board
    world.board = world.new_board(port)
    for name in ("wait", "report", "acknowledge"):
        setattr(dead, name, _gone)
    await dead.close()
    acks = await world.until("/v1/acks?version=3", lambda value: len(value["acks"]) == 2)
    assert not acks["complete"]
    assert all("bypasses" in ack["error"] for ack in acks["acks"])


async def test_a_cancelled_caller_leaves_nothing_half_applied() -> None:
    engine = FakeEngine()
    control = Control(engine, "r", "local")
    await control.start()
    slow = asyncio.Event()
    ranks = engine.ranks

    async def hold(method: str, *args: Any) -> list[dict[str, Any]]:
        await slow.wait()
        return await ranks(method, *args)

    engine.ranks = hold  # type: ignore[method-assign]
    task = asyncio.create_task(control.apply(knobs(2, max_active_seqs=4)))
    await asyncio.sleep(0.01)
    task.cancel()
    slow.set()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.01)
    assert (engine.limits, engine.version, control.version) == ((4, 512), 2, 2)


async def _gone(*_: object) -> None:
    raise ConnectionError("the board is dead")


async def test_metrics_carry_load_and_imbalance(world: World) -> None:
    text = (await world.get("/metrics"))[1]
    labels = 'deployment="default/tiny",layer="0",replica="replica-1",revision="local"'
    assert f"moestack_expert_slots_total{{{labels}}} 10.0" in text
    assert f"moestack_expert_rerouted_slots_total{{{labels}}} 3.0" in text
    assert 'moestack_rank_moe_seconds_total{deployment="default/tiny",rank="1"' in text
    assert 'phase="prefill",replica="replica-1",revision="local"} +Inf' in text
    # Two decode steps: 2 · (100 + 100) fixed, 4 · 20 of experts, 30 + 30 of cache.
    assert 'moestack_engine_decode_read_bytes_total{deployment="default/tiny",replica="replica-1"' in text
    assert " 540.0\n" in text
    assert "smbu_ratio{" not in text, "no peak of this hardware is known, so there is no ratio"


async def test_the_matrix_is_fetched_on_request(world: World) -> None:
    status, matrices = await world.get("/v1/experts")
    assert status == 200
    found = ExpertMatrix.model_validate(matrices[0])
    assert (found.replica, found.ranks, found.knobs_version) == ("replica-1", 2, 0)
    assert (found.layers[0].demand, found.layers[0].assigned) == ((6, 2, 1, 1), (3, 3, 2, 2))
    assert (found.layers[0].rank_demand, found.layers[0].rank_assigned) == ((8, 2), (6, 4))


async def test_two_who_ask_for_the_matrix_at_once_are_both_answered(world: World) -> None:
    answers = await asyncio.gather(*(world.get("/v1/experts") for _ in range(3)))
    assert [len(matrices) for _, matrices in answers] == [1, 1, 1]


@pytest.mark.parametrize("shown", [{}, {"Authorization": "Bearer x"}, {"Authorization": PASS["Authorization"][:-8]}])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/knobs", "/v1/acks", "/v1/experts", "/v1/none", "/", "/METRICS"])
async def test_a_stranger_learns_nothing(world: World, method: str, path: str, shown: dict[str, str]) -> None:
    async with aiohttp.ClientSession() as client, client.request(method, world.url + path, headers=shown) as answer:
        assert answer.status == 401
        assert DEPLOYMENT.encode() not in await answer.read()


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/v1/digests"])
async def test_who_scrapes_probes_and_routes_needs_no_pass(world: World, path: str) -> None:
    async with aiohttp.ClientSession() as client, client.get(world.url + path) as answer:
        assert answer.status == 200
