"""Predicts a whole catalog at once: every model × accelerator × layout, with numpy, as `speed.predict` would each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_planner import exchange, layouts, roofline, speed
from moe_planner.calibration import Factors
from moe_planner.catalog import Accelerator, Catalog, ModelFacts, Precision
from moe_planner.exchange import traffic
from moe_planner.memory import Ask
from moe_planner.roofline import Ops, Peaks, Rates
from moe_planner.speed import Load, SpeedUnknown
from moe_planner.weights import Layout
from moe_planner.work import Work

Matrix = NDArray[np.float64]

ARRAYS = Ops(np.maximum, np.minimum, np.exp, np.sqrt, np.log)
ALONE = Layout(1)


@dataclass(frozen=True)
class Sweep:
    """Output tokens/s of a replica: one row for each (model, layout), one column for each accelerator.

    NaN where it does not fit, or a figure of the accelerator is not known.
    """

    rows: tuple[tuple[ModelFacts, Layout], ...]
    accelerators: tuple[Accelerator, ...]
    output_tokens_per_s: Matrix


@lru_cache(maxsize=8)
def shapes(most: int) -> tuple[Layout, ...]:
    """Every tensor × data × pipeline of up to `most` GPUs, with experts whole and sliced."""
    return tuple(
        Layout(tensor, data, expert, pipeline)
        for gpus in range(1, most + 1)
        for pipeline in layouts.divisors(gpus)
        for tensor in layouts.divisors(gpus // pipeline)
        for data in [gpus // pipeline // tensor]
        for expert in sorted({1, tensor * data})
    )


def sweep(catalog: Catalog, load: Load, factors: Factors, most: int = 16) -> Sweep:
    """All of a catalog under one load, each model in its native form."""
    accelerators = tuple(catalog.accelerators.values())
    rows: list[tuple[ModelFacts, Layout]] = []
    works: list[Work] = []
    fixed: list[list[float]] = []
    each: list[float] = []
    kinds: list[tuple[str, bool]] = []
    steps = catalog.engine.batched_tokens
    for model, precision, layout in _every(catalog, most):
        ask = Ask(model, precision, accelerators[0], model.kv_dtype == "fp8")
        rows.append((model, layout))
        works.append(speed.work_of(ask, layout, load, most))
        fixed.append(speed.fixed_bytes(ask, layout, catalog))
        each.append(speed.room_of_sequence(ask, layout, load, speed.YIELDED))
        kinds.append((precision.name, ask.fp8_cache))
    usable = np.array([accelerator.memory_bytes * min(1.0, catalog.engine.utilization) for accelerator in accelerators])
    cache = usable[None, None, :] - np.array(fixed)[:, :, None]  # rows × steps × accelerators
    enough = (cache >= 0.9 * cache.max(axis=1, keepdims=True)) | (cache == cache.max(axis=1, keepdims=True))
    chosen = enough.argmax(axis=1)
    room = np.take_along_axis(cache, chosen[:, None, :], axis=1)[:, 0, :]
    data = np.array([layout.data for _, layout in rows], dtype=float)[:, None]
    fit = np.maximum(room, 0.0) / np.array(each)[:, None] * data
    running = np.minimum(float(load.concurrency), fit)
    rates = _rates(catalog, accelerators, kinds, factors, [layout for _, layout in rows])
    output = np.full(running.shape, np.nan)
    for columns, work in _by_domain(accelerators, rows, works, load, most):
        of = _columns(rates, columns)
        turn = roofline.cycle(
            work,
            of,
            np.maximum(running[:, columns], 1.0),
            load.new_tokens,
            load.output_tokens,
            np.array(steps, dtype=float)[chosen[:, columns]],
            ops=ARRAYS,
        )
        output[:, columns] = running[:, columns] * load.output_tokens / turn.total_s
    output[fit < 1.0] = np.nan
    return Sweep(tuple(rows), accelerators, output)


def _every(catalog: Catalog, most: int) -> Iterator[tuple[ModelFacts, Precision, Layout]]:
    for model in catalog.models.values():
        precision = catalog.precisions[model.native]
        for layout in shapes(most):
            if layouts.problem(layout, model, precision, 0) is None:
                yield model, precision, layout


def _by_domain(
    accelerators: Sequence[Accelerator],
    rows: Sequence[tuple[ModelFacts, Layout]],
    works: Sequence[Work],
    load: Load,
    most: int,
) -> Iterator[tuple[list[int], Work]]:
    """Accelerators by the size of their domain, with the work that crosses its border counted for it."""
    names = [item.name for item in fields(Work)]
    take = attrgetter(*names)
    table = np.array([take(work) for work in works], dtype=float)
    base = {name: table[:, index, None] for index, name in enumerate(names)}
    group = base["tensor"] * base["data"]
    for size in sorted({min(accelerator.domain_gpus, most) for accelerator in accelerators}):
        columns = [at for at, accelerator in enumerate(accelerators) if min(accelerator.domain_gpus, most) == size]
        changed = {name: base[name].copy() for name in ("send_bytes", "cross_bytes", "calls")}
        for at in np.nonzero(group[:, 0] > size)[0]:
            model, layout = rows[at]
            sent = traffic(model, layout, size)
            changed["send_bytes"][at, 0] = sent.inside
            changed["cross_bytes"][at, 0] = sent.crossing
            changed["calls"][at, 0] = sent.collectives
        yield columns, Work(**{**base, **changed})


def _rates(
    catalog: Catalog,
    accelerators: Sequence[Accelerator],
    kinds: Sequence[tuple[str, bool]],
    factors: Factors,
    at: Sequence[Layout],
) -> dict[str, Matrix]:
    """What each accelerator attains for each row's form of weights: arrays of rows × accelerators by field."""
    names = [item.name for item in fields(Rates)]
    forms = sorted(set(kinds))
    table = np.full((len(names), len(forms), len(accelerators)), np.nan)
    for column, accelerator in enumerate(accelerators):
        for line, (form, fp8) in enumerate(forms):
            try:
                peaks: Peaks = speed.peaks_of(accelerator, catalog.precisions[form], ALONE, fp8)
            except SpeedUnknown:
                continue
            found: Any = factors.rates(peaks)
            table[:, line, column] = [getattr(found, name) for name in names]
    row_of = np.array([forms.index(kind) for kind in kinds])
    rates = {name: table[index][row_of] for index, name in enumerate(names)}
    group = np.array([layout.tensor * layout.data for layout in at])[:, None]
    gpus = np.array([layout.gpus for layout in at])[:, None]
    for name, taken in (("link", factors.link), ("network", factors.network)):
        speeds = np.array([_link(accelerator, name) for accelerator in accelerators])[None, :]
        domain = np.array([a.domain_gpus for a in accelerators])[None, :]
        needed = gpus > 1 if name == "link" else group > domain
        slow = (
            factors.software * np.array([1.0 if speed.nvidia(a) else factors.elsewhere for a in accelerators])[None, :]
        )
        rates[name] = np.where(needed, speeds * taken / slow, np.inf)
    return rates


def _link(accelerator: Accelerator, name: str) -> float:
    """Bytes a second of what joins GPUs inside a domain, or domains; NaN where that is not known."""
    domain = accelerator.domain_gpus
    found = exchange.network(accelerator, domain + 1) if name == "network" else exchange.link(accelerator, 2)
    return np.nan if isinstance(found, str) else found.bytes_s


def _columns(rates: dict[str, Matrix], columns: list[int]) -> Rates:
    return Rates(**{name: values[:, columns] for name, values in rates.items()})


def best(found: Sweep) -> dict[tuple[str, str], tuple[Layout, float]]:
    """For each model and accelerator the layout with most output tokens/s of one GPU, where any fits."""
    gpus = np.array([layout.gpus for _, layout in found.rows], dtype=float)[:, None]
    speeds = np.nan_to_num(found.output_tokens_per_s / gpus, nan=-1.0)
    chosen: dict[tuple[str, str], tuple[Layout, float]] = {}
    for at, (model, layout) in enumerate(found.rows):
        for column, accelerator in enumerate(found.accelerators):
            key, value = (model.key, accelerator.name), float(speeds[at, column])
            if value > 0 and (key not in chosen or chosen[key][1] < value):
                chosen[key] = layout, value
    return chosen
