"""Latencies under OpenTelemetry's gen_ai names too: made at each scrape from our own histograms, so that a request is
counted once, and in fewer series: targets of a provider are taken together, and every third bucket is shown.

Names and units: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/ in Prometheus' spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from moe_core.metrics import LATENCY_BUCKETS_S, Metric
from moe_gateway.tallies import Spread

BUCKETS = (*(str(bound) for bound in LATENCY_BUCKETS_S[::3]), "+Inf")


class GenAiCollector(Collector):
    """`labels` gives (provider, model) of a target's name."""

    def __init__(self, sources: Mapping[Metric, Spread], labels: Callable[[str], tuple[str, str]]) -> None:
        self._sources = sources
        self._labels = labels

    def collect(self) -> Iterable[HistogramMetricFamily]:
        for row, source in self._sources.items():
            yield self._family(row, source)

    def _family(self, row: Metric, source: Spread) -> HistogramMetricFamily:
        counts: dict[tuple[str, ...], dict[str, float]] = {}
        sums: dict[tuple[str, ...], float] = {}
        for metric in source.collect():
            for sample in metric.samples:
                key: tuple[str, ...] = (sample.labels["deployment"], *self._labels(sample.labels["target"]))
                if sample.name.endswith("_sum"):
                    sums[key] = sums.get(key, 0.0) + sample.value
                elif sample.name.endswith("_bucket") and (bound := sample.labels["le"]) in BUCKETS:
                    found = counts.setdefault(key, dict.fromkeys(BUCKETS, 0.0))
                    found[bound] += sample.value
        family = HistogramMetricFamily(row.name, row.help, labels=row.labels)
        for key, buckets in counts.items():
            family.add_metric(list(key), list(buckets.items()), sums.get(key, 0.0))
        return family
