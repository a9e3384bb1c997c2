"""Markdown of the reference: tables whose cells hold any text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NOTE = "<!-- Written by `python -m moe_cli.reference --write docs/reference`; `make check` compares. -->"


def cell(text: str) -> str:
    """Text as a table's cell: one line, no bar that would end it, no tag that Markdown would swallow."""
    flat = " ".join(text.split()).replace("|", "\\|")
    parts = flat.split("`")
    for index in range(0, len(parts), 2):  # outside of code
        parts[index] = parts[index].replace("<", "&lt;")
    return "`".join(parts) or "–"


def code(text: str) -> str:
    """Text as code; nothing stays nothing."""
    return f"`{text}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; none where there are no rows."""
    body = [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    if not body:
        return []
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *body, ""]


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    text = " ".join(text.split())
    if not text:
        return ""
    first = text.partition(" ")[0].rstrip(",:;.")
    name = not (first.isascii() and first.isalpha() and first.islower())  # names keep their case: maxActiveSeqs, γ
    return (text if name else text[0].upper() + text[1:]) + ("" if text[-1] in ".!?" else ".")
