"""Every command and option: of moectl from its own parser, of the processes and generators from theirs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

from moe_cli.main import app
from moe_cli.reference_text import cell, code, sentence, table

MODULES = (
    "moe_gateway.__main__",
    "moe_tuner.__main__",
    "moe_operator.__main__",
    "moe_operator.prerequisites",
    "moe_operator.keys",
    "moe_operator.rbac",
    "moe_operator.chart",
    "moe_serving.run",
    "moe_planner.claims",
    "moe_api.crd",
    "moe_cli.reference",
)
"""What runs by `python -m`, beside moectl: each has a `parser()`."""
_TYPES = {Path: "path", str: "text", int: "whole number", float: "number", bool: "flag"}
EXITS = (
    ("0", "ok; of `diff`: nothing would change"),
    ("1", "`diff`: something would change; `crd --check`: the file differs; `replay`: a decision falls otherwise now"),
    ("2", "bad input: a file, an option"),
    ("3", "could not start"),
    ("4", "a part crashed"),
    ("130", "interrupted"),
)


def page() -> str:
    """The page, Markdown."""
    lines = ["# Commands", "", "`moectl COMMAND --help` says the same. Exit codes:", ""]
    lines += table(("code", "meaning"), EXITS)
    for name, command in _commands("moectl", get_command(app)):
        lines += [f"## {name}", "", sentence(_help(command)), ""]
        lines += table(("argument or option", "value", "default", "meaning"), map(_row, _told(command)))
    lines += ["# Processes and generators", "", "In a cluster the operator and the chart start these.", ""]
    for module in MODULES:
        lines += _module(module)
    return "\n".join(lines)


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name; hidden ones are not for people."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for child, made in inner.items():
        if not made.hidden:
            yield from _commands(f"{name} {child}", made)


def _told(command: Any) -> list[Any]:
    return [param for param in command.params if not getattr(param, "hidden", False) and param.name != "help"]


def _help(command: Any) -> str:
    return " ".join((command.help or "").split())


def _row(param: Any) -> tuple[str, str, str, str]:
    """(names, type, default, help) of a parameter."""
    if param.param_type_name == "argument":
        names = code(param.name.upper() + ("…" if param.nargs == -1 else ""))
    else:
        names = ", ".join(map(code, [*param.opts, *param.secondary_opts]))
    again = ", again for more" if getattr(param, "multiple", False) else ""
    value = "" if getattr(param, "is_flag", False) else f"{_type(param)}{again}"
    return names, value, _default(param), sentence(getattr(param, "help", "") or "")


def _type(param: Any) -> str:
    edges = (("≥", param.min), ("≤", param.max))
    bounds = " ".join(f"{sign} {edge:g}" for sign, edge in edges if edge is not None)
    given = param.type_descriptor.annotation
    kind = next((part for part in get_args(given) if part is not type(None)), given)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " ".join(code(str(member.value)) for member in kind)
    return f"{_TYPES[kind]} {bounds}".strip()


def _default(param: Any) -> str:
    shown = param.show_default
    if isinstance(shown, str):
        return shown
    if param.required:
        return "*required*"
    return _value(param.default)


def _value(default: object) -> str:
    return "" if default is None or default is False or default == "" else code(str(default))


def _module(module: str) -> list[str]:
    parser: argparse.ArgumentParser = import_module(module).parser()
    name = module.removesuffix(".__main__")
    text = re.sub(r"^`python -m [^`]*`: ", "", (parser.description or "").strip().splitlines()[0])
    lines = [f"## python -m {name}", "", sentence(cell(text)), ""]
    rows = [
        (
            ", ".join(map(code, action.option_strings)) or code(action.dest.upper()),
            "" if action.nargs == 0 else str(action.metavar or action.dest.upper()),
            "*required*"
            if action.required
            else ""
            if action.default in (None, False, "")
            else code(str(action.default)),
            sentence(action.help or ""),
        )
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
    ]
    return lines + table(("option", "value", "default", "meaning"), rows)
