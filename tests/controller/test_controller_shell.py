"""The shell around the pure reconcile: which call each request becomes, and how errors and an early end reach it."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest

from moe_api.annotations import OPERATOR_MANAGER
from moe_core.wire import Weights
from moe_kube import objects as k
from moe_kube.errors import ApiError, Conflict, NotFound, ServerError
from moe_kube.fake import FakeCluster
from moe_kube.faults import Crash, Journal, answer
from moe_kube.faulty import FaultyApi
from moe_kube.objects import Obj, Ref
from moe_operator.children import Key
from moe_operator.render.objects import Rendered
from moe_operator.requests import (
    Apply,
    AskGateways,
    Gateways,
    Get,
    Look,
    Observed,
    Outcome,
    Patch,
    Remove,
    Request,
    SendWeights,
    Tell,
    WriteStatus,
)
from moe_operator.shell import Performer, run

NAMESPACE = "serving"
CONFIG = Ref(k.CONFIG_MAP, NAMESPACE, "moe-gateway")
RESOURCE = Ref(k.MOE_DEPLOYMENT, NAMESPACE, "moe")
OBSERVED = Observed(None, (), frozenset(), 0.0)


@dataclass
class Spy:
    """Caches, gateways and Events that note what they are given."""

    learnt: list[tuple[Ref, str]] = field(default_factory=list)
    forgotten: list[tuple[Ref, str]] = field(default_factory=list)
    told: list[Tell] = field(default_factory=list)
    sent: list[SendWeights] = field(default_factory=list)

    def look(self, key: Key) -> Observed:
        return OBSERVED

    def learn(self, ref: Ref, obj: Obj) -> None:
        self.learnt.append((ref, obj["metadata"]["resourceVersion"]))

    def forget(self, ref: Ref, uid: str) -> None:
        self.forgotten.append((ref, uid))

    async def ask(self, request: AskGateways) -> Gateways:
        return Gateways(silent=len(request.pods))

    async def send(self, request: SendWeights) -> int:
        self.sent.append(request)
        return 2

    def tell(self, tell: Tell) -> None:
        self.told.append(tell)


@dataclass
class Bench:
    cluster: FakeCluster = field(default_factory=FakeCluster)
    spy: Spy = field(default_factory=Spy)
    journal: Journal = field(default_factory=Journal)

    def __post_init__(self) -> None:
        self.api = FaultyApi(self.cluster.client("operator"), journal=self.journal)
        self.performer = Performer(self.api, caches=self.spy, fleet=self.spy, teller=self.spy)

    async def perform(self, request: Request) -> Any:
        return await self.performer.perform(request)


def config_map(data: str = "1", ref: Ref = CONFIG) -> Rendered:
    meta = {"name": ref.name, "namespace": ref.namespace}
    return Rendered(ref, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"config": data}})


def resource() -> Obj:
    spec = {"model": {"id": "org/model"}, "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4}}
    meta = {"name": RESOURCE.name, "namespace": NAMESPACE}
    return {"apiVersion": RESOURCE.kind.api_version, "kind": RESOURCE.kind.kind, "metadata": meta, "spec": spec}


async def test_each_request_without_a_call_is_answered_by_its_own_part() -> None:
    bench = Bench()
    weights = SendWeights(("10.0.0.1:8001",), Weights(deployment="serving/moe", version=1, percent={"a": 100}))
    told = Tell(RESOURCE, "uid", "Normal", "Why", "what")
    assert await bench.perform(Look((NAMESPACE, "moe"))) is OBSERVED
    assert await bench.perform(AskGateways((NAMESPACE, "moe"), ("a", "b"), (), 30.0)) == Gateways(silent=2)
    assert await bench.perform(weights) == 2
    assert await bench.perform(told) is None
    assert (bench.spy.sent, bench.spy.told) == ([weights], [told])
    assert bench.journal.calls == []


async def test_get_of_what_is_not_there_is_none_and_of_a_kind_that_is_not_there_an_error() -> None:
    bench = Bench()
    assert await bench.perform(Get(CONFIG)) is None
    bench.cluster.remove(k.RAY_SERVICE)
    with pytest.raises(NotFound) as caught:
        await bench.perform(Get(Ref(k.RAY_SERVICE, NAMESPACE, "x")))
    assert caught.value.kind_missing


async def test_an_apply_without_uid_takes_no_field_from_anybody() -> None:
    bench = Bench()
    bench.cluster.apply(CONFIG, config_map("theirs").body, manager="somebody")
    with pytest.raises(Conflict):
        await bench.perform(Apply(config_map("ours")))
    assert bench.cluster.get(CONFIG)["data"] == {"config": "theirs"}


async def test_an_apply_with_uid_takes_our_fields_back_on_that_object_only() -> None:
    bench = Bench()
    made = await bench.perform(Apply(config_map("ours")))
    bench.cluster.apply(CONFIG, config_map("theirs").body, manager="somebody", force=True)
    await bench.perform(Apply(config_map("ours"), made["metadata"]["uid"]))
    assert bench.cluster.get(CONFIG)["data"] == {"config": "ours"}
    bench.cluster.delete(CONFIG)
    with pytest.raises(Conflict):
        await bench.perform(Apply(config_map("ours"), made["metadata"]["uid"]))
    assert bench.cluster.find(CONFIG) is None


async def test_answers_to_writes_are_learnt_and_reads_are_not() -> None:
    bench = Bench()
    made = await bench.perform(Apply(config_map()))
    await bench.perform(Get(CONFIG))
    assert bench.spy.learnt == [(CONFIG, made["metadata"]["resourceVersion"])]
    patched = await bench.perform(Patch(CONFIG, ({"op": "replace", "path": "/data/config", "value": "2"},)))
    assert bench.spy.learnt[1:] == [(CONFIG, patched["metadata"]["resourceVersion"])]


async def test_remove_deletes_the_one_of_that_uid() -> None:
    bench = Bench()
    made = await bench.perform(Apply(config_map()))
    await bench.perform(Remove(CONFIG, made["metadata"]["uid"]))
    assert bench.cluster.find(CONFIG) is None
    assert bench.spy.forgotten == []
    await bench.perform(Remove(CONFIG, made["metadata"]["uid"]))  # gone already: the cache does not know
    assert bench.spy.forgotten == [(CONFIG, made["metadata"]["uid"])]


async def test_remove_leaves_a_namesake_and_counts_ours_as_gone() -> None:
    bench = Bench()
    first = await bench.perform(Apply(config_map()))
    bench.cluster.delete(CONFIG)
    bench.cluster.create(CONFIG, config_map("theirs").body)
    await bench.perform(Remove(CONFIG, first["metadata"]["uid"]))
    assert bench.cluster.get(CONFIG)["data"] == {"config": "theirs"}
    assert bench.spy.forgotten == [(CONFIG, first["metadata"]["uid"])]


@pytest.mark.parametrize("gone", [True, False])
async def test_an_apply_to_one_that_is_gone_is_a_conflict_after_which_the_cache_knows(gone: bool) -> None:
    bench = Bench()
    made = await bench.perform(Apply(config_map()))
    uid = made["metadata"]["uid"]
    if gone:
        bench.cluster.delete(CONFIG)
    else:
        bench.api.add(answer(409), verbs=frozenset({"apply"}))
    with pytest.raises(Conflict):
        await bench.perform(Apply(config_map("2"), uid))
    assert bench.spy.forgotten == ([(CONFIG, uid)] if gone else [])


async def test_remove_that_conflicts_while_ours_is_there_is_an_error() -> None:
    bench = Bench()
    made = await bench.perform(Apply(config_map()))
    bench.api.add(answer(409), verbs=frozenset({"delete"}))
    with pytest.raises(Conflict):
        await bench.perform(Remove(CONFIG, made["metadata"]["uid"]))


async def test_status_is_applied_to_the_version_that_was_looked_at_and_leaves_the_tuners_part() -> None:
    bench = Bench()
    made = bench.cluster.apply(RESOURCE, resource(), manager="person")
    body = {"metadata": {}, "status": {"tuning": {"context": {"name": "night"}}}}
    tuned = bench.cluster.apply(RESOURCE, body, manager="moestack-tuner", subresource="status")
    old, new = made["metadata"]["resourceVersion"], tuned["metadata"]["resourceVersion"]
    with pytest.raises(Conflict):
        await bench.perform(WriteStatus(RESOURCE, {"observedGeneration": 1}, old))
    await bench.perform(WriteStatus(RESOURCE, {"observedGeneration": 1}, new))
    live = bench.cluster.get(RESOURCE)
    assert live["status"] == {"observedGeneration": 1, "tuning": {"context": {"name": "night"}}}
    managers = {(e["manager"], e.get("subresource", "")) for e in live["metadata"]["managedFields"]}
    assert (OPERATOR_MANAGER, "status") in managers


# -- run


def asks(*requests: Request, heard: list[Any]) -> Generator[Request, Any, Outcome]:
    """A reconcile that asks for these in turn, notes answers and errors, and its own end."""
    try:
        for request in requests:
            try:
                heard.append((yield request))
            except ApiError as error:
                heard.append(type(error).__name__)
        return Outcome(requeue_s=7.0)
    finally:
        heard.append("closed")


async def test_run_sends_answers_raises_errors_into_it_and_returns_its_outcome() -> None:
    bench, heard = Bench(), []
    bench.api.add(answer(503), call=0)
    outcome = await run(asks(Get(CONFIG), Get(CONFIG), heard=heard), bench.perform)
    assert outcome == Outcome(requeue_s=7.0)
    assert heard == ["ServerError", None, "closed"]


async def test_run_raises_what_the_reconcile_does_not_handle() -> None:
    def careless() -> Generator[Request, Any, Outcome]:
        yield Get(CONFIG)
        return Outcome()

    bench = Bench()
    bench.api.add(answer(500), call=0)
    with pytest.raises(ServerError):
        await run(careless(), bench.perform)


async def test_a_crash_ends_the_reconcile_there() -> None:
    bench, heard = Bench(), []

    async def dies_at_the_second(request: Request) -> Any:
        if len(bench.journal.calls) == 1:
            raise Crash("here")
        return await bench.perform(request)

    with pytest.raises(Crash):
        await run(asks(Get(CONFIG), Get(CONFIG), Get(CONFIG), heard=heard), dies_at_the_second)
    assert heard == [None, "closed"]
    assert len(bench.journal.calls) == 1


async def test_a_cancelled_run_closes_the_reconcile_and_asks_for_nothing_more() -> None:
    heard: list[Any] = []
    asked = asyncio.Event()

    async def never(request: Request) -> Any:
        asked.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(run(asks(Get(CONFIG), Get(CONFIG), heard=heard), never))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert heard == ["closed"]
