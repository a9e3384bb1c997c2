"""Specs for the planner's tests."""

from __future__ import annotations

from typing import Any

from moe_api.load import load_object
from moe_api.spec import MoEDeploymentSpec


def spec(model: str, accelerator: str, gpus: int, quantization: str = "Auto", **groups: Any) -> MoEDeploymentSpec:
    """One replica of a model on GPUs; further groups of the spec by their JSON name."""
    return load_object(
        {
            "apiVersion": "moestack.dev/v1alpha1",
            "kind": "MoEDeployment",
            "metadata": {"name": "m"},
            "spec": {
                "model": {"id": model, "quantization": quantization},
                "hardware": {"accelerator": accelerator, "gpusPerReplica": gpus},
                **groups,
            },
        }
    ).spec
