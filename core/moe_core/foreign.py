"""Engines that are not ours: what their Prometheus text means in our terms, and which of our knobs they lack.

Names were read in: vLLM 0.32.0 (v1/metrics/loggers.py); SGLang's production_metrics page and srt/metrics/collector.py
at 00ae9c1 (server flag --enable-metrics); TensorRT-LLM's metrics/collector.py at 050f80d, served by trtllm-serve under
/prometheus/metrics with `return_perf_metrics: true`. Where a name changed between versions, the newer comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from moe_api.enums import EngineSignal, MetricsDialect
from moe_core.wire import Knobs, Overflow

NO_LIMIT = 1 << 20
"""Stands for a limit of running requests that the engine does not tell, while none of its requests wait."""

_SAME_LOAD = frozenset({"tp_rank", "pp_rank", "moe_ep_rank", "pid"})
"""Series that differ in these labels alone tell the same requests again."""


class NotUnderstood(ValueError):
    """The text is no Prometheus text, or holds none of the names."""


@dataclass(frozen=True)
class Names:
    """Metric names by signal, the preferred first."""

    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    kv_usage: tuple[str, ...] = ()
    prompt_tokens: tuple[str, ...] = ()
    generation_tokens: tuple[str, ...] = ()
    active_limit: tuple[str, ...] = ()
    ttft: tuple[str, ...] = ()
    itl: tuple[str, ...] = ()


DIALECTS: Mapping[MetricsDialect, Names] = {
    MetricsDialect.VLLM: Names(
        running=("vllm:num_requests_running",),
        waiting=("vllm:num_requests_waiting",),
        kv_usage=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        prompt_tokens=("vllm:prompt_tokens_total",),
        generation_tokens=("vllm:generation_tokens_total",),
        ttft=("vllm:time_to_first_token_seconds",),
        itl=("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    ),
    MetricsDialect.SGLANG: Names(
        running=("sglang:num_running_reqs",),
        waiting=("sglang:num_queue_reqs",),
        kv_usage=("sglang:token_usage",),
        prompt_tokens=("sglang:prompt_tokens_total",),
        generation_tokens=("sglang:generation_tokens_total",),
        ttft=("sglang:time_to_first_token_seconds",),
        itl=("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
    ),
    MetricsDialect.TENSORRT_LLM: Names(
        running=("trtllm_num_requests_running",),
        waiting=("trtllm_num_requests_waiting",),
        kv_usage=("trtllm_kv_cache_utilization",),
        prompt_tokens=("trtllm_prompt_tokens_total",),
        generation_tokens=("trtllm_generation_tokens_total",),
        active_limit=("trtllm_max_num_active_requests",),
        ttft=("trtllm_time_to_first_token_seconds",),
        itl=("trtllm_time_per_output_token_seconds",),
    ),
}

_SIGNALS = {
    EngineSignal.RUNNING: "running",
    EngineSignal.WAITING: "waiting",
    EngineSignal.KV_USAGE: "kv_usage",
    EngineSignal.PROMPT_TOKENS: "prompt_tokens",
    EngineSignal.GENERATION_TOKENS: "generation_tokens",
}


@dataclass(frozen=True)
class Histogram:
    """Cumulative counts by upper bound in seconds, the last of them +Inf; and the sum of all."""

    buckets: tuple[tuple[float, float], ...]
    sum_s: float


@dataclass(frozen=True)
class ForeignLoad:
    """What an engine said of itself. None: it does not tell."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    active_limit: int | None = None
    ttft: Histogram | None = None
    itl: Histogram | None = None

    @property
    def limit(self) -> int:
        """Requests that may run at once. While some wait, those that run are as many as may."""
        if self.active_limit:
            return self.active_limit
        return max(1, self.running or 0) if self.waiting else NO_LIMIT

    @property
    def missing(self) -> tuple[str, ...]:
        """Signals that the forecast wants and the engine does not tell."""
        return tuple(name for name in ("running", "waiting", "kv_usage") if getattr(self, name) is None)


def names_of(dialect: MetricsDialect, custom: Mapping[EngineSignal, str]) -> Names:
    """The names of a dialect; for Custom those that the resource gives."""
    if dialect is not MetricsDialect.CUSTOM:
        return DIALECTS[dialect]
    return Names(**{_SIGNALS[signal]: (metric,) for signal, metric in custom.items()})


def read(text: str, names: Names) -> ForeignLoad:
    """An engine's load from its Prometheus text. Raises NotUnderstood.

    Series of data-parallel replicas add up; series of ranks that run the same requests count once. Cache usage is that
    of the fullest.
    """
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError as error:
        raise NotUnderstood(f"it is no Prometheus text: {error}") from None
    series = _series(families)
    load = ForeignLoad(
        running=_whole(_added(series, names.running)),
        waiting=_whole(_added(series, names.waiting)),
        kv_usage=_fullest(series, names.kv_usage),
        prompt_tokens=_added(series, names.prompt_tokens),
        generation_tokens=_added(series, names.generation_tokens),
        active_limit=_whole(_added(series, names.active_limit)),
        ttft=_histogram(series, names.ttft),
        itl=_histogram(series, names.itl),
    )
    if load == ForeignLoad():
        wanted = ", ".join(name for field in fields(names) for name in getattr(names, field.name)[:1])
        raise NotUnderstood(f"it holds none of {wanted}: is the dialect right, and are the engine's metrics enabled?")
    return load


_Series = dict[str, list[tuple[dict[str, str], float]]]


def _series(families: Iterable[Metric]) -> _Series:
    found: _Series = {}
    for family in families:
        for sample in family.samples:
            if math.isfinite(sample.value) and sample.value >= 0:
                found.setdefault(sample.name, []).append((dict(sample.labels), float(sample.value)))
    return found


def _first(series: _Series, names: Iterable[str], suffix: str = "") -> list[tuple[dict[str, str], float]]:
    return next((series[name + suffix] for name in names if name + suffix in series), [])


def _added(series: _Series, names: Iterable[str], suffix: str = "") -> float | None:
    rows = _first(series, names, suffix)
    apart: dict[tuple[tuple[str, str], ...], float] = {}
    for labels, value in rows:
        key = tuple(sorted((name, of) for name, of in labels.items() if name not in _SAME_LOAD))
        apart[key] = max(value, apart.get(key, 0.0))
    return sum(apart.values()) if rows else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _fullest(series: _Series, names: Iterable[str]) -> float | None:
    values = [value for _, value in _first(series, names)]
    return min(1.0, max(values)) if values else None


def _histogram(series: _Series, names: Iterable[str]) -> Histogram | None:
    names = tuple(names)
    rows = _first(series, names, "_bucket")
    total_s = _added(series, names, "_sum")
    bounds = sorted({float(labels["le"]) for labels, _ in rows if "le" in labels})
    if not bounds or total_s is None:
        return None
    buckets = []
    for bound in bounds:
        at = {"at": [(_without_le(labels), value) for labels, value in rows if float(labels.get("le", "nan")) == bound]}
        buckets.append((bound, _added(at, ("at",)) or 0.0))
    if bounds[-1] != math.inf or any(b[1] < a[1] for a, b in pairwise(buckets)):
        return None  # series with different buckets cannot be added up
    return Histogram(tuple(buckets), total_s)


def _without_le(labels: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name != "le"}


def unsupported(knobs: Knobs) -> tuple[str, ...]:
    """Knobs of a command that ask something of the engine: one that is not ours has none of them."""
    experts, engine = knobs.experts, knobs.engine
    asked = (
        ("experts.overflow", experts.overflow is not Overflow.UNLIMITED),
        ("experts.capacityFactor.prefill", experts.capacity_factor_prefill is not None),
        ("experts.capacityFactor.decode", experts.capacity_factor_decode is not None),
        ("experts.capacityFactorByLayer", bool(experts.capacity_factor_by_layer)),
        ("experts.perToken", bool(experts.per_token)),
        ("engine.maxActiveSeqs", engine.max_active_seqs is not None),
        ("engine.maxBatchedTokens", engine.max_batched_tokens is not None),
    )
    return tuple(name for name, is_asked in asked if is_asked)
