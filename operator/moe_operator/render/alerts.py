"""Alerts on one MoEDeployment: PromQL over metrics that our processes export, each with its text in the runbook."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from moe_api.enums import EngineKind, Overflow, TuningMode
from moe_api.scalars import format_decimal
from moe_api.v1alpha1 import MoEDeployment
from moe_core import metrics
from moe_core.metrics import Metric
from moe_core.process_config import usd_per_day
from moe_operator import promql
from moe_operator.render.pods import Json

RUNBOOK = "docs/runbook.md"
_BUDGET_SHARE = "0.9"
_MISS_BUDGET = 0.05  # the promise is for 95 of 100 requests
_DOWN = "~local_down|local_failed"
_DAY_S = 86400


@dataclass(frozen=True)
class Alert:
    """One alert: `expr` fires it once it has held for `wait`. `description` may use Prometheus' templates."""

    name: str
    expr: str
    wait: str
    severity: str
    summary: str
    description: str

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
            "annotations": {
                "summary": f"{key}: {self.summary}",
                "description": self.description,
                "runbook": f"{RUNBOOK}#{self.anchor}",
            },
        }


def alerts(resource: MoEDeployment) -> tuple[Alert, ...]:
    """Alerts that mean something for this resource."""
    spec, series = resource.spec, _Series(resource.key)
    limit = usd_per_day(spec.fallback)
    found = _gateway_alerts(series)
    if spec.fallback.targets:
        found.append(_own_pool_down(series))
        if limit:
            found += _budget_alerts(series, limit)
    if spec.engine.kind is EngineKind.VLLM and not spec.suspend:
        found += _engine_alerts(resource, series)
        if spec.tuning.mode is not TuningMode.OFF:
            found += _tuner_alerts(resource, series)
    return tuple(found)


def _gateway_alerts(series: _Series) -> list[Alert]:
    return [
        Alert(
            "MoEStackGatewayAbsent",
            f"absent({series.of(metrics.GATEWAY_CONFIG_LOADED)})",
            "5m",
            "critical",
            "no gateway is being read: clients may have no answer",
            "No pod of the gateway has been scraped for 5 minutes: none runs, or Prometheus does not reach it.",
        ),
        Alert(
            "MoEStackGatewayConfigRefused",
            f"min({series.of(metrics.GATEWAY_CONFIG_LOADED)}) == 0",
            "2m",
            "warning",
            "a gateway refuses its newest configuration and goes on with the one before",
            "What was changed last is not in force at one gateway at least. Its log names the field.",
        ),
        Alert(
            "MoEStackGatewayBreakerOpen",
            f"max by (target) ({series.of(metrics.GATEWAY_BREAKER_OPEN)}) == 1",
            "5m",
            "warning",
            "an upstream has failed again and again: it is given probes alone",
            "The gateway sends requests past {{ $labels.target }} since its last ones were refused, reset or failed.",
        ),
        Alert(
            "MoEStackSLOFastBurn",
            f"{series.missed('5m')} > {6 * _MISS_BUDGET:g} and {series.missed('1h')} > {6 * _MISS_BUDGET:g}",
            "2m",
            "critical",
            "more than 30 % of requests miss the SLO",
            "{{ $value | humanizePercentage }} of requests miss the SLO now, and too many did for an hour. At 30 % the "
            "5 % that a month allows are gone in five days.",
        ),
        Alert(
            "MoEStackSLOSlowBurn",
            f"{series.missed('30m')} > {2 * _MISS_BUDGET:g} and {series.missed('6h')} > {2 * _MISS_BUDGET:g}",
            "15m",
            "warning",
            "more than 10 % of requests have missed the SLO for hours",
            "{{ $value | humanizePercentage }} of requests missed the SLO in half an hour, and too many in six hours.",
        ),
        Alert(
            "MoEStackShedding",
            f"{series.rate(metrics.GATEWAY_SHED, '5m')} > 0",
            "5m",
            "critical",
            "requests are refused: neither the engine nor a closed API can keep the promise",
            "{{ $value | humanize }} requests a second get 529 or 503.",
        ),
    ]


def _own_pool_down(series: _Series) -> Alert:
    down, answered = series.of(metrics.GATEWAY_SPILLED, reason=_DOWN), metrics.GATEWAY_REQUESTS
    return Alert(
        "MoEStackOwnPoolDown",
        f"sum(rate({down}[5m])) / {series.rate(answered, '5m', outcome='ok')} > 0.9",
        "5m",
        "critical",
        "own replicas do not answer: paid fallback carries the traffic",
        "{{ $value | humanizePercentage }} of the answers come from a closed API since no revision of our own could "
        "give one. Clients see little of it; the budget does.",
    )


def _budget_alerts(series: _Series, limit: Decimal) -> list[Alert]:
    usd, spend = format_decimal(limit), series.of(metrics.GATEWAY_SPEND)
    return [
        Alert(
            "MoEStackFallbackBudgetNearlySpent",
            f"sum(increase({spend}[24h])) > {_BUDGET_SHARE} * {usd}",
            "1m",
            "warning",
            "90 % of the fallback budget of a day is spent",
            f'{{{{ $value | printf "%.2f" }}}} of {usd} USD went in the last 24 hours. Nothing spills beyond it.',
        ),
        Alert(
            "MoEStackFallbackSpendForecast",
            f"sum(rate({spend}[1h])) * {_DAY_S} > {usd} and sum(rate({spend}[6h])) * {_DAY_S} > {usd}",
            "15m",
            "warning",
            "at this pace closed APIs cost more than the budget of a day",
            f'At the pace of the last hour a day costs {{{{ $value | printf "%.2f" }}}} USD, that of six hours is over '
            f"the budget of {usd} too: spilling ends before the day does.",
        ),
    ]


def _engine_alerts(resource: MoEDeployment, series: _Series) -> list[Alert]:
    spec = resource.spec
    allowed = format_decimal(spec.quality.max_lost_gate_mass)
    found = [
        Alert(
            "MoEStackKVCacheFull",
            f"max({series.of(metrics.ENGINE_KV_USAGE)}) > 0.97",
            "5m",
            "warning",
            "a replica's KV cache is full: requests wait or are pushed out",
            "{{ $value | humanizePercentage }} of the blocks of a replica are in use.",
        ),
        Alert(
            "MoEStackLostGateMass",
            f"{series.rate(metrics.EXPERT_LOST_GATE_MASS, '5m')} / {series.rate(metrics.EXPERT_TOKENS, '5m')}"
            f" > {allowed}",
            "5m",
            "warning",
            "capacity costs more gate mass than spec.quality allows",
            f"A token loses {{{{ $value | humanizePercentage }}}} of its gate mass in a layer, more than {allowed}.",
        ),
        Alert(
            "MoEStackExpertImbalance",
            f"max({series.of(metrics.EXPERT_IMBALANCE, by='rank')}) > 2",
            "15m",
            "info",
            "the busiest rank has twice the mean load of experts",
            "The busiest rank has {{ $value | humanize }} times the mean: the others wait for it in every step.",
        ),
        Alert(
            "MoEStackKnobsNotInForce",
            f"max({series.of(metrics.KNOBS_VERSION)}) - min({series.of(metrics.KNOBS_VERSION)}) > 0",
            "5m",
            "warning",
            "replicas run with different knobs: one of them hears nothing of the board",
            "Versions in force lie {{ $value }} apart.",
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
                f"{{{{ $value }}}} of {spec.replicas.min} replicas are registered with the board.",
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
                "{{ $value }} layers of a replica are not hooked.",
            )
        )
    return found


def _tuner_alerts(resource: MoEDeployment, series: _Series) -> list[Alert]:
    tuning, exploring = resource.spec.tuning, series.of(metrics.TUNER_EXPLORING)
    found = [
        Alert(
            "MoEStackTunerGone",
            f"count(count_over_time({exploring}[1d])) unless count({exploring})",
            "15m",
            "warning",
            "the tuner is no longer read: knobs stay where they are",
            "A tuner told of this deployment within a day and tells nothing now.",
        )
    ]
    if tuning.mode is not TuningMode.AUTO or tuning.paused:
        return found
    ended = series.of(metrics.TUNER_TRIALS, state="rolled_back")
    found.append(
        Alert(
            "MoEStackTunerRolledBack",
            f"sum(increase({ended}[1h])) > 0",
            "0s",
            "info",
            "the tuner took a trial back: it broke a promise",
            '{{ $value | printf "%.0f" }} trials of the last hour were ended by the guard; the setting of before is '
            "in force again.",
        )
    )
    if tuning.change_budget.trials_per_day:
        found.append(
            Alert(
                "MoEStackTunerNotExploring",
                f"max(max_over_time({exploring}[1d])) == 0",
                "1h",
                "info",
                "the tuner has tried nothing for a day",
                "For a day no trial was allowed: somebody paused it, traffic is too little, or it cannot measure.",
            )
        )
    return found


@dataclass(frozen=True)
class _Series:
    """PromQL over the metrics of one deployment."""

    key: str

    def of(self, metric: Metric, **matchers: str) -> str:
        return promql.select(metric, deployment=self.key, **matchers)

    def rate(self, metric: Metric, window: str, **matchers: str) -> str:
        return promql.rate(metric, window, deployment=self.key, **matchers)

    def missed(self, window: str) -> str:
        """Share of requests that missed the SLO."""
        slo = metrics.GATEWAY_SLO
        return f"{self.rate(slo, window, result='missed')} / {self.rate(slo, window)}"
