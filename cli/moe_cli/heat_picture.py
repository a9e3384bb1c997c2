"""The heat map as a picture: one scene of rectangles and words, written as SVG or as PNG."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from typing import Literal
from xml.sax.saxutils import escape

from moe_cli.heat import title
from moe_core.expert_load import Grid, Of, Row, grid
from moe_core.wire import ExpertMatrix

INK, FAINT, PAPER, UNKNOWN = "#1b1f24", "#6a737d", "#ffffff", "#e7e9ec"
_STOPS = ((-1.0, (33, 82, 156)), (-0.5, (130, 184, 217)), (0.0, (245, 244, 240)), (0.5, (240, 150, 100)),
          (1.0, (158, 16, 36)))  # fmt: skip
_NOTHING = "#0b1d3a"
_OCTAVES = 2.0  # a quarter and four times the mean are the ends of the scale
_MARGIN, _GAP, _TOP = 24.0, 46.0, 134.0
_PANELS = {Of.DEMAND: "demand by expert (before capacity)", Of.ASSIGNED: "assigned by expert (after capacity)",
           Of.RANK_DEMAND: "demand by rank", Of.RANK: "assigned by rank"}  # fmt: skip

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Word:
    """A piece of text; `y` is its baseline."""

    x: float
    y: float
    text: str
    size: float
    anchor: Anchor = "start"
    fill: str = INK
    bold: bool = False


@dataclass
class Scene:
    """Rectangles (x, y, width, height) by colour, and words over them. Units are CSS pixels."""

    width: float = 0.0
    height: float = 0.0
    boxes: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    words: list[Word] = field(default_factory=list)

    def box(self, fill: str, x: float, y: float, width: float, height: float) -> None:
        self.boxes.setdefault(fill, []).append((x, y, width, height))


def colour(load_over_mean: float) -> str:
    """Blue below the mean, pale at it, red above, by the logarithm; darkest blue for nothing at all."""
    if load_over_mean <= 0:
        return _NOTHING
    at = min(1.0, max(-1.0, round(math.log2(load_over_mean) / _OCTAVES * 24) / 24))
    for (low, a), (high, b) in pairwise(_STOPS):
        if at <= high:
            t = (at - low) / (high - low)
            return "#" + "".join(f"{round(p + (q - p) * t):02x}" for p, q in zip(a, b, strict=True))
    raise AssertionError("the scale ends at 1")


def scene(matrix: ExpertMatrix) -> Scene:
    """Panels of demand and assigned, by expert and, with several ranks, by rank; rows are layers."""
    grids = [grid(matrix, Of.DEMAND), grid(matrix, Of.ASSIGNED)]
    if matrix.ranks > 1:
        grids += [grid(matrix, Of.RANK_DEMAND), grid(matrix, Of.RANK)]
    rows = len(matrix.layers)
    height = min(26.0, max(9.0, 640.0 / max(1, rows)))
    made = Scene()
    for number, line in enumerate(title(matrix)):
        size = 18.0 if number == 0 else 13.0
        made.words.append(Word(_MARGIN, 36.0 + 21.0 * number, line, size, bold=number == 0, fill=INK))
    x = _MARGIN + 34.0
    for number, panel in enumerate(grids):
        wide = panel.of in (Of.DEMAND, Of.ASSIGNED)
        cell = min(28.0, max(2.5, 520.0 / max(1, panel.columns))) if wide else 20.0
        # A panel is at least as wide as its caption.
        least = 6.6 * len(_PANELS[panel.of])
        width = panel.columns * cell
        _panel(made, panel, x, cell, height, labels=number == 0)
        x += max(width, least) + (_GAP if wide else 24.0)
    x = _marks(made, grids[0].rows, x - 12.0, height)
    bottom = _TOP + rows * height
    _scale(made, _MARGIN + 34.0, bottom + 34.0)
    made.width, made.height = max(x + _MARGIN, 560.0, _words_end(made)), bottom + 84.0
    return made


def _panel(made: Scene, panel: Grid, x: float, cell: float, height: float, *, labels: bool) -> None:
    made.words.append(Word(x, _TOP - 20.0, _PANELS[panel.of], 12.0, bold=True))
    every = max(1, math.ceil(12.0 / height))
    for number, row in enumerate(panel.rows):
        y = _TOP + number * height
        if labels and number % every == 0:
            made.words.append(Word(x - 8.0, y + height / 2 + 4.0, str(row.layer), 11.0, "end", FAINT))
        if row.cells is None:
            made.box(UNKNOWN, x, y, panel.columns * cell, height - 0.5)
            why = "idle" if row.hooked else "bypassed: not counted"
            if panel.columns * cell > 5.2 * len(why):
                made.words.append(Word(x + panel.columns * cell / 2, y + height / 2 + 4.0, why, 10.0, "middle", FAINT))
            continue
        for column, fill, run in _runs(row.cells):
            made.box(fill, x + column * cell, y, run * cell - (0.5 if cell >= 8 else 0.0), height - 0.5)
    step = next((s for s in (1, 2, 4, 8, 16, 32, 64, 128) if s * cell >= 26.0), 256)
    for column in range(0, panel.columns, step):
        y = _TOP + len(panel.rows) * height + 13.0
        made.words.append(Word(x + (column + 0.5) * cell, y, str(column), 10.0, "middle", FAINT))
    if labels:
        made.words.append(Word(x - 8.0, _TOP - 6.0, "layer", 10.0, "end", FAINT))


def _runs(cells: Iterable[float]) -> list[tuple[int, str, int]]:
    """(first column, colour, length) of neighbours that look alike, so that a large matrix stays a small file."""
    runs: list[tuple[int, str, int]] = []
    for column, value in enumerate(cells):
        fill = colour(value)
        if runs and runs[-1][1] == fill:
            runs[-1] = (runs[-1][0], fill, runs[-1][2] + 1)
        else:
            runs.append((column, fill, 1))
    return runs


def _marks(made: Scene, rows: Iterable[Row], x: float, height: float) -> float:
    """Max/mean of each layer, and what capacity did to it. Returns where the columns end."""
    rows = list(rows)
    columns = [("max/mean", [_ratio(row.max_over_mean) for row in rows])]
    if any(row.ranks_before is not None and row.ranks_before > 1 for row in rows):
        columns.append(("by rank", [f"{_ratio(row.ranks_before)} to {_ratio(row.ranks_after)}" for row in rows]))
    for name, shares in (
        ("dropped", [row.dropped_share for row in rows]),
        ("rerouted", [row.rerouted_share for row in rows]),
    ):
        if any(shares):
            columns.append((name, [f"{share:.1%}" if share else "" for share in shares]))
    every = max(1, math.ceil(12.0 / height))
    for name, values in columns:
        width = 7.0 * max(len(name), *(len(value) for value in values), 1)
        made.words.append(Word(x + width, _TOP - 6.0, name, 10.0, "end", FAINT))
        for number, value in enumerate(values):
            if number % every == 0:
                y = _TOP + number * height + height / 2 + 4.0
                fill = "#9e1024" if name == "dropped" else INK
                made.words.append(Word(x + width, y, value, 11.0, "end", fill))
        x += width + 12.0
    return x


def _scale(made: Scene, x: float, y: float) -> None:
    made.words.append(Word(x, y + 11.0, "load over the layer's mean", 11.0, fill=FAINT))
    x += 160.0
    made.box(_NOTHING, x, y, 16.0, 12.0)
    made.words.append(Word(x + 8.0, y + 25.0, "none", 10.0, "middle", FAINT))
    x += 30.0
    steps, width = 48, 5.0
    for step in range(steps + 1):
        made.box(colour(2.0 ** ((step / steps * 2 - 1) * _OCTAVES)), x + step * width, y, width, 12.0)
    for name, at in (("1/4", 0.0), ("1/2", 0.25), ("1", 0.5), ("2", 0.75), ("4+", 1.0)):
        made.words.append(Word(x + at * steps * width + width / 2, y + 25.0, name, 10.0, "middle", FAINT))
    x += steps * width + 52.0
    made.box(UNKNOWN, x, y, 16.0, 12.0)
    made.words.append(Word(x + 22.0, y + 11.0, "idle, or not counted", 11.0, fill=FAINT))


def _words_end(made: Scene) -> float:
    ends = (word.x + 0.56 * word.size * len(word.text) for word in made.words if word.anchor == "start")
    return max(ends, default=0.0) + _MARGIN


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def svg(made: Scene) -> bytes:
    """The scene as SVG: one path for each colour."""
    width, height = math.ceil(made.width), math.ceil(made.height)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="Inter, Helvetica, Arial, sans-serif" shape-rendering="crispEdges">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    for fill, boxes in made.boxes.items():
        path = "".join(f"M{x:g} {y:g}h{w:g}v{h:g}h{-w:g}z" for x, y, w, h in boxes)
        parts.append(f'<path fill="{fill}" d="{path}"/>')
    for word in made.words:
        weight = ' font-weight="600"' if word.bold else ""
        parts.append(
            f'<text x="{word.x:g}" y="{word.y:g}" font-size="{word.size:g}" text-anchor="{word.anchor}"'
            f' fill="{word.fill}"{weight}>{escape(word.text)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"]).encode()


def png(made: Scene, scale: float = 2.0) -> bytes:
    """The scene as PNG, `scale` pixels to a unit. Raises ImportError where Pillow is not installed."""
    from PIL import Image, ImageDraw, ImageFont

    size = (math.ceil(made.width * scale), math.ceil(made.height * scale))
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    for fill, boxes in made.boxes.items():
        for x, y, w, h in boxes:
            left, top = round(x * scale), round(y * scale)
            right, bottom = round((x + w) * scale) - 1, round((y + h) * scale) - 1
            draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=fill)
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for word in made.words:
        font = ImageFont.load_default(size=word.size * scale)
        weight = 0.4 * scale if word.bold else 0.0
        at = (word.x * scale, word.y * scale)
        draw.text(
            at, word.text, fill=word.fill, font=font, anchor=anchors[word.anchor], stroke_width=weight,
            stroke_fill=word.fill,
        )  # fmt: skip
    out = BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()
