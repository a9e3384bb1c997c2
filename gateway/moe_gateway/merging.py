"""What the workers of a pod say, as one: metrics, digests and acknowledgements. Pure.

A counter of the pod must never go back, or Prometheus counts all of it again: what a worker had counted when it was
last asked stays in the sum after its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from prometheus_client.utils import floatToGoString
from pydantic import Field

from moe_api.base import Model
from moe_core import metrics
from moe_core.wire import Ack, GatewayDigest, TargetDigest

Rule = Literal["sum", "min", "max", "mean"]
RULES: dict[str, Rule] = {
    metrics.GATEWAY_IN_FLIGHT.name: "sum",
    metrics.GATEWAY_BREAKER_OPEN.name: "max",
    metrics.GATEWAY_KNOBS_VERSION.name: "min",
    metrics.GATEWAY_WEIGHTS_VERSION.name: "min",
    metrics.GATEWAY_CONFIG_LOADED.name: "min",
    metrics.LOCAL_RENT.name: "max",
    metrics.GATEWAY_FORECAST_BRIER.name: "mean",
}
"""Where it is not the kind's own: counters and histograms are summed. Rent is the engines', and each worker tells all
of it; a version is in force where the last worker has it."""
_TOLD_ALIKE = "moestack_engine_"
"""An external engine's own numbers: each worker reads the same."""
SAMPLES_MAX = 2000
_COUNTED = ("counter", "histogram")


class Window(Model):
    """A worker's digest, and what quantiles over all workers need of it."""

    digest: GatewayDigest
    judged: int = Field(default=0, description="requests that met or missed the SLO")
    ttft_count: int = 0
    itl_count: int = 0
    ttft_s: tuple[float, ...] = Field(default=(), description="in order; of very many a part, evenly")
    itl_s: tuple[float, ...] = ()


@dataclass
class _Family:
    kind: str = "untyped"
    head: list[str] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)


def rule(name: str, kind: str) -> Rule:
    """How the samples of a family are taken together over workers."""
    if name.startswith(_TOLD_ALIKE):
        return "max"
    return RULES.get(name, "sum" if kind in _COUNTED else "max")


def expositions(live: Sequence[bytes], ended: bytes = b"") -> bytes:
    """One text of metrics for a pod, from those of its workers and the counters of those that have ended."""
    families: dict[str, _Family] = {}
    for text in (*live, ended):
        _read(text, families)
    lines = []
    for name, family in families.items():
        how = rule(name, family.kind)
        lines += family.head
        lines += [f"{key} {_said(_taken(values, how))}" for key, values in family.samples.items()]
    return ("\n".join(lines) + "\n").encode() if lines else b""


def retired(ended: bytes, last: bytes) -> bytes:
    """Counters of workers that have ended, with those of one more as it last told them."""
    families: dict[str, _Family] = {}
    _read(last, families)
    kept = []
    for name, family in families.items():
        if family.kind in _COUNTED and rule(name, family.kind) == "sum":
            kept += family.head
            kept += [f"{key} {_said(sum(values))}" for key, values in family.samples.items()]
    return expositions([ended, ("\n".join(kept) + "\n").encode()])


def _read(text: bytes, families: dict[str, _Family]) -> None:
    family = _Family()
    for line in text.decode().split("\n"):
        if line.startswith("#"):
            _, word, name, rest = line.split(" ", 3)
            family = families.setdefault(name, _Family())
            if line not in family.head:
                family.head.append(line)
            if word == "TYPE":
                family.kind = rest
        elif line:
            key, value = line.rsplit(" ", 1)
            family.samples.setdefault(key, []).append(float(value))


def _taken(values: Sequence[float], how: Rule) -> float:
    match how:
        case "sum":
            return sum(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "mean":
            return sum(values) / len(values)


def _said(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def digests(windows: Sequence[Window], name: str) -> GatewayDigest:
    """A pod's digest. What is in force is what every worker has; counts are sums; quantiles are over all requests.

    Raises ValueError without a window.
    """
    parts = [window.digest for window in windows]
    oldest = min(parts, key=lambda digest: digest.weights_version)
    hashes = {digest.config_hash for digest in parts}
    judged = sum(window.judged for window in windows)
    met = sum(window.judged * (window.digest.slo_attained or 0.0) for window in windows)
    counts = ("arrivals", "completed", "failed", "spilled", "shed", "held", "in_flight")
    tokens = ("prompt_tokens", "output_tokens")
    ttft = [(window.ttft_s, window.ttft_count) for window in windows]
    itl = [(window.itl_s, window.itl_count) for window in windows]
    return oldest.model_copy(
        update={
            **{field: sum(getattr(digest, field) for digest in parts) for field in (*counts, *tokens)},
            "gateway": name,
            "knobs_version": min(digest.knobs_version for digest in parts),
            "config_hash": hashes.pop() if len(hashes) == 1 else "",
            "config_error": next((digest.config_error for digest in parts if digest.config_error), None),
            "ttft_p50_s": quantile(ttft, 0.5),
            "ttft_p95_s": quantile(ttft, 0.95),
            "itl_p95_s": quantile(itl, 0.95),
            "slo_attained": min(1.0, met / judged) if judged else None,
            "targets": tuple(_targets(parts)),
        }
    )


def quantile(parts: Sequence[tuple[Sequence[float], int]], q: float) -> float | None:
    """Nearest-rank quantile over samples of several, each with the number that its samples stand for."""
    weighted = sorted((value, count / len(values)) for values, count in parts if values for value in values)
    rank, passed = q * sum(weight for _, weight in weighted), 0.0
    for value, weight in weighted:
        passed += weight
        if passed > rank:
            return value
    return weighted[-1][0] if weighted else None


def thinned(ordered: Sequence[float]) -> tuple[float, ...]:
    """Sorted values, or so many of them evenly as may be told."""
    count = len(ordered)
    if count <= SAMPLES_MAX:
        return tuple(ordered)
    return tuple(ordered[(2 * index + 1) * count // (2 * SAMPLES_MAX)] for index in range(SAMPLES_MAX))


def _targets(parts: Sequence[GatewayDigest]) -> Iterator[TargetDigest]:
    by_name: dict[str, list[TargetDigest]] = {}
    for digest in parts:
        for target in digest.targets:
            by_name.setdefault(target.name, []).append(target)
    for found in by_name.values():
        counts = ("requests", "failures", "met", "missed", "in_flight")
        sums = {field: sum(getattr(target, field) for target in found) for field in counts}
        yield found[0].model_copy(update={**sums, "usd": sum((target.usd for target in found), Decimal(0))})


def acks(parts: Sequence[Ack], name: str) -> Ack:
    """A pod's acknowledgement: of the moment at which its last worker had it. Raises ValueError for none."""
    last = max(parts, key=lambda ack: ack.applied_at_s)
    return last.model_copy(update={"replica": name})
