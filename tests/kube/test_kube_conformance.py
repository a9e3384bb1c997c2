"""The in-memory API server passes the suite that the real one passes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from moe_core.clock import FakeClock
from moe_kube.fake import FakeCluster
from moe_kube.fake_kinds import ALL
from moe_kube.objects import CONFIG_MAP, Ref
from tests.kube.conformance import CASES, Server


@pytest.mark.parametrize("name", CASES)
async def test_the_api_server_in_memory(name: str) -> None:
    clock = FakeClock()
    cluster = FakeCluster(clock=clock)
    api = cluster.client("tester")

    async def collect(done: Callable[[], Awaitable[bool]]) -> None:
        cluster.collect_garbage()
        assert await done()

    async def forget(token: str) -> str:
        cluster.create(Ref(CONFIG_MAP, "test", "later"), {})
        cluster.compact()
        return token

    server = Server(api, "test", clock.sleep, forget, collect, frozenset(ALL))
    run = asyncio.create_task(CASES[name](server))  # type: ignore[arg-type]
    while not run.done():
        await clock.advance(0.1)
    await run
