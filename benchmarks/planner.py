"""How fast the planner sweeps its catalog, and how far its speeds lie from published runs that it was not fitted to.

    python -m benchmarks.planner [--runs FILE] [--quick]
    python -m benchmarks.planner --fit [--runs FILE]
    python -m benchmarks.planner --cv [--runs FILE]

Sources are split before anything is fitted, by the rule of `moe_planner.fitting.split`. `--fit` fits the calibration to
the one side, cross-validates it over sources, and writes planner/moe_planner/data/calibration.toml; without it the
packaged calibration is judged. `--cv` cross-validates over the fitted sources alone: the form of the model is chosen by
it, and no held-out value is read. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_planner import calibration, catalog, fitting, published, speed, sweep, table
from moe_planner.check import check as judge
from moe_planner.check import groups, summary
from moe_planner.published import Case
from moe_planner.speed import Load

RUNS = Path(__file__).parents[2] / "shared" / "data" / "published_runs.csv"
"""Others' figures, which keep their licence and so lie beside the project, not in it."""
DATA = Path(__file__).parent.parent / "planner" / "moe_planner" / "data" / calibration.FILE
LOAD = Load(input_tokens=1024, output_tokens=512, concurrency=64)
ROUNDS = 5


def main(arguments: list[str] | None = None) -> None:
    """Judge, or fit and then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS, help="a table of published runs")
    parser.add_argument("--fit", action="store_true", help="fit the calibration anew and write it: minutes")
    parser.add_argument("--quick", action="store_true", help="sweep one round: shows that it works")
    parser.add_argument("--cv", action="store_true", help="cross-validate over fitted sources: half a minute")
    options = parser.parse_args(arguments)
    text = options.runs.read_text(encoding="utf-8")
    if options.cv:
        print(json.dumps(validate(text)))
        return
    if options.fit:
        DATA.write_text(fitted(text), encoding="utf-8")
        calibration.packaged.cache_clear()
    print(json.dumps(measure(text, 1 if options.quick else ROUNDS)))


def measure(text: str, rounds: int) -> dict[str, object]:
    """The benchmark's figures."""
    side = fitting.split(table.read(text))
    factors = calibration.packaged()
    report = judge(text, catalog.packaged(), factors, side.fitted)
    for source, told in groups(report.throughput, "source").items():
        mark = "fitted" if source in side.fitted else "held out"
        print(f"{told.median:6.1%} {told.worst:7.1%} {told.bias:+7.1%} {told.rows:4}  {mark}: {source}")
    held_out = summary(report.held_out)
    if held_out is None:
        raise SystemExit("no row of the table is held out")
    taken = []
    for _ in range(rounds):
        start, worked = time.perf_counter(), time.process_time()
        found = sweep.sweep(catalog.packaged(), LOAD, factors)
        taken.append((time.perf_counter() - start, time.process_time() - worked))
    fits = [row for row in report.fits if not row.right]
    return {
        "sweep_s": taken[0][0],
        "sweep_cpu_s": taken[0][1],
        "sweep_again_s": min(wall for wall, _ in taken),
        "sweep_points": int(found.output_tokens_per_s.size),
        "held_out_median_error": held_out.median,
        "held_out_worst_error": held_out.worst,
        "n_held_out": held_out.rows,
        "held_out_sources": sorted(groups(report.held_out, "source")),
        "fitted_sources": sorted({row.case.source for row in report.throughput if row.fitted}),
        "fits_right": [len(report.fits) - len(fits), len(report.fits)],
        "not_predicted": len(report.skipped),
    }


def validate(text: str) -> dict[str, object]:
    """Errors of each fitted source's rows by factors that were fitted to the others; held-out rows are dropped unread.

    `nvidia`: without the one source of another maker's GPU, whose factor nothing else tells.
    """
    rows = table.read(text)
    side = fitting.split(rows)
    found = published.cases([row for row in rows if row.get("source") in side.fitted], catalog.packaged())
    used = [case for case in found if isinstance(case, Case) and case.throughput]
    by_source = fitting.cross_validate(used)
    for source, errors in by_source.items():
        sizes = np.abs(errors)
        print(f"{np.median(sizes):6.1%} {sizes.max():7.1%} {np.median(errors):+7.1%} {len(errors):4}  {source}")
    others = {case.source for case in used if not speed.nvidia(case.accelerator)}
    return {
        "all": _spread(np.concatenate(list(by_source.values()))),
        "nvidia": _spread(np.concatenate([found for source, found in by_source.items() if source not in others])),
    }


def _spread(errors: NDArray[np.float64]) -> dict[str, float]:
    sizes = np.abs(errors)
    return {
        "rows": len(sizes),
        "median": float(np.median(sizes)),
        "p90": float(np.quantile(sizes, 0.9)),
        "worst": float(sizes.max()),
        "mean_ln": float(np.mean(np.abs(np.log1p(errors)))),
    }


def fitted(text: str) -> str:
    """The calibration file for a table of runs."""
    rows = table.read(text)
    side = fitting.split(rows)
    cases = [case for case in published.cases(rows, catalog.packaged()) if isinstance(case, Case) and case.throughput]
    used = [case for case in cases if case.source in side.fitted]
    others = [case for case in cases if case.source in side.held_out]
    factors = fitting.fit(used)
    left_out = np.abs(np.concatenate(list(fitting.cross_validate(used).values())))
    errors = fitting.errors(others, factors)
    # One sigma of ln(prediction / value), whatever the shape of the tails.
    error = float(np.quantile(np.abs(np.log1p(errors)), 0.683))
    lines = [
        "# Written by `python -m benchmarks.planner --fit`: do not edit. docs/speed.md says what each factor is.",
        "",
        "[factors]",
        *(f"{name} = {getattr(factors, name):.6g}" for name in calibration.BOUNDS),
        "",
        "# An engine's time over TensorRT-LLM's.",
        "[engines]",
        *(f"{name} = {value:.6g}" for name, value in sorted(factors.engines.items())),
        "",
        "# One sigma of ln(prediction / value) over sources that were only predicted.",
        "[held_out]",
        f"error = {error:.4g}",
        f"median = {float(np.median(np.abs(errors))):.4g}",
        f"worst = {float(np.max(np.abs(errors))):.4g}",
        *_sources(others),
        "",
        "[fitted]",
        f"median = {float(np.median(np.abs(fitting.errors(used, factors)))):.4g}",
        f"cross_validated_median = {float(np.median(left_out)):.4g}",
        f"cross_validated_worst = {float(np.max(left_out)):.4g}",
        *_sources(used),
    ]
    return "\n".join(lines) + "\n"


def _sources(cases: list[Case]) -> list[str]:
    names = sorted({case.source for case in cases})
    rows = ", ".join(json.dumps(case.row["id"]) for case in cases)
    return ["sources = [", *(f"  {json.dumps(name, ensure_ascii=False)}," for name in names), "]", f"rows = [{rows}]"]


if __name__ == "__main__":
    main()
