"""The real KubeRay operator on a test control plane, and the RayServices that tests give it."""

from __future__ import annotations

from typing import Any

import yaml

from tests.cluster.control_plane import ControlPlane
from tests.cluster.credentials import write_kubeconfig

WATCHED = ("rayclusters", "rayservices", "rayjobs")


def install_crds(plane: ControlPlane) -> None:
    """KubeRay's CRDs, of the version that runs: those that it watches. The API server takes seconds over each."""
    plane.install_crds(*(plane.assets / "crds" / f"ray.io_{kind}.yaml" for kind in WATCHED))


def start_kuberay(plane: ControlPlane, ray_url: str) -> None:
    """Starts the operator unless it runs; `ray_url` is the fake Ray's, before the API server (fake_ray.py)."""
    if "kuberay" in plane.components:
        return
    config = write_kubeconfig(
        plane.folder / "kuberay.kubeconfig", ray_url, plane.ca, plane.tokens["kuberay"], "kuberay"
    )
    plane.add(
        "kuberay",
        2,
        lambda ports: [
            "ray-operator",
            f"--kubeconfig={config}",
            f"--health-probe-bind-address=127.0.0.1:{ports[0]}",
            f"--metrics-addr=127.0.0.1:{ports[1]}",
            "--enable-leader-election=false",
            "--use-kubernetes-proxy",
        ],
        "http://127.0.0.1:{}/readyz",
    )


SERVE_CONFIG: dict[str, Any] = {
    "applications": [{"name": "llm", "import_path": "app:build", "deployments": [{"name": "Engine"}]}]
}


def ray_service(name: str, workers: int = 2, gpus: int = 8, serve: dict[str, Any] | None = None) -> dict[str, Any]:
    """A small RayService that KubeRay accepts: no upgrades of its own, autoscaling on, one group of GPU workers."""

    def template(container: str, limits: dict[str, str]) -> dict[str, Any]:
        return {"spec": {"containers": [{"name": container, "image": "ray", "resources": {"limits": limits}}]}}

    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {
            "upgradeStrategy": {"type": "None"},
            "serveConfigV2": yaml.safe_dump(SERVE_CONFIG if serve is None else serve),
            "rayClusterConfig": {
                "rayVersion": "2.60.0",
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {"rayStartParams": {}, "template": template("ray-head", {"cpu": "1"})},
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": workers,
                        "minReplicas": workers,
                        "maxReplicas": 2 * workers,
                        "rayStartParams": {},
                        "template": template("ray-worker", {"cpu": "1", "nvidia.com/gpu": str(gpus)}),
                    }
                ],
            },
        },
    }
