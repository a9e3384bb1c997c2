"""The rights that the operator needs, from one table of what it calls, and the manifest that grants them.

    python -m moe_operator.rbac --write manifests/operator/rbac.yaml
    python -m moe_operator.rbac --check manifests/operator/rbac.yaml
    python -m moe_operator.rbac --namespaces team-a,team-b          # prints roles for these alone

Tests hold the table to the calls from both sides: no call without a right, no right without a call.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.calls import Verb
from moe_kube.objects import Kind
from moe_operator.children import NOT_OURS, WATCHED
from moe_operator.render.books import BOOKS_VERBS
from moe_operator.server import LEASE_NAME

NAME = "moestack-operator"
VERBS: tuple[Verb, ...] = ("get", "list", "watch", "create", "update", "patch", "delete")
HEADER = "# What the operator may do. Written by `python -m moe_operator.rbac --write`; `make check` compares.\n"


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


def _right(kind: Kind, *verbs: Verb, subresource: str = "", names: tuple[str, ...] = ()) -> Right:
    return Right(kind, frozenset(verbs), subresource, names)


OBJECTS: tuple[Right, ...] = (
    _right(k.MOE_DEPLOYMENT, "get", "list", "watch"),
    _right(k.MOE_DEPLOYMENT, "patch", subresource="status"),
    # No call: admission (OwnerReferencesPermissionEnforcement, where it is on) asks for it of whoever makes an object
    # that holds up the deletion of its owner, as our children do.
    _right(k.MOE_DEPLOYMENT, "update", subresource="finalizers"),
    # Server-side apply is `patch`, and `create` as well where it makes the object.
    *(_right(kind, "get", "list", "watch", "create", "patch", "delete") for kind in WATCHED if kind not in NOT_OURS),
    # No call: the API server lets nobody grant a right that they lack, and gateways get this one on their books alone.
    _right(k.CONFIG_MAP, *BOOKS_VERBS),
    # Bounds of worker groups reach a live RayCluster by JSON patch alone.
    _right(k.RAY_CLUSTER, "list", "watch", "patch"),
    _right(k.ENDPOINT_SLICE, "list", "watch"),
    _right(k.EVENT, "create", "patch"),
)
"""In every namespace that is looked after."""
OWN: tuple[Right, ...] = (
    _right(k.LEASE, "create"),  # no name can be given for what is not there yet
    _right(k.LEASE, "get", "update", names=(LEASE_NAME,)),
)
"""In the operator's own namespace."""


def rules(rights: Iterable[Right]) -> list[dict[str, Any]]:
    """Policy rules: one for each API group and set of verbs, in a settled order."""
    grouped: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    for right in rights:
        verbs = tuple(verb for verb in VERBS if verb in right.verbs)
        grouped[right.kind.group, verbs, right.names].append(right.resource)
    return [
        {
            "apiGroups": [group],
            "resources": sorted(resources),
            **({"resourceNames": list(names)} if names else {}),
            "verbs": list(verbs),
        }
        for (group, verbs, names), resources in sorted(grouped.items())
    ]


def documents(config: OperatorConfig, subject: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The service account, its roles and bindings; `subject` is bound in place of a service account of ours.

    Cluster-wide a ClusterRole; else a Role in each namespace of the configuration.
    """
    account = {"kind": "ServiceAccount", "name": NAME, "namespace": config.namespace}
    bound = subject or account
    made: list[dict[str, Any]] = []
    if subject is None:
        made.append({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _meta(NAME, config.namespace)})
    made += _role(NAME, None, rules(OBJECTS), bound) if not config.namespaces else []
    for namespace in config.namespaces:
        made += _role(NAME, namespace, rules(OBJECTS), bound)
    made += _role(f"{NAME}-lease", config.namespace, rules(OWN), bound)
    return made


def _role(
    name: str, namespace: str | None, granted: list[dict[str, Any]], subject: dict[str, str]
) -> list[dict[str, Any]]:
    api, kind = "rbac.authorization.k8s.io/v1", "ClusterRole" if namespace is None else "Role"
    meta = _meta(name, namespace)
    return [
        {"apiVersion": api, "kind": kind, "metadata": meta, "rules": granted},
        {
            "apiVersion": api,
            "kind": f"{kind}Binding",
            "metadata": meta,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
            "subjects": [subject],
        },
    ]


def _meta(name: str, namespace: str | None) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "moestack", "app.kubernetes.io/component": "operator"}
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": labels}


def manifest(config: OperatorConfig) -> str:
    """The documents as YAML."""

    class NoAliases(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return HEADER + yaml.dump_all(documents(config), Dumper=NoAliases, sort_keys=False, width=120)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m moe_operator.rbac", description=(__doc__ or "").splitlines()[0])
    action = made.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="FILE", help="write the manifest")
    action.add_argument("--check", type=Path, metavar="FILE", help="exit with 1 where the file is another")
    made.add_argument("--namespaces", default="", help="namespaces to look after, by comma; none: the whole cluster")
    made.add_argument("--namespace", default=OperatorConfig().namespace, help="the operator's own")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    names = tuple(name for name in chosen.namespaces.split(",") if name)
    text = manifest(OperatorConfig(namespaces=names, namespace=chosen.namespace))
    if chosen.write is not None:
        chosen.write.parent.mkdir(parents=True, exist_ok=True)
        chosen.write.write_text(text)
    elif chosen.check is not None:
        if not chosen.check.is_file() or chosen.check.read_text() != text:
            print(f"{chosen.check} is not what the code calls: write it again with --write", file=sys.stderr)  # noqa: T201
            return 1
    else:
        print(text, end="")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
