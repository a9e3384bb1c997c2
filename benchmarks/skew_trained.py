"""The trained mixture of experts as `benchmarks.skew` serves it: same answers, experts wide enough to matter.

Experts are padded with neurons whose weights are zero, which adds work and changes no output, and renumbered, which
decides the rank that each lies on and changes no output either.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks import trained_moe

WIDTH = 8192
"""Neurons of an expert after padding: its GEMMs cost about what one of hidden 1024 × 1408 costs."""


def by_load(loads: list[int]) -> list[int]:
    """Experts by falling load: the first rank gets the busiest, as an unlucky placement of neighbours does."""
    return sorted(range(len(loads)), key=lambda expert: -loads[expert])


def balanced(loads: list[int], ranks: int) -> list[int]:
    """Experts so that ranks that own neighbours are loaded alike: the next busiest goes to the rank with least."""
    room = len(loads) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in by_load(loads):
        open_to = [mine for mine in held if len(mine) < room]
        min(open_to, key=lambda mine: sum(loads[e] for e in mine)).append(expert)
    return [expert for mine in held for expert in mine]


def checkpoints(folder: Path, ranks: int) -> tuple[Path, Path, list[list[int]]]:
    """Checkpoints with balanced and with neighbouring favourites, and held-out prompts as token ids.

    Placement goes by the load of the first half of the held-out text; prompts are the second half.
    """
    made = trained_moe.trained(trained_moe.Recipe())
    text = trained_moe.held_out_batch(made.path, made.recipe)
    half = len(text) // 2
    loads = trained_moe.expert_load(trained_moe.load(made.path), text[:half])
    even, together = folder / "balanced", folder / "together"
    _write(made.path, even, [balanced(layer, ranks) for layer in loads])
    _write(made.path, together, [by_load(layer) for layer in loads])
    return even, together, text[half:].tolist()


def _write(source: Path, target: Path, orders: list[list[int]]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    config["moe_intermediate_size"] = WIDTH
    (target / "config.json").write_text(json.dumps(config))
    weights: dict[str, Any] = load_file(source / "model.safetensors")
    found = dict(weights)
    for layer, order in enumerate(orders):
        base = f"model.layers.{layer}.mlp"
        found[f"{base}.gate.weight"] = weights[f"{base}.gate.weight"][order].contiguous()
        for place, expert in enumerate(order):
            for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                own = weights[f"{base}.experts.{expert}.{name}.weight"].bfloat16()
                shape = list(own.shape)
                shape[axis] = WIDTH - shape[axis]
                padded = torch.cat([own, torch.zeros(shape, dtype=own.dtype)], axis)
                found[f"{base}.experts.{place}.{name}.weight"] = padded
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
