"""Completion in a person's shell: the script that `moectl completion` prints, and what kubectl asks a plugin for.

Typer completes from the commands themselves, so nothing here names a command or an option.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from enum import StrEnum

from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]

PROGRAM = "moectl"
VARIABLE = "_MOECTL_COMPLETE"
"""Set by a shell's script when it wants words, not the command."""


class Shell(StrEnum):
    """Shells that have a script."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def script(shell: Shell) -> str:
    """Shell code that makes `moectl` complete, for the shell to read as it starts."""
    return str(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell.value))


def prepare() -> None:
    """Make Typer able to answer a script; cheap where no shell asks."""
    if VARIABLE in os.environ:
        completion_init()


def ask_for(words: Sequence[str]) -> None:
    """Put the question as a script would: which words may the last of `words` become? Those before it are complete."""
    os.environ[VARIABLE] = "complete_bash"
    os.environ["COMP_WORDS"] = shlex.join([PROGRAM, *words])
    os.environ["COMP_CWORD"] = str(max(1, len(words)))
