"""The board's Prometheus metrics: the newest digest of each replica, in the names of `moe_core.metrics`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from moe_core import metrics
from moe_core.wire import LayerDigest, Overflow, ReplicaDigest, Utilisation

_LAYER_ROWS: tuple[tuple[metrics.Metric, Callable[[LayerDigest], float | None]], ...] = (
    (metrics.EXPERT_SLOTS, lambda d: d.slots_total),
    (metrics.EXPERT_TOKENS, lambda d: d.tokens_total),
    (metrics.EXPERT_DROPPED, lambda d: d.dropped_total),
    (metrics.EXPERT_REROUTED, lambda d: d.rerouted_total),
    (metrics.EXPERT_OVERFLOW_KEPT, lambda d: d.overflow_kept_total),
    (metrics.EXPERT_LOST_GATE_MASS, lambda d: d.lost_gate_mass_total),
    (metrics.EXPERT_CV, lambda d: d.expert_cv),
    (metrics.EXPERT_MAX_PREFILL, lambda d: d.max_prefill_load),
)

_REPLICA_ROWS: tuple[tuple[metrics.Metric, Callable[[ReplicaDigest], float]], ...] = (
    (metrics.REPLICA_STARTED, lambda d: d.started_at_s),
    (metrics.KNOBS_VERSION, lambda d: d.knobs_version),
    (metrics.ENGINE_RUNNING, lambda d: d.engine.running),
    (metrics.ENGINE_WAITING, lambda d: d.engine.waiting),
    (metrics.ENGINE_KV_USAGE, lambda d: d.engine.kv_usage),
    (metrics.ENGINE_ACTIVE_LIMIT, lambda d: d.engine.max_active_seqs),
    (metrics.ENGINE_BATCHED_LIMIT, lambda d: d.engine.max_batched_tokens),
    (metrics.ENGINE_PROMPT_TOKENS, lambda d: d.engine.prompt_tokens_total),
    (metrics.ENGINE_OUTPUT_TOKENS, lambda d: d.engine.generation_tokens_total),
    (metrics.ENGINE_PREEMPTIONS, lambda d: d.engine.preemptions_total),
    (metrics.ENGINE_STEPS, lambda d: d.engine.steps_total),
    (metrics.ENGINE_BUSY, lambda d: d.engine.busy_s_total),
)


_UTILISATION_ROWS: tuple[tuple[metrics.Metric, Callable[[Utilisation], float | None]], ...] = (
    (metrics.ENGINE_DECODE_STEPS, lambda u: u.decode_steps_total),
    (metrics.ENGINE_DECODE_BUSY, lambda u: u.decode_busy_s_total),
    (metrics.ENGINE_DECODE_BYTES, lambda u: u.decode_bytes_total),
    (metrics.ENGINE_FLOPS, lambda u: u.flops_total),
    (metrics.ENGINE_TOUCHED, lambda u: u.experts_touched),
    (metrics.ENGINE_SMBU, lambda u: u.s_mbu),
    (metrics.ENGINE_SMFU, lambda u: u.s_mfu),
)


class DigestCollector(Collector):
    """Builds the families at each scrape from `digests()`; holds no state, so a counter is the replica's own."""

    def __init__(self, deployment: str, revision: str, digests: Callable[[], Iterable[ReplicaDigest]]) -> None:
        self._deployment = deployment
        self._revision = revision
        self._digests = digests

    def collect(self) -> Iterator[Family]:
        digests = list(self._digests())
        replicas = GaugeMetricFamily(
            metrics.BOARD_REPLICAS.name, metrics.BOARD_REPLICAS.help, labels=metrics.BOARD_REPLICAS.labels
        )
        replicas.add_metric([self._deployment, self._revision], len(digests))
        yield replicas
        for row, read in _REPLICA_ROWS:
            family = metrics.family(row)
            for digest in digests:
                family.add_metric(self._labels(digest), float(read(digest)))
            yield family
        for use_row, read_use in _UTILISATION_ROWS:
            family = metrics.family(use_row)
            for digest in digests:
                use = None if digest.utilisation is None else read_use(digest.utilisation)
                if use is not None:
                    family.add_metric(self._labels(digest), float(use))
            yield family
        for layer_row, read_layer in _LAYER_ROWS:
            family = metrics.family(layer_row)
            for digest in digests:
                for layer in digest.layers:
                    value = read_layer(layer)
                    if value is not None and layer.hooked:
                        family.add_metric([*self._labels(digest), str(layer.layer)], float(value))
            yield family
        yield from self._imbalance(digests)
        yield from self._others(digests)

    def _labels(self, digest: ReplicaDigest) -> list[str]:
        return [self._deployment, self._revision, digest.replica]

    def _imbalance(self, digests: list[ReplicaDigest]) -> Iterator[Family]:
        family = metrics.family(metrics.EXPERT_IMBALANCE)
        hot = metrics.family(metrics.EXPERT_HOT)
        for digest in digests:
            for layer in digest.layers:
                labels = [*self._labels(digest), str(layer.layer)]
                for by, value in (
                    ("expert", layer.expert_max_over_mean),
                    ("rank", layer.rank_max_over_mean),
                    ("rank_demand", layer.demand_rank_max_over_mean),
                ):
                    if value is not None:
                        family.add_metric([*labels, by], value)
                for expert, slots in layer.hottest:
                    hot.add_metric([*labels, str(expert)], slots)
        yield family
        yield hot

    def _others(self, digests: list[ReplicaDigest]) -> Iterator[Family]:
        gamma = metrics.family(metrics.CAPACITY_FACTOR)
        layers = metrics.family(metrics.LAYERS_HOOKED)
        seconds = metrics.family(metrics.RANK_MOE_SECONDS)
        for digest in digests:
            labels = self._labels(digest)
            capped = digest.knobs.overflow is not Overflow.UNLIMITED
            for phase, factor in (
                ("prefill", digest.knobs.capacity_factor_prefill),
                ("decode", digest.knobs.capacity_factor_decode),
            ):
                gamma.add_metric([*labels, phase], float(factor) if capped and factor is not None else math.inf)
            hooked = sum(1 for layer in digest.layers if layer.hooked)
            layers.add_metric([*labels, "hooked"], hooked)
            layers.add_metric([*labels, "bypassed"], len(digest.layers) - hooked)
            for rank, value in enumerate(digest.engine.rank_moe_s_total):
                seconds.add_metric([*labels, str(rank)], value)
        yield gamma
        yield layers
        yield seconds


def registry(deployment: str, revision: str, digests: Callable[[], Iterable[ReplicaDigest]]) -> CollectorRegistry:
    """A registry that holds the collector alone."""
    result = CollectorRegistry()
    result.register(DigestCollector(deployment, revision, digests))
    return result
