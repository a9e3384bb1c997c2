"""Reflector, election and events against the real API server: what the fakes assume of it is true."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from moe_core.clock import SystemClock
from moe_core.retry import Backoff
from moe_kube import errors
from moe_kube.client import KubeApi
from moe_kube.connect import connect
from moe_kube.events import Recorder
from moe_kube.lease import Election
from moe_kube.objects import CONFIG_MAP, CUSTOM_RESOURCE_DEFINITION, LEASE, Kind, Ref
from moe_kube.reflector import Reflector
from tests.cluster.control_plane import ControlPlane

pytestmark = pytest.mark.cluster


@pytest.fixture
async def api(control_plane: ControlPlane) -> AsyncIterator[KubeApi]:
    async with await connect(control_plane.kubeconfigs["admin"]) as it:
        yield it


async def until(what: str, found: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (answer := found()):
        assert time.monotonic() < end, f"not within {timeout_s:.0f} s: {what}"
        await asyncio.sleep(0.02)
    return answer


def reflector(api: KubeApi, kind: Kind, namespace: str, **options: Any) -> Reflector[str]:
    return Reflector(
        api,
        kind,
        project=lambda obj: obj.get("data", {}).get("value", obj["metadata"]["uid"]),
        clock=SystemClock(),
        namespace=namespace,
        backoff=Backoff(initial_s=0.1, max_s=1.0),
        **options,
    )


@pytest.fixture
async def tasks() -> AsyncIterator[Callable[[Any], asyncio.Task[None]]]:
    running: list[asyncio.Task[None]] = []

    def start(work: Any) -> asyncio.Task[None]:
        running.append(asyncio.create_task(work))
        return running[-1]

    yield start
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def config_map(namespace: str, name: str) -> Ref:
    return Ref(CONFIG_MAP, namespace, name)


async def test_a_reflector_follows_in_pages_and_live(api, namespace, tasks):
    for number in range(5):
        await api.create(config_map(namespace, f"c{number}"), {"data": {"value": "1"}})
    cache = reflector(api, CONFIG_MAP, namespace, page=2)
    tasks(cache.run())
    await cache.wait_synced()
    mine = [config_map(namespace, f"c{number}") for number in range(5)]
    assert [cache.get(ref) for ref in mine] == ["1"] * 5
    await api.apply(mine[0], {"data": {"value": "2"}}, manager="test")
    await api.delete(mine[1])
    await until("the change arrives", lambda: cache.get(mine[0]) == "2")
    await until("the deletion arrives", lambda: cache.get(mine[1]) is None)
    assert int(cache.resource_version) > 0
    assert cache.lists_total == 1


async def test_versions_grow_through_delete_and_recreate(api, namespace):
    """What the reflector relies on: the version of a DELETED event is that of the deletion."""
    made = await api.create(config_map(namespace, "a"), {})
    watch = api.watch(CONFIG_MAP, resource_version=made["metadata"]["resourceVersion"], namespace=namespace)
    await api.delete(config_map(namespace, "a"))
    await api.create(config_map(namespace, "a"), {})
    seen = []
    async for event in watch:
        if event.type != "BOOKMARK" and event.object["metadata"]["name"] == "a":
            seen.append((event.type, int(event.object["metadata"]["resourceVersion"])))
        if len(seen) == 2:
            break
    await watch.aclose()
    assert [kind for kind, _ in seen] == ["DELETED", "ADDED"]
    assert int(made["metadata"]["resourceVersion"]) < seen[0][1] < seen[1][1]


WIDGET = Kind("test.moestack.dev", "v1", "Widget", "widgets")
WIDGETS = Ref(CUSTOM_RESOURCE_DEFINITION, "", "widgets.test.moestack.dev")
WIDGETS_CRD: dict[str, Any] = {
    "spec": {
        "group": "test.moestack.dev",
        "scope": "Namespaced",
        "names": {"plural": "widgets", "kind": "Widget"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    }
}


async def test_a_kind_comes_goes_and_comes_again(api, namespace, tasks):
    told: list[bool] = []
    cache = reflector(api, WIDGET, namespace, absent_s=0.2, on_absent=told.append)
    tasks(cache.run())
    await cache.wait_synced()
    assert cache.absent
    with pytest.raises(errors.NotFound) as missing:
        await api.get(Ref(WIDGET, namespace, "w"))
    assert missing.value.kind_missing
    try:
        for _ in range(2):
            await api.create(WIDGETS, WIDGETS_CRD)
            await until("the kind is served", lambda: not cache.absent)
            with pytest.raises(errors.NotFound) as missing:
                await api.get(Ref(WIDGET, namespace, "w"))
            assert not missing.value.kind_missing
            await api.create(Ref(WIDGET, namespace, "w"), {})
            await until("its object is seen", lambda: len(cache) == 1)
            await api.delete(WIDGETS)
            await until("the kind is gone and its objects too", lambda: cache.absent and len(cache) == 0)
            await gone(api, WIDGETS)
    finally:
        if told[-1:] == [False]:
            await api.delete(WIDGETS)
    assert told == [True, False, True, False, True]


async def gone(api: KubeApi, ref: Ref) -> None:
    for _ in range(200):
        try:
            await api.get(ref)
        except errors.NotFound:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{ref} is still there")


async def test_a_server_that_falls_silent_ends_the_watch_and_is_followed_again(control_plane, api, namespace, tasks):
    api._silence_s = 0.7
    cache = reflector(api, CONFIG_MAP, namespace)
    tasks(cache.run())
    await cache.wait_synced()
    process = control_plane.components["kube-apiserver"].pid
    os.kill(process, signal.SIGSTOP)
    try:
        watches = cache.watches_total
        await until("the silent watch is given up", lambda: cache.watches_total > watches)
    finally:
        os.kill(process, signal.SIGCONT)
    await api.create(config_map(namespace, "late"), {"data": {"value": "1"}})
    await until("what happened since is seen", lambda: cache.get(config_map(namespace, "late")) == "1")
    assert cache.lists_total == 1


async def test_two_candidates_on_a_real_lease(control_plane, api, namespace, tasks):
    ref = Ref(LEASE, namespace, "operator")
    both = [
        Election(api, ref, clock=SystemClock(), duration_s=3, renew_deadline_s=2.0, retry_s=0.3, identity=name)
        for name in "ab"
    ]
    runs = [tasks(election.run()) for election in both]
    first = await until("one leads", lambda: next((one for one in both if one.leading), None))
    second = next(one for one in both if one is not first)
    await asyncio.sleep(1.0)
    assert first.leading
    assert not second.leading
    first.stop()
    await asyncio.wait_for(runs[both.index(first)], 5)
    await until("the other one takes over at once", lambda: second.leading, 2.0)
    spec = (await api.get(ref))["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == (second.identity, 1)
    runs[both.index(second)].cancel()


async def test_events_are_accepted_with_their_series(control_plane, api, namespace):
    made = await api.create(config_map(namespace, "subject"), {})
    recorder = Recorder(api, SystemClock(), controller="moestack.dev/test", instance="test")
    recorder.record(
        config_map(namespace, "subject"), made["metadata"]["uid"], type="Warning", reason="Tried", note="é" * 2000
    )
    await recorder.flush()
    for _ in range(2):
        recorder.record(
            config_map(namespace, "subject"), made["metadata"]["uid"], type="Warning", reason="Tried", note="é" * 2000
        )
    series = next(iter(recorder._series.values()))
    series.due_s = 0.0
    await recorder.flush()
    assert recorder.dropped_total == 0
    listed = control_plane.ask("GET", f"/apis/events.k8s.io/v1/namespaces/{namespace}/events").json()["items"]
    event = next(item for item in listed if item["regarding"]["name"] == "subject")
    assert event["series"]["count"] == 3
    assert event["reportingController"] == "moestack.dev/test"
    said = control_plane.kubectl("events", "--for", "configmap/subject", "-n", namespace).stdout
    assert "Tried" in said


async def test_a_user_without_rights_is_told_so(control_plane, namespace):
    async with await connect(control_plane.kubeconfigs["person"]) as person:
        with pytest.raises(errors.Forbidden, match='User "person" cannot get resource "configmaps"'):
            await person.get(config_map(namespace, "x"))
        with pytest.raises(errors.Forbidden):
            await anext(person.watch(CONFIG_MAP, resource_version="", namespace=namespace))


async def test_a_token_that_nobody_knows(control_plane, tmp_path):
    path = tmp_path / "config"
    good = control_plane.kubeconfigs["person"].read_text()
    path.write_text(good.replace(control_plane.tokens["person"], "unknown-to-all"))
    async with await connect(path) as stranger:
        with pytest.raises(errors.Forbidden) as refused:
            await stranger.get(config_map("default", "x"))
    assert refused.value.status == 401
    assert "unknown-to-all" not in str(refused.value)
