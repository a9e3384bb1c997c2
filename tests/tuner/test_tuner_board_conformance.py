"""What the tuner relies on at a board, held by the real one and by the fake that its other tests use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from moe_core.http import session
from moe_core.log import get_log
from moe_core.signing import Signer
from moe_core.wire import Ack
from moe_serving.board import Board
from moe_tuner.actuate import Actuator
from moe_tuner.world import World, boot_setting
from tests.tuner.fakes import DEPLOYMENT, FakeBoard, InstantClock, replica_digest, served
from tests.tuner.tuner_world import setting

pytestmark = pytest.mark.parametrize("kind", ["fake", "real"])


@asynccontextmanager
async def board_of(kind: str, signer: Signer) -> AsyncIterator[str]:
    if kind == "fake":
        async with served(FakeBoard(signer).routes()) as url:
            yield url
        return
    board = Board(DEPLOYMENT, "local", [signer.public_pem()], "127.0.0.1", 0, InstantClock())
    url = await board.start()
    try:
        await board.register("r0", 2, None)
        await board.report(replica_digest(seq=1).to_json())
        for version in range(1, 4):
            acks = [Ack(replica="r0", rank=rank, version=version, applied_at_s=0.0).to_json() for rank in range(2)]
            await board.acknowledge(version, acks)
        yield url
    finally:
        await board.close()


def actuator(url: str, signer: Signer, client: aiohttp.ClientSession) -> Actuator:
    return Actuator(
        deployment=DEPLOYMENT,
        board_url=url,
        gateway_urls=(),
        signer=signer,
        client=client,
        clock=InstantClock(),
        log=get_log("test"),
    )


async def test_statuses_of_a_post(kind: str) -> None:
    signer = Signer.generate()
    async with board_of(kind, signer) as url, session() as client:

        async def post(version: int, gamma: str, key: Signer = signer) -> tuple[int, dict[str, object]]:
            envelope = key.sign(setting(gamma).knobs(DEPLOYMENT, version))
            async with client.post(f"{url}/v1/knobs", json=envelope.to_json()) as response:
                return response.status, await response.json()

        shown = {"Authorization": f"Bearer {actuator(url, signer, client).shown}"}
        assert (await client.get(f"{url}/v1/knobs", headers=shown)).status == 404
        assert await post(2, "1.5") == (202, {"version": 2})
        assert await post(2, "1.5") == (200, {"version": 2})
        status, answer = await post(1, "1.5")
        assert (status, answer["version"]) == (409, 2)
        status, answer = await post(2, "2")
        assert (status, answer["version"]) == (409, 2)
        assert (await post(3, "2", Signer.generate()))[0] == 403


async def test_a_sent_setting_is_acknowledged_and_read_back(kind: str) -> None:
    signer = Signer.generate()
    async with board_of(kind, signer) as url, session() as client:
        hand = actuator(url, signer, client)
        assert await hand.current() is None
        sent = await hand.send(setting("1.5"))
        assert (await hand.settle(sent)).complete
        assert await hand.current() == sent.knobs


async def test_digests_are_read_and_tell_what_a_replica_booted_with(kind: str) -> None:
    signer = Signer.generate()
    async with board_of(kind, signer) as url, session() as client:
        reading = await World(client, actuator(url, signer, client), url).read()
        assert reading.board_up
        assert reading.in_force is None
        assert reading.observation.missing == ()
        assert reading.observation.replicas is not None
        boot = boot_setting(reading.observation.replicas)
        assert boot is not None
        assert boot.engine.max_active_seqs == 16
        assert boot.engine.max_batched_tokens is None
