"""Stories of changes that rebuild nothing: more replicas, knobs, and what a running gateway takes up."""

from __future__ import annotations

import json
from typing import Any

from moe_kube.objects import Obj
from moe_operator.names import gateway_name
from tests.cluster.life import NAME, Life, story

HOT: dict[str, Any] = {
    "slo": {"ttftP95": "3s", "itlP95": "2s"},
    "experts.capacityFactor": {"prefill": "1.5"},
    "experts.overflow": "Reroute",
    "fallback": {
        "targets": [
            {
                "name": "spare",
                "provider": "openai-compatible",
                "model": "spare",
                "baseUrl": "https://spare.example.com/v1",
                "zeroRetention": True,
            }
        ],
        "budget": {"usdPerDay": "50"},
    },
}


def uids(life: Life, kind: str) -> dict[str, str]:
    """What would differ if anything of that kind were made anew."""
    return {obj["metadata"]["name"]: obj["metadata"]["uid"] for obj in life.list(kind)}


def workers(life: Life) -> Obj:
    """The worker group of the only RayCluster."""
    (cluster,) = life.list("rayclusters")
    group: Obj = cluster["spec"]["workerGroupSpecs"][0]
    return group


def autoscaling(config: Obj) -> tuple[int, int]:
    """Bounds of replicas in a Serve configuration."""
    bounds = config["applications"][0]["deployments"][0]["autoscaling_config"]
    return bounds["min_replicas"], bounds["max_replicas"]


def sent(life: Life, revision: str) -> list[tuple[int, int]]:
    """Bounds of each Serve configuration that KubeRay has PUT."""
    return [autoscaling(put.config) for put in life.stage.fake_ray.puts(life.namespace, revision)]


@story
def bounds_of_replicas_reach_the_live_cluster(life: Life) -> None:
    life.apply({"replicas": {"min": 1, "max": 2}})
    revision = life.until_ready()
    before = uids(life, "rayservices") | uids(life, "rayclusters") | uids(life, "pods")
    assert sent(life, revision) == [(1, 2)]

    life.apply({"replicas": {"min": 2, "max": 4}})
    life.until("Serve has the new bounds", lambda: sent(life, revision) == [(1, 2), (2, 4)])
    life.until(
        "the worker group has them", lambda: (workers(life)["minReplicas"], workers(life)["maxReplicas"]) == (2, 4)
    )
    life.until("both replicas are ready", lambda: life.status().get("readyReplicas") == 2)
    assert len(life.names("pods", labelSelector="ray.io/node-type=worker")) == 2
    after = uids(life, "rayservices") | uids(life, "rayclusters") | uids(life, "pods")
    assert before.items() <= after.items(), "nothing was made anew"
    assert life.until_ready() == revision


@story
def hot_changes_restart_nothing(life: Life) -> None:
    life.apply()
    revision = life.until_ready()
    kinds = ("rayservices", "rayclusters", "pods", "deployments", "replicasets")
    before = {kind: uids(life, kind) for kind in kinds}
    (service,), (deployment,) = life.list("rayservices"), life.list("deployments")

    life.apply(HOT)

    def config() -> Obj:
        made = life.get("configmaps", gateway_name(NAME))
        assert made is not None
        (text,) = made["data"].values()
        document: Obj = json.loads(text)
        return document

    life.until("gateways are told", lambda: config()["slo"] == {"ttftP95S": 3.0, "itlP95S": 2.0})
    assert [target["name"] for target in config()["targets"]] == ["spare"]
    life.until("status speaks of it", lambda: life.condition("ServingReady")[0] == "True")
    assert life.until_ready() == revision
    assert {kind: uids(life, kind) for kind in kinds} == before
    (service_after,), (deployment_after,) = life.list("rayservices"), life.list("deployments")
    assert service_after["metadata"]["generation"] == service["metadata"]["generation"]
    assert deployment_after["metadata"]["generation"] == deployment["metadata"]["generation"]
    assert len(sent(life, revision)) == 1
