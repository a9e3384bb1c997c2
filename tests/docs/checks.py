"""What must hold of a command of the docs without running it: by the real parser, Makefile, chart, files and routes."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from typer.main import get_command

from moe_cli.main import app
from moe_cli.tune import parse_pin
from moe_gateway.openapi import OPENAPI_PATH, ROUTES
from tests.docs.shell import ROOT, SHELL, Command

PLACEHOLDERS = {"COMMAND": "plan", "VERSION": "3", "KNOB": "experts", "KNOB=VALUE": "engine.maxActiveSeqs=8"}
"""Words in capitals that a parser would refuse as they stand; any other is a name or a path."""
INCOMPLETE = re.compile(r"Missing (argument|parameter|option)|requires an argument|Missing command")
"""What a parser may say of a command that a sentence only names."""
KINDS = {
    *(
        "moed",
        "moedeployment",
        "moedeployments",
        "crd",
        "customresourcedefinition",
        "secret",
        "namespace",
        "pods",
        "pod",
    ),
    *(
        "deployment",
        "deploy",
        "rayservice",
        "rayservices",
        "events",
        "networkpolicy",
        "service",
        "svc",
        "job",
        "nodes",
        "lease",
    ),
}
KINDED = ("get", "describe", "delete", "edit", "patch", "annotate")
KUBECTL = {
    "apply",
    "get",
    "describe",
    "delete",
    "create",
    "logs",
    "port-forward",
    "wait",
    "edit",
    "patch",
    "label",
    "annotate",
    "explain",
}
HELM = {"install", "upgrade", "test", "uninstall", "template", "show", "get", "rollback"}
PATHS = {
    *(route.path for route in ROUTES),
    *(OPENAPI_PATH, "/metrics", "/healthz", "/readyz", "/v1/digest", "/v1/costs", "/v1/forecasts"),
    *("/v1/status", "/v1/history", "/v1/deployments", "/v1/digests", "/v1/experts", "/v1/acks", "/v1/knobs"),
}
"""Of the client port and of the admin ports."""


def moectl(command: Command) -> str | None:
    """What moectl's own parser says against the words; None where it takes them."""
    parser = get_command(app)
    _mute(parser)
    # `bash|zsh|fish` names alternatives: the first stands for all.
    words = [word.split("|")[0] for word in command.words[1:]]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parser.main(words or ["--help"], prog_name="moectl", standalone_mode=False)
    except Exception as error:  # click's own kinds are not exported by typer
        said = str(getattr(error, "format_message", error.__str__)()) or type(error).__name__
        if command.block or not (INCOMPLETE.search(said) or type(error).__name__ == "NoArgsIsHelpError"):
            return said
    if words[:2] in (["tune", "pin"], ["tune", "unpin"]):
        for knob in [word for word in words[2:] if "." in word]:  # what has no dot is a resource, or an option
            parse_pin(knob)
    return None


def _mute(command: Any) -> None:
    """Parse and do nothing."""
    for inner in getattr(command, "commands", {}).values():
        _mute(inner)
    if not getattr(command, "commands", None):
        command.callback = lambda **_: None


def make(command: Command) -> str | None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = [word for word in command.words[1:] if "=" not in word and word not in targets]
    return f"no target {', '.join(unknown)}" if unknown else None


def kubectl(command: Command) -> str | None:
    if len(command.words) == 1:
        return None
    verb, rest = command.words[1], command.words[2:]
    if verb == "moe":  # the plugin is moectl
        return moectl(replace(command, words=("moectl", *rest)))
    if verb not in KUBECTL:
        return f"kubectl {verb} is not known here"
    if missing := _missing(_values(rest, "-f")):
        return missing
    kinds = [word.partition("/")[0] for word in rest[:1] if not word.startswith("-")]
    kinds = [kind for given in kinds for kind in given.split(",")]
    unknown = [kind for kind in kinds if verb in KINDED and kind not in KINDS]
    return f"no kind {unknown[0]}" if unknown else None


def helm(command: Command) -> str | None:
    if len(command.words) == 1:
        return None
    verb, rest = command.words[1], command.words[2:]
    if verb not in HELM:
        return f"helm {verb} is not known here"
    if missing := _missing([*_values(rest, "-f"), *(word for word in rest if word.startswith("charts/"))]):
        return missing
    values = yaml.safe_load((ROOT / "charts/moestack/values.yaml").read_text())
    for setting in _values(rest, "--set"):
        for one in setting.split(","):
            found: Any = values
            for part in one.partition("=")[0].partition("{")[0].split("."):
                if not isinstance(found, dict) or part not in found:
                    return f"--set {one}: the chart has no such value"
                found = found[part]
    return None


def docker(command: Command) -> str | None:
    return _missing(_values(command.words, "-f"))


def curl(command: Command) -> str | None:
    """The address is one that a process of ours answers."""
    urls = [word for word in command.words[1:] if re.match(r"https?://|\$", word)]
    if not urls:
        return None if not command.block else "no address"
    path = urlsplit(re.sub(r"^\$\{?\w+\}?", "", urls[0])).path
    known = path in PATHS or f"/v1{path}" in PATHS or re.sub(r"^/v1", "", path) in PATHS
    return None if known else f"nobody answers {path}"


def shell(command: Command) -> str | None:
    if command.program == "." and not command.words[1].endswith("bin/activate"):
        return f"what is {command.words[1]}?"
    return None


def _values(words: Sequence[str], option: str) -> list[str]:
    return [after for word, after in pairwise(words) if word == option]


def _missing(paths: Sequence[str]) -> str | None:
    gone = [path for path in paths if path != "-" and not path.isupper() and not (ROOT / Path(path)).exists()]
    own = [path for path in gone if "/" in path or path.endswith("Dockerfile")]
    return f"no such file: {own[0]}" if own else None


CHECKS: dict[str, Callable[[Command], str | None]] = {
    **dict.fromkeys(SHELL, shell),
    **{"moectl": moectl, "make": make, "kubectl": kubectl, "helm": helm, "docker": docker, "curl": curl},
    "openssl": lambda command: None if command.words[1] in ("rand", "x509") else "not known here",
}
"""Program → what it has against a command; `pytest` and `python` are checked all at once."""
