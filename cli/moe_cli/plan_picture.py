"""The answer of `moectl plan` as a picture: memory, radar and front; SVG, or HTML around it. Pure."""

from __future__ import annotations

import math
from html import escape

from moe_cli import plan_text
from moe_cli.heat_picture import FAINT, INK, PAPER, UNKNOWN
from moe_cli.plan_answer import Answer
from moe_planner import report
from moe_planner.catalog import GIB
from moe_planner.search import Option

WIDTH, HEIGHT = 1080, 640
_PARTS = {
    "Weights": "#21529c",
    "RedundantExperts": "#6f9fd0",
    "Activations": "#f09664",
    "Overhead": "#b9bec5",
    "KVCache": "#3f8f5f",
    "Free": "#eef0f2",
}
_BLUE, _RED = "#21529c", "#9e1024"


def svg(answer: Answer) -> str:
    """A picture that stands alone."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="Inter, Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
        _text(24, 36, _title(answer), 18, bold=True),
        *_memory(answer, 24, 70, WIDTH - 48),
        *_radar(answer, 300, 400, 150),
        *_front(answer, 620, 230, WIDTH - 690, 320),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def html(answer: Answer) -> str:
    """A page without anything from elsewhere: the picture, and the words under it."""
    words = "\n".join(plan_text.lines(answer, explain=True))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(_title(answer))}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<style>body{font-family:Inter,Helvetica,Arial,sans-serif;margin:2rem auto;max-width:1100px;color:#1b1f24}"
        "svg{max-width:100%;height:auto}pre{overflow-x:auto;font-size:12px;line-height:1.45}</style></head>\n"
        f"<body>\n{svg(answer)}<pre>{escape(words)}</pre>\n</body></html>\n"
    )


def _title(answer: Answer) -> str:
    model = answer.resource.spec.model.id
    chosen = answer.chosen
    if chosen is None:
        return f"{model}: {answer.verdict.reason}"
    return f"{model} on {chosen.place.gpus} × {chosen.place.accelerator.name}, {chosen.layout}"


def _memory(answer: Answer, x: float, y: float, width: float) -> list[str]:
    plan = answer.verdict.plan
    if plan is None or not plan.memory:
        return [_text(x, y + 20, answer.verdict.message[:150], 12, fill=_RED)]
    total = sum(row.size.bytes for row in plan.memory)
    made = [_text(x, y, f"Memory of one GPU, {total / GIB:.1f} GiB", 13, bold=True)]
    at, label = x, x
    for row in plan.memory:
        size = row.size.bytes / total * width
        fill = _PARTS.get(row.part, UNKNOWN)
        made.append(f'<rect x="{at:.1f}" y="{y + 10}" width="{size:.1f}" height="34" fill="{fill}"/>')
        at += size
        words = f"{row.part} {row.size.bytes / GIB:.1f} GiB"
        made.append(f'<rect x="{label:.1f}" y="{y + 56}" width="11" height="11" fill="{fill}"/>')
        made.append(_text(label + 16, y + 66, words, 12))
        label += 34 + 7.0 * len(words)
    return made


def _radar(answer: Answer, x: float, y: float, radius: float) -> list[str]:
    """Axes from the middle outwards, 1 at the rim; an axis of nothing known is dashed and named so."""
    chosen, found = answer.chosen, answer.found
    if chosen is None or found is None:
        return []
    values = report.radar(chosen, found, answer.accuracy)
    made = [_text(x, y - radius - 42, "Cost, accuracy, performance: 1 is the best", 13, bold=True, anchor="middle")]
    count = len(values)
    angles = [-math.pi / 2 + 2 * math.pi * i / count for i in range(count)]
    for share in (0.25, 0.5, 0.75, 1.0):
        ring = " ".join(
            f"{x + radius * share * math.cos(a):.1f},{y + radius * share * math.sin(a):.1f}" for a in angles
        )
        made.append(f'<polygon points="{ring}" fill="none" stroke="#d5d9de"/>')
    corners = []
    for angle, (name, value) in zip(angles, values.items(), strict=True):
        dx, dy = math.cos(angle), math.sin(angle)
        dash = ' stroke-dasharray="3 4"' if value is None else ""
        end = f'x2="{x + radius * dx:.1f}" y2="{y + radius * dy:.1f}"'
        made.append(f'<line x1="{x}" y1="{y}" {end} stroke="{FAINT}"{dash}/>')
        anchor = "middle" if abs(dx) < 0.1 else "start" if dx > 0 else "end"
        words = f"{name}: not known" if value is None else f"{name} {value:.2f}"
        made.append(_text(x + (radius + 12) * dx, y + (radius + 16) * dy + 4, words, 12, anchor=anchor))
        if value is not None:
            corners.append(f"{x + radius * value * dx:.1f},{y + radius * value * dy:.1f}")
    made.append(f'<polygon points="{" ".join(corners)}" fill="{_BLUE}" fill-opacity="0.25" stroke="{_BLUE}"/>')
    return made


def _front(answer: Answer, x: float, y: float, width: float, height: float) -> list[str]:
    """Cost against the seconds of a request, both by the logarithm; the front in blue, the chosen one in red."""
    found, chosen = answer.found, answer.chosen
    if found is None or chosen is None or chosen.usd_per_m is None:
        return []
    options = [o for o in (*found.options, chosen) if o.usd_per_m]
    across, up = ([math.log10(_pair(o)[axis]) for o in options] for axis in (0, 1))
    made = [
        _text(x, y - 12, "$ per 1M tokens against seconds of a request", 13, bold=True),
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="#d5d9de"/>',
    ]

    def at(option: Option) -> tuple[float, float]:
        a, b = (math.log10(value) for value in _pair(option))
        return x + 12 + (width - 24) * _place(a, across), y + height - 12 - (height - 24) * _place(b, up)

    front = set(map(id, found.front))
    for option in options:
        px, py = at(option)
        on = id(option) in front
        fill, r = (_RED, 6) if option is chosen else (_BLUE, 4) if on else ("#c3c9d0", 2.5)
        words = (
            f"{option.place.gpus} × {option.place.accelerator.name}, {option.layout}, {option.concurrency} in flight"
        )
        made.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{r}" fill="{fill}"><title>{escape(words)}</title></circle>'
        )
    made += [
        _text(x, y + height + 18, f"{10 ** min(across):.1f} s", 11, fill=FAINT),
        _text(x + width, y + height + 18, f"{10 ** max(across):.1f} s", 11, anchor="end", fill=FAINT),
        _text(x + width + 6, y + height - 4, f"${10 ** min(up):.2f}", 11, fill=FAINT),
        _text(x + width + 6, y + 12, f"${10 ** max(up):.2f}", 11, fill=FAINT),
    ]
    return made


def _pair(option: Option) -> tuple[float, float]:
    return option.request_s, option.usd_per_m or 1.0


def _place(value: float, all_of: list[float]) -> float:
    low, high = min(all_of), max(all_of)
    return 0.5 if high == low else (value - low) / (high - low)


def _text(
    x: float, y: float, words: str, size: float, *, bold: bool = False, anchor: str = "start", fill: str = INK
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}"{weight}>'
        f"{escape(words)}</text>"
    )
