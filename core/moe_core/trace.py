"""Recorded traffic: when requests came and how long they were, as the Azure LLM inference traces have it (CSV)."""

from __future__ import annotations

import csv
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceInvalid(ValueError):
    """A file that is no trace. `message` names the file, and the line where there is one."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.remedy = f"a CSV with the columns {','.join(COLUMNS)} is wanted"
        super().__init__(f"{message}; {self.remedy}")


class Recorded(NamedTuple):
    """One request: seconds from the first of the trace, and tokens, one at least."""

    at_s: float
    input_tokens: int
    output_tokens: int


def read(path: Path) -> list[Recorded]:
    """The requests of a trace in order of arrival; those of one moment as the file has them. Raises TraceInvalid."""
    found: list[Recorded] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not set(COLUMNS) <= set(rows.fieldnames or ()):
                raise TraceInvalid(f"{path}: it has the columns {','.join(rows.fieldnames or ()) or 'none'}")
            for row in rows:
                try:
                    at, inputs, outputs = (row[name] or "" for name in COLUMNS)
                    found.append(Recorded(_seconds(at), max(1, int(inputs)), max(1, int(outputs))))
                except (ValueError, TypeError) as error:
                    raise TraceInvalid(f"{path}, line {rows.line_num}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceInvalid(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise TraceInvalid(f"{path}: it has no requests")
    found.sort(key=lambda one: one.at_s)
    first = found[0].at_s
    return [one._replace(at_s=one.at_s - first) for one in found]


def _seconds(text: str) -> float:
    """Unix seconds of `2023-11-16 18:17:03.9799600` (any number of decimals) or of a plain number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        whole, _, decimals = text.strip().replace("T", " ").removesuffix("Z").partition(".")
        moment = datetime.strptime(whole, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        seconds = moment.timestamp() + (float(f"0.{decimals}") if decimals else 0.0)
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r} is no time")
    return seconds
