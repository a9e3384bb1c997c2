"""The tuner's own metrics: the TUNER_* rows of the metric table, for all deployments in one registry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, generate_latest

from moe_core import metrics
from moe_tuner.explore import End


class Families:
    """The registry of a process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._records: Counter | None = None
        self.decisions = metrics.counter(metrics.TUNER_DECISIONS, self._registry)
        self.exploring = metrics.gauge(metrics.TUNER_EXPLORING, self._registry)
        self.version = metrics.gauge(metrics.TUNER_KNOBS_VERSION, self._registry)
        self.trials = metrics.counter(metrics.TUNER_TRIALS, self._registry)
        self.acks = metrics.histogram(metrics.TUNER_ACK_SECONDS, self._registry)
        self.ticks = metrics.histogram(metrics.TUNER_TICK_SECONDS, self._registry)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def leads(self, leading: Callable[[], bool]) -> None:
        """Tell as well whether this process leads: where several stand by."""
        metrics.gauge(metrics.TUNER_LEADER, self._registry).set_function(lambda: 1.0 if leading() else 0.0)
        self._records = metrics.counter(metrics.TUNER_RECORDS, self._registry)

    def recorded(self, result: str) -> None:
        """A write of `status.tuning`. Only after `leads`."""
        if self._records is not None:
            self._records.labels(result).inc()


class Exporter:
    """One deployment's part of them."""

    def __init__(self, deployment: str, families: Families | None = None) -> None:
        self._deployment = deployment
        self._all = families or Families()
        self._decisions: set[tuple[str, str]] = set()
        for end in End:
            self._all.trials.labels(deployment, end.value)

    def decided(self, loop: str, action: str) -> None:
        self._decisions.add((loop, action))
        self._all.decisions.labels(self._deployment, loop, action).inc()

    def exploring(self, may: bool) -> None:
        self._all.exploring.labels(self._deployment).set(1 if may else 0)

    def version(self, version: int) -> None:
        self._all.version.labels(self._deployment).set(version)

    def trial_ended(self, end: End) -> None:
        self._all.trials.labels(self._deployment, end.value).inc()

    def acknowledged(self, seconds: float) -> None:
        self._all.acks.labels(self._deployment).observe(seconds)

    def ticked(self, seconds: float) -> None:
        self._all.ticks.labels(self._deployment).observe(seconds)

    def exposition(self) -> bytes:
        return self._all.exposition()

    def close(self) -> None:
        """Take the series of a deployment that is gone out of the exposition."""
        every, name = self._all, self._deployment
        rows = [(family, (name,)) for family in (every.exploring, every.version, every.acks, every.ticks)]
        rows += [(every.trials, (name, end.value)) for end in End]  # type: ignore[misc]
        rows += [(every.decisions, (name, *row)) for row in self._decisions]  # type: ignore[misc]
        for family, labels in rows:
            with contextlib.suppress(KeyError):
                family.remove(*labels)
