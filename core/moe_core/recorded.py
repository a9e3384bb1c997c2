"""Decisions of the spill policy as lines of JSON, exactly, and the same decisions made again from them. Pure.

A line holds what a decision looked at, how it fell, and the state before it wherever the line before did not leave that
one. So a file can be decided again from its beginning, by the very function that the simulator calls. Floats come back
bit for bit; a field at its default is left out.
"""

from __future__ import annotations

import collections.abc
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Any

import orjson

from moe_core import spill
from moe_core.forecast import SpillContext
from moe_core.spill import SpillState

HEAD = {"recorded": "moestack decisions", "version": 1}
"""The first line of each file."""
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class RecordInvalid(ValueError):
    """A line that is none of ours, or that cannot stand where it does."""


@dataclass(frozen=True, slots=True)
class Noted:
    """One decision as it was made. `chain`: whose states follow one another; `follows`: `before` is what the decision
    noted before it left. `number`: the version of that state."""

    chain: str
    number: int
    context: SpillContext
    decision: Any
    before: SpillState
    follows: bool


@dataclass(frozen=True, slots=True)
class Differing:
    """A decision that would fall otherwise now."""

    line: int
    was: Any
    now: Any


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of a file: how many decisions were made again, and which of them differ."""

    decisions: int
    differing: tuple[Differing, ...]


def head() -> bytes:
    """The first line of a file."""
    return orjson.dumps(HEAD) + b"\n"


def line(noted: Noted, *, whole: bool) -> bytes:
    """One line; `whole`: with the state in any case, as the first of its chain in a file needs it."""
    document: dict[str, Any] = {"chain": noted.chain, "number": noted.number}
    if whole or not noted.follows:
        document["state"] = encode(noted.before)
    document |= {"context": encode(noted.context), "decision": encode(noted.decision)}
    return orjson.dumps(document) + b"\n"


def replay(lines: Iterable[bytes], decide: Callable[[SpillContext, Any], tuple[Any, Any]] = spill.decide) -> Replayed:
    """Decide again what a file holds. Raises RecordInvalid, with the number of the line."""
    states: dict[str, SpillState] = {}
    count, differing = 0, []
    for number, document in _documents(lines):
        try:
            chain, context = document["chain"], decode(SpillContext, document["context"])
            before = decode(SpillState, document["state"]) if "state" in document else states[chain]
            was = document["decision"]
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise RecordInvalid(f"line {number}: it is no decision of this version: {error!r}") from None
        decision, states[chain] = decide(context, before)
        now = orjson.loads(orjson.dumps(encode(decision)))
        count += 1
        if now != was:
            differing.append(Differing(number, was, now))
    return Replayed(count, tuple(differing))


def _documents(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line but the first, with its number. A last line that was cut off is no line yet."""
    for number, raw in enumerate(lines, 1):
        if number > 1 and not raw.endswith(b"\n"):
            return
        try:
            document = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise RecordInvalid(f"line {number}: it is no JSON: {error}") from None
        if number > 1 and isinstance(document, dict):
            yield number, document
        elif number > 1 or document != HEAD:
            raise RecordInvalid(f"line {number}: a file of decisions begins with {orjson.dumps(HEAD).decode()}")


def encode(value: Any) -> Any:
    """Plain JSON of what contexts, states and decisions are made of."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, frozenset):
        return sorted(value)
    if is_dataclass(value):
        row = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: encode(each) for field, each in row if each != field.default}
    if isinstance(value, collections.abc.Sequence):
        return [encode(each) for each in value]
    raise TypeError(f"{type(value).__name__} is in no context")


def decode(kind: Any, value: Any) -> Any:
    """What `encode` was given, of this type. Raises TypeError, ValueError or KeyError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = (each for each in inner if each is not types.NoneType)
        return decode(kind, value)
    if origin is frozenset:
        return frozenset(decode(inner[0], each) for each in value)
    if origin is collections.abc.Sequence or (origin is tuple and inner[-1] is Ellipsis):
        return tuple(decode(inner[0], each) for each in value)
    if origin is tuple:
        return tuple(decode(each, one) for each, one in zip(inner, value, strict=True))
    if kind is float:
        return _NOT_FINITE[value] if isinstance(value, str) else value
    if is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        return kind(**{name: decode(hints[name], each) for name, each in value.items()})
    return kind(value)


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
