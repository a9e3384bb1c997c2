"""An operator that is replaced by a newer one, and one that is there before KubeRay is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from moe_api.annotations import RENDERER
from moe_kube.objects import Obj
from moe_operator.render.objects import RENDERER_VERSION
from tests.cluster import newer_operator
from tests.cluster.control_plane import ROOT, ControlPlane
from tests.cluster.control_plane import running as plane_running
from tests.cluster.kuberay import install_crds
from tests.cluster.life import NAME, Life, Stage
from tests.cluster.namespaces import fresh_namespace
from tests.cluster.operators import ENVIRONMENT, config, grant, running
from tests.cluster.stories_scale import uids

pytestmark = pytest.mark.cluster

RECREATE = {"upgrade": {"strategy": "Recreate", "drainTimeout": "2s"}}
NEWER: dict[str, Any] = {
    "program": (newer_operator.__file__,),
    "environment": {**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{ROOT}"},
}


def life_of(plane: ControlPlane, namespace: str) -> Life:
    """A life without gateways and requests."""
    return Life(cast("Stage", Stage(plane, *[cast("Any", None)] * 4)), namespace)


def pinned(life: Life) -> tuple[str, str, Obj]:
    """Of the only RayService: its name, its renderer's version, and the annotations of its workers."""
    (service,) = life.list("rayservices")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    meta = service["metadata"]
    return meta["name"], meta["annotations"][RENDERER], group["template"]["metadata"].get("annotations", {})


def test_a_newer_renderer_touches_no_running_cluster(
    kuberay: ControlPlane, moestack_crd: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    life = life_of(kuberay, namespace)
    made = config(namespace=namespace, namespaces=(namespace,), lease_s=4.0)
    account = grant(kuberay, made)
    kinds = ("rayservices", "rayclusters", "pods", "deployments", "replicasets")
    with running(tmp_path, made, account, "older"):
        life.apply(RECREATE)
        old = life.until_ready()
        before = {kind: uids(life, kind) for kind in kinds}
        generation = life.list("rayservices")[0]["metadata"]["generation"]
    assert pinned(life) == (old, RENDERER_VERSION, {})

    with running(tmp_path, made, account, "newer", **NEWER) as newer:
        deployment = life.path("deployments", f"{NAME}-gateway")

        def rendered_by() -> str:
            return str(kuberay.ask("GET", deployment).json()["metadata"]["annotations"][RENDERER])

        life.until("the newer operator is at work", lambda: rendered_by() == newer_operator.VERSION)
        settled = (("result", "settled"),)
        life.until("and done", lambda: newer.metrics()["moestack_operator_reconcile_seconds_count"][settled] > 0)
        assert pinned(life) == (old, RENDERER_VERSION, {})
        assert life.list("rayservices")[0]["metadata"]["generation"] == generation
        assert {kind: uids(life, kind) for kind in kinds} == before, "nothing was made anew"

        life.apply({**RECREATE, "engine.maxModelLen": 16384})
        life.until("the upgrade is done", lambda: life.serving() not in ("", old))
        new = life.until_ready()
        assert pinned(life) == (new, newer_operator.VERSION, {newer_operator.MARK: newer_operator.VERSION})
        (cluster,) = life.list("rayclusters")
        (group,) = cluster["spec"]["workerGroupSpecs"]
        assert group["template"]["metadata"]["annotations"][newer_operator.MARK] == newer_operator.VERSION


def test_it_waits_for_kuberay_and_starts_by_itself(tmp_path: Path) -> None:
    with plane_running(tmp_path / "plane") as plane:
        plane.install_crds(ROOT / "manifests" / "crd" / "moestack.dev_moedeployments.yaml")
        with fresh_namespace(plane) as namespace:
            life = life_of(plane, namespace)
            made = config(namespace=namespace, namespaces=(namespace,))
            with running(tmp_path, made, grant(plane, made)):
                life.apply()
                life.until("it says so", lambda: life.condition("ClusterReady")[1] == "KubeRayMissing")
                assert "install KubeRay" in life.condition("ClusterReady")[2]
                assert life.names("deployments") == [f"{NAME}-gateway"], "what needs no KubeRay is there"
                install_crds(plane)
                life.until("the RayService is made", lambda: life.names("rayservices") == [life.revision_of()])
                life.until("it says so no more", lambda: life.condition("ClusterReady")[1] == "Creating")
