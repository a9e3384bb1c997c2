"""What is wrong with a resource, in words: path, value, what is allowed."""

from __future__ import annotations

import difflib
import re
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moe_api.document import Path
from moe_api.fields import ALLOWED, Rule
from moe_api.redact import REDACTED, redact, secret_name

MAX_VALUE_CHARS = 60
ABSENT = object()


@dataclass(frozen=True)
class Problem:
    """One thing to mend. `path` is like `spec.fallback.targets[0].model`; `value` is shortened and without secrets."""

    path: str
    value: str | None
    remedy: str
    line: int = 0

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {self.value}"
        return f"{self.path}{shown}: {self.remedy}" if self.path else self.remedy


def format_path(path: Path) -> str:
    """`("spec", "tiers", 0, "name")` as `spec.tiers[0].name`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", part) and redact(part) == part:
            text += f".{part}" if text else part
        else:
            text += f"[{redact(part)[:MAX_VALUE_CHARS]!r}]"
    return text


def show(path: Path, value: object) -> str | None:
    """The value for a message: short, one line, no secret. None where it is absent, null or a whole group."""
    if value is ABSENT or value is None or isinstance(value, dict | list):
        return None
    name = next((part for part in reversed(path) if isinstance(part, str)), "")
    if isinstance(value, str) and secret_name(name):
        return REDACTED
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(str(redact(text)).split())
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"


def lookup(values: object, path: Path) -> object:
    """What stands at the path, or ABSENT."""
    for part in path:
        if isinstance(values, dict) and part in values:
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part in range(len(values)):
            values = values[part]
        else:
            return ABSENT
    return values


def nearest(word: str, known: list[str]) -> str | None:
    """The known name that the word was probably meant to be: case and separators first, then edit distance."""
    folded = {re.sub(r"[-_]", "", name).lower(): name for name in known}
    key = re.sub(r"[-_]", "", word).lower()
    if key in folded:
        return folded[key]
    close = difflib.get_close_matches(key, list(folded), n=1, cutoff=0.6)
    return folded[close[0]] if close else None


@dataclass(frozen=True)
class Found:
    """A problem with its place: `path` is to be mended, `owner` is the value that failed, `reads` what a rule saw."""

    path: Path
    owner: Path
    reads: tuple[Path, ...]
    problem: Problem


def from_validation(error: ValidationError, root: type[BaseModel], values: object) -> list[Found]:
    """Every problem of a failed validation of `values`, in pydantic's order."""
    found: list[Found] = []
    for item in error.errors(include_url=False):
        base = tuple(part for part in item["loc"] if part != "[key]")
        if item["type"] == "rules":
            rules: list[Rule] = item["ctx"]["broken"]
            for rule in rules:
                path = (*base, *(part for part in rule.field.split(".") if part))
                reads = tuple((*base, *read) for read in rule.reads())
                found.append(Found(path, base, reads, _problem(path, values, rule.message)))
        elif item["type"] == "entries":
            entries: dict[str, str] = item["ctx"]["entries"]
            for key, why in entries.items():
                found.append(Found((*base, key), base, (), _problem((*base, key), values, why)))
        else:
            remedy = _remedy(item, base, root, _field_at(root, base), values)
            found.append(Found(base, base, (), _problem(base, values, remedy)))
    return found


def _problem(path: Path, values: object, remedy: str) -> Problem:
    return Problem(format_path(path), show(path, lookup(values, path)), remedy)


def _unwrap(annotation: Any) -> Any:
    """The type inside Optional and Annotated."""
    while True:
        origin = get_origin(annotation)
        if origin in (Union, types.UnionType):
            annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
        elif hasattr(annotation, "__metadata__"):
            annotation = annotation.__origin__
        else:
            return annotation


def fields_by_alias(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by their JSON names."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _walk(root: type[BaseModel], path: Path) -> tuple[Any, FieldInfo | None]:
    """Type and declaration at a path of the resource; the declaration is that of the nearest named field."""
    current: Any = root
    info: FieldInfo | None = None
    for part in path:
        current = _unwrap(current)
        if isinstance(current, type) and issubclass(current, BaseModel):
            info = fields_by_alias(current).get(str(part))
            current = info.annotation if info else None
        elif get_origin(current) in (tuple, list):
            current = get_args(current)[0]
        elif get_origin(current) is dict:
            current = get_args(current)[1]
        else:
            return None, None
    return _unwrap(current), info


def _field_at(root: type[BaseModel], path: Path) -> FieldInfo | None:
    return _walk(root, path)[1]


def _allowed_text(field: FieldInfo | None) -> str | None:
    extra = field.json_schema_extra if field else None
    text = extra.get(ALLOWED) if isinstance(extra, dict) else None
    return str(text) if text else None


def _unknown(path: Path, root: type[BaseModel]) -> str:
    model, _ = _walk(root, path[:-1])
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return "is unknown: remove it"
    known = list(fields_by_alias(model))
    meant = nearest(str(path[-1]), known)
    if meant:
        return f"is unknown: did you mean {meant}?"
    return f"is unknown: remove it, or use one of {', '.join(known)}"


def _missing(path: Path, field: FieldInfo | None) -> str:
    text = field.description.rstrip(".") if field and field.description else "a value"
    return f"is missing: add it ({text[0].lower()}{text[1:]})"


def _choice(path: Path, root: type[BaseModel], item: ErrorDetails, value: object) -> str:
    kind, _ = _walk(root, path)
    words = [str(word) for word in (get_args(kind) if get_origin(kind) is Literal else list(kind))]
    text = f"must be one of {', '.join(words)}"
    if isinstance(value, bool):
        twin = next((w for w in words if w.lower() in (("off", "no") if not value else ("on", "yes"))), None)
        if twin:
            return f'{text}; YAML reads {twin} without quotes as {str(value).lower()}: write "{twin}"'
    if value is None and "None" in words:
        return text
    meant = nearest(value, words) if isinstance(value, str) else None
    return f"{text}; did you mean {meant}?" if meant else text


_WHOLE = "must be a whole number"


def _remedy(item: ErrorDetails, path: Path, root: type[BaseModel], field: FieldInfo | None, values: object) -> str:  # noqa: PLR0912
    kind, context, value = item["type"], item.get("ctx", {}), lookup(values, path)
    match kind:
        case "extra_forbidden":
            return _unknown(path, root)
        case "missing":
            return _missing(path, field)
        case "enum" | "literal_error":
            return _choice(path, root, item, value)
        case "string_type":
            quoted = (
                f'; write it in quotes, "{value}"'
                if isinstance(value, int | float) and not isinstance(value, bool)
                else ""
            )
            return f"must be text{quoted}"
        case "int_type" | "int_parsing" | "int_from_float":
            plain = isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value)
            return f"{_WHOLE}; write it without quotes" if plain else _WHOLE
        case "bool_type" | "bool_parsing":
            return "must be true or false, without quotes"
        case "greater_than_equal":
            return f"must be {context['ge']} or more"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "string_too_short":
            return (
                "must not be empty"
                if context["min_length"] == 1
                else f"must have at least {context['min_length']} characters"
            )
        case "string_too_long":
            return f"must have at most {context['max_length']} characters"
        case "string_pattern_mismatch":
            allowed = _allowed_text(field)
            return f"must be {allowed}" if allowed else f"must match {context['pattern']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            target, _ = _walk(root, path)
            known = isinstance(target, type) and issubclass(target, BaseModel)
            names = f" with {', '.join(fields_by_alias(target))}" if known else ""
            return f"must be a mapping{names}"
        case "tuple_type" | "list_type":
            return "must be a list: begin each item with '-'"
        case "invalid_key":
            return "a key must be text: write it in quotes"
        case _:
            return item["msg"]
