"""Cases on identity, versions, generation, status, deletion and refusals."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest

from moe_kube.errors import Conflict, Invalid, NotFound
from moe_kube.managed import owned
from moe_kube.objects import (
    CONFIG_MAP,
    MOE_DEPLOYMENT,
    SERVICE,
    Kind,
    Obj,
)
from tests.kube.bodies import CONTENTS, MOE_SPEC, TUNING, body, condition
from tests.kube.server import OPERATOR, PERSON, TUNER, Server, case, config, gone, seen, version

# Objects and their metadata


@case
async def an_object_that_is_not_there_is_not_found_and_its_kind_is_not_missing(server: Server) -> None:
    ref = server.ref(CONFIG_MAP, "none")
    with pytest.raises(NotFound) as caught:
        await server.api.get(ref)
    assert not caught.value.kind_missing
    with pytest.raises(NotFound):
        await server.api.delete(ref)
    with pytest.raises(NotFound):
        await server.api.json_patch(ref, [{"op": "add", "path": "/data", "value": {}}])
    with pytest.raises(NotFound):
        await server.api.apply(
            server.ref(MOE_DEPLOYMENT, "none"), {"status": {}}, manager=OPERATOR, subresource="status"
        )


@case
async def a_kind_that_is_not_installed_is_a_missing_kind_on_every_call(server: Server) -> None:
    kind = Kind("none.moestack.dev", "v1", "Nothing", "nothings")
    ref = server.ref(kind)
    calls: list[Awaitable[Any]] = [
        server.api.get(ref),
        server.api.list(kind, namespace=server.namespace),
        server.api.apply(ref, {}, manager=OPERATOR),
        server.api.create(ref, {}),
        server.api.delete(ref),
    ]
    for call in calls:
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.kind_missing
    with pytest.raises(NotFound) as caught:
        await anext(server.api.watch(kind, resource_version="1", namespace=server.namespace))
    assert caught.value.kind_missing


@case
async def a_created_object_gets_identity_and_cannot_be_created_twice(server: Server) -> None:
    ref = server.ref(CONFIG_MAP)
    made = await server.api.create(ref, {"data": {"a": "1"}})
    meta = made["metadata"]
    assert (made["apiVersion"], made["kind"], meta["name"], meta["namespace"]) == (
        "v1",
        "ConfigMap",
        ref.name,
        server.namespace,
    )
    assert meta["uid"]
    assert meta["creationTimestamp"].endswith("Z")
    assert int(meta["resourceVersion"]) > 0
    assert "generation" not in meta
    assert await server.api.get(ref) == made
    with pytest.raises(Conflict) as caught:
        await server.api.create(ref, {"data": {}})
    assert caught.value.reason == "AlreadyExists"


@case
async def a_replace_needs_the_newest_version(server: Server) -> None:
    ref = server.ref(MOE_DEPLOYMENT)
    first = await server.api.create(ref, {"spec": MOE_SPEC})
    second = await server.api.replace(ref, {**first, "metadata": {**first["metadata"], "labels": {"a": "b"}}})
    assert version(second) != version(first)
    with pytest.raises(Conflict) as caught:
        await server.api.replace(ref, first)
    assert caught.value.reason == "Conflict"
    without = {key: value for key, value in second["metadata"].items() if key != "resourceVersion"}
    with pytest.raises(Invalid, match=r"metadata\.resourceVersion"):
        await server.api.replace(ref, {**second, "metadata": without})
    other = {**second["metadata"], "uid": "00000000-0000-4000-8000-000000000000"}
    with pytest.raises(Conflict):
        await server.api.replace(ref, {**second, "metadata": other})
    assert version(await server.api.replace(ref, second)) == version(second), "no change is no write"


@case
async def a_deletion_may_ask_for_a_uid(server: Server) -> None:
    made = await config(server, a="1")
    ref = server.ref(CONFIG_MAP)
    with pytest.raises(Conflict):
        await server.api.delete(ref, uid="00000000-0000-4000-8000-000000000000")
    await server.api.delete(ref, uid=made["metadata"]["uid"])
    assert await gone(server, ref)
    again = await config(server, a="1")
    assert again["metadata"]["uid"] != made["metadata"]["uid"]


@case
async def generation_rises_with_the_spec_alone(server: Server) -> None:
    ref = server.ref(MOE_DEPLOYMENT)
    made = await server.api.apply(ref, body(MOE_DEPLOYMENT), manager=OPERATOR)
    assert made["metadata"]["generation"] == 1
    labelled = await server.api.apply(ref, {"metadata": {"labels": {"more": "1"}}}, manager=PERSON)
    assert labelled["metadata"]["generation"] == 1
    told = await server.api.apply(ref, {"status": {"observedGeneration": 1}}, manager=OPERATOR, subresource="status")
    assert told["metadata"]["generation"] == 1
    changed = {**MOE_SPEC, "suspend": True}
    assert (await server.api.apply(ref, {"spec": changed}, manager=OPERATOR))["metadata"]["generation"] == 2


@case
async def generation_by_kind(server: Server) -> None:
    without = {"ConfigMap", "Service", "ServiceAccount", "ControllerRevision", "Lease"}
    for kind in sorted(server.kinds & CONTENTS.keys()):
        made = await server.api.apply(server.ref(kind, "generation"), body(kind), manager=OPERATOR)
        expected = None if kind.kind in without else 1
        assert made["metadata"].get("generation") == expected, kind.kind


# Status apart


@case
async def the_status_is_written_on_its_own_path_only(server: Server) -> None:
    ref = server.ref(MOE_DEPLOYMENT)
    made = await server.api.apply(ref, {"spec": MOE_SPEC, "status": {"replicas": 9}}, manager=OPERATOR)
    assert "status" not in made
    told = await server.api.apply(
        ref,
        {"spec": {**MOE_SPEC, "suspend": True}, "metadata": {"labels": {"x": "y"}}, "status": {"replicas": 1}},
        manager=OPERATOR,
        subresource="status",
    )
    assert told["status"] == {"replicas": 1}
    assert told["spec"] == made["spec"]
    assert "labels" not in told["metadata"]
    patched = await server.api.json_patch(ref, [{"op": "replace", "path": "/status/replicas", "value": 7}])
    assert patched["status"] == {"replicas": 1}
    assert version(patched) == version(told)


@case
async def two_writers_share_the_status(server: Server) -> None:
    """The operator's apply never holds `tuning`, the tuner's nothing else: neither takes the other's."""
    ref = server.ref(MOE_DEPLOYMENT)
    await server.api.apply(ref, {"spec": MOE_SPEC}, manager=PERSON)

    async def operator(*conditions: Obj, **more: Any) -> Obj:
        status = {"conditions": list(conditions), "observedGeneration": 1, **more}
        return await server.api.apply(ref, {"status": status}, manager=OPERATOR, subresource="status")

    async def tuner(**tuning: Any) -> Obj:
        status = {"tuning": {**TUNING, **tuning}, "conditions": [condition("TuningActive")]}
        return await server.api.apply(ref, {"status": status}, manager=TUNER, subresource="status", force=False)

    await operator(condition("Accepted"), condition("Fits"))
    await tuner(acknowledged=4)
    after = await operator(condition("Accepted", "False"), replicas=2)
    assert after["status"]["tuning"] == {**TUNING, "acknowledged": 4}
    assert {one["type"]: one["status"] for one in after["status"]["conditions"]} == {
        "Accepted": "False",
        "TuningActive": "True",
    }
    last = await tuner(acknowledged=5)
    assert last["status"]["replicas"] == 2
    assert owned(last, TUNER, "status")["status"]["tuning"] == {**TUNING, "acknowledged": 5}
    assert "tuning" not in owned(last, OPERATOR, "status")["status"]
    assert owned(last, PERSON) == {"spec": MOE_SPEC}


# Deletion


@case
async def a_finalizer_holds_a_deletion(server: Server) -> None:
    ref = server.ref(MOE_DEPLOYMENT)
    wanted = {"metadata": {"finalizers": ["moestack.dev/test"]}, "spec": MOE_SPEC}
    made = await server.api.apply(ref, wanted, manager=OPERATOR)
    await server.api.delete(ref)
    held = await server.api.get(ref)
    assert held["metadata"]["deletionTimestamp"]
    assert held["metadata"]["generation"] == 2
    await server.api.delete(ref)
    assert version(await server.api.get(ref)) == version(held)
    with pytest.raises(Invalid, match="finalizers"):
        await server.api.apply(ref, {"metadata": {"finalizers": ["moestack.dev/late"]}}, manager=PERSON)
    with pytest.raises(Conflict):
        await server.api.create(ref, {"spec": MOE_SPEC})
    last = await server.api.apply(ref, {"spec": MOE_SPEC}, manager=OPERATOR)
    assert last["metadata"]["uid"] == made["metadata"]["uid"]
    assert await gone(server, ref)
    events = await seen(server, MOE_DEPLOYMENT, version(made))
    assert [event.type for event in events] == ["MODIFIED", "DELETED"]


async def _family(server: Server, **owner_of: str) -> None:
    """ConfigMaps, each owned by another: `child="parent"`."""
    for child, parent in owner_of.items():
        meta: Obj = {}
        if parent:
            owner = await server.api.get(server.ref(CONFIG_MAP, parent))
            reference = {
                "apiVersion": "v1",
                "blockOwnerDeletion": True,
                "controller": True,
                "kind": "ConfigMap",
                "name": parent,
                "uid": owner["metadata"]["uid"],
            }
            meta = {"ownerReferences": [reference]}
        await server.api.apply(server.ref(CONFIG_MAP, child), {"metadata": meta}, manager=OPERATOR)


@case
async def what_an_object_owns_goes_after_it(server: Server) -> None:
    await _family(server, parent="", child="parent", grandchild="child", other="")
    await server.api.delete(server.ref(CONFIG_MAP, "parent"))
    assert await gone(server, server.ref(CONFIG_MAP, "parent")), "in the background: the owner goes first"
    await server.collect(lambda: gone(server, server.ref(CONFIG_MAP, "grandchild")))
    assert await gone(server, server.ref(CONFIG_MAP, "child"))
    assert not await gone(server, server.ref(CONFIG_MAP, "other"))


@case
async def in_the_foreground_the_owner_goes_last(server: Server) -> None:
    await _family(server, parent="", child="parent")
    child = server.ref(CONFIG_MAP, "child")
    await server.api.apply(child, {"metadata": {"finalizers": ["moestack.dev/test"]}}, manager=PERSON)
    await server.api.delete(server.ref(CONFIG_MAP, "parent"), propagation="Foreground")

    async def child_is_marked() -> bool:
        return "deletionTimestamp" in (await server.api.get(child))["metadata"]

    await server.collect(child_is_marked)
    parent = await server.api.get(server.ref(CONFIG_MAP, "parent"))
    assert parent["metadata"]["finalizers"] == ["foregroundDeletion"]
    await server.api.apply(child, {}, manager=PERSON)
    await server.collect(lambda: gone(server, server.ref(CONFIG_MAP, "parent")))
    assert await gone(server, child)


@case
async def orphans_stay_without_their_owner(server: Server) -> None:
    await _family(server, parent="", child="parent")
    await server.api.delete(server.ref(CONFIG_MAP, "parent"), propagation="Orphan")
    await server.collect(lambda: gone(server, server.ref(CONFIG_MAP, "parent")))
    child = await server.api.get(server.ref(CONFIG_MAP, "child"))
    assert "ownerReferences" not in child["metadata"]


@case
async def an_owner_of_another_life_is_no_owner(server: Server) -> None:
    """A child made with the uid of an owner that is gone is collected, though an object of that name is there."""
    before = await config(server, "parent", a="1")
    await server.api.delete(server.ref(CONFIG_MAP, "parent"))
    await config(server, "parent", a="1")
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "parent", "uid": before["metadata"]["uid"]}
    child = server.ref(CONFIG_MAP, "child")
    await server.api.create(child, {"metadata": {"ownerReferences": [reference]}})
    await server.collect(lambda: gone(server, child))


# Refusals


@case
async def names_and_labels_are_checked(server: Server) -> None:
    long = "a" * 64
    with pytest.raises(Invalid, match=r"metadata\.name"):
        await server.api.create(server.ref(CONFIG_MAP, "Upper_Case"), {})
    with pytest.raises(Invalid, match=r"metadata\.name"):
        await server.api.create(server.ref(SERVICE, long), {"spec": {"ports": [{"port": 1}]}})
    with pytest.raises(Invalid, match=r"metadata\.labels"):
        await server.api.create(server.ref(CONFIG_MAP), {"metadata": {"labels": {"a": long}}})
    with pytest.raises(Invalid, match=r"metadata\.labels"):
        await server.api.apply(server.ref(CONFIG_MAP), {"metadata": {"labels": {"a b": "x"}}}, manager=OPERATOR)
    with pytest.raises(Invalid):
        await server.api.apply(server.ref(CONFIG_MAP), {"metadata": {"name": "another"}}, manager=OPERATOR)
