"""A rendered object: where it belongs and what it should hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_api.annotations import RENDERER
from moe_kube.managed import content, digest
from moe_kube.objects import Kind, Ref
from moe_operator.names import Owner

RENDERER_VERSION = "1"
"""Raised with any change of what a revision renders to. Running revisions keep what they were born with."""


@dataclass(frozen=True)
class Rendered:
    """One object for server-side apply."""

    ref: Ref
    body: dict[str, Any]

    @property
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
) -> Rendered:
    """An object of that kind in the owner's namespace, owned, with the renderer's version."""
    body: dict[str, Any] = {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {
            "name": name,
            "namespace": owner.namespace,
            "labels": dict(labels),
            "annotations": {RENDERER: RENDERER_VERSION, **(annotations or {})},
            "ownerReferences": [owner.reference()],
        },
        **content_,
    }
    return Rendered(Ref(kind, owner.namespace, name), body)
