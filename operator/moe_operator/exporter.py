"""The operator's own metrics: the OPERATOR_* rows of the metric table, in a registry of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from moe_core import metrics
from moe_kube.calls import Call
from moe_operator.controller import Controller, Result

Family = CounterMetricFamily | GaugeMetricFamily
RESULTS: tuple[Result, ...] = ("settled", "changed", "retried", "failed", "fenced")


class Exporter:
    """One process's metrics. `called` and `reconciled` are told of each call and reconcile; the rest is read."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._reconciles = metrics.histogram(metrics.OPERATOR_RECONCILE_SECONDS, self._registry)
        self._calls = metrics.counter(metrics.OPERATOR_API_CALLS, self._registry)
        self._seconds = metrics.histogram(metrics.OPERATOR_API_SECONDS, self._registry)
        for result in RESULTS:
            self._reconciles.labels(result)

    def called(self, call: Call, status: int, seconds: float) -> None:
        kind = f"{call.kind.kind}/{call.subresource}" if call.subresource else call.kind.kind
        self._calls.labels(call.verb, kind, str(status)).inc()
        if call.verb != "watch":
            self._seconds.labels(call.verb).observe(seconds)

    def reconciled(self, result: Result, seconds: float) -> None:
        self._reconciles.labels(result).observe(seconds)

    def reads(
        self,
        controller: Controller,
        *,
        leading: Callable[[], bool],
        throttled_s: Callable[[], float],
        dropped: Callable[[], int],
    ) -> None:
        """Where the values come from that are read at each scrape."""
        self._registry.register(_State(controller, leading, throttled_s, dropped))

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class _State(Collector):
    """Values that exist anyway, read at each scrape; holds none itself."""

    def __init__(
        self,
        controller: Controller,
        leading: Callable[[], bool],
        throttled_s: Callable[[], float],
        dropped: Callable[[], int],
    ) -> None:
        self._controller = controller
        self._leading = leading
        self._throttled_s = throttled_s
        self._dropped = dropped

    def collect(self) -> Iterator[Family]:
        controller = self._controller
        single = (
            (metrics.OPERATOR_LEADER, float(self._leading())),
            (metrics.OPERATOR_OBJECTS, len(controller.caches)),
            (metrics.OPERATOR_QUEUE_DEPTH, controller.depth),
            (metrics.OPERATOR_QUEUE_AGE, controller.oldest_age_s()),
            (metrics.OPERATOR_WORK_AGE, controller.longest_work_s()),
            (metrics.OPERATOR_QUEUE_ADDS, controller.adds_total),
            (metrics.OPERATOR_RETRIES, controller.retries_total),
            (metrics.OPERATOR_THROTTLED_SECONDS, self._throttled_s()),
            (metrics.OPERATOR_EVENTS_DROPPED, self._dropped()),
        )
        for metric, value in single:
            family = metrics.family(metric)
            family.add_metric([], value)
            yield family
        conditions = metrics.family(metrics.OPERATOR_CONDITIONS)
        for (type_, status), count in sorted(controller.caches.conditions.items()):
            conditions.add_metric([type_, status], count)
        yield conditions
        yield from self._caches()

    def _caches(self) -> Iterator[Family]:
        """By kind, added up over namespaces."""
        lists, watches, behind, objects = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        for reflector in self._controller.caches.reflectors():
            kind = reflector.kind.kind
            lists[kind] += reflector.lists_total
            watches[kind] += reflector.watches_total
            behind[kind] = max(behind[kind], int(reflector.trouble is not None))
            objects[kind] += len(reflector)
        for metric, values in (
            (metrics.OPERATOR_CACHE_LISTS, lists),
            (metrics.OPERATOR_CACHE_WATCHES, watches),
            (metrics.OPERATOR_CACHE_BEHIND, behind),
            (metrics.OPERATOR_CACHE_OBJECTS, objects),
        ):
            family = metrics.family(metric)
            for kind, value in values.items():
                family.add_metric([kind], value)
            yield family
