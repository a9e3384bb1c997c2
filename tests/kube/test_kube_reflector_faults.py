"""The reflector on the in-memory API server with each fault of a watch: in the end it holds what the server holds."""

from __future__ import annotations

import asyncio
import random

import pytest

from moe_core.clock import FakeClock
from moe_kube.fake import FakeCluster
from moe_kube.faults import API_ERRORS
from moe_kube.faulty import FaultyApi
from moe_kube.objects import CONFIG_MAP, RAY_SERVICE, Ref
from moe_kube.reflector import Reflector

STEPS = ("drop", "end", "gone", "duplicate", "miss_delete", "miss", "silent")
RELIST_S = 600.0


class World:
    def __init__(self, *, lag_writes: int = 0) -> None:
        self.clock = FakeClock()
        self.cluster = FakeCluster(clock=self.clock)
        self.api = FaultyApi(self.cluster.client(lag_writes=lag_writes), clock=self.clock)
        self.rng = random.Random(5)
        self.told: dict[str, int] = {}
        self.cache: Reflector[tuple[int, str]] = Reflector(
            self.api,
            CONFIG_MAP,
            project=lambda obj: (int(obj["metadata"]["resourceVersion"]), obj["data"]["value"]),
            clock=self.clock,
            on_change=self.check,
            relist_every_s=RELIST_S,
            page=3,
            rng=random.Random(9),
        )

    def check(self, on: Ref, old: tuple[int, str] | None, new: tuple[int, str] | None) -> None:
        """Never back in version, and `old` is what was told before."""
        if new is not None:
            assert new[0] > self.told.get(on.name, 0)
            self.told[on.name] = new[0]

    def churn(self, writes: int) -> None:
        for number in range(writes):
            ref = Ref(CONFIG_MAP, "default", f"c{self.rng.randrange(6)}")
            if self.cluster.find(ref) is not None and self.rng.random() < 0.4:
                self.cluster.delete(ref)
            else:
                self.cluster.apply(ref, {"data": {"value": str(number)}}, manager="test")

    def holds_what_the_server_holds(self) -> bool:
        live = {obj["metadata"]["name"]: obj["data"]["value"] for obj in self.cluster.peek(CONFIG_MAP, "default")}
        return {on.name: value for on, (_, value) in self.cache.items()} == live


@pytest.fixture
async def world(request):
    it = World(**getattr(request, "param", {}))
    it.churn(8)
    task = asyncio.create_task(it.cache.run())
    yield it
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("step", STEPS)
async def test_each_fault_of_a_watch(world, step, after):
    await world.clock.advance(1)
    rule = world.api.add_watch(step, kind=CONFIG_MAP, after=after, times=3)
    for _ in range(10):
        world.churn(3)
        await world.clock.advance(40)
    await world.clock.advance(400)
    assert rule.met >= 1
    world.api.calm()
    await world.clock.advance(3 * RELIST_S)
    assert world.holds_what_the_server_holds()


@pytest.mark.parametrize("name", API_ERRORS)
async def test_each_error_of_a_list_and_of_a_watch(world, name):
    await world.clock.advance(1)
    world.api.add_watch("gone")
    rules = [world.api.add(API_ERRORS[name], verbs=frozenset({verb}), times=5) for verb in ("list", "watch")]
    for _ in range(10):
        world.churn(2)
        await world.clock.advance(30)
    assert [rule.met for rule in rules] == [5, 5]
    await world.clock.advance(20)
    assert world.holds_what_the_server_holds()
    assert world.cache.trouble is None


@pytest.mark.parametrize("world", [{"lag_writes": 4}], indirect=True)
async def test_reads_that_are_writes_behind(world):
    for _ in range(10):
        world.churn(3)
        world.api.stale_lists = 2
        world.api.add_watch("gone")
        await world.clock.advance(60)
    world.cluster.apply(Ref(CONFIG_MAP, "default", "c0"), {"data": {"value": "last"}}, manager="test")
    world.api.inner.lag_writes = 0
    await world.clock.advance(3 * RELIST_S)
    assert world.holds_what_the_server_holds()


async def test_history_that_is_compacted_while_the_connection_is_down(world):
    await world.clock.advance(1)
    world.api.add_watch("drop")
    world.churn(20)
    world.cluster.compact()
    await world.clock.advance(60)
    assert world.holds_what_the_server_holds()


async def test_a_kind_that_is_removed_and_installed_again():
    clock = FakeClock()
    cluster = FakeCluster(clock=clock)
    told: list[bool] = []
    cache: Reflector[str] = Reflector(
        cluster.client(), RAY_SERVICE, project=lambda obj: obj["metadata"]["uid"], clock=clock, on_absent=told.append
    )
    cluster.remove(RAY_SERVICE)
    task = asyncio.create_task(cache.run())
    await clock.advance(100)
    assert cache.absent
    for _ in range(2):
        cluster.install(RAY_SERVICE)
        cluster.create(Ref(RAY_SERVICE, "default", "r"), {"spec": {}})
        await clock.advance(60)
        assert len(cache) == 1
        cluster.remove(RAY_SERVICE)
        await clock.advance(60)
        assert (cache.absent, len(cache)) == (True, 0)
    assert told == [True, False, True, False, True]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
