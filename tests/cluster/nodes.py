"""Nodes that kwok plays, and pods on them that lose their readiness."""

from __future__ import annotations

from typing import Any

from tests.cluster.control_plane import ControlPlane


def gpu_node(name: str, gpus: int, product: str = "NVIDIA-H100-80GB-HBM3") -> dict[str, Any]:
    """A Node with `gpus` of nvidia.com/gpu and the product label that GPU feature discovery sets."""
    capacity = {"cpu": "96", "memory": "1Ti", "ephemeral-storage": "4Ti", "pods": "200", "nvidia.com/gpu": str(gpus)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                "nvidia.com/gpu.product": product,
            },
        },
        "status": {"capacity": capacity, "allocatable": capacity},
    }


def set_ready(plane: ControlPlane, namespace: str, selector: str, *, ready: bool) -> int:
    """Sets the readiness of running pods as a kubelet's probe would; kwok leaves it so. How many pods it met."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    pods = plane.ask("GET", path, labelSelector=selector).json()["items"]
    for pod in pods:
        status = str(ready)
        conditions = [{"type": kind, "status": status} for kind in ("Ready", "ContainersReady")]
        patched = plane.ask(
            "PATCH",
            f"{path}/{pod['metadata']['name']}/status",
            {"status": {"conditions": conditions}},
            content_type="application/strategic-merge-patch+json",
        )
        assert patched.ok, patched.text
    return len(pods)
