"""How commands end: exit codes, and problems that name the field and the remedy."""

from __future__ import annotations

from enum import IntEnum

from moe_api.base import Model


class Exit(IntEnum):
    """Exit codes of moectl, the same for every command."""

    OK = 0
    CHANGED = 1  # `diff` found something, as kubectl and diff have it
    BAD_INPUT = 2  # a file or an option is wrong; nothing was started
    COULD_NOT_START = 3  # the machine refused: a port in use, a program missing, an engine that cannot load the model
    CRASHED = 4  # a part of a running stack died; everything else was stopped
    INTERRUPTED = 130  # Ctrl-C or SIGTERM; everything was stopped


class Problem(Model):
    """One thing that is wrong: where, what, and what to do about it."""

    field: str = ""
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        cure = f"\n  → {self.remedy}" if self.remedy else ""
        return f"{where}{self.message}{cure}"


class Refusal(Exception):
    """Raised where a command cannot go on. Carries every problem found, and the exit code."""

    def __init__(self, *problems: Problem, code: Exit = Exit.BAD_INPUT) -> None:
        self.problems = problems
        self.code = code
        super().__init__("\n".join(str(problem) for problem in problems))
