"""What a part says on its standard output, one JSON object a line; every other line is only logged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from moe_cli.outcome import Problem


@dataclass(frozen=True)
class Ready:
    """{"ready": true, …}: the part serves. Scalars beside it are facts that later parts may refer to."""

    facts: dict[str, str]


@dataclass(frozen=True)
class Step:
    """{"stage": "engine", "state": "start" | "done", "detail": "…"}: a step of its start."""

    name: str
    state: Literal["start", "done"]
    detail: str


@dataclass(frozen=True)
class Fault:
    """{"error": {"field": …, "message": …, "remedy": …}}: why it cannot start, in words for a person."""

    problem: Problem


Announcement = Ready | Step | Fault


def parse(line: bytes) -> Announcement | None:
    """The announcement in a line, or None."""
    if not line.startswith(b"{"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    match row:
        case {"ready": True}:
            facts = {k: str(v) for k, v in row.items() if isinstance(v, str | int) and not isinstance(v, bool)}
            return Ready(facts)
        case {"stage": str(name), "state": "start" | "done" as state}:
            return Step(name, state, str(row.get("detail", "")))
        case {"error": {"message": str(message), **rest}}:
            remedy, where = str(rest.get("remedy", "")), str(rest.get("field", ""))
            return Fault(Problem(field=where, message=message, remedy=remedy))
        case {"error": str(message)}:
            return Fault(Problem(message=message))
    return None
