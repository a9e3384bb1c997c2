"""Stories of sleep, ends and new beginnings: suspend, pause, delete, delete and recreate, adoption, foreign objects."""

from __future__ import annotations

from typing import Any

import yaml

from moe_kube.objects import Obj
from moe_operator.names import gateway_name
from tests.cluster.life import NAME, Life, story
from tests.cluster.stories_scale import uids

MANAGER = "moestack-operator"


def owner(obj: Obj) -> str:
    """Uid of the owner that controls it."""
    return next((one["uid"] for one in obj["metadata"].get("ownerReferences", ()) if one.get("controller")), "")


@story
def suspended_it_runs_nothing_and_comes_back_as_it_was(life: Life) -> None:
    life.apply()
    revision = life.until_ready()
    life.apply({"suspend": True, "upgrade.drainTimeout": "2s"})
    life.until("the cluster is gone", lambda: not life.names("rayservices") + life.names("rayclusters"))
    life.until("its pods are gone", lambda: not life.names("pods", labelSelector="ray.io/cluster"))
    life.until("it says so", lambda: life.condition("ClusterReady")[:2] == ("False", "Suspended"))
    assert life.names("deployments") == [gateway_name(NAME)], "its address stays"
    life.apply()
    assert life.until_ready() == revision


@story
def paused_nothing_moves(life: Life) -> None:
    life.apply()
    life.until_ready()
    before = {kind: uids(life, kind) for kind in ("rayservices", "rayclusters", "pods", "deployments")}
    life.kubectl("annotate", "moed", NAME, "moestack.dev/paused=true")
    life.apply({"tuning.paused": True})
    generation = (life.get("moedeployments", NAME) or {})["metadata"]["generation"]
    life.until("it was seen", lambda: life.status().get("observedGeneration") == generation)
    assert {kind: uids(life, kind) for kind in before} == before


@story
def deleted_it_leaves_nothing(life: Life) -> None:
    life.apply()
    life.until_ready()
    assert len(life.all_objects()) > 20
    life.kubectl("delete", "moed", NAME, "--timeout=60s")
    life.until("nothing is left", lambda: not life.all_objects())


@story
def deleted_in_mid_upgrade_it_leaves_nothing(life: Life) -> None:
    life.apply()
    life.until_ready()
    life.apply({"engine.maxModelLen": 16384})
    life.until("both revisions run", lambda: len(life.names("rayclusters")) == 2)
    life.kubectl("delete", "moed", NAME, "--timeout=60s")
    life.until("nothing is left", lambda: not life.all_objects())


@story
def deleted_and_recreated_at_once_it_comes_back(life: Life) -> None:
    life.apply()
    life.until_ready()
    before = uids(life, "moedeployments") | uids(life, "rayservices") | uids(life, "deployments")
    life.kubectl("delete", "moed", NAME, "--wait=false")
    life.apply()
    life.until(
        "all of it is new",
        lambda: (
            not before.items()
            & (uids(life, "moedeployments") | uids(life, "rayservices") | uids(life, "deployments")).items()
        ),
    )
    life.until_ready()
    ours = (uids(life, "moedeployments"))[NAME]
    for kind in ("rayservices", "deployments", "configmaps", "services", "controllerrevisions"):
        of_ours = [obj for obj in life.list(kind) if MANAGER in str(obj["metadata"].get("managedFields"))]
        assert {owner(obj) for obj in of_ours} == {ours}, kind


@story
def orphans_are_adopted_as_they_run(life: Life) -> None:
    life.apply()
    revision = life.until_ready()
    kinds = ("rayservices", "rayclusters", "pods", "deployments", "services", "configmaps")
    before = {kind: uids(life, kind) for kind in kinds}
    life.kubectl("delete", "moed", NAME, "--cascade=orphan")
    life.until("it is gone", lambda: not life.names("moedeployments"))
    assert not owner(life.list("rayservices")[0]), "nobody owns it"
    life.apply()
    assert life.until_ready() == revision
    ours = uids(life, "moedeployments")[NAME]
    life.until("the RayService is owned", lambda: owner(life.list("rayservices")[0]) == ours)
    assert {kind: uids(life, kind) for kind in kinds} == before, "nothing was made anew"
    life.kubectl("delete", "moed", NAME, "--timeout=60s")
    life.until("nothing is left", lambda: not life.all_objects())


def foreign(life: Life, asleep: str) -> list[Obj]:
    """Somebody else's objects, by names that two MoEDeployments need."""
    labels = {"app": "other"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "other"}]}}
    deployment = {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod}
    ray = {"rayClusterConfig": {"headGroupSpec": {"rayStartParams": {}, "template": pod}}}
    kinds: list[tuple[str, str, str, dict[str, Any]]] = [
        ("apps/v1", "Deployment", gateway_name(NAME), deployment),
        ("v1", "Service", gateway_name(NAME), {"selector": labels, "ports": [{"port": 1}]}),
        ("ray.io/v1", "RayService", life.revision_of(name=asleep), ray),
    ]
    return [
        {"apiVersion": version, "kind": kind, "metadata": {"name": name}, "spec": spec}
        for version, kind, name, spec in kinds
    ]


@story
def foreign_objects_of_its_names_are_left_alone(life: Life) -> None:
    other = "other"
    theirs = yaml.safe_dump_all(foreign(life, other))
    life.kubectl("apply", "-f", "-", stdin=theirs)
    where = {
        ("deployments", gateway_name(NAME)): NAME,
        ("services", gateway_name(NAME)): NAME,
        ("rayservices", life.revision_of(name=other)): other,
    }

    def seen() -> list[Any]:
        found = [life.get(*at) or {} for at in where]
        return [(obj["metadata"]["uid"], obj["spec"], obj["metadata"].get("labels"), owner(obj)) for obj in found]

    before = seen()
    life.apply()
    life.apply(name=other)
    for (kind, taken), name in where.items():

        def said(name: str = name, taken: str = taken) -> bool:
            _, reason, message = life.condition("Degraded", name)
            return reason == "NameTaken" and taken in message

        life.until(f"{name} says that the name of its {kind} is taken", said)
    assert seen() == before
    for at in where:
        assert MANAGER not in str((life.get(*at) or {})["metadata"]["managedFields"])
    assert gateway_name(NAME) not in life.names("horizontalpodautoscalers"), "it would scale what is theirs"
    life.kubectl("delete", "-f", "-", "--timeout=60s", stdin=theirs)
    for name in (NAME, other):
        life.until_ready(name)
        assert life.condition("Degraded", name)[0] == "False"
