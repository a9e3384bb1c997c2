"""Counts of requests as plain numbers, made into metric families only when somebody scrapes.

A child of the metrics library costs a lock, three checks and a call for each of half a dozen counts of a request; a
scrape comes every few seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from moe_core.metrics import LATENCY_BUCKETS_S, Metric

Labels = tuple[str, ...]
_BOUNDS = (*(str(bound) for bound in LATENCY_BUCKETS_S), "+Inf")


class Counts(Collector):
    """A counter of the common table: `values` by its labels."""

    def __init__(self, row: Metric) -> None:
        self._row = row
        self.values: dict[Labels, float] = {}

    def add(self, labels: Labels, amount: float = 1.0) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def describe(self) -> Iterable[CounterMetricFamily]:
        return (self._family(),)

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = self._family()
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return (family,)

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily(self._row.name.removesuffix("_total"), self._row.help, labels=self._row.labels)


class Spread(Collector):
    """A histogram of the common table, in the latency buckets of this project."""

    def __init__(self, row: Metric) -> None:
        self._row = row
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, labels: Labels, value: float) -> None:
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._counts[labels] = [0] * len(_BOUNDS)
            self._sums[labels] = 0.0
        counts[bisect_left(LATENCY_BUCKETS_S, value)] += 1
        self._sums[labels] += value

    def describe(self) -> Iterable[HistogramMetricFamily]:
        return (self._family(),)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = self._family()
        for labels, counts in self._counts.items():
            buckets: list[tuple[str, float]] = []
            total = 0
            for bound, count in zip(_BOUNDS, counts, strict=True):
                total += count
                buckets.append((bound, float(total)))
            family.add_metric(labels, buckets, self._sums[labels])
        return (family,)

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._row.name, self._row.help, labels=self._row.labels)
