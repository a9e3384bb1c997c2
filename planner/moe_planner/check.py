"""Predictions against a table of published runs: each row with its error, and medians by source, model and hardware."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_planner import published, table
from moe_planner.calibration import Factors
from moe_planner.catalog import Catalog
from moe_planner.published import Case, FitCase, Skipped


@dataclass(frozen=True)
class Told:
    """A case with what was predicted for it. `error`: prediction over value, less one."""

    case: Case
    predicted: float
    fitted: bool  # its source is one that the calibration was fitted to
    width: float  # of the prediction's interval to each side, in ln

    @property
    def inside(self) -> bool:
        """Whether the value lies in the interval that comes with the prediction."""
        return abs(math.log(self.predicted / self.case.value)) <= self.width

    @property
    def error(self) -> float:
        return self.predicted / self.case.value - 1.0


@dataclass(frozen=True)
class Summary:
    """Errors of a group of rows, without their signs."""

    rows: int
    median: float
    worst: float
    bias: float  # median with signs
    inside: float  # share of rows that lie in their prediction's interval


@dataclass(frozen=True)
class Report:
    """A table's rows, judged."""

    told: tuple[Told, ...]
    fits: tuple[FitCase, ...]
    skipped: tuple[Skipped, ...]

    @property
    def throughput(self) -> tuple[Told, ...]:
        return tuple(row for row in self.told if row.case.throughput)

    @property
    def latency(self) -> tuple[Told, ...]:
        return tuple(row for row in self.told if not row.case.throughput)

    @property
    def held_out(self) -> tuple[Told, ...]:
        """Throughput of sources that no factor was fitted to."""
        return tuple(row for row in self.throughput if not row.fitted)


def check(text: str, catalog: Catalog, factors: Factors, fitted: Sequence[str] = ()) -> Report:
    """Judge every row of a table. Raises table.TableInvalid."""
    found = published.cases(table.read(text), catalog)
    sources = frozenset(fitted)
    return Report(
        told=tuple(
            Told(case, published.predict(case, factors), case.source in sources, factors.error)
            for case in found
            if isinstance(case, Case)
        ),
        fits=tuple(case for case in found if isinstance(case, FitCase)),
        skipped=tuple(case for case in found if isinstance(case, Skipped)),
    )


def summary(rows: Sequence[Told]) -> Summary | None:
    """Errors of rows; None where there is none."""
    if not rows:
        return None
    errors = [row.error for row in rows]
    sizes = [abs(error) for error in errors]
    return Summary(
        len(rows),
        statistics.median(sizes),
        max(sizes),
        statistics.median(errors),
        sum(row.inside for row in rows) / len(rows),
    )


GROUPS: Mapping[str, Callable[[Told], str]] = {
    "source": lambda row: row.case.source,
    "model": lambda row: row.case.model.key,
    "hardware": lambda row: row.case.accelerator.name,
}


def groups(rows: Sequence[Told], by: str) -> dict[str, Summary]:
    """Errors by source, model or hardware, in the order of names."""
    found: dict[str, list[Told]] = {}
    for row in rows:
        found.setdefault(GROUPS[by](row), []).append(row)
    return {name: told for name, told in ((name, summary(found[name])) for name in sorted(found)) if told}


def document(report: Report) -> dict[str, Any]:
    """The report as JSON."""

    def shown(rows: Sequence[Told]) -> dict[str, Any] | None:
        total = summary(rows)
        return None if total is None else _summary(total)

    return {
        "rows": [
            *(_told(row) for row in report.told),
            *(
                {**_row(case.row), "metric": "fits", "fits": case.seen, "predicted": case.told, "right": case.right}
                for case in report.fits
            ),
            *({**_row(case.row), "skipped": case.why} for case in report.skipped),
        ],
        "throughput": shown(report.throughput),
        "held_out": shown(report.held_out),
        "latency": shown(report.latency),
        "fits": {"rows": len(report.fits), "right": sum(case.right for case in report.fits)},
        "skipped": len(report.skipped),
        "by": {by: {name: _summary(told) for name, told in groups(report.throughput, by).items()} for by in GROUPS},
    }


def _row(row: Mapping[str, str]) -> dict[str, Any]:
    return {"id": row.get("id", ""), "model": row["model"], "hardware": row["hardware"], "metric": row["metric"]}


def _told(row: Told) -> dict[str, Any]:
    return {
        **_row(row.case.row),
        "source": row.case.source,
        "value": row.case.value,
        "predicted": row.predicted,
        "error": row.error,
        "inside": row.inside,
        "fitted": row.fitted,
        "assumed": list(row.case.assumed),
    }


def _summary(told: Summary) -> dict[str, float]:
    return {"rows": told.rows, "median": told.median, "worst": told.worst, "bias": told.bias, "inside": told.inside}
