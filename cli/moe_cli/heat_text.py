"""The heat map in a terminal: levels are shapes, so that it reads without colour; colour says the same again."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.style import Style
from rich.text import Text

from moe_cli.heat import BOUNDS, LEVELS, level, title
from moe_core.expert_load import Grid, Of, Row, binned
from moe_core.wire import ExpertMatrix

BLOCKS = "·▁▂▃▄▅▆▇█"
ASCII = ".,-~=+*#@"
WIDEST_CELL = 4
LEAST_COLUMNS = 8
_HEADS = {len(heads): heads for heads in ("  max/mean  by rank      marks", "  max/mean  marks", "  max/mean")}
_ALL, _NO_RANKS, _RATIO = _HEADS
_STYLES = (
    *("bright_black", "color(26)", "color(32)", "color(74)", "default", "color(180)", "color(173)"),
    *("color(166)", "bold color(160)"),
)
_WHAT = {
    Of.DEMAND: ("expert", "demand: slots that the router asked for, before capacity"),
    Of.ASSIGNED: ("expert", "assigned: slots that experts computed, after capacity"),
    Of.RANK_DEMAND: ("EP rank", "demand by EP rank, before capacity"),
    Of.RANK: ("EP rank", "assigned slots by EP rank, after capacity"),
}
_PLAIN = str.maketrans({"·": "-", "→": ">", "–": "-"})
_MARKS = {"D": "dropped slots", "R": "rerouted slots", "K": "slots kept above capacity (group limit)"}


def render(matrix: ExpertMatrix, grid: Grid, width: int, *, unicode: bool = True) -> Text:
    """The whole map, at most `width` columns wide where that is 32 or more."""
    glyphs = BLOCKS if unicode else ASCII
    text = Text(no_wrap=True)
    for line in (part for whole in title(matrix) for part in textwrap.wrap(whole, max(width, 32))):
        text.append(line + "\n", style="bold" if not text else "")
    label = max(5, max((len(str(row.layer)) for row in grid.rows), default=0))
    right = _right_width(grid, width)
    room = max(LEAST_COLUMNS, width - label - 1 - right)
    group = max(1, -(-grid.columns // room))
    shown = -(-grid.columns // group)
    cell = max(1, min(WIDEST_CELL, room // shown)) if shown else 1
    what, meaning = _WHAT[grid.of]
    for line in textwrap.wrap(meaning, max(width, 32)):
        text.append(line + "\n")
    text.append("layer".rjust(label) + " " + _axis(grid.columns, group, cell, shown))
    text.append(_heads(right) + "\n", style="bright_black")
    for row in grid.rows:
        text.append(str(row.layer).rjust(label) + " ")
        _cells(text, row, shown, cell, glyphs)
        text.append(_numbers(row, right) + "\n")
    for said in _legend(grid, what, group, glyphs, max(width, 32)):
        text.append_text(said)
        text.append("\n")
    return text if unicode else _ascii(text)


def _ascii(text: Text) -> Text:
    """The same where the terminal's encoding has none of our signs."""
    plain = text.plain.translate(_PLAIN).encode("ascii", "replace").decode()
    return Text(plain, spans=text.spans, no_wrap=True)


def _cells(text: Text, row: Row, shown: int, cell: int, glyphs: str) -> None:
    if row.cells is None:
        why = "idle" if row.hooked else "bypassed: not counted"
        text.append(why[: shown * cell].ljust(shown * cell), style="bright_black")
        return
    cells, _ = binned(row.cells, shown)
    for value in cells:
        at = level(value)
        text.append(glyphs[at] * cell, style=Style.parse(_STYLES[at]))
    text.append(" " * (shown - len(cells)) * cell)


def _axis(columns: int, group: int, cell: int, shown: int) -> str:
    """Numbers of the first expert in a column, as many as fit."""
    line = ""
    for column in range(shown):
        at = column * cell
        name = str(column * group)
        if at >= len(line) + (1 if line else 0) and at + len(name) <= shown * cell:
            line = line.ljust(at) + name
    return line.ljust(shown * cell)


def _right_width(grid: Grid, width: int) -> int:
    """Room for the numbers at the right: all of them, or the first, or none."""
    ranks = any(row.ranks_before is not None for row in grid.rows)
    for wanted, least in ((_ALL if ranks else _NO_RANKS, 72), (_RATIO, 44)):
        if width >= least:
            return wanted
    return 0


def _heads(right: int) -> str:
    return _HEADS.get(right, "")


def _numbers(row: Row, right: int) -> str:
    if not right:
        return ""
    text = f"  {_ratio(row.max_over_mean):>8}"
    if right == _ALL:
        before, after = _ratio(row.ranks_before), _ratio(row.ranks_after)
        text += f"  {before + '→' + after:<11}"
    return (text + f" {row.marks}" if right > _RATIO else text).rstrip()


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _legend(grid: Grid, what: str, group: int, glyphs: str, width: int) -> Iterator[Text]:
    line = Text(f"load over the mean of {what}s:")
    for at in range(LEVELS):
        if line.cell_len + 4 + len(_range(at)) > width:
            yield line
            line = Text()
        line.append("  " if line else "").append(glyphs[at], style=Style.parse(_STYLES[at])).append(f" {_range(at)}")
    yield line
    if group > 1:
        yield from _wrapped(
            f"a column is the hottest of {group} neighbouring {what}s: {grid.columns} do not fit side by side", width
        )
    marks = sorted({mark for row in grid.rows for mark in row.marks}, key="DRK".index)
    if marks:
        yield from _wrapped("marks: " + ", ".join(f"{mark} {_MARKS[mark]}" for mark in marks), width)
    bypassed = sum(not row.hooked for row in grid.rows)
    if bypassed:
        yield from _wrapped(
            f"{bypassed} of {len(grid.rows)} layers bypass the router's hook: their load is unknown, not zero", width
        )


def _wrapped(sentence: str, width: int) -> Iterator[Text]:
    return (Text(line) for line in textwrap.wrap(sentence, width))


def _range(at: int) -> str:
    if at == 0:
        return "none"
    if at == 1:
        return f"<{BOUNDS[0]:g}"
    return f"{BOUNDS[at - 2]:g}+" if at == LEVELS - 1 else f"{BOUNDS[at - 2]:g}–{BOUNDS[at - 1]:g}"
