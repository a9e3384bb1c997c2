"""Load of experts by layer: what was counted between two matrices, and load over mean. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from moe_core.wire import ExpertMatrix, LayerLoad


class Of(StrEnum):
    """Which load is drawn."""

    DEMAND = "demand"
    ASSIGNED = "assigned"
    RANK_DEMAND = "rank-demand"
    RANK = "rank"


@dataclass(frozen=True)
class Row:
    """One layer. `cells`: load over the layer's mean; None where nothing at all was routed."""

    layer: int
    hooked: bool
    cells: tuple[float, ...] | None
    max_over_mean: float | None
    ranks_before: float | None
    ranks_after: float | None
    marks: str
    dropped_share: float
    rerouted_share: float


@dataclass(frozen=True)
class Grid:
    """Layers by experts (or EP ranks), and what a title says of it."""

    of: Of
    rows: tuple[Row, ...]
    columns: int


def since(before: ExpertMatrix, after: ExpertMatrix) -> ExpertMatrix:
    """What was counted between two matrices of one replica. After a restart in between: since that restart."""
    if (before.replica, before.started_at_s) != (after.replica, after.started_at_s):
        return after
    layers = tuple(_since(*pair) for pair in zip(before.layers, after.layers, strict=True))
    return after.model_copy(update={"layers": layers, "started_at_s": before.at_s})


def _since(before: LayerLoad, after: LayerLoad) -> LayerLoad:
    vectors = ("demand", "assigned", "rank_demand", "rank_assigned")
    numbers = ("tokens", "dropped", "rerouted", "overflow_kept")
    changes: dict[str, object] = {name: getattr(after, name) - getattr(before, name) for name in numbers}
    for name in vectors:
        changes[name] = tuple(b - a for a, b in zip(getattr(before, name), getattr(after, name), strict=True))
    return after.model_copy(update=changes)


def grid(matrix: ExpertMatrix, of: Of) -> Grid:
    """The heat map of one kind of load."""
    rows = tuple(_row(layer, _load(layer, of)) for layer in matrix.layers)
    columns = max((len(_load(layer, of)) for layer in matrix.layers), default=0)
    return Grid(of, rows, columns)


def _load(layer: LayerLoad, of: Of) -> tuple[int, ...]:
    return {
        Of.DEMAND: layer.demand,
        Of.ASSIGNED: layer.assigned,
        Of.RANK_DEMAND: layer.rank_demand,
        Of.RANK: layer.rank_assigned,
    }[of]


def _row(layer: LayerLoad, load: Sequence[int]) -> Row:
    slots = sum(layer.demand)
    known = layer.hooked and slots > 0
    counts = (("D", layer.dropped), ("R", layer.rerouted), ("K", layer.overflow_kept))
    return Row(
        layer=layer.layer,
        hooked=layer.hooked,
        cells=over_mean(load) if known else None,
        max_over_mean=worst(load) if known else None,
        ranks_before=worst(layer.rank_demand) if known else None,
        ranks_after=worst(layer.rank_assigned) if known else None,
        marks="".join(mark for mark, count in counts if count and known),
        dropped_share=layer.dropped / slots if known else 0.0,
        rerouted_share=layer.rerouted / slots if known else 0.0,
    )


def over_mean(load: Sequence[int]) -> tuple[float, ...] | None:
    """Each load over the mean of all; None where nothing was loaded."""
    total = sum(load)
    return tuple(x * len(load) / total for x in load) if total else None


def worst(load: Sequence[int]) -> float | None:
    """Straggler factor: max over mean."""
    cells = over_mean(load)
    return None if cells is None else max(cells)


def binned(cells: Sequence[float], columns: int) -> tuple[tuple[float, ...], int]:
    """Cells for a narrower map, each the hottest of `group` neighbours, so that no hot expert disappears."""
    group = max(1, math.ceil(len(cells) / max(1, columns)))
    return tuple(max(cells[i : i + group]) for i in range(0, len(cells), group)), group
