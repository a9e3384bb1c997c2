"""Rights on the API server as a table of what a process calls, and the roles that grant them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_kube.calls import Verb
from moe_kube.objects import Kind

VERBS: tuple[Verb, ...] = ("get", "list", "watch", "create", "update", "patch", "delete")


@dataclass(frozen=True, slots=True)
class Right:
    """Verbs on a kind, or on a subresource of it; on the objects of these names alone where there are any."""

    kind: Kind
    verbs: frozenset[Verb]
    subresource: str = ""
    names: tuple[str, ...] = ()

    @property
    def resource(self) -> str:
        return f"{self.kind.plural}/{self.subresource}" if self.subresource else self.kind.plural


def right(kind: Kind, *verbs: Verb, subresource: str = "", names: tuple[str, ...] = ()) -> Right:
    return Right(kind, frozenset(verbs), subresource, names)


def rules(rights: Iterable[Right]) -> list[dict[str, Any]]:
    """Policy rules: one for each API group and set of verbs, in a settled order."""
    grouped: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    for one in rights:
        verbs = tuple(verb for verb in VERBS if verb in one.verbs)
        grouped[one.kind.group, verbs, one.names].append(one.resource)
    return [
        {
            "apiGroups": [group],
            "resources": sorted(resources),
            **({"resourceNames": list(names)} if names else {}),
            "verbs": list(verbs),
        }
        for (group, verbs, names), resources in sorted(grouped.items())
    ]


def role(
    name: str,
    namespace: str | None,
    granted: list[dict[str, Any]],
    subject: Mapping[str, str],
    labels: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A Role and its binding; without a namespace a ClusterRole and its own."""
    api, kind = "rbac.authorization.k8s.io/v1", "ClusterRole" if namespace is None else "Role"
    meta = {"name": name, **({"namespace": namespace} if namespace else {}), "labels": dict(labels)}
    return [
        {"apiVersion": api, "kind": kind, "metadata": meta, "rules": granted},
        {
            "apiVersion": api,
            "kind": f"{kind}Binding",
            "metadata": meta,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
            "subjects": [dict(subject)],
        },
    ]
