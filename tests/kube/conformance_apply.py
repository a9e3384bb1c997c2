"""Cases on server-side apply: who owns what, conflicts, what goes when it is no longer sent."""

from __future__ import annotations

import json

import pytest

from moe_kube.errors import Conflict
from moe_kube.managed import content, digest, owned
from moe_kube.objects import (
    CONFIG_MAP,
    DEPLOYMENT,
    RAY_SERVICE,
    SERVICE,
    Obj,
)
from tests.kube.bodies import CONTENTS, LABELS, RAY_SPEC, body, container
from tests.kube.server import OPERATOR, PERSON, Server, case, config, gone, version

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
