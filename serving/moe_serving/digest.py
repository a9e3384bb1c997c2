"""From counters of the ranks to the digest of a replica: pure arithmetic, with the counters before as its state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_core.wire import EngineDigest, ExpertKnobs, ExpertMatrix, LayerDigest, LayerLoad, ReplicaDigest
from moe_serving.utilisation import UNKNOWN, Peaks, Shapes, Work, measure

HOTTEST = 3
"""Experts by name in each layer's digest: enough to see a hot spot, few enough for Prometheus."""


_BY_EXPERT = ("demand", "assigned")
_ADDED = ("tokens", "dropped", "rerouted", "overflow_kept", "lost_gate_mass", "touched")
"""Counters of `moestack_read` that add up over parts of a batch: lists by expert, and numbers."""


@dataclass(frozen=True)
class Identity:
    """Who reports."""

    replica: str
    revision: str
    started_at_s: float
    model: str = ""


@dataclass(frozen=True)
class Totals:
    """Slots by expert of each layer at the digest before: (demand, assigned); and the work of the engine."""

    layers: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    seq: int = 0
    work: Work | None = None


def build(
    who: Identity,
    at_s: float,
    ranks: Sequence[Mapping[str, Any]],
    scheduler: Mapping[str, Any],
    before: Totals,
    shapes: Shapes | None = None,
    peaks: Peaks = UNKNOWN,
) -> tuple[ReplicaDigest, Totals]:
    """The digest of a replica, and the totals that the next one is counted from.

    `ranks` are answers of `moestack_read`, by rank. `scheduler` is the answer of `moestack_scheduler_state`. An engine
    that is one rank of data-parallel attention counts what its own requests demand, of every EP rank of its gang.
    """
    first = _whole(ranks)
    layers: list[LayerDigest] = []
    totals: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for position, layer in enumerate(first["layers"]):
        owners = _owners(ranks, position)
        now = (tuple(layer["demand"]), tuple(layer["assigned"]))
        totals[position] = now
        layers.append(_layer(layer, now, before.layers.get(position), owners))
    work = None if shapes is None else _work(first, ranks)
    digest = ReplicaDigest(
        replica=who.replica,
        revision=who.revision,
        started_at_s=who.started_at_s,
        at_s=at_s,
        seq=before.seq + 1,
        ranks=len(ranks),
        knobs_version=min(int(rank["version"]) for rank in ranks),
        knobs=ExpertKnobs.model_validate_json(first["knobs"]),
        engine=EngineDigest(
            running=int(scheduler["running"]),
            waiting=int(scheduler["waiting"]),
            kv_usage=min(1.0, max(0.0, float(scheduler["kv_usage"]))),
            max_active_seqs=int(scheduler["active_seqs"]),
            max_batched_tokens=int(scheduler["batched_tokens"]),
            ceiling_active_seqs=int(scheduler["ceiling_active_seqs"]),
            ceiling_batched_tokens=int(scheduler["ceiling_batched_tokens"]),
            prompt_tokens_total=int(first["prompt_tokens"]),
            generation_tokens_total=int(first["generated_tokens"]),
            preemptions_total=int(scheduler.get("preemptions", 0)),
            steps_total=int(first["steps"]),
            busy_s_total=max(float(rank["busy_s"]) for rank in ranks),
            rank_moe_s_total=tuple(float(rank["moe_s"]) for rank in ranks),
        ),
        utilisation=None
        if shapes is None or work is None
        else measure(shapes, peaks, work, before.work, reads_known=not _shares_experts(ranks)),
        layers=tuple(layers),
    )
    return digest, Totals(totals, before.seq + 1, work)


def _whole(ranks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """An engine's counters. Under tensor parallelism each rank routes the same tokens, so the first tells them; where
    tokens are cut into a part for each rank before they are routed (sequence parallel), the ranks add up."""
    layers = [_joined([rank["layers"][position] for rank in ranks]) for position in range(len(ranks[0]["layers"]))]
    return {**ranks[0], "layers": layers}


def _joined(parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if not parts[0].get("split"):
        return parts[0]
    slots = {name: [sum(row) for row in zip(*(part[name] for part in parts), strict=True)] for name in _BY_EXPERT}
    sums = {name: sum(part[name] for part in parts) for name in _ADDED}
    return {**parts[0], **slots, **sums, "max_prefill_load": max(part["max_prefill_load"] for part in parts)}


def _owners(ranks: Sequence[Mapping[str, Any]], position: int) -> Sequence[Sequence[int] | None]:
    """Experts of each EP rank, in the order of ranks."""
    places: Sequence[Sequence[int]] | None = ranks[0]["layers"][position].get("places")
    return places or [rank["layers"][position]["mine"] for rank in ranks]


def _shares_experts(ranks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether experts of other engines serve this one's tokens, and its experts theirs (data-parallel attention)."""
    return any(len(_owners(ranks, position)) > len(ranks) for position in range(len(ranks[0]["layers"])))


def _work(first: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> Work:
    """Each rank reads its own part of the cache; a step lasts as long as its slowest rank."""
    return Work.of(
        first,
        kv_bytes=sum(float(rank["work"]["decode_kv_bytes"]) for rank in ranks),
        busy_s=max(float(rank["busy_s"]) for rank in ranks),
        decode_busy_s=max(float(rank["work"]["decode_busy_s"]) for rank in ranks),
    )


def matrix(who: Identity, at_s: float, ranks: Sequence[Mapping[str, Any]]) -> ExpertMatrix:
    """Every layer's load since the replica started, from answers of `moestack_read`."""
    first = _whole(ranks)
    layers = []
    for position, layer in enumerate(first["layers"]):
        owners = _owners(ranks, position)
        layers.append(
            LayerLoad(
                layer=int(layer["layer"]),
                hooked=bool(layer["hooked"]),
                tokens=int(layer["tokens"]),
                demand=tuple(layer["demand"]),
                assigned=tuple(layer["assigned"]),
                rank_demand=tuple(_by_rank(layer["demand"], owners)),
                rank_assigned=tuple(_by_rank(layer["assigned"], owners)),
                dropped=int(layer["dropped"]),
                rerouted=int(layer["rerouted"]),
                overflow_kept=int(layer["overflow_kept"]),
            )
        )
    return ExpertMatrix(
        replica=who.replica,
        revision=who.revision,
        model=who.model,
        started_at_s=who.started_at_s,
        at_s=at_s,
        ranks=len(ranks),
        knobs_version=min(int(rank["version"]) for rank in ranks),
        knobs=ExpertKnobs.model_validate_json(first["knobs"]),
        layers=tuple(layers),
    )


def max_over_mean(load: Sequence[int]) -> float | None:
    """Straggler factor max/mean; None where nothing was loaded."""
    total = sum(load)
    return max(load) * len(load) / total if total else None


def coefficient_of_variation(load: Sequence[int]) -> float | None:
    """Standard deviation over mean, of the whole population; None where nothing was loaded."""
    total = sum(load)
    if not total:
        return None
    mean = total / len(load)
    return math.sqrt(sum((x - mean) ** 2 for x in load) / len(load)) / mean


def _layer(
    layer: Mapping[str, Any],
    now: tuple[tuple[int, ...], tuple[int, ...]],
    before: tuple[tuple[int, ...], tuple[int, ...]] | None,
    owners: Sequence[Sequence[int] | None],
) -> LayerDigest:
    demand, assigned = (_since(now[i], None if before is None else before[i]) for i in (0, 1))
    rank_demand, rank_load = (_by_rank(load, owners) for load in (demand, assigned))
    hottest = sorted(range(len(now[0])), key=lambda e: (-now[0][e], e))[:HOTTEST]
    return LayerDigest(
        layer=int(layer["layer"]),
        hooked=bool(layer["hooked"]),
        slots_total=sum(now[0]),
        dropped_total=int(layer["dropped"]),
        rerouted_total=int(layer["rerouted"]),
        overflow_kept_total=int(layer["overflow_kept"]),
        lost_gate_mass_total=float(layer["lost_gate_mass"]),
        tokens_total=int(layer["tokens"]),
        window_slots=sum(demand),
        expert_max_over_mean=max_over_mean(demand),
        expert_cv=coefficient_of_variation(demand),
        rank_max_over_mean=max_over_mean(rank_load),
        rank_slots=tuple(rank_load),
        demand_rank_max_over_mean=max_over_mean(rank_demand),
        hottest=tuple((e, now[0][e]) for e in hottest if now[0][e]),
        max_prefill_load=int(layer["max_prefill_load"]),
    )


def _since(now: Sequence[int], before: Sequence[int] | None) -> list[int]:
    return list(now) if before is None else [a - b for a, b in zip(now, before, strict=True)]


def _by_rank(load: Sequence[int], owners: Sequence[Sequence[int] | None]) -> list[int]:
    """Slots by EP rank. A rank without a map (no expert parallelism) holds every expert."""
    return [sum(load) if mine is None else sum(load[e] for e in mine) for mine in owners]
