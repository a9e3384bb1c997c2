"""The rights that the tuner needs in a cluster, from one table of what it calls: the chart's files that grant them.

    python -m moe_tuner.rbac --write charts/moestack/files
    python -m moe_tuner.rbac --check charts/moestack/files

Tests hold the table to the calls from both sides: no call without a right, no right without a call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from moe_kube import objects as k
from moe_kube.rights import Right, right, rules
from moe_tuner.cluster import LEASE_NAME

HEADER = "# Written by `python -m moe_tuner.rbac --write`; `make check` compares.\n"
OBJECTS: tuple[Right, ...] = (
    right(k.MOE_DEPLOYMENT, "list", "watch"),
    right(k.MOE_DEPLOYMENT, "patch", subresource="status"),
    right(k.ENDPOINT_SLICE, "list", "watch"),
    right(k.EVENT, "create", "patch"),
)
"""In every namespace whose MoEDeployments it tunes."""
OWN: tuple[Right, ...] = (
    right(k.LEASE, "create"),  # no name can be given for what is not there yet
    right(k.LEASE, "get", "update", names=(LEASE_NAME,)),
)
"""In its own namespace."""


def files() -> dict[str, str]:
    """The files by name."""
    return {
        "tuner-rules.yaml": HEADER + yaml.safe_dump(rules(OBJECTS), sort_keys=False, width=120),
        "tuner-lease-rules.yaml": HEADER + yaml.safe_dump(rules(OWN), sort_keys=False, width=120),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_tuner.rbac", description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FOLDER")
    action.add_argument("--check", type=Path, metavar="FOLDER", help="exit with 1 where a file is another")
    chosen = parser.parse_args(arguments)
    if chosen.write is not None:
        for name, text in files().items():
            (chosen.write / name).write_text(text)
        return 0
    paths = {chosen.check / name: text for name, text in files().items()}
    stale = [path for path, text in paths.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(f"{path} is not what the code calls: write it again with --write", file=sys.stderr)  # noqa: T201
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
