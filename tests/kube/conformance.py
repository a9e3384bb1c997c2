"""What every API server answers: cases that the in-memory one and the real one both pass.

A case is an async function of a `Server`. `CASES` holds them by name; a test module runs them on its own server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest

from moe_kube.api import Api, WatchEvent
from moe_kube.errors import Conflict, Gone, Invalid, NotFound
from moe_kube.managed import content, digest, owned
from moe_kube.objects import (
    CONFIG_MAP,
    DEPLOYMENT,
    MOE_DEPLOYMENT,
    NETWORK_POLICY,
    RAY_SERVICE,
    SERVICE,
    Kind,
    Obj,
    Ref,
)
from tests.kube.bodies import CONTENTS, LABELS, MOE_SPEC, RAY_SPEC, TUNING, body, condition, container

WATCH_S = 3.0
OPERATOR, TUNER, PERSON = "moestack-operator", "moestack-tuner", "kubectl"


@dataclass(frozen=True)
class Server:
    """A server under test. `api` is a client that may do everything; `namespace` is empty and its own."""

    api: Api
    namespace: str
    let_pass: Callable[[float], Awaitable[None]]
    """Let so many seconds pass for the server."""
    forget: Callable[[str], Awaitable[str]]
    """Forget the past. Given a continue token, one of the same place whose version is forgotten."""
    collect: Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
    """Let the garbage collector work until the condition holds; AssertionError where it never does."""
    kinds: frozenset[Kind]
    """Kinds that are installed."""

    def ref(self, kind: Kind, name: str = "x") -> Ref:
        return Ref(kind, self.namespace, name)


Case = Callable[[Server], Awaitable[None]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


async def config(server: Server, name: str = "x", **data: str) -> Obj:
    return await server.api.apply(server.ref(CONFIG_MAP, name), {"data": data}, manager=OPERATOR)


def version(obj: Obj) -> str:
    return str(obj["metadata"]["resourceVersion"])


async def gone(server: Server, ref: Ref) -> bool:
    try:
        await server.api.get(ref)
    except NotFound:
        return True
    return False


async def seen(server: Server, kind: Kind, since: str, *, labels: str = "") -> list[WatchEvent]:
    """All changes that a watch brings until it ends; versions never go back."""
    events = server.api.watch(
        kind, resource_version=since, namespace=server.namespace, labels=labels, timeout_s=WATCH_S
    )
    async with aclosing(events):
        found = [event async for event in events]
    versions = [int(version(event.object)) for event in found]
    assert versions == sorted(versions)
    return [event for event in found if event.type != "BOOKMARK"]


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


# Server-side apply


@case
async def an_apply_creates_and_the_same_again_writes_nothing(server: Server) -> None:
    for kind in sorted(server.kinds & CONTENTS.keys()):
        ref = server.ref(kind, "same")
        wanted = body(kind, annotations={"moestack.dev/a": "b"})
        first = await server.api.apply(ref, wanted, manager=OPERATOR)
        before, again = first, await server.api.apply(ref, json.loads(json.dumps(wanted)), manager=OPERATOR)
        for _ in range(20):
            if version(again) == version(before):
                break
            await server.let_pass(0.1)  # Its controller is still at work on the status.
            before = await server.api.get(ref)
            again = await server.api.apply(ref, wanted, manager=OPERATOR)
        assert version(again) == version(before), kind.kind
        assert again["metadata"]["uid"] == first["metadata"]["uid"]
        assert again["metadata"].get("generation") == first["metadata"].get("generation")


@case
async def what_a_manager_owns_is_what_it_applied(server: Server) -> None:
    for kind in sorted(server.kinds & CONTENTS.keys()):
        wanted = body(kind, annotations={"moestack.dev/a": "b"})
        live = await server.api.apply(server.ref(kind, "owned"), wanted, manager=OPERATOR)
        assert owned(live, OPERATOR) == content(wanted), kind.kind
        assert digest(owned(live, OPERATOR)) == digest(content(wanted))
        assert owned(live, "nobody") == {}


@case
async def a_field_of_another_manager_is_a_conflict_without_force(server: Server) -> None:
    ref = server.ref(DEPLOYMENT)
    await server.api.apply(ref, body(DEPLOYMENT), manager=OPERATOR)
    with pytest.raises(Conflict) as caught:
        await server.api.apply(ref, {"spec": {"replicas": 5}}, manager=PERSON, force=False)
    assert caught.value.reason == "Conflict"
    assert OPERATOR in str(caught.value)
    assert ".spec.replicas" in str(caught.value)
    same = await server.api.apply(ref, {"spec": {"replicas": 2}}, manager=PERSON, force=False)
    assert owned(same, PERSON) == {"spec": {"replicas": 2}}, "the same value is shared"
    assert owned(same, OPERATOR)["spec"]["replicas"] == 2


@case
async def force_takes_a_field_and_it_can_be_taken_back(server: Server) -> None:
    ref = server.ref(CONFIG_MAP)
    await config(server, a="1", b="1")
    taken = await server.api.apply(ref, {"data": {"a": "2"}}, manager=PERSON, force=True)
    assert taken["data"] == {"a": "2", "b": "1"}
    assert owned(taken, OPERATOR) == {"data": {"b": "1"}}
    back = await config(server, a="1", b="1")
    assert back["data"] == {"a": "1", "b": "1"}
    assert owned(back, PERSON) == {}


@case
async def what_a_manager_stops_sending_goes_unless_another_holds_it(server: Server) -> None:
    ref = server.ref(CONFIG_MAP)
    await config(server, a="1", b="1", c="1")
    await server.api.apply(ref, {"data": {"b": "1"}}, manager=PERSON, force=False)
    left = await config(server, c="1")
    assert left["data"] == {"b": "1", "c": "1"}
    none = await server.api.apply(ref, {}, manager=PERSON)
    assert none["data"] == {"c": "1"}
    assert owned(none, PERSON) == {}


@case
async def items_of_a_keyed_list_have_owners_of_their_own(server: Server) -> None:
    ref = server.ref(DEPLOYMENT)
    wanted = body(DEPLOYMENT)
    await server.api.apply(ref, wanted, manager=OPERATOR)
    side = {"spec": {"template": {"spec": {"containers": [{"name": "side", "image": "s"}]}}}}
    both = await server.api.apply(ref, side, manager=PERSON)
    containers = both["spec"]["template"]["spec"]["containers"]
    assert [one["name"] for one in containers] == ["main", "side"]
    assert owned(both, OPERATOR) == content(wanted)
    assert owned(both, PERSON) == side
    alone = await server.api.apply(ref, {}, manager=PERSON)
    assert [one["name"] for one in alone["spec"]["template"]["spec"]["containers"]] == ["main"]


@case
async def an_item_that_is_no_longer_sent_goes(server: Server) -> None:
    ref = server.ref(DEPLOYMENT)
    spec = CONTENTS[DEPLOYMENT]["spec"]

    def with_containers(*containers: Obj) -> Obj:
        pods = {**spec["template"]["spec"], "containers": list(containers)}
        return {"spec": {**spec, "template": {**spec["template"], "spec": pods}}}

    await server.api.apply(ref, with_containers(container("a"), container("b")), manager=OPERATOR)
    left = await server.api.apply(ref, with_containers(container("b", env=[])), manager=OPERATOR)
    (only,) = left["spec"]["template"]["spec"]["containers"]
    assert only["name"] == "b"
    assert not only.get("env")
    order = await server.api.apply(ref, with_containers(container("c"), container("b")), manager=OPERATOR)
    assert [one["name"] for one in order["spec"]["template"]["spec"]["containers"]] == ["c", "b"]


@case
async def a_whole_list_has_one_owner(server: Server) -> None:
    if RAY_SERVICE not in server.kinds:
        pytest.skip("RayService is not installed")
    ref = server.ref(RAY_SERVICE)
    wanted = body(RAY_SERVICE)
    await server.api.apply(ref, wanted, manager=OPERATOR)
    groups = [{**RAY_SPEC["rayClusterConfig"]["workerGroupSpecs"][0], "maxReplicas": 8}]
    other = {"spec": {"rayClusterConfig": {"workerGroupSpecs": groups}}}
    with pytest.raises(Conflict, match="workerGroupSpecs"):
        await server.api.apply(ref, other, manager=PERSON, force=False)
    taken = await server.api.apply(ref, other, manager=PERSON)
    assert "workerGroupSpecs" not in owned(taken, OPERATOR)["spec"]["rayClusterConfig"]
    assert owned(taken, PERSON) == other


@case
async def a_port_without_protocol_gets_its_default(server: Server) -> None:
    ref = server.ref(SERVICE)
    wanted = {"spec": {"ports": [{"port": 80}], "selector": LABELS}}
    live = await server.api.apply(ref, wanted, manager=OPERATOR)
    assert live["spec"]["ports"][0]["protocol"] == "TCP"
    assert owned(live, OPERATOR)["spec"]["ports"] == [{"port": 80, "protocol": "TCP"}]
    assert version(await server.api.apply(ref, wanted, manager=OPERATOR)) == version(live)


@case
async def quantities_of_built_in_kinds_have_one_form(server: Server) -> None:
    forms = {
        "0.5": "500m",
        "1000m": "1",
        "2000": "2k",
        "1024Mi": "1Gi",
        "1.5Gi": "1536Mi",
        "1500Mi": "1500Mi",
        "0": "0",
    }
    for written, stored in forms.items():
        resources = {"limits": {"memory": written}, "requests": {"memory": written}}
        pods = {"containers": [{"name": "main", "image": "i", "resources": resources}]}
        spec = {
            **CONTENTS[DEPLOYMENT]["spec"],
            "replicas": 0,
            "template": {"metadata": {"labels": LABELS}, "spec": pods},
        }
        live = await server.api.apply(server.ref(DEPLOYMENT), {"spec": spec}, manager=OPERATOR)
        (found,) = live["spec"]["template"]["spec"]["containers"]
        assert found["resources"] == {"limits": {"memory": stored}, "requests": {"memory": stored}}, written


@case
async def defaults_inside_what_is_whole_become_the_owners(server: Server) -> None:
    """Whoever compares what it applied with what it owns must write these out."""
    reference = {"fieldPath": "metadata.name"}
    token = {"serviceAccountToken": {"path": "token"}}
    pods = {
        "containers": [{"name": "main", "image": "i", "env": [{"name": "N", "valueFrom": {"fieldRef": reference}}]}],
        "volumes": [{"name": "token", "projected": {"sources": [token]}}],
    }
    spec = {**CONTENTS[DEPLOYMENT]["spec"], "replicas": 0, "template": {"metadata": {"labels": LABELS}, "spec": pods}}
    live = await server.api.apply(server.ref(DEPLOYMENT), {"spec": spec}, manager=OPERATOR)
    found = owned(live, OPERATOR)["spec"]["template"]["spec"]
    assert found["containers"][0]["env"][0]["valueFrom"] == {"fieldRef": {**reference, "apiVersion": "v1"}}
    (source,) = found["volumes"][0]["projected"]["sources"]
    assert source == {"serviceAccountToken": {"expirationSeconds": 3600, "path": "token"}}
    rules = [{"ports": [{"port": 80}]}]
    live = await server.api.apply(
        server.ref(NETWORK_POLICY), {"spec": {"podSelector": {}, "ingress": rules}}, manager=OPERATOR
    )
    assert owned(live, OPERATOR)["spec"]["ingress"] == [{"ports": [{"port": 80, "protocol": "TCP"}]}]
    if RAY_SERVICE in server.kinds:
        cluster = RAY_SPEC["rayClusterConfig"]
        groups = [{"groupName": "g", "rayStartParams": {}, "template": {"spec": {"containers": []}}}]
        ray = {**RAY_SPEC, "rayClusterConfig": {**cluster, "workerGroupSpecs": groups}}
        live = await server.api.apply(server.ref(RAY_SERVICE), {"spec": ray}, manager=OPERATOR)
        filled = {"maxReplicas": 2147483647, "minReplicas": 0, "numOfHosts": 1, "replicas": 0}
        assert owned(live, OPERATOR)["spec"]["rayClusterConfig"]["workerGroupSpecs"] == [{**groups[0], **filled}]


@case
async def what_is_empty_in_a_built_in_kind_is_left_out(server: Server) -> None:
    """It is owned, but not there: so what is applied to such kinds must not hold it."""
    live = await server.api.apply(server.ref(CONFIG_MAP), {"data": {}}, manager=OPERATOR)
    assert "data" not in live
    assert owned(live, OPERATOR) == {}
    pods = {"containers": [{"name": "main", "image": "i", "args": [], "env": []}], "volumes": []}
    spec = {**CONTENTS[DEPLOYMENT]["spec"], "replicas": 0, "template": {"metadata": {"labels": LABELS}, "spec": pods}}
    live = await server.api.apply(server.ref(DEPLOYMENT), {"spec": spec}, manager=OPERATOR)
    found = live["spec"]["template"]["spec"]
    assert "volumes" not in found
    assert not {"args", "env"} & found["containers"][0].keys()


@case
async def a_hand_edit_takes_the_field_and_the_next_apply_returns_it(server: Server) -> None:
    ref = server.ref(DEPLOYMENT)
    wanted = body(DEPLOYMENT)
    await server.api.apply(ref, wanted, manager=OPERATOR)
    edited = await server.api.json_patch(ref, [{"op": "replace", "path": "/spec/replicas", "value": 7}])
    assert "replicas" not in owned(edited, OPERATOR)["spec"]
    with pytest.raises(Conflict, match=r"\.spec\.replicas"):
        await server.api.apply(ref, wanted, manager=OPERATOR, force=False)
    back = await server.api.apply(ref, wanted, manager=OPERATOR)
    assert back["spec"]["replicas"] == 2
    assert owned(back, OPERATOR) == content(wanted)


@case
async def an_apply_may_ask_for_a_uid_or_a_version(server: Server) -> None:
    ref = server.ref(CONFIG_MAP)
    with pytest.raises(Conflict):
        await server.api.apply(ref, {"metadata": {"uid": "none"}, "data": {}}, manager=OPERATOR)
    assert await gone(server, ref)
    made = await config(server, a="1")
    uid = made["metadata"]["uid"]
    await server.api.apply(ref, {"metadata": {"uid": uid}, "data": {"a": "2"}}, manager=OPERATOR)
    with pytest.raises(Conflict):
        await server.api.apply(ref, {"metadata": {"uid": "other"}, "data": {"a": "3"}}, manager=OPERATOR)
    with pytest.raises(Conflict):
        await server.api.apply(
            ref, {"metadata": {"resourceVersion": version(made)}, "data": {"a": "3"}}, manager=OPERATOR
        )
    assert (await server.api.get(ref))["data"] == {"a": "2"}


@case
async def owner_references_and_finalizers_are_sets_of_their_own(server: Server) -> None:
    owner = await config(server, "owner", a="1")
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"]}
    ref = server.ref(CONFIG_MAP, "child")
    ours = {"metadata": {"finalizers": ["moestack.dev/a"], "ownerReferences": [reference]}}
    await server.api.apply(ref, ours, manager=OPERATOR)
    both = await server.api.apply(ref, {"metadata": {"finalizers": ["moestack.dev/b"]}}, manager=PERSON)
    assert both["metadata"]["finalizers"] == ["moestack.dev/a", "moestack.dev/b"]
    assert owned(both, OPERATOR) == ours
    none = await server.api.apply(ref, {}, manager=OPERATOR)
    assert none["metadata"]["finalizers"] == ["moestack.dev/b"]
    assert "ownerReferences" not in none["metadata"]
    await server.api.apply(ref, {}, manager=PERSON)


# Our own rules


@case
async def defaults_are_filled_in_and_owned_by_nobody(server: Server) -> None:
    ref = server.ref(MOE_DEPLOYMENT)
    live = await server.api.apply(ref, {"spec": MOE_SPEC}, manager=PERSON)
    assert live["spec"]["replicas"]["min"] >= 1
    assert live["spec"]["experts"]["overflow"] == "Unlimited"
    assert live["spec"]["fallback"]["budget"]["usdPerDay"] == "200"
    assert owned(live, PERSON) == {"spec": MOE_SPEC}


@case
async def a_bad_resource_is_invalid_and_the_field_is_named(server: Server) -> None:
    bad: dict[str, Obj] = {
        "gpusPerReplica": {**MOE_SPEC, "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 0}},
        "spec.model": {key: value for key, value in MOE_SPEC.items() if key != "model"},
        "overflow": {**MOE_SPEC, "experts": {"overflow": "Sometimes"}},
    }
    for field, spec in bad.items():
        for write in (
            server.api.apply(server.ref(MOE_DEPLOYMENT, "bad"), {"spec": spec}, manager=PERSON),
            server.api.create(server.ref(MOE_DEPLOYMENT, "bad"), {"spec": spec}),
        ):
            with pytest.raises(Invalid) as caught:
                await write
            assert field in str(caught.value)
            assert caught.value.status == 422
    assert await gone(server, server.ref(MOE_DEPLOYMENT, "bad"))


# Lists


@case
async def a_list_comes_in_pages_of_one_version(server: Server) -> None:
    for name in "abcde":
        await config(server, name, a=name)
    first = await server.api.list(CONFIG_MAP, namespace=server.namespace, labels="", limit=2)
    await server.api.delete(server.ref(CONFIG_MAP, "e"))
    await config(server, "f", a="f")
    names = [one["metadata"]["name"] for one in first.items]
    page = first
    while page.continue_token:
        page = await server.api.list(
            CONFIG_MAP, namespace=server.namespace, limit=2, continue_token=page.continue_token
        )
        assert page.resource_version == first.resource_version
        names += [one["metadata"]["name"] for one in page.items]
    assert [name for name in names if len(name) == 1] == list("abcde")


@case
async def a_page_of_a_version_that_is_forgotten_is_gone(server: Server) -> None:
    for name in "abc":
        await server.api.apply(server.ref(MOE_DEPLOYMENT, name), {"spec": MOE_SPEC}, manager=OPERATOR)
    first = await server.api.list(MOE_DEPLOYMENT, namespace=server.namespace, limit=1)
    token = await server.forget(first.continue_token)
    with pytest.raises(Gone):
        await server.api.list(MOE_DEPLOYMENT, namespace=server.namespace, limit=1, continue_token=token)


@case
async def a_list_selects_by_labels(server: Server) -> None:
    labels = {"a": {"tier": "gold", "app": "x"}, "b": {"tier": "free"}, "c": {}}
    for name, own in labels.items():
        await server.api.create(server.ref(CONFIG_MAP, name), {"metadata": {"labels": {**own, "case": "labels"}}})
    expected = {
        "tier=gold": "a",
        "tier==gold,app=x": "a",
        "tier!=gold": "bc",
        "tier in (gold, free)": "ab",
        "tier notin (gold)": "bc",
        "tier": "ab",
        "!tier": "c",
        "tier,!app": "b",
        "": "abc",
    }
    for text, names in expected.items():
        selector = f"case=labels,{text}" if text else "case=labels"
        page = await server.api.list(CONFIG_MAP, namespace=server.namespace, labels=selector)
        assert "".join(one["metadata"]["name"] for one in page.items) == names, text
    with pytest.raises(Invalid):
        await server.api.list(CONFIG_MAP, namespace=server.namespace, labels="a in b")


@case
async def a_list_from_a_cache_is_no_newer_than_a_fresh_one(server: Server) -> None:
    await config(server, "cached", a="1")
    fresh = await server.api.list(CONFIG_MAP, namespace=server.namespace)
    cached = await server.api.list(CONFIG_MAP, namespace=server.namespace, resource_version="0")
    assert int(cached.resource_version) <= int(fresh.resource_version)
    assert "cached" in {one["metadata"]["name"] for one in fresh.items}


# Watches


@case
async def a_watch_tells_every_change_after_a_version(server: Server) -> None:
    await config(server, "before", a="1")
    start = (await server.api.list(CONFIG_MAP, namespace=server.namespace)).resource_version
    made = await config(server, "w", a="1")
    changed = await config(server, "w", a="2")
    await server.api.delete(server.ref(CONFIG_MAP, "w"))
    events = await seen(server, CONFIG_MAP, start)
    assert [event.type for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert [version(event.object) for event in events[:2]] == [version(made), version(changed)]
    assert int(version(events[2].object)) > int(version(changed))
    assert events[2].object["data"] == {"a": "2"}
    later = await seen(server, CONFIG_MAP, version(changed))
    assert [event.type for event in later] == ["DELETED"]


@case
async def a_watch_that_selects_nothing_brings_bookmarks_of_what_passes_and_ends(server: Server) -> None:
    start = version(await config(server, "before", a="1"))
    events = server.api.watch(
        CONFIG_MAP, resource_version=start, namespace=server.namespace, labels="none=such", timeout_s=5.0
    )

    async def collect() -> list[WatchEvent]:
        async with aclosing(events):
            return [event async for event in events]

    watching = asyncio.create_task(collect())
    await server.let_pass(0.5)
    passing = await config(server, "passing", a="1")
    found = await watching
    assert {event.type for event in found} == {"BOOKMARK"}
    assert int(version(found[-1].object)) >= int(version(passing))


@case
async def leaving_a_selector_is_a_deletion_and_entering_an_addition(server: Server) -> None:
    ref = server.ref(CONFIG_MAP, "moving")
    start = version(await server.api.apply(ref, {"metadata": {"labels": {"in": "no"}}}, manager=OPERATOR))
    await server.api.apply(ref, {"metadata": {"labels": {"in": "yes"}}, "data": {"a": "1"}}, manager=OPERATOR)
    await server.api.apply(ref, {"metadata": {"labels": {"in": "yes"}}, "data": {"a": "2"}}, manager=OPERATOR)
    left = await server.api.apply(ref, {"metadata": {"labels": {"in": "no"}}, "data": {"a": "3"}}, manager=OPERATOR)
    await server.api.delete(ref)
    events = await seen(server, CONFIG_MAP, start, labels="in=yes")
    assert [event.type for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    last = events[-1].object
    assert version(last) == version(left)
    assert last["data"] == {"a": "2"}, "the last state that was selected"


@case
async def a_watch_from_a_version_too_old_is_gone(server: Server) -> None:
    with pytest.raises(Gone):
        await anext(
            server.api.watch(MOE_DEPLOYMENT, resource_version="1", namespace=server.namespace, timeout_s=WATCH_S)
        )


# JSON patch


@case
async def a_json_patch_is_done_whole_or_not_at_all(server: Server) -> None:
    ref = server.ref(CONFIG_MAP)
    made = await config(server, a="1", b="1")
    for failing in (
        {"op": "test", "path": "/data/b", "value": "other"},
        {"op": "remove", "path": "/data/none"},
        {"op": "replace", "path": "/data/none/deeper", "value": "1"},
    ):
        with pytest.raises(Invalid):
            await server.api.json_patch(ref, [{"op": "replace", "path": "/data/a", "value": "2"}, failing])
    assert version(await server.api.get(ref)) == version(made)
    done = await server.api.json_patch(
        ref,
        [
            {"op": "test", "path": "/metadata/resourceVersion", "value": version(made)},
            {"op": "test", "path": "/data/b", "value": "1"},
            {"op": "remove", "path": "/data/b"},
            {"op": "add", "path": "/metadata/annotations", "value": {}},
            {"op": "add", "path": "/metadata/annotations/moestack.dev~1x", "value": "1"},
        ],
    )
    assert done["data"] == {"a": "1"}
    assert done["metadata"]["annotations"] == {"moestack.dev/x": "1"}
    stale = {"op": "test", "path": "/metadata/resourceVersion", "value": version(made)}
    with pytest.raises(Invalid):
        await server.api.json_patch(ref, [stale, {"op": "remove", "path": "/data/a"}])


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
