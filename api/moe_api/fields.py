"""How a field of the resource is declared: description, unit, default, disruption class, and rules that CEL repeats."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_snake
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticUndefined, core_schema

from moe_api.base import Model

DISRUPTION = "x-moe-disruption"
LOWERED = "x-moe-lowered"
UNIT = "x-moe-unit"
ALLOWED = "x-moe-allowed"


class Disruption(StrEnum):
    """What a change of a field costs while traffic flows."""

    HOT = "hot"
    ROLLING = "rolling"
    REVISION = "revision"


def _field(description: str, default: Any, extra: dict[str, Any], constraints: dict[str, Any]) -> Any:
    extra = {key: value for key, value in extra.items() if value is not None}
    return Field(default=default, description=description, json_schema_extra=extra, **constraints)


def hot(
    description: str,
    default: Any = PydanticUndefined,
    *,
    unit: str | None = None,
    allowed: str | None = None,
    **limits: Any,
) -> Any:
    """A field whose change no request notices. `allowed` says in words what a pattern admits."""
    return _field(description, default, {DISRUPTION: Disruption.HOT.value, UNIT: unit, ALLOWED: allowed}, limits)


def rolling(
    description: str,
    default: Any = PydanticUndefined,
    *,
    unit: str | None = None,
    allowed: str | None = None,
    **limits: Any,
) -> Any:
    """A field whose change replaces replicas, gang by gang."""
    return _field(description, default, {DISRUPTION: Disruption.ROLLING.value, UNIT: unit, ALLOWED: allowed}, limits)


def revision(
    description: str,
    default: Any = PydanticUndefined,
    *,
    unit: str | None = None,
    allowed: str | None = None,
    lowered: Disruption | None = None,
    **limits: Any,
) -> Any:
    """A field whose change makes a new revision. `lowered`: the class of a smaller number, where that is cheaper."""
    extra = {
        DISRUPTION: Disruption.REVISION.value,
        UNIT: unit,
        ALLOWED: allowed,
        LOWERED: lowered.value if lowered else None,
    }
    return _field(description, default, extra, limits)


def group(description: str, default: Any = PydanticUndefined, *, disruption: Disruption | None = None) -> Any:
    """A nested object; its leaves carry the classes, unless it sets one for all of them."""
    return _field(description, default, {DISRUPTION: disruption.value if disruption else None}, {})


def told(description: str, default: Any = None, *, unit: str | None = None, **limits: Any) -> Any:
    """A field of the status: written by us, read by people, so it has no class."""
    return _field(description, default, {UNIT: unit}, limits)


@dataclass(frozen=True)
class Rule:
    """A rule over one object, twice: `holds` for pydantic, `cel` for the API server. `field` names what to change."""

    cel: str
    message: str
    field: str
    holds: Callable[[Any], bool]

    def reads(self) -> tuple[tuple[str, ...], ...]:
        """Paths below the object that the rule looks at."""
        return tuple(tuple(path.split(".")) for path in re.findall(r"\bself\.([A-Za-z0-9.]*[A-Za-z0-9])", self.cel))


class SpecModel(Model):
    """A group of the resource. Subclasses list their cross-field rules in RULES."""

    model_config = ConfigDict(validate_default=True)

    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        """A known field that is null counts as left out, as the API server has it."""
        if not isinstance(values, dict) or None not in values.values():
            return values
        known = {name for field, info in cls.model_fields.items() for name in (field, info.alias or field)}
        return {name: value for name, value in values.items() if value is not None or name not in known}

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        broken = [rule for rule in type(self).RULES if not rule.holds(self)]
        if broken:
            text = "; ".join(f"{rule.field.lstrip('.') or 'object'}: {rule.message}" for rule in broken)
            raise PydanticCustomError("rules", "{text}", {"text": text, "broken": broken})
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        rendered = handler.resolve_ref_schema(handler(schema))
        if cls.RULES:
            rendered["x-kubernetes-validations"] = [_validation(rule) for rule in cls.RULES]
        return rendered


def _validation(rule: Rule) -> dict[str, str]:
    """The rule as the API server takes it. A CRD does not describe metadata, so no fieldPath can point there."""
    if rule.field.startswith(".metadata"):
        return {"rule": rule.cel, "message": f"{rule.field[1:]} {rule.message}"}
    return {"rule": rule.cel, "message": rule.message, "fieldPath": rule.field}


@dataclass(frozen=True)
class ListOf:
    """Bounds of a tuple and how server-side apply merges it: by `key` (map), as a set, or whole (atomic)."""

    max_items: int
    key: str | None = None
    unique: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        kind = "map" if self.key else "set" if self.unique else "atomic"
        rendered = {**handler(schema), "maxItems": self.max_items, "x-kubernetes-list-type": kind}
        if self.key:
            rendered["x-kubernetes-list-map-keys"] = [self.key]
        return rendered

    def key_of(self, item: Any) -> Any:
        """What tells an item from the others."""
        return getattr(item, _attribute(self.key)) if self.key else item

    def _check(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(items) > self.max_items:
            raise PydanticCustomError(
                "list_too_long", "must have at most {most} items, has {count}",
                {"most": self.max_items, "count": len(items)},
            )  # fmt: skip
        if self.key or self.unique:
            keys = [self.key_of(item) for item in items]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    raise PydanticCustomError(
                        "duplicate", "{what} {key} is there twice: each must be unique",
                        {"what": self.key or "the value", "key": str(key)[:64]},
                    )  # fmt: skip
        return items


@dataclass(frozen=True)
class MapOf:
    """Bounds of a string map: how many entries, and the form of a key."""

    max_properties: int
    key_pattern: str | None = None
    key_max: int = 316
    key_form: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        rendered = {**handler(schema), "maxProperties": self.max_properties}
        rendered.pop("propertyNames", None)
        if self.key_pattern:
            rule = f"self.all(k, size(k) <= {self.key_max} && k.matches(r'{self.key_pattern}'))"
            rendered["x-kubernetes-validations"] = [{"rule": rule, "message": self._form()}]
        return rendered

    def _form(self) -> str:
        return f"the key must be {self.key_form} of at most {self.key_max} characters"

    def _check(self, entries: dict[str, Any]) -> dict[str, Any]:
        if len(entries) > self.max_properties:
            raise PydanticCustomError(
                "map_too_long", "must have at most {most} entries, has {count}",
                {"most": self.max_properties, "count": len(entries)},
            )  # fmt: skip
        refused = {key: why for key in entries if (why := self._refusal(key, entries[key]))}
        if refused:
            raise PydanticCustomError(
                "entries",
                "{text}",
                {"text": "; ".join(f"{k}: {why}" for k, why in refused.items()), "entries": refused},
            )
        return entries

    def _refusal(self, key: str, value: Any) -> str | None:
        """Why an entry may not be there; None where it may."""
        if self.key_pattern and (len(key) > self.key_max or not re.fullmatch(self.key_pattern, key)):
            return self._form()
        return None


@cache
def _attribute(key: str) -> str:
    """Python's name of a field; asked for with each item of each list."""
    return to_snake(key)
