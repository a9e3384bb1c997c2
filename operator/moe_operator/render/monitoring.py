"""What Prometheus reads of one MoEDeployment and what it warns of, where the Prometheus operator's kinds exist."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moe_api.annotations import REVISION_LABEL
from moe_api.enums import Toggle
from moe_api.v1alpha1 import MoEDeployment
from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.objects import Kind
from moe_operator.names import Owner, engine_policy_name, gateway_name, labels
from moe_operator.render import network
from moe_operator.render.alerts import alerts
from moe_operator.render.cluster import ENGINE
from moe_operator.render.objects import Rendered, rendered


def objects(
    resource: MoEDeployment,
    *,
    present: Collection[Kind],
    config: OperatorConfig,
    owner: Owner,
    revisions: Sequence[str],
) -> tuple[Rendered, ...]:
    """PodMonitors and the PrometheusRule, as far as asked for and as their kinds are served here."""
    spec = resource.spec.monitoring
    made: list[Rendered] = []
    if spec.monitors is not Toggle.DISABLED and k.POD_MONITOR in present:
        made.append(_monitor(resource, owner, gateway_name(owner.name), "gateway", ("admin",)))
        if revisions:
            made.append(_monitor(resource, owner, engine_policy_name(owner.name), ENGINE, ("board", "metrics")))
    if spec.alerts is not Toggle.DISABLED and k.PROMETHEUS_RULE in present:
        rules = [alert.to_json(owner.key) for alert in alerts(resource)]
        content = {"spec": {"groups": [{"name": f"moestack.{owner.namespace}.{owner.name}", "rules": rules}]}}
        made.append(rendered(k.PROMETHEUS_RULE, owner, owner.name, _labels(resource, owner), content))
    return tuple(made)


def _labels(resource: MoEDeployment, owner: Owner, component: str = "monitoring") -> dict[str, str]:
    return {**resource.spec.monitoring.labels, **labels(owner, component)}


def _monitor(resource: MoEDeployment, owner: Owner, name: str, component: str, ports: Sequence[str]) -> Rendered:
    interval = str(resource.spec.monitoring.scrape_interval)
    spec = {
        "selector": {"matchLabels": network.selector(owner, component)},
        "podTargetLabels": [REVISION_LABEL],
        "podMetricsEndpoints": [{"port": port, "path": "/metrics", "interval": interval} for port in ports],
    }
    return rendered(k.POD_MONITOR, owner, name, _labels(resource, owner), {"spec": spec})
