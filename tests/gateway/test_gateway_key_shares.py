"""A key's limit is one, however many workers there are: what each tells, what is lost, and the whole over sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from moe_core.config import GatewayConfig, KeyLimits, SiblingsConfig
from moe_gateway import limits
from moe_gateway.key_shares import FORGET_S, SILENT_S, TOLD_MOST, TOLD_TIMES, KeyShares
from moe_gateway.limits import MINUTE_S
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import Client, chat, config, running, until
from tests.gateway.test_gateway_limits import KEY, auth
from tests.gateway.test_gateway_siblings import free_ports

ID = "acme/laptop"


def sharing() -> KeyShares:
    shares = KeyShares()
    shares.telling = True
    return shares


def taken(shares: KeyShares, now_s: float = 0.0, key: str = ID) -> tuple[int, int]:
    all_ = list(shares.elsewhere(key, now_s))
    return sum(one.requests for one in all_), sum(one.tokens for one in all_)


def test_what_one_takes_counts_at_the_other_once() -> None:
    one, other = sharing(), sharing()
    one.took(ID, 1, 0, 1)
    one.took(ID, 0, 300, 1)
    for _ in range(TOLD_TIMES):
        other.hear("one", one.tell(), 0.0)
    assert other.in_flight(ID, 0.0) == 1
    assert taken(other) == (1, 300)
    assert taken(other) == (0, 0), "asked once, counted once"
    one.took(ID, 0, -200, 0)
    other.hear("one", one.tell(), 0.0)
    assert (taken(other), other.in_flight(ID, 0.0)) == ((0, -200), 0)


@given(lost=st.lists(st.booleans(), max_size=40))
def test_what_a_lost_datagram_said_is_in_the_next_one_that_comes(lost: list[bool]) -> None:
    one, other = sharing(), sharing()
    one.took(ID, 1, 10, 1)
    other.hear("one", one.tell(), 0.0)
    for gone in lost:
        one.took(ID, 1, 10, 1)
        told = one.tell()
        if not gone:
            other.hear("one", told, 0.0)
    one.took(ID, 1, 10, 0)
    other.hear("one", one.tell(), 0.0)
    assert taken(other) == (len(lost) + 2, 10 * (len(lost) + 2))


def test_a_worker_that_comes_late_is_not_charged_for_what_was_before() -> None:
    one, late = sharing(), sharing()
    for _ in range(50):
        one.took(ID, 1, 1000, 0)
        one.tell()
    one.took(ID, 1, 1000, 0)
    late.hear("one", one.tell(), 0.0)
    assert taken(late) == (1, 1000)


def test_a_worker_that_begins_anew_under_its_name_counts_from_nothing() -> None:
    one, other = sharing(), sharing()
    for _ in range(3):
        one.took(ID, 1, 100, 0)
    other.hear("one", one.tell(), 0.0)
    again = sharing()
    again.took(ID, 1, 7, 1)
    other.hear("one", again.tell(), 1.0)
    assert taken(other, 1.0) == (4, 307)


def test_the_silent_have_nothing_in_flight_and_old_takings_no_weight() -> None:
    one, other = sharing(), sharing()
    one.took(ID, 1, 5, 3)
    other.hear("one", one.tell(), 0.0)
    assert other.in_flight(ID, SILENT_S) == 3
    assert other.in_flight(ID, SILENT_S + 0.1) == 0
    assert taken(other, MINUTE_S + 0.1) == (0, 0)
    other.hear("two", {}, FORGET_S + 1.0)
    assert other.in_flight(ID, 0.5) == 0, "a worker that went is forgotten"


def test_many_keys_take_turns_and_all_are_told() -> None:
    one, other = sharing(), sharing()
    keys = [f"k{n}" for n in range(3 * TOLD_MOST)]
    for key in keys:
        one.took(key, 1, 0, 1)
    while one.pending():
        told = one.tell()
        assert len(told) <= TOLD_MOST
        other.hear("one", told, 0.0)
    assert all(taken(other, key=key) == (1, 0) for key in keys)


def test_nothing_is_kept_where_there_is_nobody_to_tell() -> None:
    alone = KeyShares()
    alone.took(ID, 1, 1, 1)
    assert not alone.pending()
    assert alone.tell() == {}


def test_a_key_that_was_never_here_stands_where_it_would_had_all_come_here() -> None:
    limit = KeyLimits.model_validate({"requestsPerMinute": 60})
    there = limits.begun(limit, 0.0)
    here = limits.begun(limit, 0.0)
    for second in range(20):
        for _ in range(2):
            there, exceeded = limits.admit(there, float(second))
            assert exceeded is None
            here = limits.taken(here, 1, 0, float(second))
    assert here.requests == there.requests


def _settings(folder: Path, local: FakeUpstream, port: int, **limit: int) -> GatewayConfig:
    siblings = SiblingsConfig(host="127.0.0.1", port=port, workers=2)
    return config(local, auth=auth(folder, **limit), siblings=siblings.model_dump(by_alias=True))


async def _asked(client: Client) -> bool:
    """Whether the key was let in."""
    answer = await client.post(chat(), x_api_key=KEY)
    assert answer.status in {200, 429}
    return answer.status == 200


async def test_two_workers_let_a_key_have_one_limit_of_requests(tmp_path: Path) -> None:
    async with FakeUpstream() as local:
        settings = _settings(tmp_path, local, free_ports(), requestsPerMinute=6)
        async with running(settings) as one, running(settings) as other:
            gateways = [client.server.gateway for client in (one, other)]
            await until(lambda: all(each.siblings.listening for each in gateways))
            admitted = 0
            for number in range(20):
                asked, unasked = (one, other) if number % 2 else (other, one)
                if await _asked(asked):
                    admitted += 1
                    shares = unasked.server.gateway.access.shares
                    await until(lambda shares=shares: shares.knows("laptop"))
            assert 6 <= admitted <= 7, "two limits would be twelve; a bucket may fill by one meanwhile"


async def test_two_workers_let_a_key_have_one_limit_of_requests_in_flight(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with FakeUpstream(Behaviour(gate=gate)) as local:
        settings = _settings(tmp_path, local, free_ports(), concurrent=1)
        async with running(settings) as one, running(settings) as other:
            gateways = [client.server.gateway for client in (one, other)]
            await until(lambda: all(each.siblings.listening for each in gateways))
            there = gateways[1]
            held = asyncio.create_task(one.post(chat(), x_api_key=KEY))
            await until(lambda: there.access.shares.in_flight("laptop", there.clock.monotonic()) == 1)
            assert not await _asked(other)
            held.cancel()
            await until(lambda: there.access.shares.in_flight("laptop", there.clock.monotonic()) == 0)
            gate.set()
            assert await _asked(other)
