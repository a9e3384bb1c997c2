"""The life of a deployment in stories: what a person, the cluster or a fault does, and what the operator makes of it.

Read it as the specification. Each story begins with a deployment that serves, unless it says otherwise.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from moe_api.annotations import DEPLOYMENT_LABEL
from moe_core.addresses import gateway_admin_name
from moe_kube import objects as k
from moe_kube.objects import Kind, Obj, Ref
from moe_operator.names import MANAGED_BY
from moe_operator.requests import AskGateways
from moe_operator.snapshot import parse
from tests.controller import world as worlds
from tests.controller.stories import (
    BRIDGE,
    LONGER,
    LONGER_BRIDGE,
    LONGER_RECREATE,
    RECREATE,
    START_S,
    UPGRADE_S,
    spec_with,
)
from tests.controller.world import NAMESPACE, SPEC, World

UNFIT = spec_with("model.id", "deepseek-ai/DeepSeek-V3")
SCALABLE = spec_with("replicas", {"min": 1, "max": 4})
EAGER = spec_with("engine.extraArgs", {"enforce-eager": "true"})
EXTERNAL = {name: SPEC[name] for name in ("model", "fallback", "gateway", "upgrade")} | {
    "engine": {"kind": "External", "url": "http://engine.example.com/v1"}
}


def started(spec: Obj = SPEC) -> World:
    """A deployment that serves."""
    return copy.deepcopy(_started(json.dumps(spec)))


@lru_cache
def _started(spec: str) -> World:
    world = World()
    world.put(json.loads(spec))
    world.run(START_S)
    return world


def at(kind: Kind, name: str) -> Ref:
    return Ref(kind, NAMESPACE, name)


def services(world: World) -> set[str]:
    return {obj["metadata"]["name"] for obj in world.cluster.peek(k.RAY_SERVICE)}


def leader(world: World) -> str:
    return next(name for name, (_, weight) in world.revisions().items() if weight == 100)


def weights(world: World) -> dict[str, int]:
    return {name: weight for name, (_, weight) in world.revisions().items() if weight}


def said(world: World, kind: str) -> tuple[str, str]:
    condition = world.condition(kind)
    return condition["status"], condition["reason"]


def until(world: World, holds: Callable[[], bool], turns: int = 60) -> None:
    for _ in range(turns):
        if holds():
            return
        world.turn()
    raise AssertionError(f"it never comes to that: {world.revisions()}")


def newcomer(world: World, spec: Obj) -> str:
    """Ask for another revision, and wait until it is made."""
    before = services(world)
    world.put(spec)
    until(world, lambda: bool(services(world) - before))
    return (services(world) - before).pop()


def failed(world: World, spec: Obj) -> str:
    """Ask for a revision that never comes up, and wait until it is given up."""
    new = newcomer(world, spec)
    world.ray.never_ready.add(new)
    until(world, lambda: services(world) == {leader(world)} - {new} if weights(world) else False)
    return new


def settled(world: World) -> str:
    """One revision serves, and nothing is written any more."""
    assert weights(world) == {leader(world): 100}
    assert services(world) == {leader(world)}
    assert said(world, "ServingReady") == ("True", "Ready")
    assert world.idle_writes() == 0
    return leader(world)


# A plain life


def test_an_apply_is_enough() -> None:
    world = started()
    settled(world)
    assert {kind: world.condition(kind)["status"] for kind in ("Accepted", "Fits", "ClusterReady", "GatewayReady")} == {
        "Accepted": "True",
        "Fits": "True",
        "ClusterReady": "True",
        "GatewayReady": "True",
    }
    assert said(world, "Degraded") == ("False", "AsExpected")


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec_with("fallback.budget", {"usdPerDay": "50"}), id="hot"),
        pytest.param(spec_with("replicas", {"min": 2, "max": 4}), id="scale"),
        pytest.param(EAGER, id="rolling"),
    ],
)
def test_a_change_that_needs_no_new_cluster_makes_none(spec: Obj) -> None:
    world = started()
    before = world.cluster.get(at(k.RAY_SERVICE, leader(world)))["metadata"]["uid"]
    world.put(spec)
    world.run(START_S)
    assert world.cluster.get(at(k.RAY_SERVICE, settled(world)))["metadata"]["uid"] == before


@pytest.mark.parametrize(
    ("before", "after", "serves_meanwhile"),
    [
        pytest.param(SPEC, LONGER, True, id="Surge: beside the old one"),
        pytest.param(BRIDGE, LONGER_BRIDGE, False, id="Bridge: after the old one"),
        pytest.param(RECREATE, LONGER_RECREATE, False, id="Recreate: after the old one"),
    ],
)
def test_an_upgrade(before: Obj, after: Obj, serves_meanwhile: bool) -> None:
    world = started(before)
    old = leader(world)
    world.put(after)
    gaps = 0
    for _ in range(40):
        world.turn()
        gaps += not weights(world)
        assert len(services(world)) <= 1 + serves_meanwhile
    assert (gaps == 0) == serves_meanwhile
    assert settled(world) != old


@pytest.mark.parametrize(("before", "after"), [(SPEC, LONGER), (BRIDGE, LONGER_BRIDGE), (RECREATE, LONGER_RECREATE)])
def test_an_upgrade_that_fails_comes_back(before: Obj, after: Obj) -> None:
    world = started(before)
    old = leader(world)
    failed(world, after)
    world.run(UPGRADE_S)
    assert settled(world) == old
    assert said(world, "Degraded") == ("True", "RolledBack")


def test_suspend_gives_the_gpus_back_and_resume_takes_them_again() -> None:
    world = started()
    name = leader(world)
    world.put(spec_with("suspend", True))
    world.run(START_S)
    assert services(world) == set()
    assert said(world, "ClusterReady") == ("False", "Suspended")
    assert world.idle_writes() == 0
    world.put(SPEC)
    world.run(START_S)
    assert settled(world) == name


def test_deletion_leaves_nothing() -> None:
    world = started()
    world.drop()
    world.run(START_S)
    assert world.state() == {}


def test_an_object_of_ours_without_an_owner_is_adopted() -> None:
    world = started()
    ref = at(k.CONFIG_MAP, "moe-gateway")
    orphan = world.cluster.get(ref)
    world.cluster.delete(ref)
    meta = {"name": ref.name, "namespace": NAMESPACE, "labels": orphan["metadata"]["labels"]}
    world.cluster.create(ref, {"metadata": meta, "data": orphan["data"]}, user="person")
    world.run(START_S)
    assert world.cluster.get(ref)["metadata"]["ownerReferences"][0]["kind"] == "MoEDeployment"
    settled(world)


def test_an_object_of_somebody_else_is_left_alone_and_named() -> None:
    world = World()
    ref = at(k.CONFIG_MAP, "moe-gateway")
    body = {"metadata": {"name": ref.name, "namespace": NAMESPACE}, "data": {"a": "b"}}
    world.cluster.create(ref, body, user="person")
    world.put()
    world.run(START_S)
    assert world.cluster.get(ref)["data"] == {"a": "b"}
    assert said(world, "Degraded") == ("True", "NameTaken")


def test_an_external_engine_and_our_own_take_over_from_each_other() -> None:
    world = started(EXTERNAL)
    assert services(world) == set()
    assert world.idle_writes() == 0
    world.put(SPEC)
    world.run(START_S)
    settled(world)
    world.put(EXTERNAL)
    world.run(UPGRADE_S)
    config = json.loads(world.cluster.get(at(k.CONFIG_MAP, "moe-gateway"))["data"]["gateway.json"])
    assert (services(world), config["weights"]) == (set(), {"external": 100})
    assert world.idle_writes() == 0


def test_no_replicas_is_a_floor() -> None:
    settled(started(spec_with("replicas", {"min": 0, "max": 2})))


# Upgrades and changes of mind


def test_a_revision_that_has_not_proven_itself_begins_with_the_first_step_again() -> None:
    """A → B at 20 % → A → B, before B has drained."""
    world = started()
    new = newcomer(world, LONGER)
    until(world, lambda: weights(world).get(new) == 20)
    world.pods.in_flight = {new: 1}
    world.put(SPEC)
    until(world, lambda: world.revisions()[new] == ("Draining", 0))
    world.put(LONGER)
    world.turn()
    assert weights(world)[new] <= 20


def test_a_revision_that_has_served_comes_back_at_once() -> None:
    """A → B → A, before A has drained."""
    world = started()
    old = leader(world)
    world.pods.in_flight = {old: 1}
    new = newcomer(world, LONGER)
    until(world, lambda: weights(world) == {new: 100})
    until(world, lambda: world.revisions()[old] == ("Draining", 0))
    world.put(SPEC)
    world.turn()
    assert weights(world) == {old: 100}


def test_an_upgrade_that_turns_from_surge_to_bridge_leaves_nobody_without() -> None:
    world = started()
    new = newcomer(world, LONGER)
    until(world, lambda: weights(world).get(new) == 20)
    world.pods.in_flight = dict.fromkeys(services(world), 1)
    world.put(LONGER_BRIDGE)
    for _ in range(30):
        world.turn()
        assert weights(world)
    assert settled(world) == new


def test_a_hot_change_does_not_try_a_failed_upgrade_again() -> None:
    world = started()
    old = leader(world)
    new = failed(world, LONGER)
    world.put(spec_with("fallback.budget", {"usdPerDay": "50"}, LONGER))
    world.run(START_S)
    assert services(world) == {old}
    world.ray.never_ready.clear()
    world.put(spec_with("upgrade.progressDeadline", "80s", LONGER))
    world.run(UPGRADE_S)
    assert settled(world) == new, "one of how upgrades go does"


def test_a_ceiling_that_was_raised_in_vain_and_is_lowered_again_is_served_by_the_revision_before() -> None:
    low, high = spec_with("engine.maxActiveSeqs", 64), spec_with("engine.maxActiveSeqs", 128)
    world = started(low)
    old = leader(world)
    failed(world, high)
    world.put(low)
    world.run(START_S)
    assert settled(world) == old
    assert said(world, "Degraded") == ("False", "AsExpected")


def test_what_the_new_revision_is_to_prove_does_not_reach_the_old_one() -> None:
    """A bad argument of class rolling beside a change of class revision must leave something to return to."""
    world = started()
    old = leader(world)
    before = world.cluster.get(at(k.RAY_SERVICE, old))["spec"]
    newcomer(world, spec_with("engine.extraArgs", {"enforce-eager": "true"}, LONGER))
    world.run(20)
    assert world.cluster.get(at(k.RAY_SERVICE, old))["spec"] == before


def test_a_return_goes_to_what_has_served_not_to_what_never_came_up() -> None:
    """Bridge: A serves; B and C never come up."""
    world = started(BRIDGE)
    old = leader(world)
    for length in (8192, 12288, 16384, 20480):
        world.ray.never_ready.add(newcomer(world, spec_with("engine.maxModelLen", length, BRIDGE)))
        world.run(20)
    world.run(2 * UPGRADE_S)
    assert settled(world) == old


@pytest.mark.parametrize("strategy", ["Surge", "Bridge", "Recreate"])
def test_many_changes_before_anything_is_up(strategy: str) -> None:
    world = World()
    world.ray.ready_after_s = 1e9
    for length in range(12):
        spec = spec_with("engine.maxModelLen", 8192 + 512 * length)
        world.put(spec_with("upgrade.strategy", strategy, spec))
        world.run(25)
        assert len(services(world)) <= 2
    world.ray.ready_after_s = 10
    world.run(2 * UPGRADE_S)
    settled(world)
    assert len(world.revisions()) == 1


@pytest.mark.parametrize("turns", range(2, 28, 4))
def test_suspend_in_any_phase_of_an_upgrade(turns: int) -> None:
    world = started()
    world.put(LONGER)
    for _ in range(turns):
        world.turn()
    world.put(spec_with("suspend", True, LONGER))
    world.run(120)
    assert services(world) == set()
    assert world.idle_writes() == 0
    world.put(LONGER)
    world.run(120)
    settled(world)


# What does not fit, and what cannot be made


@pytest.mark.parametrize("turns", range(0, 20, 4))
def test_a_spec_that_does_not_fit_stops_an_upgrade_and_not_the_service(turns: int) -> None:
    world = started(BRIDGE)
    world.put(LONGER_BRIDGE)
    for _ in range(turns):
        world.turn()
    world.put(spec_with("upgrade.strategy", "Bridge", UNFIT))
    world.run(UPGRADE_S)
    settled(world)
    assert said(world, "Degraded") == ("True", "DoesNotFit")


def test_a_spec_that_does_not_fit_after_a_failed_upgrade_leaves_the_return_alone() -> None:
    world = started(BRIDGE)
    old = leader(world)
    new = newcomer(world, LONGER_BRIDGE)
    world.ray.never_ready.add(new)
    until(world, lambda: world.revisions()[new][0] == "Failed")
    world.put(spec_with("upgrade.strategy", "Bridge", UNFIT))
    world.run(UPGRADE_S)
    assert settled(world) == old


def test_what_never_fitted_makes_no_pods() -> None:
    world = World()
    world.put(UNFIT)
    world.run(START_S)
    assert services(world) == set()
    assert said(world, "Fits")[0] == "False"
    assert world.idle_writes() == 0


def test_an_operator_that_was_given_no_images_takes_nothing_away() -> None:
    world = started()
    before = {str(ref) for kind in (k.DEPLOYMENT, k.SERVICE, k.CONFIG_MAP) for ref in world.cluster.refs(kind)}
    world.config = world.config.model_copy(update={"gateway_image": None, "engine_image": None})
    world.idle_writes(2)
    after = {str(ref) for kind in (k.DEPLOYMENT, k.SERVICE, k.CONFIG_MAP) for ref in world.cluster.refs(kind)}
    assert after == before
    assert said(world, "GatewayReady") == ("False", "ImageMissing")
    assert said(world, "ServingReady") == ("True", "Ready")


# What is taken away by hand


@pytest.mark.parametrize("turns", range(2, 28, 4))
def test_ray_services_that_are_deleted_in_any_phase_of_an_upgrade_come_back(turns: int) -> None:
    world = started()
    world.put(LONGER)
    for _ in range(turns):
        world.turn()
    for name in services(world):
        world.cluster.delete(at(k.RAY_SERVICE, name))
    world.run(300)
    settled(world)


def test_a_record_that_is_deleted_is_pinned_again() -> None:
    world = started()
    record = at(k.CONTROLLER_REVISION, leader(world))
    before = world.cluster.get(record)["data"]
    world.cluster.delete(record)
    world.run(START_S)
    assert world.cluster.get(record)["data"] == before
    settled(world)


def test_a_record_that_is_deleted_in_mid_upgrade_costs_no_traffic() -> None:
    world = started()
    old = leader(world)
    new = newcomer(world, LONGER)
    world.cluster.delete(at(k.CONTROLLER_REVISION, old))
    for _ in range(4):
        world.turn()
        assert old in services(world)
    assert said(world, "Degraded") == ("True", "RecordLost")
    world.run(UPGRADE_S)
    assert settled(world) == new


def test_a_record_that_is_deleted_while_the_spec_does_not_fit_costs_no_traffic() -> None:
    world = started()
    old = leader(world)
    world.put(UNFIT)
    world.run(20)
    world.cluster.delete(at(k.CONTROLLER_REVISION, old))
    world.run(START_S)
    assert settled(world) == old


def test_a_lost_record_rebuilds_no_cluster_with_todays_image() -> None:
    world = started()
    old = leader(world)
    before = world.cluster.get(at(k.RAY_SERVICE, old))["spec"]
    world.config = world.config.model_copy(update={"engine_image": "registry.example.com/e@sha256:" + "c" * 64})
    world.cluster.delete(at(k.CONTROLLER_REVISION, old))
    world.run(START_S)
    assert world.cluster.get(at(k.RAY_SERVICE, old))["spec"] == before
    assert said(world, "Degraded") == ("True", "RecordLost")
    assert "spec.engine.image" in world.condition("Degraded")["message"]


def test_a_field_of_status_that_is_not_understood_costs_that_field_alone() -> None:
    """A newer tuner or operator has written it."""
    obj = started().resource()
    assert obj is not None
    obj["status"]["tuning"] = {"mode": "Auto", "acknowledged": 4, "fresh": 1}
    obj["status"]["revisions"][0]["fresh"] = 1
    obj["status"]["conditions"][0]["status"] = "Perhaps"
    _, status = parse(obj)
    assert [(r.phase.value, r.weight) for r in status.revisions] == [("Serving", 100)]
    assert status.tuning is not None
    assert status.tuning.acknowledged == 4
    assert status.weights_version > 0


# What others say and write


def test_a_traceback_in_a_message_of_serve_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    down = {"status": "DEPLOY_FAILED", "message": "Traceback " * 1000}
    monkeypatch.setattr(worlds, "_application", lambda ready: {"status": "RUNNING"} if ready else down)
    world = World()
    world.ray.ready_after_s = 40
    world.put()
    world.run(20)
    assert world.condition("ServingReady")["message"].count("Traceback") > 10
    world.run(START_S)
    settled(world)


@pytest.mark.parametrize(
    ("name", "port", "owner"),
    [
        pytest.param("moe-gateway-admin-evil", 6379, None, id="labels alone"),
        pytest.param("moe-gateway-admin-evil", 8001, None, id="labels and port"),
        pytest.param("moe-gateway-admin-evil", 6379, "moe-gateway-admin", id="an owner, and another port"),
        pytest.param("moe-gateway-evil", 8001, "moe-gateway", id="of another Service of ours"),
    ],
)
def test_an_address_of_a_stranger_is_not_asked(name: str, port: int, owner: str | None) -> None:
    world = started()
    asked: set[str] = set()
    ask = world.pods.ask

    async def spy(request: AskGateways) -> Any:
        asked.update(request.pods)
        return await ask(request)

    world.pods.ask = spy  # type: ignore[method-assign]
    meta: Obj = {"name": name, "namespace": NAMESPACE, "labels": {**MANAGED_BY, DEPLOYMENT_LABEL: "moe"}}
    if owner is not None:
        uid = world.cluster.get(at(k.SERVICE, owner))["metadata"]["uid"]
        reference = {"apiVersion": "v1", "kind": "Service", "name": owner, "uid": uid, "controller": True}
        meta["ownerReferences"] = [reference]
    ports = [{"name": "admin", "port": port, "protocol": "TCP"}]
    endpoints = [{"addresses": ["10.9.9.9"]}]
    body = {"metadata": meta, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}
    world.cluster.create(at(k.ENDPOINT_SLICE, name), body, user="tenant")
    world.put(LONGER)
    world.run(START_S)
    assert asked == {"10.0.0.1:8001"}
    assert gateway_admin_name("moe") == "moe-gateway-admin"


def test_a_ray_cluster_of_a_stranger_is_neither_scaled_nor_counted() -> None:
    world = started()
    ours = world.cluster.peek(k.RAY_CLUSTER)[0]
    groups = [{**group, "minReplicas": 7} for group in ours["spec"]["workerGroupSpecs"]]
    meta = {"name": "evil", "namespace": NAMESPACE, "labels": ours["metadata"]["labels"]}
    world.cluster.create(at(k.RAY_CLUSTER, "evil"), {"metadata": meta, "spec": {"workerGroupSpecs": groups}})
    world.run(START_S)
    assert world.cluster.get(at(k.RAY_CLUSTER, "evil"))["spec"]["workerGroupSpecs"] == groups
    settled(world)


def test_the_tuners_bounds_hold_while_it_is_not_off() -> None:
    world = started(SCALABLE)
    world.tune({"mode": "Auto", "acknowledged": 4, "replicas": {"min": 3, "max": 3}})
    world.run(20)
    bounds = lambda: world.cluster.peek(k.RAY_CLUSTER)[0]["spec"]["workerGroupSpecs"][0]["minReplicas"]  # noqa: E731
    assert bounds() == 3
    world.put(spec_with("tuning", {"mode": "Off"}, SCALABLE))
    world.run(20)
    assert bounds() == 1


# What a person reads at three in the morning


def test_a_first_start_that_takes_too_long_is_told() -> None:
    world = World()
    world.ray.ready_after_s = 1e9
    world.put()
    world.run(UPGRADE_S)
    assert said(world, "Degraded") == ("True", "NotReadyInTime")
    assert "has not become ready in 90 s" in world.condition("Degraded")["message"]
    assert world.idle_writes() == 0


def test_the_only_revision_that_does_not_answer_is_told_and_so_is_its_return() -> None:
    world = started()
    world.ray.unready = {leader(world)}
    world.run(2 * START_S)
    assert said(world, "Degraded") == ("True", "NotReadyInTime")
    assert "has all the traffic" in world.condition("Degraded")["message"]
    assert world.idle_writes() == 0
    world.ray.unready = set()
    world.run(20)
    assert said(world, "Degraded") == ("False", "AsExpected")


def test_gateways_that_never_answer_are_told_and_hold_no_drain_for_ever() -> None:
    world = started()
    world.pods.silent = True
    world.run(START_S)
    assert said(world, "SLOMet") == ("Unknown", "GatewaysSilent")
    world.put(spec_with("suspend", True))
    world.run(START_S)
    assert services(world) == set()


def test_gateways_that_lag_after_a_bridge_are_asked_until_they_use_the_new_weights() -> None:
    world = started(BRIDGE)
    world.put(LONGER_BRIDGE)
    until(world, lambda: len(services(world)) == 1 and not weights(world))
    world.pods.deaf = True
    until(world, lambda: bool(weights(world)), turns=200)
    asked: list[AskGateways] = []
    ask = world.pods.ask

    async def counted(request: AskGateways) -> Any:
        asked.append(request)
        return await ask(request)

    world.pods.ask = counted  # type: ignore[method-assign]
    world.run(60.0)
    assert len(asked) >= 8
    world.pods.deaf = False
    world.run(10.0)
    assert world.pods.version == (world.resource() or {})["status"]["weightsVersion"]
