"""From digests to signals: sums over replicas and gateways, rates from counters, nothing made up for a missing one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moe_core.setting import Signals
from moe_core.wire import GatewayDigest, ReplicaDigest

COUNTER_WINDOW_S = 5.0
"""Counters are differenced over about this long: long enough for a stable share, short enough for a guard."""
DIGEST_FRESH_S = 5.0
"""A digest that was not renewed for this long (three were due) is no word about the present."""
API_FAILURES, API_FAILURE_SHARE = 3, 0.3


@dataclass(frozen=True)
class Counters:
    """Sums of one replica's counters at one time."""

    at_s: float
    started_at_s: float
    tokens: float = 0.0
    slots: float = 0.0
    dropped: float = 0.0
    lost_gate_mass: float = 0.0
    engine_tokens: float = 0.0
    preemptions: float = 0.0


@dataclass(frozen=True)
class Track:
    """What folding remembers: recent counters by replica, and when each digest last moved on."""

    counters: Mapping[str, tuple[Counters, ...]] = field(default_factory=dict)
    seen: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Observation:
    """One reading of the deployment. A source that gave no answer is None, and `missing` says why."""

    replicas: tuple[ReplicaDigest, ...] | None
    gateways: tuple[GatewayDigest, ...] | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Folded:
    """Signals of a tick, and what changed about the replicas themselves."""

    signals: Signals
    restarted: tuple[str, ...] = ()
    died: tuple[str, ...] = ()
    """Replicas that restarted, fell silent or are gone since the tick before."""
    versions: tuple[int, ...] = ()


def fold(observation: Observation, track: Track, now_s: float) -> tuple[Folded, Track]:
    """Combine all digests. `now_s` is monotonic; ages are judged by our own clock, so that skew cannot lie."""
    before = track
    replicas, track, restarted, stale = _fresh(observation.replicas, track, now_s)
    missing = (*observation.missing, *(f"replica {name}: its digest stands still" for name in stale))
    board = _from_board(replicas, track) if replicas else {}
    gateway = _from_gateways(observation.gateways) if observation.gateways else {}
    versions = (
        *(digest.knobs_version for digest in replicas or ()),
        *(digest.knobs_version for digest in observation.gateways or ()),
    )
    signals = Signals.model_validate({**board, **gateway, "missing": missing, "lag_s": COUNTER_WINDOW_S + 1.0})
    silent = {name for name in stale if name not in before.silent}
    gone = tuple(sorted(before.seen.keys() - track.seen.keys()))
    died = tuple(dict.fromkeys((*restarted, *sorted(silent), *gone)))
    return Folded(signals, restarted, died, versions), replace(track, silent=frozenset(stale))


def _fresh(
    digests: tuple[ReplicaDigest, ...] | None, track: Track, now_s: float
) -> tuple[tuple[ReplicaDigest, ...] | None, Track, tuple[str, ...], tuple[str, ...]]:
    if not digests:
        # No board, or one that has just lost its memory: no word on any replica.
        return digests, track, (), ()
    counters, seen = dict[str, tuple[Counters, ...]](), dict[str, tuple[int, float]]()
    fresh, restarted, stale = list[ReplicaDigest](), list[str](), list[str]()
    for digest in digests:
        name = digest.replica
        before = track.counters.get(name, ())
        if before and before[-1].started_at_s != digest.started_at_s:
            restarted.append(name)
            before = ()
        last_seq, last_s = track.seen.get(name, (-1, now_s))
        seen[name] = (digest.seq, now_s if digest.seq != last_seq else last_s)
        if now_s - seen[name][1] > DIGEST_FRESH_S:
            stale.append(name)
            counters[name] = before
            continue
        if not before or digest.seq != last_seq:
            before = (*before, _counters(digest))
        newest = before[-1].at_s
        counters[name] = tuple(c for c in before if c.at_s >= newest - COUNTER_WINDOW_S - 1.0)
        fresh.append(digest)
    return tuple(fresh), Track(counters, seen), tuple(restarted), tuple(stale)


def _counters(digest: ReplicaDigest) -> Counters:
    hooked = [layer for layer in digest.layers if layer.hooked]
    return Counters(
        at_s=digest.at_s,
        started_at_s=digest.started_at_s,
        tokens=sum(layer.tokens_total for layer in hooked),
        slots=sum(layer.slots_total for layer in hooked),
        dropped=sum(layer.dropped_total for layer in hooked),
        lost_gate_mass=sum(layer.lost_gate_mass_total for layer in hooked),
        engine_tokens=digest.engine.prompt_tokens_total + digest.engine.generation_tokens_total,
        preemptions=digest.engine.preemptions_total,
    )


def _from_board(replicas: tuple[ReplicaDigest, ...], track: Track) -> dict[str, object]:
    engines = [digest.engine for digest in replicas]
    seconds = tokens = slots = dropped = lost = engine_tokens = preemptions = 0.0
    for digest in replicas:
        series = track.counters[digest.replica]
        first, last = series[0], series[-1]
        elapsed_s = last.at_s - first.at_s
        if elapsed_s <= 0 or last.engine_tokens < first.engine_tokens or last.tokens < first.tokens:
            continue
        seconds += elapsed_s
        tokens += last.tokens - first.tokens
        slots += last.slots - first.slots
        dropped += last.dropped - first.dropped
        lost += last.lost_gate_mass - first.lost_gate_mass
        engine_tokens += (last.engine_tokens - first.engine_tokens) / elapsed_s
        preemptions += (last.preemptions - first.preemptions) / elapsed_s
    return {
        "replicas": len(replicas),
        "running": sum(engine.running for engine in engines),
        "waiting": sum(engine.waiting for engine in engines),
        "active_limit": min(engine.max_active_seqs for engine in engines),
        "active_ceiling": min(engine.ceiling_active_seqs for engine in engines),
        "kv_usage": max(engine.kv_usage for engine in engines),
        "preemptions_per_s": preemptions if seconds else None,
        "engine_tokens_per_s": engine_tokens if seconds else None,
        "rank_demand": _imbalance(replicas, demand=True),
        "rank_assigned": _imbalance(replicas, demand=False),
        "expert_cv": _spread(replicas),
        "lost_gate_mass": lost / tokens if tokens > 0 else None,
        "dropped_share": dropped / slots if slots > 0 else None,
    }


def _imbalance(replicas: tuple[ReplicaDigest, ...], *, demand: bool) -> float | None:
    """Rank max/mean of the worst replica, its layers weighted by the slots they saw: a step waits for every layer."""
    worst: float | None = None
    for digest in replicas:
        weight = total = 0.0
        for layer in digest.layers:
            ratio = layer.demand_rank_max_over_mean if demand else layer.rank_max_over_mean
            if layer.hooked and ratio is not None and layer.window_slots > 0:
                weight += layer.window_slots
                total += layer.window_slots * ratio
        if weight > 0:
            worst = total / weight if worst is None else max(worst, total / weight)
    return worst


def _spread(replicas: tuple[ReplicaDigest, ...]) -> float | None:
    """Coefficient of variation of demand over experts, of the worst replica, its layers weighted by their slots."""
    worst: float | None = None
    for digest in replicas:
        known = [(x.window_slots, x.expert_cv) for x in digest.layers if x.hooked and x.expert_cv is not None]
        weight = sum(slots for slots, _ in known)
        if weight > 0:
            mean = sum(slots * spread for slots, spread in known) / weight
            worst = mean if worst is None else max(worst, mean)
    return worst


def _from_gateways(gateways: tuple[GatewayDigest, ...]) -> dict[str, object]:
    window_s = max(digest.window_s for digest in gateways)
    arrivals = sum(digest.arrivals for digest in gateways)
    completed = sum(digest.completed for digest in gateways)
    attained = [(d.slo_attained, d.completed + d.failed) for d in gateways if d.slo_attained is not None]
    finished = sum(count for _, count in attained)
    closed = [target for digest in gateways for target in digest.targets if not target.local]
    api_requests, api_failures = sum(t.requests for t in closed), sum(t.failures for t in closed)
    return {
        "window_s": window_s,
        "arrivals_per_s": sum(d.arrivals / d.window_s for d in gateways),
        "completed_per_s": sum(d.completed / d.window_s for d in gateways),
        "local_per_s": sum((t.requests - t.failures) / d.window_s for d in gateways for t in d.targets if t.local),
        "in_flight": sum(digest.in_flight for digest in gateways),
        "prompt_tokens": sum(d.prompt_tokens for d in gateways) / completed if completed else None,
        "output_tokens": sum(d.output_tokens for d in gateways) / completed if completed else None,
        # The worst gateway's percentile: an upper bound on that of all of them together.
        "ttft_p95_s": max((d.ttft_p95_s for d in gateways if d.ttft_p95_s is not None), default=None),
        "itl_p95_s": max((d.itl_p95_s for d in gateways if d.itl_p95_s is not None), default=None),
        "slo_attained": sum(share * count for share, count in attained) / finished if finished else None,
        "spill_share": min(1.0, sum(d.spilled for d in gateways) / arrivals) if arrivals else None,
        "shed_share": min(1.0, sum(d.shed for d in gateways) / arrivals) if arrivals else None,
        "can_spill": bool(closed),
        "api_failing": api_failures >= API_FAILURES and api_failures > API_FAILURE_SHARE * api_requests,
    }
