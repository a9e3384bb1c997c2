"""`moectl replay`: decisions that a gateway wrote down, made again by this version's policy."""

from __future__ import annotations

from pathlib import Path

import orjson

from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_core.recorded import RecordInvalid, Replayed, replay

SHOWN = 10


def show(files: list[Path], say: Say) -> Exit:
    """Exit code 0 where every decision falls as it did, 1 where some do not."""
    found = [(file, _replayed(file)) for file in files]
    decisions = sum(one.decisions for _, one in found)
    differing = [(file, each) for file, one in found for each in one.differing]
    for file, each in differing[:SHOWN]:
        say.line(f"{file}, line {each.line}: was {orjson.dumps(each.was).decode()}")
        say.line(f"    now {orjson.dumps(each.now).decode()}")
    if len(differing) > SHOWN:
        say.line(f"and {len(differing) - SHOWN} more")
    said = "all fall as they did" if not differing else f"{len(differing)} fall otherwise now"
    say.line(f"{decisions} decisions made again: {said}")
    return Exit.CHANGED if differing else Exit.OK


def _replayed(file: Path) -> Replayed:
    try:
        with file.open("rb") as lines:
            return replay(lines)
    except OSError as error:
        remedy = "name a file that a gateway has written down decisions in"
        raise Refusal(Problem(field=str(file), message=error.strerror or "cannot be read", remedy=remedy)) from None
    except RecordInvalid as error:
        remedy = "take the version of moectl that the gateway had, or a file that is whole"
        raise Refusal(Problem(field=str(file), message=str(error), remedy=remedy)) from None
