"""A MoEDeployment from a file: every problem at once, each with its path, value and remedy."""

from __future__ import annotations

import copy
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from moe_api.annotations import API_VERSION, KIND
from moe_api.document import MAX_BYTES, Document, DocumentInvalid, Path, parse
from moe_api.problems import ABSENT, Problem, from_validation, lookup, nearest, show
from moe_api.resource import MoEDeployment

MAX_PASSES = 6
_STAND_INS: dict[Path, Any] = {
    ("metadata",): {"name": "stand-in"},
    ("metadata", "name"): "stand-in",
    ("spec", "model"): {"id": "stand-in"},
    ("spec", "model", "id"): "stand-in",
}


class ResourceInvalid(Exception):
    """The file is no valid MoEDeployment. `str()` has one line for each problem."""

    def __init__(self, origin: str, problems: list[Problem]) -> None:
        self.origin = origin
        self.problems = problems
        super().__init__(origin, problems)

    def __str__(self) -> str:
        return "\n".join(
            f"{self.origin}{f':{problem.line}' if problem.line else ''}: {problem}" for problem in self.problems
        )


def load_file(path: FilePath | str) -> MoEDeployment:
    """Read and check a file. Raises ResourceInvalid, also where the file cannot be read."""
    origin = str(path)
    try:
        with FilePath(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ResourceInvalid(origin, [Problem("", None, "there is no such file")]) from None
    except IsADirectoryError:
        raise ResourceInvalid(origin, [Problem("", None, "is a folder: name the file in it")]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ResourceInvalid(origin, [Problem("", None, f"cannot be read: {reason}")]) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ResourceInvalid(origin, [Problem("", None, "is not UTF-8 text", line)]) from None
    return load_text(text, origin)


def load_text(text: str, origin: str = "document") -> MoEDeployment:
    """Check one YAML (or JSON) document; `origin` begins each line of the error. Raises ResourceInvalid."""
    try:
        document = parse(text)
    except DocumentInvalid as error:
        place = f" (column {error.column})" if error.column else ""
        raise ResourceInvalid(origin, [Problem("", None, f"{error.message}{place}", error.line)]) from None
    problems = _wrong_kind(document)
    if not problems:
        found = _validate(document.values)
        if isinstance(found, MoEDeployment):
            return found
        problems = [Problem(p.path, p.value, p.remedy, document.line(path)) for path, p in found]
    raise ResourceInvalid(origin, problems)


def load_object(values: dict[str, Any], origin: str = "object") -> MoEDeployment:
    """Check a document that is parsed already, such as an answer of the API server. Raises ResourceInvalid."""
    found = _validate(values)
    if isinstance(found, MoEDeployment):
        return found
    raise ResourceInvalid(origin, [problem for _, problem in found])


def _wrong_kind(document: Document) -> list[Problem]:
    """Said alone: what follows from a document of another kind would only mislead."""
    problems = []
    for name, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        value = document.values.get(name)
        if name not in document.values:
            meant = nearest(name, [str(key) for key in document.values if key not in ("apiVersion", "kind")])
            hint = f" ({meant} is not a field)" if meant and meant.lower() == name.lower() else ""
            problems.append(Problem(name, None, f"is missing: write {name}: {wanted}{hint}", 1))
        elif value != wanted:
            shown = show((name,), value)
            problems.append(Problem(name, shown, f"must be {wanted}", document.line((name,))))
    return problems


def _validate(values: dict[str, Any]) -> MoEDeployment | list[tuple[Path, Problem]]:
    """The resource, or every problem in the order of their paths.

    Rules that span fields are silent while a field below them is wrong. So what is wrong is taken out and the rest is
    checked again, until nothing new comes; a rule that reads what was taken out is not believed.
    """
    known: dict[tuple[Path, str], Problem] = {}
    pruned = values
    removed: set[Path] = set()
    for _ in range(MAX_PASSES):
        try:
            found = MoEDeployment.model_validate(pruned, by_alias=True, by_name=False)
        except ValidationError as error:
            fresh = from_validation(error, MoEDeployment, values)
            for item in fresh:
                if not any(_related(gone, path) for gone in removed for path in (item.path, *item.reads)):
                    known[item.path, item.problem.remedy] = item.problem
            culprits = {_removable(item.owner, pruned) for item in fresh} - removed
            if not culprits:
                break
            if pruned is values:
                pruned = copy.deepcopy(values)
            for path in culprits:
                _take_out(pruned, path)
            removed |= culprits
        else:
            if not known:
                return found
            break
    return sorted(((path, problem) for (path, _), problem in known.items()), key=lambda item: _order(item[0]))


def _order(path: Path) -> tuple[tuple[bool, str], ...]:
    return tuple((isinstance(part, str), f"{part:08d}" if isinstance(part, int) else part) for part in path)


def _related(one: Path, other: Path) -> bool:
    """Whether one lies at or inside the other."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _removable(path: Path, values: object) -> Path:
    """What to take out for a problem there: the field; where it is missing, its group; never one item of a list,
    so that the places of the others stay."""
    if lookup(values, path) is ABSENT:
        path = path[:-1]
    for index, part in enumerate(path):
        if isinstance(part, int):
            return path[:index]
    return path


def _take_out(values: dict[str, Any], path: Path) -> None:
    """Remove the path; groups that must be there get a stand-in that is valid."""
    parent = lookup(values, path[:-1])
    if not path or not isinstance(parent, dict):
        return
    stand_in = _STAND_INS.get(path)
    if stand_in is None:
        parent.pop(path[-1], None)
    else:
        parent[path[-1]] = copy.deepcopy(stand_in)


__all__ = ["Problem", "ResourceInvalid", "load_file", "load_object", "load_text"]
