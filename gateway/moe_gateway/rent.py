"""Rent of the deployment's own GPUs as a metric, split by what they did: read from the engines' own counters."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from moe_core import metrics
from moe_core.costs import rent
from moe_gateway.state import Gateway


class RentCollector(Collector):
    """Says nothing without `gpuUsdPerHour`, nor of an engine that does not tell decode passes apart."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Family]:
        usd_per_hour = self._gateway.config.gpu_usd_per_hour
        if usd_per_hour is None:
            return
        family = metrics.family(metrics.LOCAL_RENT)
        for upstream in self._gateway.fleet.revisions:
            found = rent(upstream.replicas, usd_per_hour)
            if found is not None:
                labels = [self._gateway.config.deployment, upstream.name]
                for phase, usd in (
                    ("prefill", found.prefill_usd),
                    ("decode", found.decode_usd),
                    ("idle", found.idle_usd),
                ):
                    family.add_metric([*labels, phase], usd)
        if family.samples:
            yield family
