"""How commands speak: results on standard output, problems on standard error, colour only on a terminal."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.text import Text

from moe_cli.outcome import Problem


class Say:
    """Two consoles. Text is printed as it is: nothing in it is markup, and lines are not wrapped or cut."""

    def __init__(self, out: Console | None = None, err: Console | None = None) -> None:
        self.out = out or Console(highlight=False)
        self.err = err or Console(stderr=True, highlight=False)

    def line(self, text: str) -> None:
        self.out.print(Text(text), soft_wrap=True)

    def show(self, block: RenderableType) -> None:
        self.out.print(block)

    def aside(self, text: str) -> None:
        """For people, where standard output is for programs."""
        self.err.print(Text(text), soft_wrap=True)

    def problem(self, problem: Problem | str) -> None:
        self.err.print(Text.assemble(("error: ", "bold red"), str(problem)), soft_wrap=True)
