"""The tuner's own metrics: the TUNER_* rows of the metric table, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from moe_core import metrics
from moe_tuner.explore import End


class Exporter:
    """One deployment's tuner metrics."""

    def __init__(self, deployment: str) -> None:
        self._registry = CollectorRegistry()
        self._deployment = deployment
        self._decisions = metrics.counter(metrics.TUNER_DECISIONS, self._registry)
        self._exploring = metrics.gauge(metrics.TUNER_EXPLORING, self._registry).labels(deployment)
        self._version = metrics.gauge(metrics.TUNER_KNOBS_VERSION, self._registry).labels(deployment)
        self._trials = metrics.counter(metrics.TUNER_TRIALS, self._registry)
        self._acks = metrics.histogram(metrics.TUNER_ACK_SECONDS, self._registry).labels(deployment)
        self._ticks = metrics.histogram(metrics.TUNER_TICK_SECONDS, self._registry).labels(deployment)
        for end in End:
            self._trials.labels(deployment, end.value)

    def decided(self, loop: str, action: str) -> None:
        self._decisions.labels(self._deployment, loop, action).inc()

    def exploring(self, may: bool) -> None:
        self._exploring.set(1 if may else 0)

    def version(self, version: int) -> None:
        self._version.set(version)

    def trial_ended(self, end: End) -> None:
        self._trials.labels(self._deployment, end.value).inc()

    def acknowledged(self, seconds: float) -> None:
        self._acks.observe(seconds)

    def ticked(self, seconds: float) -> None:
        self._ticks.observe(seconds)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)
