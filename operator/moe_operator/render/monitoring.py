"""What Prometheus reads of one MoEDeployment and what it warns of, where the Prometheus operator's kinds exist."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moe_api.annotations import REVISION_LABEL
from moe_api.enums import EngineKind, Overflow, Toggle
from moe_api.scalars import format_decimal
from moe_api.v1alpha1 import MoEDeployment
from moe_core import metrics
from moe_core.config import OperatorConfig
from moe_core.metrics import Metric
from moe_core.process_config import usd_per_day
from moe_kube import objects as k
from moe_kube.objects import Kind
from moe_operator.names import Owner, engine_policy_name, gateway_name, labels
from moe_operator.render import network
from moe_operator.render.cluster import ENGINE
from moe_operator.render.objects import Rendered, rendered
from moe_operator.render.pods import Json

RUNBOOK = "docs/runbook.md"
_BUDGET_SHARE = "0.9"
_MISS_BUDGET = 0.05  # the promise is for 95 of 100 requests


@dataclass(frozen=True)
class Alert:
    """One alert: `expr` fires it once it has held for `wait`."""

    name: str
    expr: str
    wait: str
    severity: str
    summary: str

    @property
    def anchor(self) -> str:
        """Heading of its text in the runbook."""
        return self.name.lower()

    def to_json(self, key: str) -> Json:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.wait,
            "labels": {"severity": self.severity, "moedeployment": key},
            "annotations": {"summary": f"{key}: {self.summary}", "runbook": f"{RUNBOOK}#{self.anchor}"},
        }


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


def alerts(resource: MoEDeployment) -> tuple[Alert, ...]:
    """Alerts that mean something for this resource, on metrics that our processes export."""
    spec, series = resource.spec, _Series(resource.key)
    found = [
        Alert(
            "MoEStackGatewayAbsent",
            f"absent({series.of(metrics.GATEWAY_CONFIG_LOADED)})",
            "5m",
            "critical",
            "no gateway is being read: clients may have no answer",
        ),
        Alert(
            "MoEStackGatewayConfigRefused",
            f"min({series.of(metrics.GATEWAY_CONFIG_LOADED)}) == 0",
            "2m",
            "warning",
            "a gateway refuses its newest configuration and goes on with the one before",
        ),
        Alert(
            "MoEStackSLOFastBurn",
            f"{series.missed('5m')} > {6 * _MISS_BUDGET:g} and {series.missed('1h')} > {6 * _MISS_BUDGET:g}",
            "2m",
            "critical",
            "more than 30 % of requests miss the SLO",
        ),
        Alert(
            "MoEStackSLOSlowBurn",
            f"{series.missed('30m')} > {2 * _MISS_BUDGET:g} and {series.missed('6h')} > {2 * _MISS_BUDGET:g}",
            "15m",
            "warning",
            "more than 10 % of requests have missed the SLO for hours",
        ),
        Alert(
            "MoEStackShedding",
            f"{series.rate(metrics.GATEWAY_SHED, '5m')} > 0",
            "5m",
            "critical",
            "requests are refused: neither the engine nor a closed API can keep the promise",
        ),
    ]
    limit = usd_per_day(spec.fallback)
    if spec.fallback.targets and limit:
        found.append(
            Alert(
                "MoEStackFallbackBudgetNearlySpent",
                f"sum(increase({series.of(metrics.GATEWAY_SPEND)}[24h])) > {_BUDGET_SHARE} * {format_decimal(limit)}",
                "1m",
                "warning",
                "90 % of the fallback budget of a day is spent",
            )
        )
    if spec.engine.kind is EngineKind.VLLM and not spec.suspend:
        found += _engine_alerts(resource, series)
    return tuple(found)


def _engine_alerts(resource: MoEDeployment, series: _Series) -> list[Alert]:
    spec = resource.spec
    found = [
        Alert(
            "MoEStackKVCacheFull",
            f"max({series.of(metrics.ENGINE_KV_USAGE)}) > 0.97",
            "5m",
            "warning",
            "a replica's KV cache is full: requests wait or are pushed out",
        ),
        Alert(
            "MoEStackLostGateMass",
            f"{series.rate(metrics.EXPERT_LOST_GATE_MASS, '5m')} / {series.rate(metrics.EXPERT_TOKENS, '5m')}"
            f" > {format_decimal(spec.quality.max_lost_gate_mass)}",
            "5m",
            "warning",
            "capacity costs more gate mass than spec.quality allows",
        ),
        Alert(
            "MoEStackExpertImbalance",
            f"max({series.of(metrics.EXPERT_IMBALANCE, by='rank')}) > 2",
            "15m",
            "info",
            "the busiest rank has twice the mean load of experts",
        ),
        Alert(
            "MoEStackKnobsNotInForce",
            f"max({series.of(metrics.KNOBS_VERSION)}) - min({series.of(metrics.KNOBS_VERSION)}) > 0",
            "5m",
            "warning",
            "replicas run with different knobs: one of them hears nothing of the board",
        ),
    ]
    if spec.replicas.min:
        found.append(
            Alert(
                "MoEStackReplicasMissing",
                f"(sum({series.of(metrics.BOARD_REPLICAS)}) or vector(0)) < {spec.replicas.min}",
                "15m",
                "critical",
                f"fewer than {spec.replicas.min} replicas answer",
            )
        )
    if spec.experts.overflow is not Overflow.UNLIMITED:
        found.append(
            Alert(
                "MoEStackLayersBypassed",
                f"max({series.of(metrics.LAYERS_HOOKED, state='bypassed')}) > 0",
                "5m",
                "warning",
                "layers route past the plugin, so capacity does not hold there",
            )
        )
    return found


@dataclass(frozen=True)
class _Series:
    """PromQL over the metrics of one deployment."""

    key: str

    def of(self, metric: Metric, **matchers: str) -> str:
        wanted = {"deployment": self.key, **matchers}
        unknown = wanted.keys() - set(metric.labels)
        if unknown:
            raise ValueError(f"{metric.name} has no label {', '.join(sorted(unknown))}")
        return f"{metric.name}{{{', '.join(f'{name}={json.dumps(value)}' for name, value in wanted.items())}}}"

    def rate(self, metric: Metric, window: str, **matchers: str) -> str:
        return f"sum(rate({self.of(metric, **matchers)}[{window}]))"

    def missed(self, window: str) -> str:
        """Share of requests that missed the SLO."""
        slo = metrics.GATEWAY_SLO
        return f"{self.rate(slo, window, result='missed')} / {self.rate(slo, window)}"
