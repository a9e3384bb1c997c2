"""`moectl simulate`: scenarios through the simulator, with the policy of production, as a table or JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_planner.sim.policy import PLAIN, Policy
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.scenarios import PACKAGED, Scenario, ScenarioInvalid, load, names
from moe_planner.sim.simulate import simulate

POLICIES = {"production": Policy(), "local": PLAIN}


@dataclass(frozen=True)
class SimulateOptions:
    """`moectl simulate` as it was asked for."""

    file: Path | None
    scenarios: tuple[str, ...]
    traces: Path | None
    scale: float
    seed: int | None
    policy: str
    as_json: bool


def run(options: SimulateOptions, say: Say) -> Exit:
    """Simulate every scenario that was asked for, all of them by default. Raises Refusal before the first."""
    if options.policy not in POLICIES:
        raise Refusal(Problem(field="--policy", message=f"{options.policy!r}", remedy=f"one of {', '.join(POLICIES)}"))
    scenarios = _read(options)
    results: list[tuple[Scenario, Result]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=say.err, transient=True, disable=not say.err.is_terminal) as progress:
        for scenario in scenarios:
            bar = progress.add_task(scenario.name, total=1.0)
            result = simulate(
                scenario.workload,
                scenario.world,
                POLICIES[options.policy],
                seed=scenario.seed,
                progress=lambda share, bar=bar: progress.update(bar, completed=share),  # type: ignore[misc]
            )
            progress.remove_task(bar)
            results.append((scenario, result))
    if options.as_json:
        documents = [{"scenario": scenario.name, "seed": scenario.seed, **r.summary()} for scenario, r in results]
        say.line(json.dumps(documents[0] if len(options.scenarios) == 1 else documents))
    else:
        for line in table(results):
            say.line(line)
    return Exit.OK


def _read(options: SimulateOptions) -> list[Scenario]:
    file = options.file or PACKAGED
    try:
        chosen = options.scenarios or tuple(names(file))
        return [load(file, n, traces=options.traces, scale=options.scale, seed=options.seed) for n in chosen]
    except ScenarioInvalid as error:
        field, _, rest = str(error).partition(": ")
        message, _, remedy = rest.rpartition("; ")
        raise Refusal(Problem(field=field, message=message or remedy, remedy=remedy if message else "")) from None


TITLES = (
    *("scenario", "requests", "attained", "spilled", "shed", "failed"),
    *("TTFT p50", "p95", "p99", "ITL p50", "p95", "API", "rent", "busy"),
)


def table(results: list[tuple[Scenario, Result]]) -> list[str]:
    """A header, and one line a scenario."""
    rows = [TITLES, *(_row(scenario, result) for scenario, result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(TITLES))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [row[0].ljust(widths[0]) + line[widths[0] :] for row, line in zip(rows, lines, strict=True)]


def _row(scenario: Scenario, result: Result) -> tuple[str, ...]:
    return (
        scenario.name,
        f"{len(scenario.workload)}",
        f"{result.attainment:.1%}",
        f"{result.count(Outcome.API) / len(scenario.workload):.1%}",
        f"{result.count(Outcome.SHED)}",
        f"{result.count(Outcome.FAILED) + result.count(Outcome.CUT)}",
        *(_seconds(result.quantile("ttft_s", q)) for q in (0.5, 0.95, 0.99)),
        *(_seconds(result.quantile("itl_s", q)) for q in (0.5, 0.95)),
        f"${result.api_usd:,.2f}",
        f"${result.rent_usd:,.2f}",
        f"{result.utilisation:.0%}",
    )


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"
