"""Asks the cluster for what an installation needs, and names what is missing: what `helm test` runs.

python -m moe_operator.prerequisites --config FILE [--monitoring]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.access import AccessError
from moe_kube.api import Api
from moe_kube.connect import connect
from moe_kube.errors import ApiError, Forbidden, NotFound
from moe_kube.objects import Kind
from moe_operator.__main__ import ConfigRefused, load_config


@dataclass(frozen=True, slots=True)
class Need:
    """A kind that the cluster must serve, what brings it, and whether an installation works without it."""

    kind: Kind
    brought_by: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What was seen of one need; `fault` is empty where all is well."""

    need: Need
    fault: str = ""

    @property
    def fatal(self) -> bool:
        return bool(self.fault) and not self.need.optional

    def __str__(self) -> str:
        kind = f"{self.need.kind.kind} ({self.need.kind.api_version})"
        if not self.fault:
            return f"ok       {kind}"
        return f"{'optional' if self.need.optional else 'MISSING '} {kind}: {self.fault}"


def needs(monitoring: bool) -> tuple[Need, ...]:
    """What to ask for. `monitoring`: the person wants monitors and alerts, so that their kinds are no option."""
    prometheus = "install the Prometheus operator, or set monitoring to false"
    return (
        Need(k.MOE_DEPLOYMENT, "apply manifests/crd, or install the chart with crds.install"),
        Need(k.RAY_SERVICE, "install KubeRay 1.6 or newer; without it only external engines are served"),
        Need(k.POD_MONITOR, prometheus, optional=not monitoring),
        Need(k.PROMETHEUS_RULE, prometheus, optional=not monitoring),
        Need(k.HTTP_ROUTE, "install the Gateway API for spec.gateway.exposure HTTPRoute", optional=True),
    )


async def look(api: Api, config: OperatorConfig, wanted: Sequence[Need]) -> list[Found]:
    """Ask for each kind, as the operator's own account, in each namespace that it looks after."""
    return [Found(need, await _fault(api, config, need)) for need in wanted]


async def _fault(api: Api, config: OperatorConfig, need: Need) -> str:
    for namespace in config.namespaces or (None,):
        try:
            await api.list(need.kind, namespace=namespace, limit=1)
        except NotFound:
            return f"not served by this cluster: {need.brought_by}"
        except Forbidden:
            where = "the cluster" if namespace is None else f"namespace {namespace}"
            return f"the operator's account may not list it in {where}: apply the chart's roles"
    return ""


async def run(config: OperatorConfig, kubeconfig: Path | None, monitoring: bool) -> list[Found]:
    async with await connect(kubeconfig) as api:
        return await look(api, config, needs(monitoring))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m moe_operator.prerequisites", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("--config", type=Path, required=True, help="the operator's own")
    made.add_argument("--kubeconfig", type=Path, help="by default the pod's service account")
    made.add_argument("--monitoring", action="store_true", help="monitors and alerts are wanted")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    try:
        found = asyncio.run(run(load_config(chosen.config), chosen.kubeconfig, chosen.monitoring))
    except (ConfigRefused, AccessError, ApiError) as error:
        print(f"prerequisites: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print("\n".join(map(str, found)))  # noqa: T201
    return 1 if any(one.fatal for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
