"""What a change of a MoEDeployment costs: each changed field with its disruption class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moe_api.fields import DISRUPTION, LOWERED, Disruption, ListOf
from moe_api.problems import show
from moe_api.resource import MoEDeployment

_ORDER = (Disruption.HOT, Disruption.ROLLING, Disruption.REVISION)


@dataclass(frozen=True)
class Change:
    """One changed field. `old` and `new` are JSON values; None is left out. `path` names list items by their key."""

    path: str
    old: Any
    new: Any
    disruption: Disruption

    def __str__(self) -> str:
        return f"{self.path}: {_text(self.path, self.old)} → {_text(self.path, self.new)} ({self.disruption})"


def _text(path: str, value: Any) -> str:
    if value is None:
        return "unset"
    last = path.rpartition(".")[2]
    return show((last,), value) or show((last,), str(value)) or ""


def worst(changes: list[Change]) -> Disruption | None:
    """The costliest class among the changes; None where there are none."""
    return max((change.disruption for change in changes), key=_ORDER.index, default=None)


def classify(old: MoEDeployment, new: MoEDeployment) -> list[Change]:
    """Every change of the spec, in the order of the fields."""
    return list(_models("spec", old.spec, new.spec, None))


def _models(path: str, old: BaseModel, new: BaseModel, inherited: Disruption | None) -> Iterator[Change]:
    for name, info in type(new).model_fields.items():
        yield from _field(f"{path}.{info.alias or name}", getattr(old, name), getattr(new, name), info, inherited)


def _field(path: str, old: Any, new: Any, info: FieldInfo, inherited: Disruption | None) -> Iterator[Change]:
    if old == new:
        return
    own = inherited or _class(info)
    marker = next((found for found in info.metadata if isinstance(found, ListOf) and found.key), None)
    if isinstance(old, BaseModel) and isinstance(new, BaseModel):
        yield from _models(path, old, new, own)
    elif marker is not None:
        yield from _items(path, {marker.key_of(i): i for i in old}, {marker.key_of(i): i for i in new}, own)
    else:
        yield Change(path, _plain(old), _plain(new), _lowered(info, old, new) or own or _deepest(old, new))


def _items(path: str, old: dict[Any, Any], new: dict[Any, Any], inherited: Disruption | None) -> Iterator[Change]:
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        place = f"{path}[{key}]"
        if before is None or after is None:
            yield Change(place, _plain(before), _plain(after), inherited or _deepest(before, after))
        elif before != after:
            yield from _models(place, before, after, inherited)
    if list(old) != list(new) and set(old) == set(new):
        yield Change(path, [str(k) for k in old], [str(k) for k in new], Disruption.HOT)


def _class(info: FieldInfo) -> Disruption | None:
    extra = info.json_schema_extra
    found = extra.get(DISRUPTION) if isinstance(extra, dict) else None
    return Disruption(str(found)) if found else None


def _lowered(info: FieldInfo, old: Any, new: Any) -> Disruption | None:
    extra = info.json_schema_extra
    found = extra.get(LOWERED) if isinstance(extra, dict) else None
    smaller = isinstance(old, int) and isinstance(new, int) and new < old
    return Disruption(str(found)) if found and smaller else None


def _deepest(*values: Any) -> Disruption:
    """The costliest class of any field of the groups given: they come or go whole."""
    found = [Disruption.HOT]
    for value in values:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, BaseModel):
                for name, info in type(item).model_fields.items():
                    found.append(_class(info) or _deepest(getattr(item, name)))
    return max(found, key=_ORDER.index)


def _plain(value: Any) -> Any:
    """The value as JSON."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int) else str(value)


def inputs(resource: MoEDeployment, disruption: Disruption) -> dict[str, Any]:
    """Path → JSON value of every field of that class, or a costlier one, that is not at its default.

    Two resources whose inputs of class revision are equal are served by the same revision. Defaults are left out, so
    that a field that a later version adds does not change what an older resource asks for.
    """
    found: dict[str, Any] = {}
    _inputs("spec", resource.spec, _ORDER.index(disruption), None, found)
    return found


def _inputs(path: str, group: BaseModel, least: int, inherited: Disruption | None, found: dict[str, Any]) -> None:
    for field in _fields(type(group)):
        value = getattr(group, field.name)
        own = inherited or field.own
        if isinstance(value, BaseModel):
            _inputs(f"{path}.{field.alias}", value, least, own, found)
        elif value is None or value in ((), {}) or (not field.required and value == field.default):
            continue
        elif _ORDER.index(own or _deepest(value)) >= least:
            found[f"{path}.{field.alias}"] = _plain(value)


@dataclass(frozen=True, slots=True)
class _Field:
    """What `_inputs` asks of a field, looked up once."""

    name: str
    alias: str
    own: Disruption | None
    required: bool
    default: Any


@cache
def _fields(group: type[BaseModel]) -> tuple[_Field, ...]:
    return tuple(
        _Field(
            name,
            info.alias or name,
            _class(info),
            info.is_required(),
            None if info.is_required() else info.get_default(call_default_factory=True),
        )
        for name, info in group.model_fields.items()
    )
