"""The smallest good file, its variations, and what is wrong with a text."""

from __future__ import annotations

import pytest

from moe_api.load import ResourceInvalid, load_text


def file_with(*extra: str, drop: str = "") -> str:
    """The smallest good file, without the lines that begin with `drop`, and with lines added to its spec."""
    lines = [
        "apiVersion: moestack.dev/v1alpha1",
        "kind: MoEDeployment",
        "metadata: {name: m}",
        "spec:",
        "  model: {id: org/m}",
        "  hardware: {accelerator: cpu, gpusPerReplica: 2}",
    ]
    kept = [line for line in lines if not drop or not line.strip().startswith(drop)]
    return "\n".join([*kept, *(f"  {line}" for line in extra)])


def problems_of(text: str) -> dict[str, tuple[str | None, str]]:
    with pytest.raises(ResourceInvalid) as caught:
        load_text(text, "f.yaml")
    return {problem.path: (problem.value, problem.remedy) for problem in caught.value.problems}
