"""Typed reads of a JSON object: every refusal names the field by its path, and no field is passed over."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from moe_planner.sim.invalid import Invalid

NOTE = "note"
"""Words for people; any object may have them."""


class ScenarioInvalid(Invalid):
    """A scenario file that cannot be used."""


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ScenarioInvalid."""
    remedy = "a JSON object with slo, pools, apis and scenarios is wanted"
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise ScenarioInvalid(str(path), str(error.strerror), "give a file that can be read") from None
    except RecursionError:
        raise ScenarioInvalid(str(path), "it is nested too deep", remedy) from None
    except ScenarioInvalid:
        raise
    except ValueError as error:
        raise ScenarioInvalid(str(path), f"it is no JSON: {error}", remedy) from None
    if not isinstance(document, dict):
        raise ScenarioInvalid(str(path), "it is no JSON object", remedy)
    return document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ScenarioInvalid(name, "it is there twice in one object", "keep one of them")
        found[name] = value
    return found


class Fields:
    """One object of the file, and the path to it. `known`: the fields that it may have."""

    def __init__(self, given: Mapping[str, Any], at: str, known: Collection[str] | None = None) -> None:
        self.given, self.at = given, at
        for name in given:
            if known is None or name in known or name == NOTE:
                continue
            near = difflib.get_close_matches(name, known, n=1)
            self.refuse(name, "it is not known", f"{near[0]} is meant?" if near else f"one of {', '.join(known)}")

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def path(self, name: str) -> str:
        return f"{self.at}.{name}" if self.at else name

    def refuse(self, name: str, message: str, remedy: str) -> NoReturn:
        raise ScenarioInvalid(self.path(name), message, remedy)

    def number(self, name: str, *, default: float | None = None, least: float = 0.0) -> float:
        """A finite number, `least` or more."""
        if name not in self.given and default is not None:
            return default
        return self._number(self._value(name), name, least)

    def whole(self, name: str, *, default: int | None = None, least: int = 1) -> int:
        """A whole number, `least` or more."""
        if name not in self.given and default is not None:
            return default
        value = self.number(name, least=least)
        if value != int(value):
            self.refuse(name, f"{value:g} is no whole number", "give a whole number")
        return int(value)

    def pair(self, name: str, *, default: tuple[float, float] | None = None) -> tuple[float, float]:
        """Two numbers as [from, to], the second not below the first."""
        if name not in self.given and default is not None:
            return default
        return self._pair(self._value(name), name)

    def pairs(self, name: str) -> tuple[tuple[float, float], ...]:
        """A list of [from, to]; none where it is left out."""
        found = self.list(name) if name in self.given else []
        return tuple(self._pair(value, f"{name}[{i}]") for i, value in enumerate(found))

    def text(self, name: str) -> str:
        value = self._value(name)
        if not isinstance(value, str) or not value:
            self.refuse(name, f"{_shown(value)} is no name", "give a text that is not empty")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.given.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, f"{_shown(value)}", "give true or false")
        return value

    def list(self, name: str) -> list[Any]:
        value = self._value(name)
        if not isinstance(value, list):
            self.refuse(name, f"{_shown(value)} is no list", "give a list")
        return value

    def objects(self, name: str, known: Collection[str]) -> Iterator[Fields]:
        """The objects of a list, each under its place."""
        for i, value in enumerate(self.list(name)):
            if not isinstance(value, dict):
                self.refuse(f"{name}[{i}]", f"{_shown(value)} is no object", "give an object")
            yield Fields(value, self.path(f"{name}[{i}]"), known)

    def object(self, name: str, known: Collection[str] | None = None) -> Fields:
        value = self._value(name)
        if not isinstance(value, dict):
            self.refuse(name, f"{_shown(value)} is no object", "give an object")
        return Fields(value, self.path(name), known)

    def _value(self, name: str) -> Any:
        if name not in self.given:
            self.refuse(name, "it is missing", "add it")
        return self.given[name]

    def _number(self, value: Any, name: str, least: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, f"{_shown(value)} is no number", "give a number")
        number = float(value) if abs(value) < 1e300 else math.inf
        if not math.isfinite(number):
            self.refuse(name, f"{_shown(value)} is no finite number", "give a finite number")
        if number < least:
            self.refuse(name, f"{number:g} is too small", f"give {least:g} or more")
        return number

    def _pair(self, value: Any, name: str) -> tuple[float, float]:
        if not isinstance(value, list) or len(value) != 2:
            self.refuse(name, f"{_shown(value)} is no pair", "give two numbers as [from, to]")
        low, high = (self._number(one, f"{name}[{i}]", 0.0) for i, one in enumerate(value))
        if low > high:
            self.refuse(name, f"[{low:g}, {high:g}] falls", "give [from, to] with from ≤ to")
        return low, high


def _shown(value: Any) -> str:
    """A value as the file has it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
