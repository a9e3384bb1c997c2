"""What an accelerator's name means to Kubernetes: the resource that a pod asks for, and the nodes that have it."""

from __future__ import annotations

from typing import Any

CPU = "cpu"
RESOURCES = {"nvidia-": "nvidia.com/gpu", "amd-": "amd.com/gpu", "tpu-": "google.com/tpu"}
"""Prefix of a catalog name → extended resource."""

_PRODUCT = "nvidia.com/gpu.product"  # NVIDIA's GPU feature discovery, part of its GPU operator
_GKE = "cloud.google.com/gke-accelerator"
_NODES: dict[str, dict[str, tuple[str, ...]]] = {
    "nvidia-h100": {
        _PRODUCT: ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"),
        _GKE: ("nvidia-h100-80gb", "nvidia-h100-mega-80gb"),
    },
    "nvidia-h100-pcie": {_PRODUCT: ("NVIDIA-H100-PCIe",)},
    "nvidia-h100-nvl": {_PRODUCT: ("NVIDIA-H100-NVL",)},
    "nvidia-h200": {_PRODUCT: ("NVIDIA-H200",), _GKE: ("nvidia-h200-141gb",)},
    "nvidia-b200": {_PRODUCT: ("NVIDIA-B200",), _GKE: ("nvidia-b200",)},
    "nvidia-gb200": {_PRODUCT: ("NVIDIA-GB200",), _GKE: ("nvidia-gb200",)},
    "nvidia-gb300": {_PRODUCT: ("NVIDIA-GB300",)},
    "nvidia-b300": {_PRODUCT: ("NVIDIA-B300-SXM6-AC",)},
    "nvidia-a100-80gb": {
        _PRODUCT: ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe", "NVIDIA-A100-PCIE-80GB"),
        _GKE: ("nvidia-a100-80gb",),
    },
    "nvidia-a100-40gb": {_PRODUCT: ("NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"), _GKE: ("nvidia-tesla-a100",)},
    "nvidia-l40s": {_PRODUCT: ("NVIDIA-L40S",)},
    "nvidia-l4": {_PRODUCT: ("NVIDIA-L4",), _GKE: ("nvidia-l4",)},
    "nvidia-a10": {_PRODUCT: ("NVIDIA-A10",)},
    "nvidia-rtx-3090": {_PRODUCT: ("NVIDIA-GeForce-RTX-3090",)},
    "nvidia-rtx-4090": {_PRODUCT: ("NVIDIA-GeForce-RTX-4090",)},
    "nvidia-rtx-5090": {_PRODUCT: ("NVIDIA-GeForce-RTX-5090",)},
}
"""Catalog name → node label → values that mean it."""


def resource(accelerator: str) -> str | None:
    """The extended resource of an accelerator; None for cpu, and for a vendor that is not known."""
    return next((name for prefix, name in RESOURCES.items() if accelerator.startswith(prefix)), None)


def affinity(accelerator: str) -> dict[str, Any]:
    """Node affinity: where nodes say which accelerator they have, it must be this one; where none does, any will do.

    Terms are alternatives: one for each label that names the accelerator, and one for nodes without such a label.
    """
    labels = _NODES.get(accelerator)
    if labels is None:
        return {}
    terms = [
        {"matchExpressions": [{"key": key, "operator": "In", "values": list(values)}]} for key, values in labels.items()
    ]
    silent = {"matchExpressions": [{"key": key, "operator": "DoesNotExist"} for key in (_PRODUCT, _GKE)]}
    required = {"nodeSelectorTerms": [*terms, silent]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
