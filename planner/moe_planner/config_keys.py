"""Typed look-ups in a config.json, so that what is missing or of the wrong kind is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_planner.catalog import CatalogInvalid

LARGEST = 10**9
"""No dimension of a model is larger; what is would only overflow later."""


class Keys:
    """The keys of one object in a config.json of the model `name`; `prefix` leads to it."""

    def __init__(self, values: Mapping[str, Any], name: str, prefix: str = "") -> None:
        self._values, self.name, self._prefix = values, name, prefix

    def nested(self, *names: str) -> Keys:
        """The first of these objects that is there; with one name it must be, with several this one stands in."""
        for name in names:
            if (found := self._values.get(name)) is not None:
                if not isinstance(found, dict):
                    raise self.wrong(name, "is no object")
                return Keys(found, self.name, f"{self._prefix}{name}.")
        if len(names) == 1:
            raise self.wrong(names[0], "is missing")
        return self

    def optional(self, name: str) -> Keys | None:
        """The object of that name; None where there is none."""
        return None if self._values.get(name) is None else self.nested(name)

    def whole(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The first of these numbers that is there. Lists with one value for all layers count as that value."""
        for name in names:
            value = self._values.get(name)
            if isinstance(value, list) and value and all(item == value[0] for item in value):
                value = value[0]
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise self.wrong(name, f"must be a whole number, the same for all layers; it is {str(value)[:40]}")
            if not least <= value <= LARGEST:
                raise self.wrong(name, f"must be {least} to {LARGEST}; it is {value}")
            return value
        if default is None:
            raise self.wrong(names[0], "is missing")
        return default

    def text(self, name: str, default: str | None = None) -> str:
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "is missing" if value is None else "must be a text")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def words(self, name: str) -> list[str]:
        """A list of texts; empty where there is none."""
        return self._list(name, str)

    def numbers(self, name: str) -> list[int]:
        """A list of numbers; empty where there is none."""
        return self._list(name, int)

    def _list(self, name: str, kind: type) -> list[Any]:
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.wrong(name, f"must be a list of {'texts' if kind is str else 'numbers'}")
        return value

    def wrong(self, name: str, remedy: str) -> CatalogInvalid:
        """The error for a field of this object."""
        return CatalogInvalid(f"{self.name}: config.json: {self._prefix}{name}", remedy)
