"""Builders for the command line's tests: resources, checkpoints, machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from moe_api.load import load_object
from moe_api.v1alpha1 import MoEDeployment
from moe_cli.fit import Machine
from moe_cli.stack import Options

QWEN = "Qwen/Qwen3-235B-A22B-FP8"


def document(**groups: Any) -> dict[str, Any]:
    """A MoEDeployment as plain values; keyword arguments replace groups of its spec, None removes one."""
    spec = {"model": {"id": QWEN}, "hardware": {"accelerator": "cpu", "gpusPerReplica": 2}} | groups
    return {
        "apiVersion": "moestack.dev/v1alpha1",
        "kind": "MoEDeployment",
        "metadata": {"name": "t"},
        "spec": {name: group for name, group in spec.items() if group is not None},
    }


def resource(**groups: Any) -> MoEDeployment:
    return load_object(document(**groups))


def write_resource(folder: Path, **groups: Any) -> Path:
    path = folder / "moe.yaml"
    path.write_text(yaml.safe_dump(document(**groups)))
    return path


def write_checkpoint(folder: Path, *, top_k: int = 4, weights: bytes = b"\0" * 64, **config: Any) -> Path:
    """A checkpoint folder with one whole safetensors file of one tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 16, "num_experts_per_tok": top_k}
    (folder / "config.json").write_text(json.dumps({**facts, "max_position_embeddings": 4096, **config}))
    (folder / "model.safetensors").write_bytes(safetensors(weights))
    return folder


def safetensors(data: bytes) -> bytes:
    tensor = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + data


def machine(**changes: Any) -> Machine:
    values: dict[str, Any] = {
        "cores": 2,
        "memory_bytes": 24 * 2**30,
        "python": "python",
        "prometheus": "/usr/bin/prometheus",
    }
    return Machine(**{**values, **changes})


def options(**changes: Any) -> Options:
    return Options(**{"state_dir": Path("/state"), "stack_id": "s1", "public_key": "PEM", **changes})
