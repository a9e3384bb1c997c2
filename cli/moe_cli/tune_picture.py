"""The tuner's page: SLO, latency, spend, knobs over time, what trials won and cost; HTML with SVG in it. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from moe_cli import tune_text
from moe_cli.heat_picture import FAINT, INK, PAPER
from moe_cli.tune_series import Points, Series
from moe_tuner.report import DecisionRecord, TuningReport

WIDTH, HEIGHT, LEFT, TOP = 1080, 150, 80, 34
_BLUE, _RED, _GREEN = "#21529c", "#9e1024", "#3f8f5f"
ENDED = ("Promote", "RollBack", "GiveUp")


@dataclass(frozen=True)
class Plot:
    """One plot. `held`: each value stands until the next one, as knobs do."""

    title: str
    points: Points
    held: bool = False
    marks: Points = ()


def html(report: TuningReport, records: Sequence[DecisionRecord], series: Series) -> str:
    """A page without anything from elsewhere. `records` oldest first."""
    title = f"Tuning of {report.deployment}"
    plots = [*_traffic(records, series), *_knobs(report, records), *_trials(records)]
    drawn = "\n".join(svg(plot) for plot in plots if plot.points)
    missing = "".join(f"<li>{escape(plot.title)}: nothing was recorded</li>" for plot in plots if not plot.points)
    rows = "".join(f"<tr><td>{escape(tune_text.decision_line(record))}</td></tr>" for record in reversed(records))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<style>body{font-family:Inter,Helvetica,Arial,sans-serif;margin:2rem auto;max-width:1100px;color:#1b1f24}"
        "svg{max-width:100%;height:auto;display:block;margin:1rem 0}pre{overflow-x:auto;font-size:12px}"
        "td{font-size:12px;padding:2px 0;border-top:1px solid #e7e9ec}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n<pre>{escape(chr(10).join(tune_text.status_lines(report)))}</pre>\n{drawn}\n"
        f"<ul>{missing}</ul>\n<h2>Decisions</h2><table>{rows}</table></body></html>\n"
    )


def _traffic(records: Sequence[DecisionRecord], series: Series) -> list[Plot]:
    """From Prometheus where it answered, else what decisions saw."""
    sent: Points = tuple((record.time, 0.0) for record in records if record.sent)
    ttft = series.ttft_p95_s or tuple(
        (r.time, r.signals.ttft_p95_s) for r in records if r.signals.ttft_p95_s is not None
    )
    attained = series.attained or tuple(
        (r.time, r.signals.slo_attained) for r in records if r.signals.slo_attained is not None
    )
    return [
        Plot("SLO attained, share of requests (lines below: changes of knobs)", attained, marks=sent),
        Plot("TTFT p95, seconds", ttft, marks=sent),
        Plot("Spend on closed APIs, USD since the gateway started", series.spend_usd),
        Plot("Engine seconds for 1,000 tokens", series.busy_s_per_ktoken, marks=sent),
    ]


def _knobs(report: TuningReport, records: Sequence[DecisionRecord]) -> list[Plot]:
    """Traces of the three knobs; a gap where a knob has no number (uncapped, at its ceiling, the resource's)."""
    settings = [(record.time, record.after) for record in records if record.sent and record.after is not None]
    if records:
        settings.insert(0, (records[0].time, records[0].before))
    if settings:
        settings.append((max(settings[-1][0], time.time()), report.knobs or settings[-1][1]))
    gamma = tuple((at, float(s.prefill_cap)) for at, s in settings if s.prefill_cap is not None)
    seqs = tuple((at, float(s.engine.max_active_seqs)) for at, s in settings if s.engine.max_active_seqs is not None)
    miss = tuple((at, s.fallback.miss_probability) for at, s in settings if s.fallback.miss_probability is not None)
    return [
        Plot("γ of prefill", gamma, held=True),
        Plot("maxActiveSeqs", seqs, held=True),
        Plot("missProbability, above which requests spill", miss, held=True),
    ]


def _trials(records: Sequence[DecisionRecord]) -> list[Plot]:
    """Cost of each measured trial over the first incumbent's, the best so far, and regret against the best of all."""
    costs = trial_costs(records)
    if not costs:
        return [Plot("Cost of trials over the first incumbent's", ()), Plot("Regret of trials", ())]
    best, lowest = [], 1.0
    for at, cost, promoted in costs:
        lowest = min(lowest, cost) if promoted else lowest
        best.append((at, lowest))
    least, regret, total = min(1.0, *(cost for _, cost, _ in costs)), [], 0.0
    for at, cost, _ in costs:
        total += cost - least
        regret.append((at, total))
    each = tuple((at, cost) for at, cost, _ in costs)
    return [
        Plot("Cost of the incumbent, the first one's being 1 (dots: trials)", tuple(best), held=True, marks=each),
        Plot("Regret: what trials cost above the best of them, summed", tuple(regret)),
    ]


def trial_costs(records: Sequence[DecisionRecord]) -> list[tuple[float, float, bool]]:
    """(time, cost over the first incumbent's, promoted) of each trial that was measured, chained over promotions."""
    incumbent, found = 1.0, []
    for record in records:
        if record.loop != "slow" or record.measured is None or record.action not in ENDED:
            continue
        cost = incumbent * record.measured.ratio
        promoted = record.action == "Promote"
        found.append((record.time, cost, promoted))
        incumbent = cost if promoted else incumbent
    return found


def svg(plot: Plot) -> str:
    """One plot over time. Marks share the axis where they carry a value, and lie on its foot where it is 0."""
    width, height = WIDTH - LEFT - 20, HEIGHT - TOP - 26
    times = [at for at, _ in (*plot.points, *plot.marks)]
    values = [value for _, value in (*plot.points, *(mark for mark in plot.marks if mark[1]))]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1.0
    first, last = min(times), max(times)
    span = last - first or 1.0

    def at(moment: float, value: float) -> tuple[float, float]:
        return LEFT + width * (moment - first) / span, TOP + height * (1 - (value - low) / (high - low))

    path, before = [], None
    for moment, value in plot.points:
        x, y = at(moment, value)
        if plot.held and before is not None:
            path.append(f"{x:.1f},{before:.1f}")
        path.append(f"{x:.1f},{y:.1f}")
        before = y
    foot = TOP + height
    marks = [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{foot}" y2="{foot + 6}" stroke="{_RED}"/>'
        if not value
        else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_GREEN}"/>'
        for (moment, value), (x, y) in ((mark, at(*mark)) for mark in plot.marks)
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="Inter, Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
        _text(0, 18, plot.title, 13, bold=True),
        f'<rect x="{LEFT}" y="{TOP}" width="{width}" height="{height}" fill="none" stroke="#d5d9de"/>',
        f'<polyline points="{" ".join(path)}" fill="none" stroke="{_BLUE}" stroke-width="1.5"/>',
        *(f'<circle cx="{x}" cy="{y}" r="2" fill="{_BLUE}"/>' for x, y in (p.split(",") for p in path[:1])),
        *marks,
        _text(LEFT - 6, TOP + 10, f"{high:.4g}", 11, anchor="end", fill=FAINT),
        _text(LEFT - 6, foot, f"{low:.4g}", 11, anchor="end", fill=FAINT),
        _text(LEFT, HEIGHT - 4, _clock(first), 11, fill=FAINT),
        _text(WIDTH - 20, HEIGHT - 4, _clock(last), 11, anchor="end", fill=FAINT),
        "</svg>",
    ]
    return "\n".join(parts)


def _clock(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))


def _text(
    x: float, y: float, words: str, size: float, *, bold: bool = False, anchor: str = "start", fill: str = INK
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}"{weight}>'
        f"{escape(words)}</text>"
    )
