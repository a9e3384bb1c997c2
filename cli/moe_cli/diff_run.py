"""`moectl diff`: reads both sides and prints the report."""

from __future__ import annotations

import json
from pathlib import Path

from moe_cli.diff import lines, report
from moe_cli.files import read
from moe_cli.outcome import Exit
from moe_cli.say import Say


def run(file: Path, against: Path, say: Say, *, as_json: bool) -> Exit:
    """Say what applying `file` over `against` would change. Raises Refusal."""
    diff = report(read(against), read(file))
    if as_json:
        say.line(json.dumps(diff.to_json(), ensure_ascii=False, indent=2))
    else:
        for line in lines(diff):
            say.line(line)
    return Exit.CHANGED if diff.changed else Exit.OK
