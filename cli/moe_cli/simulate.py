"""`moectl simulate`: scenarios, or one's own MoEDeployment, through the simulator, as a table or JSON."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_cli.simulate_file import FileOptions, planned
from moe_planner.sim.fields import ScenarioInvalid
from moe_planner.sim.policy import PLAIN, Policy
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.scenarios import PACKAGED, Scenario, load, names
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
    of_file: FileOptions = field(default_factory=FileOptions)


def run(options: SimulateOptions, say: Say) -> Exit:
    """Simulate every scenario that was asked for, all of them by default. Raises Refusal before the first.

    Ctrl-C ends the one that runs: its requests that have ended are shown, marked as partial.
    """
    if options.policy not in POLICIES:
        raise Refusal(Problem(field="--policy", message=f"{options.policy!r}", remedy=f"one of {', '.join(POLICIES)}"))
    scenarios, extra = _chosen(options, say)
    results: list[tuple[Scenario, Result]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=say.err, transient=True, disable=not say.err.is_terminal)
    with _stopping() as stop, bars as progress:
        for scenario in scenarios:
            bar = progress.add_task(scenario.name, total=1.0)

            def heard(share: float, bar: Any = bar) -> bool:
                progress.update(bar, completed=share)
                return bool(stop)

            result = simulate(
                scenario.workload, scenario.world, POLICIES[options.policy], seed=scenario.seed, progress=heard
            )
            progress.remove_task(bar)
            results.append((scenario, result))
            if stop:
                break
    if options.as_json:
        documents = [{"scenario": s.name, "seed": s.seed, **r.summary(), **extra} for s, r in results]
        say.line(json.dumps(documents[0] if len(options.scenarios) == 1 or extra else documents))
    else:
        for line in table(results):
            say.line(line)
        for line in tiers(results):
            say.line(line)
    if not stop:
        return Exit.OK
    last, result = results[-1]
    left = len(scenarios) - len(results)
    ended = len(last.workload) - result.unfinished
    say.aside(
        f"interrupted: {last.name} has {ended:,} of {len(last.workload):,} requests"
        + (f", {left} more not begun" if left else "")
    )
    return Exit.INTERRUPTED


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM; a second one ends the command at once."""
    stop: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def heard(number: int, _: Any) -> None:
        stop.append(number)
        for each in numbers:
            signal.signal(each, before[each])

    for number in numbers:
        signal.signal(number, heard)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def _chosen(options: SimulateOptions, say: Say) -> tuple[list[Scenario], dict[str, Any]]:
    """What is simulated, and what JSON says of it beside the result."""
    if options.file is not None and _is_resource(options.file):
        for name, given in (("--scenario", options.scenarios), ("--traces", options.traces)):
            if given:
                remedy = "leave it out; --trace CSV gives traffic"
                raise Refusal(Problem(field=name, message="is for a file of scenarios", remedy=remedy))
        if not (math.isfinite(options.scale) and options.scale > 0):
            message = f"{options.scale:g} is no factor"
            raise Refusal(Problem(field="--scale", message=message, remedy="give a number above 0"))
        found = planned(options.file, options.of_file, scale=options.scale, seed=options.seed or 0)
        for note in found.notes:
            say.aside(note)
        return [found.scenario], {"plan": found.plan}
    for name in options.of_file.given():
        raise Refusal(Problem(field=name, message="is for a MoEDeployment", remedy="name its file, or leave it out"))
    return _read(options), {}


def _is_resource(file: Path) -> bool:
    """Whether a file is a MoEDeployment: YAML, or JSON with a kind."""
    if file.suffix.lower() in {".yaml", ".yml"}:
        return True
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "kind" in document


def _read(options: SimulateOptions) -> list[Scenario]:
    file = options.file or PACKAGED
    try:
        chosen = options.scenarios or tuple(names(file))
        return [load(file, n, traces=options.traces, scale=options.scale, seed=options.seed) for n in chosen]
    except ScenarioInvalid as error:
        raise Refusal(Problem(field=error.field, message=error.message, remedy=error.remedy)) from None


TITLES = (
    *("scenario", "requests", "attained", "spilled", "shed", "failed"),
    *("TTFT p50", "p95", "p99", "ITL p50", "p95", "API", "rent", "$/Mtok", "busy"),
)


def table(results: list[tuple[Scenario, Result]]) -> list[str]:
    """A header, and one line a scenario."""
    rows = [TITLES, *(_row(scenario, result) for scenario, result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(TITLES))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [row[0].ljust(widths[0]) + line[widths[0] :] for row, line in zip(rows, lines, strict=True)]


def tiers(results: list[tuple[Scenario, Result]]) -> list[str]:
    """A line for each tier of a scenario that has some."""
    lines = []
    for scenario, result in results:
        for name, row in result.summary().get("tiers", {}).items():
            attained, spilled = (
                "–" if row[key] is None else f"{row[key]:.1%}" for key in ("attainment", "spill_share")
            )
            lines.append(
                f"{scenario.name}, tier {name}: {row['requests']:,} requests, {attained} attained, {spilled} spilled"
            )
    return lines


def _row(scenario: Scenario, result: Result) -> tuple[str, ...]:
    requests = len(result.workload)
    return (
        f"{scenario.name} (partial)" if result.unfinished else scenario.name,
        f"{requests}",
        _share(result.attainment),
        _share(result.count(Outcome.API) / requests if requests else math.nan),
        f"{result.count(Outcome.SHED)}",
        f"{result.count(Outcome.FAILED) + result.count(Outcome.CUT)}",
        *(_seconds(result.quantile("ttft_s", q)) for q in (0.5, 0.95, 0.99)),
        *(_seconds(result.quantile("itl_s", q)) for q in (0.5, 0.95)),
        f"${result.api_usd:,.2f}",
        f"${result.rent_usd:,.2f}",
        "–" if math.isnan(result.usd_per_m_tokens) else f"${result.usd_per_m_tokens:,.2f}",
        "–" if math.isnan(result.utilisation) else f"{result.utilisation:.0%}",
    )


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"
