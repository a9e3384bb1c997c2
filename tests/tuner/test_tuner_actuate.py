"""Actuation against a board that loses posts, restarts and is overtaken: one version, once, everywhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from moe_core.http import session
from moe_core.log import get_log
from moe_core.signing import Signer
from moe_tuner.actuate import ActuationFailed, Actuator, Overtaken
from tests.tuner.fakes import DEPLOYMENT, FakeBoard, FakeGateway, InstantClock, served
from tests.tuner.tuner_world import setting


@dataclass
class Bench:
    board: FakeBoard
    gateway: FakeGateway
    actuator: Actuator
    gateway_url: str


@asynccontextmanager
async def bench(signer: Signer | None = None) -> AsyncIterator[Bench]:
    trusted = Signer.generate()
    board, gateway = FakeBoard(trusted), FakeGateway()
    async with served(board.routes()) as board_url, served(gateway.routes()) as gateway_url, session() as client:
        actuator = Actuator(
            deployment=DEPLOYMENT,
            board_url=board_url,
            gateway_urls=[gateway_url],
            signer=signer or trusted,
            client=client,
            clock=InstantClock(),
            log=get_log("test"),
        )
        yield Bench(board, gateway, actuator, gateway_url)


async def test_a_change_reaches_board_and_gateway_and_is_acknowledged() -> None:
    async with bench() as b:
        sent = await b.actuator.send(setting("1.5"))
        report = await b.actuator.settle(sent)
        assert report.complete
        assert report.seconds is not None
        assert [knobs.version for knobs in b.board.applied] == [1]
        assert b.board.applied[0].experts.capacity_factor_prefill == setting("1.5").experts.capacity_factor_prefill
        assert b.gateway.versions == [1]


async def test_versions_go_on_from_what_the_board_and_the_replicas_have() -> None:
    async with bench() as b:
        b.board.put(setting().knobs(DEPLOYMENT, 7))
        assert (await b.actuator.send(setting("2"))).knobs.version == 8
        b.actuator.heard([20])
        assert (await b.actuator.send(setting("1"))).knobs.version == 21


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 1), (1, 1)], ids=["lost request", "lost answer", "both"])
async def test_lost_posts_are_sent_again_and_applied_once(before: int, after: int) -> None:
    async with bench() as b:
        b.board.lose_before, b.board.lose_after = before, after
        sent = await b.actuator.send(setting("1.5"))
        assert sent.knobs.version == 1
        assert len(b.board.applied) == 1
        assert b.board.posts == before + after + 1


async def test_a_board_that_is_down_gets_no_half_applied_change() -> None:
    async with bench() as b:
        b.board.down = True
        with pytest.raises(ActuationFailed, match="knobs were not sent"):
            await b.actuator.send(setting("1.5"))
        assert b.gateway.versions == []


async def test_a_change_whose_answer_stays_lost_is_reported_as_doubtful() -> None:
    async with bench() as b:
        b.board.lose_after, b.board.lose_afterwards = 1, 99
        with pytest.raises(ActuationFailed) as failed:
            await b.actuator.send(setting("1.5"))
        assert failed.value.doubtful == b.board.knobs
        assert b.gateway.versions == []


async def test_another_writers_newer_version_wins() -> None:
    async with bench() as b:
        theirs = setting("1.2").knobs(DEPLOYMENT, 5)
        read_current = b.actuator.current

        async def overtaken_after_reading():  # type: ignore[no-untyped-def]
            knobs = await read_current()
            if b.board.version < 5:
                b.board.put(theirs)
            return knobs

        b.actuator.current = overtaken_after_reading  # type: ignore[method-assign]
        with pytest.raises(Overtaken) as overtaken:
            await b.actuator.send(setting("2"))
        assert overtaken.value.version == 5
        assert overtaken.value.knobs == theirs
        assert b.gateway.versions == []
        assert (await b.actuator.send(setting("2"))).knobs.version == 6


async def test_a_key_that_the_board_does_not_trust_fails_at_once() -> None:
    async with bench(signer=Signer.generate()) as b:
        with pytest.raises(ActuationFailed, match="refused"):
            await b.actuator.send(setting("2"))
        assert b.board.posts == 1


async def test_a_silent_rank_is_named_after_the_deadline() -> None:
    async with bench() as b:
        b.board.silent_rank = 1
        report = await b.actuator.settle(await b.actuator.send(setting("2")))
        assert not report.complete
        assert report.missing == ("r0/1",)
        assert report.seconds is None


async def test_a_rank_that_refuses_is_told_at_once() -> None:
    async with bench() as b:
        b.board.refuse = "γ·k < 1"
        report = await b.actuator.settle(await b.actuator.send(setting("2")))
        assert report.errors == ("r0/0: γ·k < 1", "r0/1: γ·k < 1")


async def test_a_gateway_that_was_busy_gets_the_knobs_again() -> None:
    async with bench() as b:
        b.gateway.refuse = 2
        report = await b.actuator.settle(await b.actuator.send(setting("2")))
        assert report.complete
        assert b.gateway.versions == [1]


async def test_a_board_and_a_gateway_that_restart_get_the_same_version_again() -> None:
    async with bench() as b:
        await b.actuator.send(setting("2"))
        b.board.envelope, b.board.version = None, 0
        b.gateway.versions.clear()
        await b.actuator.resend(None, {b.gateway_url: 0})
        assert b.board.version == 1
        assert b.gateway.versions == [1]
        posts = b.board.posts
        await b.actuator.resend(b.board.knobs, {b.gateway_url: 1})
        assert b.board.posts == posts
        assert b.gateway.versions == [1]
