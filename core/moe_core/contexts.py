"""The context table: which knobs relieved which kind of traffic, learned between spikes, put in force at the next one.

A context is a cell of arrival rate, tokens per request and expert skew, each in steps that a policy can tell apart.
"""

from __future__ import annotations

import math
from decimal import Decimal

from pydantic import Field

from moe_api.base import Model
from moe_core.config import KnobBounds
from moe_core.setting import Setting, Signals

MOST_ROWS = 256
"""Rows kept; of more, the one that relieved least often goes."""
RELAX, LEAST_STEP = 0.5, 0.05
"""Of the way home that a row goes back by, after a spike in which nothing pressed under it: it may be too much."""
SKEW_STEP = 0.25
NEAR = 1.5
"""Steps at which one context still tells of another: a spike shows only part of its height in its first seconds."""


class Row(Model):
    """What relieved a context."""

    setting: Setting
    times: int = Field(default=1, ge=1, description="spikes that ended under it")


Table = dict[str, Row]


def cell_of(signals: Signals) -> str | None:
    """Name of the cell that traffic is in; None while its rate is unknown.

    Rate and tokens in powers of √2 and 2: a spike is seen by its first seconds, whose counts scatter.
    """
    if not signals.arrivals_per_s:
        return None
    rate = round(2 * math.log2(signals.arrivals_per_s))
    tokens = (signals.prompt_tokens or 0.0) + (signals.output_tokens or 0.0)
    length = round(math.log2(max(1.0, tokens)))
    skew = round((max(1.0, signals.rank_demand or 1.0) - 1.0) / SKEW_STEP)
    return f"rate {rate}, length {length}, skew {skew}"


def foreseen(table: Table, cell: str | None, home: Setting, bounds: KnobBounds) -> Setting | None:
    """The setting that relieved this context, or the nearest one, inside the bounds and with pins as they are at home.

    None where nothing near was ever relieved, or home is what relieves it.
    """
    if cell is None or not table:
        return None
    name = cell if cell in table else min(table, key=lambda known: (_apart(cell, known), known))
    if _apart(cell, name) > NEAR:
        return None
    setting = inside(_no_weaker(table[name].setting, home), home, bounds)
    return None if setting == home else setting


def without_capacity(table: Table, factor: Decimal, home: Setting) -> Table:
    """The table once γ = `factor` has broken quality: rows that cap as hard keep the rest of what relieved them."""

    def kept(row: Row) -> Row:
        cap = row.setting.prefill_cap
        lossy = cap is not None and cap <= factor
        return row.model_copy(update={"setting": row.setting.with_capacity(home)}) if lossy else row

    return {cell: kept(row) for cell, row in table.items()}


def relieved(table: Table, cell: str | None, setting: Setting, home: Setting, *, pressed: bool) -> Table:
    """The table after a spike that ended under `setting`. `pressed`: whether anything still pressed once it was met."""
    if cell is None:
        return table
    kept = setting if pressed else _nearer(setting, home)
    times = table[cell].times + 1 if cell in table else 1
    rows = {**table, cell: Row(setting=kept, times=times)}
    if kept == home:
        del rows[cell]
    while len(rows) > MOST_ROWS:
        del rows[min(rows, key=lambda name: (rows[name].times, name))]
    return rows


def _apart(one: str, other: str) -> float:
    """Steps between two cells; a step of the rate is half of one, since it is half as wide."""
    a, b = (tuple(int(part.rsplit(" ", 1)[1]) for part in cell.split(", ")) for cell in (one, other))
    return abs(a[0] - b[0]) / 2 + abs(a[1] - b[1]) + abs(a[2] - b[2])


def _no_weaker(setting: Setting, home: Setting) -> Setting:
    """The setting with every knob that relieves less than home does as it is at home: home may have settled since."""
    cap, own = setting.prefill_cap, home.prefill_cap
    if own is not None and (cap is None or cap > own):
        setting = setting.with_capacity(home)
    miss, rest = setting.fallback.miss_probability, home.fallback.miss_probability
    if miss is not None and rest is not None and miss > rest:
        setting = setting.with_miss_probability(rest)
    return setting


def inside(setting: Setting, home: Setting, bounds: KnobBounds) -> Setting:
    """The setting within the bounds, pins as they are at home; home where that leaves no difference."""
    limit, cap, miss = setting.engine.max_active_seqs, setting.prefill_cap, setting.fallback.miss_probability
    if limit is not None:
        setting = setting.with_active_seqs(min(bounds.active_seqs_max, max(bounds.active_seqs_min, limit)))
    if cap is not None and not bounds.capacity_factor_min <= cap <= bounds.capacity_factor_max:
        setting = setting.with_capacity(home)
    if miss is not None:
        low = 0.0 if bounds.miss_probability_min is None else bounds.miss_probability_min
        high = 1.0 if bounds.miss_probability_max is None else bounds.miss_probability_max
        setting = setting.with_miss_probability(min(high, max(low, miss)))
    setting = setting.keeping_pins(home, bounds)
    return setting if home.differences(setting) else home


def _nearer(setting: Setting, home: Setting) -> Setting:
    """Half of the way home for what is priced in money; the rest as it was."""
    miss, rest = setting.fallback.miss_probability, home.fallback.miss_probability
    if miss is None or miss == rest:
        return setting
    target = 0.5 if rest is None else rest
    near = round(miss + RELAX * (target - miss), 4)
    return setting.with_miss_probability(rest if abs(near - target) < LEAST_STEP else near)
