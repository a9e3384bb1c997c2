"""Which of the layouts that fit is taken: the first in their order, unless another is predicted to give clearly more.

Clearly is by more than the calibration's own error, so that neither noise nor the next calibration turns a choice over
lightly (docs/adr/0026). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moe_planner import calibration, memory, speed
from moe_planner.calibration import Factors
from moe_planner.catalog import Catalog, packaged
from moe_planner.memory import Ask
from moe_planner.search import Slo
from moe_planner.speed import Load, Prepared, SpeedUnknown
from moe_planner.weights import Layout

USUAL_TOKENS = (2000.0, 200.0)
"""Input and output of a mean request where nobody says: a chat of a few turns."""
STEPS = 12
"""Halvings of the search for the most requests that keep the SLO: below a thousandth of what the cache holds."""


@dataclass(frozen=True)
class Room:
    """A layout that fits, as it would be launched: tokens of a step, and bytes of cache on its fullest GPU."""

    layout: Layout
    batched_tokens: int
    cache: float


@dataclass(frozen=True)
class Preferred:
    """Which of the layouts, and why, in words that follow its name."""

    index: int
    why: str


def prefer(ask: Ask, rooms: Sequence[Room], slo: Slo, context: int, catalog: Catalog) -> Preferred:
    """The first layout in the order given, unless another beats it by more than the calibration's error.

    Compared is the output of a replica under the SLO, with requests of `USUAL_TOKENS` (shorter where the context is)
    and as many in flight as keep it, up to what was asked for or memory holds. Where a figure of the hardware is not
    known, the order stands.
    """
    if len(rooms) == 1:
        return Preferred(0, "the only layout that fits")
    if catalog is packaged():  # its accelerators are told apart by name: what is equal is the same
        return _prefer_packaged(ask, tuple(rooms), slo, context)
    return _prefer(ask, tuple(rooms), slo, context, catalog)


@lru_cache(maxsize=4096)
def _prefer_packaged(ask: Ask, rooms: tuple[Room, ...], slo: Slo, context: int) -> Preferred:
    return _prefer(ask, rooms, slo, context, packaged())


def _prefer(ask: Ask, rooms: tuple[Room, ...], slo: Slo, context: int, catalog: Catalog) -> Preferred:
    factors = calibration.packaged()
    try:
        outputs = [under_slo(ask, room, slo, context, catalog, factors) for room in rooms]
    except SpeedUnknown:
        return Preferred(0, "the first in order, as speeds here are not known")
    margin = math.exp(factors.error)
    return rule([room.layout for room in rooms], outputs, margin)


def rule(layouts: Sequence[Layout], outputs: Sequence[float], margin: float) -> Preferred:
    """The first, unless others give more than `margin` times its output; of those the first that none of them beats by
    as much again."""
    most = max(outputs)
    if outputs[0] * margin >= most:
        return Preferred(0, f"the first in order: no other is predicted to give {margin:.2f} times its output")
    index = next(at for at, output in enumerate(outputs) if output > outputs[0] * margin and output * margin >= most)
    if not outputs[0]:
        return Preferred(index, f"predicted to keep the SLO, which {layouts[0]} is not")
    return Preferred(index, f"predicted to give {outputs[index] / outputs[0]:.1f} times the output of {layouts[0]}")


def under_slo(ask: Ask, room: Room, slo: Slo, context: int, catalog: Catalog, factors: Factors) -> float:
    """Output tokens/s of a replica with as many usual requests in flight as keep the SLO; 0 where not even one does.

    One request may miss it by the calibration's error: so much is not known. Raises SpeedUnknown.
    """
    shorter = min(1.0, context / sum(USUAL_TOKENS))
    tokens = Load(USUAL_TOKENS[0] * shorter, USUAL_TOKENS[1] * shorter, 1)
    most = most_seqs(ask, room, tokens, catalog) * room.layout.data
    at = replace(speed.prepare(ask, room.layout, tokens, catalog), batched_tokens=room.batched_tokens)
    if (best := _running(at, most, slo, factors)) is not None:
        return best
    alone = _running(at, 1.0, slo, factors, margin=math.exp(factors.error))
    if alone is None:
        return 0.0
    low, high = 1.0, most
    for _ in range(STEPS):
        middle = (low + high) / 2.0
        found = _running(at, middle, slo, factors)
        if found is None:
            high = middle
        else:
            low, alone = middle, found
    return alone


def most_seqs(ask: Ask, room: Room, load: Load, catalog: Catalog) -> float:
    """Sequences of one data rank that are launched: as asked for, else what the cache holds up to the engine's own."""
    one = memory.sequence_bytes(ask, room.layout, math.ceil(load.input_tokens + load.output_tokens), 0)
    limit = ask.active_seqs or catalog.engine.active_seqs
    return max(1.0, min(float(limit), room.batched_tokens, room.cache // one))


def _running(at: Prepared, running: float, slo: Slo, factors: Factors, margin: float = 1.0) -> float | None:
    """Output tokens/s with so many requests in flight; None where the SLO is missed."""
    load = replace(at.load, concurrency=max(1, round(running)))
    found = speed.finish(replace(at, load=load, running=running), factors)
    kept = all(
        wanted is None or got <= wanted * margin
        for got, wanted in ((found.ttft_s, slo.ttft_s), (found.itl_s, slo.itl_s))
    )
    return found.output_tokens_per_s if kept else None
