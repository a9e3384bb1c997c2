"""The parts of the Helm chart that come from code: CRD, the operator's rights, alerts on the operator, dashboards.

python -m moe_operator.chart --write charts/moestack/files
python -m moe_operator.chart --check charts/moestack/files
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_api import crd
from moe_core import metrics
from moe_kube.rights import rules
from moe_operator import dashboards, rbac
from moe_operator.dashboards.model import Dashboard, to_json
from moe_operator.render.alerts import Alert

DASHBOARDS = "dashboards"
HEADER = "# Written by `python -m moe_operator.chart --write`; `make check` compares.\n"
ALERTS = (
    Alert(
        "MoEStackOperatorAbsent",
        f"absent({metrics.OPERATOR_LEADER.name} == 1)",
        "5m",
        "critical",
        "no operator holds the lease: nothing is deployed, upgraded or repaired; what runs goes on",
        "No process has said for 5 minutes that it leads: none runs, none gets the lease, or none is scraped.",
    ),
    Alert(
        "MoEStackOperatorFailing",
        f'sum(rate({metrics.OPERATOR_RECONCILE_SECONDS.name}_count{{result="failed"}}[10m])) > 0',
        "15m",
        "warning",
        "reconciles fail again and again",
        "{{ $value | humanize }} reconciles a second end in an error.",
    ),
    Alert(
        "MoEStackOperatorBehind",
        f"max({metrics.OPERATOR_CACHE_BEHIND.name}) > 0 or max({metrics.OPERATOR_QUEUE_AGE.name}) > 300",
        "10m",
        "warning",
        "the operator sees the cluster late, or cannot keep up with it",
        "A kind cannot be listed or watched, or a MoEDeployment has waited for more than 5 minutes.",
    ),
)
"""About no one MoEDeployment; those of each are rendered beside it."""


def files() -> dict[str, str]:
    """The files by name; a dashboard lies in a folder of its own."""
    definition = crd.render()
    # Helm deletes what it made: with the definition would go every MoEDeployment and all that serves.
    definition["metadata"].setdefault("annotations", {})["helm.sh/resource-policy"] = "keep"
    return {
        "crd.yaml": _dump(definition),
        "rules.yaml": _dump(rules(rbac.OBJECTS)),
        "lease-rules.yaml": _dump(rules(rbac.OWN)),
        "alerts.yaml": _dump([_rule(alert) for alert in ALERTS]),
        **{f"{DASHBOARDS}/{page.name}.json": _page(page) for page in dashboards.ALL},
    }


def _rule(alert: Alert) -> dict[str, Any]:
    made = alert.to_json("the operator")
    del made["labels"]["moedeployment"]
    made["annotations"]["summary"] = alert.summary
    return made


def _page(page: Dashboard) -> str:
    return json.dumps(to_json(page), indent=1, ensure_ascii=False) + "\n"


def _dump(content: Any) -> str:
    return HEADER + yaml.dump(content, Dumper=_NoAliases, sort_keys=False, width=120, allow_unicode=True)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m moe_operator.chart", description=(__doc__ or "").splitlines()[0])
    action = made.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FOLDER")
    action.add_argument("--check", type=Path, metavar="FOLDER", help="exit with 1 where a file is another")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    if chosen.write is not None:
        for name, text in files().items():
            (chosen.write / name).parent.mkdir(parents=True, exist_ok=True)
            (chosen.write / name).write_text(text)
        return 0
    stale = [name for name, text in files().items() if _read(chosen.check / name) != text]
    for name in stale:
        print(f"{chosen.check / name} is not what the code gives: write it again with --write", file=sys.stderr)  # noqa: T201
    return 1 if stale else 0


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
