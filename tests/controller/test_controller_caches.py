"""What the operator's caches know, whom a change wakes, and what happens when a kind comes or goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from moe_api.annotations import DEPLOYMENT_LABEL
from moe_core.clock import FakeClock
from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.fake import FakeCluster
from moe_kube.faults import after, answer
from moe_kube.faulty import FaultyApi
from moe_kube.objects import Kind, Obj, Ref
from moe_operator.caches import Caches
from moe_operator.children import Key
from moe_operator.names import MANAGED_BY

KEY: Key = ("a", "moe")
SPEC: Obj = {"model": {"id": "org/model"}, "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4}}


@dataclass
class Bench:
    config: OperatorConfig = field(default_factory=OperatorConfig)
    clock: FakeClock = field(default_factory=FakeClock)
    woken: list[Key] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cluster = FakeCluster(clock=self.clock)
        self.api = FaultyApi(self.cluster.client("operator"), clock=self.clock)
        self.caches = Caches(self.api, self.config, clock=self.clock, wake=self.woken.append)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.caches.run())
        try:
            await self.pass_time(0.0)
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def pass_time(self, seconds: float) -> None:
        for _ in range(5):
            await self.clock.advance(seconds / 5)

    async def woken_by(self, seconds: float = 1.0) -> list[Key]:
        """Keys that were woken since the last call."""
        await self.pass_time(seconds)
        found = list(self.woken)
        self.woken.clear()
        return found

    def put(self, key: Key = KEY, spec: Obj = SPEC) -> Obj:
        ref = Ref(k.MOE_DEPLOYMENT, *key)
        return self.cluster.apply(ref, {"metadata": {}, "spec": spec}, manager="person")


def child(kind: Kind, name: str, of: Key = KEY, **more: object) -> tuple[Ref, Obj]:
    meta = {"labels": {**MANAGED_BY, DEPLOYMENT_LABEL: of[1]}}
    return Ref(kind, of[0], name), {"metadata": meta, **more}


async def test_it_knows_every_moedeployment_with_its_own_children_only() -> None:
    bench = Bench()
    made = bench.put()
    bench.put(("b", "moe"))
    ref, body = child(k.CONFIG_MAP, "moe-gateway", data={"x": "1"})
    bench.cluster.create(ref, body)
    bench.cluster.create(Ref(k.CONFIG_MAP, "a", "somebodys"), {"metadata": {"labels": {DEPLOYMENT_LABEL: "moe"}}})
    async with bench.following():
        assert bench.caches.synced
        assert sorted(bench.caches.keys()) == [("a", "moe"), ("b", "moe")]
        seen = bench.caches.look(KEY)
        assert seen.resource is not None
        assert seen.resource["metadata"]["uid"] == made["metadata"]["uid"]
        assert [c.ref for c in seen.children] == [ref]
        assert bench.caches.look(("b", "moe")).children == ()
        assert bench.caches.look(("c", "none")).resource is None
        assert seen.now == bench.clock.time()


async def test_a_change_of_a_child_wakes_its_key_and_a_heartbeat_wakes_nobody() -> None:
    bench = Bench()
    bench.put()
    ref, body = child(k.RAY_SERVICE, "moe-1", spec={"rayClusterConfig": {}})
    async with bench.following():
        await bench.woken_by()
        bench.cluster.create(ref, body)
        assert await bench.woken_by() == [KEY]
        bench.cluster.set_status(ref, {"lastUpdateTime": "2026-01-01T00:00:00Z"}, user="kuberay")
        assert await bench.woken_by() == []
        not_ready = {"type": "Ready", "status": "False", "message": "no endpoint yet"}
        bench.cluster.set_status(ref, {"conditions": [not_ready]}, user="kuberay")
        assert await bench.woken_by() == [KEY]
        bench.cluster.delete(ref)
        assert await bench.woken_by() == [KEY]


async def test_a_child_that_changes_hands_wakes_both() -> None:
    bench = Bench()
    ref, body = child(k.CONFIG_MAP, "x")
    bench.cluster.create(ref, body)
    async with bench.following():
        await bench.woken_by()
        bench.cluster.edit(ref, lambda obj: obj["metadata"]["labels"].update({DEPLOYMENT_LABEL: "other"}))
        assert sorted(await bench.woken_by()) == [("a", "moe"), ("a", "other")]


async def test_an_own_write_is_known_at_once_and_wakes_nobody() -> None:
    bench = Bench()
    bench.put()
    ref, body = child(k.CONFIG_MAP, "moe-gateway", data={"x": "1"})
    async with bench.following():
        await bench.woken_by()
        bench.caches.learn(ref, bench.cluster.apply(ref, body, manager="us"))
        assert [c.ref for c in bench.caches.look(KEY).children] == [ref]
        assert await bench.woken_by() == []
        bench.cluster.edit(ref, lambda obj: obj["metadata"]["labels"].update({"moestack.dev/revision": "r"}))
        assert await bench.woken_by() == [KEY]


async def test_the_answer_to_a_write_of_what_was_deleted_since_brings_nothing_back() -> None:
    bench = Bench()
    bench.put()
    ref, body = child(k.CONFIG_MAP, "moe-gateway")
    async with bench.following():
        late = bench.cluster.apply(ref, body, manager="us")
        bench.cluster.delete(ref)
        await bench.woken_by()
        bench.caches.learn(ref, late)
        assert bench.caches.look(KEY).children == ()


async def test_a_list_from_before_an_own_write_does_not_take_it_away() -> None:
    bench = Bench()
    bench.put()
    ref, body = child(k.CONFIG_MAP, "moe-gateway")

    def write_meanwhile(_: object) -> None:
        bench.caches.learn(ref, bench.cluster.apply(ref, body, manager="us"))

    async with bench.following():
        await bench.woken_by()
        bench.cluster.compact()
        listed = bench.api.add(after(write_meanwhile), verbs=frozenset({"list"}), kinds=frozenset({k.CONFIG_MAP}))
        bench.api.add_watch("gone", kind=k.CONFIG_MAP)
        assert await bench.woken_by(700.0) == []
        assert listed.met == 1
        assert [c.ref for c in bench.caches.look(KEY).children] == [ref]


async def test_a_kind_that_is_missing_is_told_and_its_coming_wakes_everybody() -> None:
    bench = Bench()
    bench.cluster.remove(k.RAY_SERVICE)
    bench.put()
    bench.put(("b", "other"))
    async with bench.following():
        await bench.woken_by()
        assert bench.caches.synced
        assert bench.caches.look(KEY).absent == {k.RAY_SERVICE}
        bench.cluster.install(k.RAY_SERVICE)
        assert sorted(await bench.woken_by(60.0)) == [("a", "moe"), ("b", "other")]
        assert bench.caches.look(KEY).absent == frozenset()


async def test_without_our_own_crd_nothing_can_begin_and_it_says_so() -> None:
    bench = Bench()
    bench.cluster.remove(k.MOE_DEPLOYMENT)
    async with bench.following():
        await bench.pass_time(1.0)
        assert [(b.kind, b.blocks) for b in bench.caches.behind()] == [(k.MOE_DEPLOYMENT, True)]
        bench.cluster.install(k.MOE_DEPLOYMENT)
        bench.put()
        assert await bench.woken_by(60.0) == [KEY]
        assert bench.caches.behind() == []


async def test_a_right_that_is_missing_keeps_a_cache_empty_and_is_named() -> None:
    bench = Bench()
    bench.api.add(answer(403), verbs=frozenset({"list"}), kinds=frozenset({k.INGRESS}), times=None)
    async with bench.following():
        await bench.pass_time(1.0)
        assert not bench.caches.synced
        behind = bench.caches.behind()
        assert [(b.kind, b.blocks) for b in behind] == [(k.INGRESS, True)]
        assert "injected 403" in behind[0].reason
        bench.api.calm()
        await bench.pass_time(120.0)
        assert bench.caches.synced


async def test_it_looks_after_the_namespaces_that_it_is_given() -> None:
    bench = Bench(OperatorConfig(namespaces=("a", "b")))
    for namespace in ("a", "b", "c"):
        bench.put((namespace, "moe"))
    async with bench.following():
        assert sorted(bench.caches.keys()) == [("a", "moe"), ("b", "moe")]
        assert bench.caches.look(("c", "moe")).resource is None
        listed = {call.ref for call in bench.api.journal.calls}
        assert listed == {None}
        assert len(bench.caches) == 2


async def test_conditions_are_counted_as_they_come_and_go() -> None:
    bench = Bench()
    bench.put()
    bench.put(("a", "other"))
    ref = Ref(k.MOE_DEPLOYMENT, *KEY)

    def says(status: str) -> Obj:
        return {
            "conditions": [
                {
                    "type": "Accepted",
                    "status": status,
                    "reason": "Valid",
                    "message": "",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
            ]
        }

    async with bench.following():
        for status in ("True", "False"):
            bench.cluster.apply(ref, {"metadata": {}, "status": says(status)}, manager="us", subresource="status")
            await bench.pass_time(1.0)
            assert +bench.caches.conditions == {("Accepted", status): 1}
        bench.cluster.delete(ref)
        await bench.pass_time(1.0)
        assert +bench.caches.conditions == {}
        assert len(bench.caches) == 1


async def test_what_the_server_says_is_gone_is_forgotten_and_wakes_nobody() -> None:
    bench = Bench()
    bench.put()
    ref, body = child(k.CONFIG_MAP, "moe-gateway", data={"x": "1"})
    async with bench.following():
        uid = bench.cluster.create(ref, body)["metadata"]["uid"]
        bench.api.add_watch("miss_delete", kind=k.CONFIG_MAP)
        await bench.woken_by()
        bench.cluster.delete(ref)
        await bench.woken_by()
        bench.caches.forget(ref, "another")
        assert [c.ref for c in bench.caches.look(KEY).children] == [ref]
        bench.caches.forget(ref, uid)
        bench.caches.forget(ref, uid)
        assert bench.caches.look(KEY).children == ()
        assert await bench.woken_by() == []
        bench.cluster.create(ref, body)
        assert await bench.woken_by() == [KEY]
