"""A rendered object: where it belongs and what it should hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moe_api.annotations import RENDERER
from moe_core.process_config import Problem
from moe_kube.managed import content, digest
from moe_kube.objects import Kind, Ref
from moe_operator.names import Owner

RENDERER_VERSION = "1"
"""Raised with any change of what a revision renders to. Running revisions keep what they were born with."""


class NotRenderable(ValueError):
    """What is asked for cannot be made; the message names the field and the remedy."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("; ".join(map(str, problems)))


@dataclass(frozen=True)
class Rendered:
    """One object for server-side apply."""

    ref: Ref
    body: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """Digest of what we want to own of it: the same as that of the live object where nothing has drifted."""
        return digest(content(self.body))


def rendered(
    kind: Kind,
    owner: Owner,
    name: str,
    labels: Mapping[str, str],
    content_: Mapping[str, Any],
    annotations: Mapping[str, str] | None = None,
    *,
    renderer: str = RENDERER_VERSION,
) -> Rendered:
    """An object of that kind in the owner's namespace, owned, with the version of the renderer that made it."""
    body: dict[str, Any] = {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {
            "name": name,
            "namespace": owner.namespace,
            "labels": dict(labels),
            "annotations": {RENDERER: renderer, **(annotations or {})},
            "ownerReferences": [owner.reference()],
        },
        **content_,
    }
    return Rendered(Ref(kind, owner.namespace, name), body)
