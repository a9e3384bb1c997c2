"""Late binding: `${part.fact}` in a plan becomes what that part announced when it was ready."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Facts = Mapping[str, Mapping[str, str]]
_REFERENCE = re.compile(r"\$\{([a-z]+)\.([A-Za-z_]+)\}")


class Unbound(LookupError):
    """A reference to a fact that no part has announced."""


def references(value: Any) -> set[str]:
    """Names of the parts that a document refers to."""
    if isinstance(value, str):
        return {part for part, _ in _REFERENCE.findall(value)}
    if isinstance(value, Mapping):
        return set().union(*(references(item) for item in value.values())) if value else set()
    if isinstance(value, list | tuple):
        return set().union(*(references(item) for item in value)) if value else set()
    return set()


def bind(value: Any, facts: Facts) -> Any:
    """The document with every reference replaced. Raises Unbound."""

    def fact(match: re.Match[str]) -> str:
        part, name = match.groups()
        try:
            return facts[part][name]
        except KeyError:
            raise Unbound(f"{part} announced no {name}") from None

    if isinstance(value, str):
        return _REFERENCE.sub(fact, value)
    if isinstance(value, Mapping):
        return {key: bind(item, facts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bind(item, facts) for item in value]
    return value
