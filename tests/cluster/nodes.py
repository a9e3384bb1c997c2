"""Nodes that kwok plays."""

from __future__ import annotations

from typing import Any


def gpu_node(name: str, gpus: int, accelerator: str = "nvidia-h100") -> dict[str, Any]:
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
                "nvidia.com/gpu.product": accelerator,
            },
        },
        "status": {"capacity": capacity, "allocatable": capacity},
    }
