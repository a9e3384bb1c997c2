"""`moectl plan --check FILE`: the planner's predictions against a table of published runs."""

from __future__ import annotations

import json as json_text
from pathlib import Path

from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_planner import calibration, catalog
from moe_planner.check import GROUPS, Report, Summary, Told, document, groups, summary
from moe_planner.check import check as judge
from moe_planner.published import Skipped
from moe_planner.table import TableInvalid


def check(path: Path, json: bool, say: Say | None = None) -> Exit:
    """Print each row with prediction and error, then medians. Raises Refusal where the file is no such table."""
    out = say or Say()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no UTF-8 text"
        problem = Problem(field=str(path), message=f"cannot be read: {reason}", remedy="name a CSV of published runs")
        raise Refusal(problem) from None
    try:
        report = judge(text, catalog.packaged(), calibration.packaged(), calibration.fitted_sources())
    except TableInvalid as error:
        raise Refusal(Problem(field=str(path), message=str(error), remedy="see docs/speed.md for the form")) from None
    if json:
        out.line(json_text.dumps(document(report)))
    else:
        for line in lines(report):
            out.line(line)
    return Exit.OK


def lines(report: Report) -> list[str]:
    """The report as text."""
    found = [_header(), *(_told(row) for row in report.told)]
    for case in report.fits:
        seen, told = ("fits" if yes else "does not fit" for yes in (case.seen, case.told))
        verdict = "right" if case.right else "WRONG"
        where = f"{case.row['model']} {case.row['precision']} on {case.row['gpus']} × {case.row['hardware']}"
        found.append(f"{_name(case.row.get('id', '')):<6} {where}: seen {seen}, predicted {told}: {verdict}")
    found += [_skipped(case) for case in report.skipped]
    for by in GROUPS:
        found += ["", f"throughput error by {by} (median, worst, bias, rows, in the interval)"]
        found += [f"  {_errors(told)}  {name}" for name, told in groups(report.throughput, by).items()]
    found.append("")
    for title, rows in (
        ("throughput", report.throughput),
        ("  of sources that no factor was fitted to", report.held_out),
        ("latency", report.latency),
    ):
        total = summary(rows)
        if total is not None:
            found.append(f"{_errors(total)}  {title}")
    right = sum(case.right for case in report.fits)
    found.append(f"fit rows right: {right} of {len(report.fits)}; rows not predicted: {len(report.skipped)}")
    return found


def _header() -> str:
    return f"{'row':<6} {'published':>12} {'predicted':>12} {'error':>7}  what"


def _told(row: Told) -> str:
    case = row.case
    unit = {"ttft": "s to the first token", "itl": "s between tokens"}.get(case.metric, f"{case.metric} tokens/s")
    assumed = f" ({', '.join(case.assumed)} assumed)" if case.assumed else ""
    mark = "" if row.fitted or not case.throughput else " *"
    what = f"{case.model.key} {case.precision.name}, {case.gpus} × {case.accelerator.name}, {case.engine}"
    return (
        f"{_name(case.row.get('id', '')):<6} {_number(case.value):>12} {_number(row.predicted):>12} {row.error:>+7.0%}"
        f"  {unit}: {what}{assumed}{mark}"
    )


def _name(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())[:24]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _skipped(case: Skipped) -> str:
    return f"{_name(case.row.get('id', '')):<6} not predicted: {_line(case.why)}"


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def _errors(told: Summary) -> str:
    return f"{told.median:>6.1%} {told.worst:>7.1%} {told.bias:>+7.1%} {told.rows:>5} {told.inside:>5.0%}"
