"""The rights that the operator needs, from one table of what it calls, and the manifest that grants them.

    python -m moe_operator.rbac --write manifests/operator/rbac.yaml
    python -m moe_operator.rbac --check manifests/operator/rbac.yaml
    python -m moe_operator.rbac --namespaces team-a,team-b          # prints roles for these alone

Tests hold the table to the calls from both sides: no call without a right, no right without a call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.rights import Right, right, role, rules
from moe_operator.children import NOT_OURS, WATCHED
from moe_operator.render.books import BOOKS_VERBS
from moe_operator.server import LEASE_NAME

NAME = "moestack-operator"
LABELS = {"app.kubernetes.io/name": "moestack", "app.kubernetes.io/component": "operator"}
HEADER = "# What the operator may do. Written by `python -m moe_operator.rbac --write`; `make check` compares.\n"


OBJECTS: tuple[Right, ...] = (
    right(k.MOE_DEPLOYMENT, "get", "list", "watch"),
    right(k.MOE_DEPLOYMENT, "patch", subresource="status"),
    # No call: admission (OwnerReferencesPermissionEnforcement, where it is on) asks for it of whoever makes an object
    # that holds up the deletion of its owner, as our children do.
    right(k.MOE_DEPLOYMENT, "update", subresource="finalizers"),
    # Server-side apply is `patch`, and `create` as well where it makes the object.
    *(right(kind, "get", "list", "watch", "create", "patch", "delete") for kind in WATCHED if kind not in NOT_OURS),
    # No call: the API server lets nobody grant a right that they lack, and gateways get this one on their books alone.
    right(k.CONFIG_MAP, *BOOKS_VERBS),
    # Bounds of worker groups reach a live RayCluster by JSON patch alone.
    right(k.RAY_CLUSTER, "list", "watch", "patch"),
    right(k.ENDPOINT_SLICE, "list", "watch"),
    right(k.EVENT, "create", "patch"),
)
"""In every namespace that is looked after."""
OWN: tuple[Right, ...] = (
    right(k.LEASE, "create"),  # no name can be given for what is not there yet
    right(k.LEASE, "get", "update", names=(LEASE_NAME,)),
)
"""In the operator's own namespace."""


def documents(config: OperatorConfig, subject: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The service account, its roles and bindings; `subject` is bound in place of a service account of ours.

    Cluster-wide a ClusterRole; else a Role in each namespace of the configuration.
    """
    account = {"kind": "ServiceAccount", "name": NAME, "namespace": config.namespace}
    bound = subject or account
    made: list[dict[str, Any]] = []
    if subject is None:
        meta = {"name": NAME, "namespace": config.namespace, "labels": LABELS}
        made.append({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})
    made += role(NAME, None, rules(OBJECTS), bound, LABELS) if not config.namespaces else []
    for namespace in config.namespaces:
        made += role(NAME, namespace, rules(OBJECTS), bound, LABELS)
    made += role(f"{NAME}-lease", config.namespace, rules(OWN), bound, LABELS)
    return made


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
