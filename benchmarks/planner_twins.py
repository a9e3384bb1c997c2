"""How far a row lies from what its own source says of the same run on another GPU: what no model of speed can explain.

    python -m benchmarks.planner_twins [--runs FILE] [--beyond 0.2]

Twins are two rows of one source that differ in hardware alone. The source's other twins of the same two kinds of
hardware say by how much one is faster than the other. A model that is exact on the other twin, and on the median of
those ratios, would still be wrong about a row by what is printed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from benchmarks.planner import RUNS
from moe_planner import catalog, published, table
from moe_planner.published import Case

SAME = ("model", "precision", "engine", "gpus", "tp", "dp", "ep", "pp", "input_tokens", "output_tokens", "metric")


@dataclass(frozen=True)
class Alone:
    """A row, its twin, and the error of a model that is exact on the twin and on the other twins' median ratio."""

    row: str
    twin: str
    ratio: float  # the row's value over its twin's
    others: tuple[float, ...]  # the same ratio of the source's other twins on these two kinds of hardware

    @property
    def error(self) -> float:
        return statistics.median(self.others) / self.ratio - 1.0


def main(arguments: list[str] | None = None) -> None:
    """Print rows that their own source's other rows contradict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS, help="a table of published runs")
    parser.add_argument("--beyond", type=float, default=0.2, help="smallest error that is printed")
    options = parser.parse_args(arguments)
    rows = published.cases(table.read(options.runs.read_text(encoding="utf-8")), catalog.packaged())
    found = alone([case for case in rows if isinstance(case, Case) and case.throughput])
    for one in sorted(found, key=lambda one: -abs(one.error)):
        if abs(one.error) >= options.beyond:
            low, middle, high = min(one.others), statistics.median(one.others), max(one.others)
            print(
                f"{one.error:+5.0%} {one.row}: {one.ratio:.2f} of {one.twin}; {len(one.others)} other pairs have"
                f" {low:.2f} to {high:.2f}, median {middle:.2f}"
            )
    worst = max(found, key=lambda one: abs(one.error), default=None)
    print(json.dumps({"pairs": len(found) // 2, "worst": worst and worst.row, "worst_error": worst and worst.error}))


def alone(cases: Sequence[Case]) -> list[Alone]:
    """Each row that has a twin, once for each, where the source has two other pairs on the same hardware at least."""
    pairs: dict[tuple[str, str, str], list[tuple[Case, Case]]] = {}
    runs: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        runs.setdefault((case.source, *(case.row.get(name, "") for name in SAME)), []).append(case)
    for same in runs.values():
        for one, other in permutations(same, 2):
            if one.accelerator is not other.accelerator:
                pairs.setdefault((one.source, one.accelerator.name, other.accelerator.name), []).append((one, other))
    found = []
    for group in pairs.values():
        ratios = [one.value / other.value for one, other in group]
        for at, (one, other) in enumerate(group):
            others = (*ratios[:at], *ratios[at + 1 :])
            if len(others) > 1:
                found.append(Alone(one.row["id"], other.row["id"], ratios[at], others))
    return found


if __name__ == "__main__":
    main()
