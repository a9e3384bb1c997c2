"""The simulated controllers behave as the operator's tests take for granted."""

from __future__ import annotations

from typing import Any

import pytest

from moe_kube.objects import DEPLOYMENT, ENDPOINT_SLICE, RAY_CLUSTER, RAY_SERVICE, SERVICE, Obj, Ref
from tests.kube.bodies import LABELS, body
from tests.world.world import World

RAY = Ref(RAY_SERVICE, "test", "qwen-r1")
GATEWAY = Ref(DEPLOYMENT, "test", "gateway")
ADMIN = Ref(SERVICE, "test", "gateway-admin")


def ready(world: World, ref: Ref = RAY) -> str:
    conditions = world.cluster.get(ref).get("status", {}).get("conditions", [])
    return next((one["status"] for one in conditions if one["type"] == "Ready"), "")


def apply(world: World, ref: Ref, **more: Any) -> None:
    world.cluster.apply(ref, {**body(ref.kind), **more}, manager="operator")


async def test_a_ray_service_gets_a_cluster_and_becomes_ready_in_time() -> None:
    world = World(ray_ready_after_s=30.0)
    apply(world, RAY)
    world.settle()
    assert ready(world) == "False"
    (cluster,) = world.cluster.peek(RAY_CLUSTER)
    status = world.cluster.get(RAY)["status"]
    assert status["pendingServiceStatus"]["rayClusterName"] == cluster["metadata"]["name"]
    assert cluster["metadata"]["labels"]["ray.io/originated-from-cr-name"] == RAY.name
    await world.run(29)
    assert ready(world) == "False"
    await world.run(1)
    status = world.cluster.get(RAY)["status"]
    assert ready(world) == "True"
    assert (status["serviceStatus"], status["numServeEndpoints"]) == ("Running", 1)
    assert status["activeServiceStatus"]["rayClusterName"] == cluster["metadata"]["name"]
    assert status["observedGeneration"] == world.cluster.get(RAY)["metadata"]["generation"]
    assert "pendingServiceStatus" not in status


async def test_a_settled_world_writes_nothing() -> None:
    world = World()
    for ref in (RAY, GATEWAY):
        apply(world, ref)
    await world.run(40)
    version = world.cluster.version
    await world.run(10)
    assert world.cluster.version == version


async def test_what_none_keeps_from_the_live_cluster_and_what_it_lets_through() -> None:
    world = World(ray_ready_after_s=0.0)
    apply(world, RAY)
    world.settle()
    (before,) = world.cluster.peek(RAY_CLUSTER)

    def change(obj: Obj) -> None:
        obj["spec"]["rayClusterConfig"]["rayVersion"] = "2.61.0"
        obj["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"] = 9
        obj["spec"]["serveConfigV2"] = "applications: [new]\n"

    world.cluster.edit(RAY, change)
    world.settle()
    (after,) = world.cluster.peek(RAY_CLUSTER)
    assert after["spec"] == before["spec"]
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert world.kuberay.serving[after["metadata"]["name"]] == "applications: [new]\n"


async def test_troubles() -> None:
    world = World(ray_ready_after_s=10.0)
    apply(world, RAY)
    world.kuberay.trouble(RAY.name).never_ready = True
    await world.run(60)
    status = world.cluster.get(RAY)["status"]
    assert ready(world) == "False"
    app = status["pendingServiceStatus"]["applicationStatuses"]["llm"]
    assert app == {"status": "DEPLOY_FAILED", "message": "the engine did not start"}
    world.kuberay.trouble(RAY.name).never_ready = False
    world.settle()
    assert ready(world) == "True"
    world.kuberay.trouble(RAY.name).unready = True
    world.settle()
    assert ready(world) == "False"
    assert "numServeEndpoints" not in world.cluster.get(RAY)["status"]


async def test_a_deleted_ray_service_goes_with_its_cluster() -> None:
    world = World(ray_ready_after_s=0.0)
    apply(world, RAY)
    world.settle()
    world.kuberay.trouble(RAY.name).stuck_deletion = True
    world.cluster.delete(RAY)
    world.settle()
    assert "deletionTimestamp" in world.cluster.get(RAY)["metadata"], "KubeRay's finalizer holds it"
    assert not world.cluster.refs(RAY_CLUSTER)
    world.kuberay.trouble(RAY.name).stuck_deletion = False
    world.settle()
    assert not world.cluster.refs(RAY_SERVICE)


async def test_a_deployment_becomes_available_and_its_service_names_its_pods() -> None:
    world = World(pods_ready_after_s=5.0)
    apply(world, GATEWAY)
    spec = {
        "clusterIP": "None",
        "ports": [{"name": "admin", "port": 9000, "protocol": "TCP", "targetPort": "http"}],
        "publishNotReadyAddresses": True,
        "selector": LABELS,
    }
    apply(world, ADMIN, spec=spec)
    world.settle()
    assert "availableReplicas" not in world.cluster.get(GATEWAY)["status"]
    (found,) = world.cluster.peek(ENDPOINT_SLICE)
    assert found["metadata"]["labels"]["kubernetes.io/service-name"] == ADMIN.name
    assert found["ports"][0]["port"] == 8000
    first = [endpoint["addresses"][0] for endpoint in found["endpoints"]]
    assert len(first) == 2
    await world.run(5)
    status = world.cluster.get(GATEWAY)["status"]
    assert (status["availableReplicas"], status["observedGeneration"]) == (2, 1)

    def roll(obj: Obj) -> None:
        obj["spec"]["template"]["metadata"]["annotations"]["moestack.dev/digest"] = "y"

    world.cluster.edit(GATEWAY, roll)
    world.deployments.never_ready.add(GATEWAY.name)
    await world.run(10)
    (found,) = world.cluster.peek(ENDPOINT_SLICE)
    addresses = [endpoint["addresses"][0] for endpoint in found["endpoints"]]
    assert set(first) < set(addresses), "old pods stay while the new ones are not ready"
    progressing = world.cluster.get(GATEWAY)["status"]["conditions"][1]
    assert (progressing["type"], progressing["status"]) == ("Progressing", "False")
    world.deployments.never_ready.clear()
    world.settle()
    (found,) = world.cluster.peek(ENDPOINT_SLICE)
    assert not set(first) & {endpoint["addresses"][0] for endpoint in found["endpoints"]}
    world.cluster.delete(ADMIN)
    world.settle()
    assert not world.cluster.refs(ENDPOINT_SLICE)


async def test_kinds_come_and_go() -> None:
    world = World()
    apply(world, RAY)
    world.settle()
    world.cluster.remove(RAY_SERVICE)
    world.settle()
    assert not world.cluster.refs(RAY_CLUSTER), "its owner's kind is gone, so it is collected"
    with pytest.raises(Exception, match="could not find"):
        apply(world, RAY)
    world.cluster.install(RAY_SERVICE)
    apply(world, RAY)
    world.settle()
    assert len(world.cluster.refs(RAY_CLUSTER)) == 1


def test_an_owner_in_another_namespace_is_none() -> None:
    world = World()
    owner = world.cluster.create(Ref(SERVICE, "other", "owner"), body(SERVICE))
    reference = {"apiVersion": "v1", "kind": "Service", "name": "owner", "uid": owner["metadata"]["uid"]}
    world.cluster.create(ADMIN, body(SERVICE, ownerReferences=[reference]))
    near = Ref(SERVICE, "other", "near")
    world.cluster.create(near, body(SERVICE, ownerReferences=[reference]))
    assert world.cluster.collect_garbage() == 1
    assert world.cluster.find(ADMIN) is None
    assert world.cluster.find(near) is not None


def test_of_two_owners_the_one_that_is_gone_is_forgotten() -> None:
    world = World()
    references = []
    for name in ("stays", "goes"):
        owner = world.cluster.create(Ref(SERVICE, "test", name), body(SERVICE))
        uid = owner["metadata"]["uid"]
        references.append({"apiVersion": "v1", "kind": "Service", "name": name, "uid": uid})
    world.cluster.create(ADMIN, body(SERVICE, ownerReferences=references))
    world.cluster.delete(Ref(SERVICE, "test", "goes"))
    assert world.cluster.collect_garbage() == 1
    assert world.cluster.get(ADMIN)["metadata"]["ownerReferences"] == references[:1]
    assert world.cluster.collect_garbage() == 0
