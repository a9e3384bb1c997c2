"""Scalars of the resource that JSON has no type for: durations, sizes and exact decimals, each kept as text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

DURATION_PATTERN = r"^([0-9]{1,6}(\.[0-9]{1,6})?(ns|us|µs|ms|s|m|h)){1,4}$"
QUANTITY_PATTERN = r"^[0-9]{1,18}(\.[0-9]{1,9})?(Ki|Mi|Gi|Ti|Pi|Ei|m|k|M|G|T|P|E)?$"
DECIMAL_PATTERN = r"^[0-9]{1,12}(\.[0-9]{1,6})?$"
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
LABEL_VALUE_PATTERN = r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
QUALIFIED_NAME_PATTERN = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"

_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|ms|s|m|h)")
_UNIT_S = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
}
_SUFFIX = {
    "": Decimal(1),
    "m": Decimal("1e-3"),
    **{name: Decimal(1000) ** power for power, name in enumerate(["k", "M", "G", "T", "P", "E"], 1)},
    **{name: Decimal(1024) ** power for power, name in enumerate(["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"], 1)},
}
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
MAX_INT = 2**63 - 1


def parse_duration(text: str) -> Decimal:
    """Seconds in a Go duration (`800ms`, `1.5s`, `1h30m`). Raises ValueError with the remedy."""
    if re.fullmatch(DURATION_PATTERN, text):
        return sum((Decimal(number) * _UNIT_S[unit] for number, unit in _PART.findall(text)), Decimal(0))
    if _NUMBER.fullmatch(text):
        raise ValueError("a duration needs a unit: write 800ms or 1.5s")
    raise ValueError("not a duration: write a number with ms, s, m or h, such as 800ms or 1.5s")


def parse_quantity(text: str) -> Decimal:
    """Value of a Kubernetes quantity (`80Gi`, `500m`, `4`). Raises ValueError with the remedy."""
    if not re.fullmatch(QUANTITY_PATTERN, text):
        raise ValueError("not a quantity: write a number with Ki, Mi, Gi, Ti, k, M, G or T, such as 80Gi")
    number = re.match(r"[0-9.]+", text)
    assert number is not None  # noqa: S101 - the pattern begins with a digit
    with localcontext(prec=64):  # 18 digits times 1024⁶ are exact in 37
        return Decimal(number.group()) * _SUFFIX[text[number.end() :]]


def format_decimal(value: Decimal) -> str:
    """Plain text of a decimal, without exponent and trailing zeros."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


class Duration(str):
    """A Go duration as it was written; `.seconds` is its length."""

    __slots__ = ()

    @property
    def seconds(self) -> float:
        return float(parse_duration(self))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "maxLength": 32, "pattern": DURATION_PATTERN}

    @classmethod
    def _parse(cls, value: Any) -> Duration:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise PydanticCustomError("duration", "must be a duration: write 800ms or 1.5s")
        try:
            parse_duration(str(value))
        except ValueError as error:
            raise PydanticCustomError("duration", "{why}", {"why": str(error)}) from None
        return cls(value)


@dataclass(frozen=True)
class Between:
    """Bounds of a duration, both inclusive, checked here and by CEL."""

    low: str
    high: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        rule = f"duration(self) >= duration('{self.low}') && duration(self) <= duration('{self.high}')"
        return {
            **handler(schema),
            "x-kubernetes-validations": [{"rule": rule, "message": f"must be from {self.low} to {self.high}"}],
        }

    def _check(self, value: Duration) -> Duration:
        if parse_duration(self.low) <= parse_duration(value) <= parse_duration(self.high):
            return value
        raise PydanticCustomError(
            "duration_range", "must be from {low} to {high}", {"low": self.low, "high": self.high}
        )


class Quantity(str):
    """A Kubernetes quantity as it was written; `.value` is exact, `.bytes` rounds up."""

    __slots__ = ()

    @property
    def value(self) -> Decimal:
        return parse_quantity(self)

    @property
    def bytes(self) -> int:
        return int(self.value.to_integral_value(rounding="ROUND_CEILING"))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "x-kubernetes-int-or-string": True,
            "minimum": 0,
            "maxLength": 32,
            "pattern": QUANTITY_PATTERN,
        }

    @classmethod
    def _parse(cls, value: Any) -> Quantity:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise PydanticCustomError("quantity", "must be a quantity: write 80Gi, or a whole number")
        if isinstance(value, int) and not 0 <= value <= MAX_INT:
            raise PydanticCustomError("quantity", "must not be negative, nor above 9223372036854775807")
        try:
            parse_quantity(str(value))
        except ValueError as error:
            raise PydanticCustomError("quantity", "{why}", {"why": str(error)}) from None
        return cls(value)


@dataclass(frozen=True)
class Exact:
    """A decimal written as text or as a whole number, never as a float; bounds are inclusive unless `above` is set.

    Attached to `Decimal`. `lenient` takes floats too: for values that other processes of ours send as numbers.
    """

    low: str = "0"
    high: str = "1000000000"
    above: bool = False
    lenient: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._parse, serialization=core_schema.plain_serializer_function_ser_schema(format_decimal)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # `double` costs CEL the same for a string of any length, which `quantity(string(self))` does not.
        sign = ">" if self.above else ">="
        rule = f"double(self) {sign} {_double(self.low)} && double(self) <= {_double(self.high)}"
        return {
            "x-kubernetes-int-or-string": True,
            "maxLength": 20,
            "pattern": DECIMAL_PATTERN,
            "x-kubernetes-validations": [{"rule": rule, "message": self._allowed()}],
        }

    def _allowed(self) -> str:
        if self.above:
            return f"must be above {self.low} and at most {self.high}"
        return f"must be from {self.low} to {self.high}"

    def _parse(self, value: Any) -> Decimal:
        if isinstance(value, float) and self.lenient and math.isfinite(value):
            value = format_decimal(Decimal(repr(round(value, 6))))
        if isinstance(value, float):
            raise PydanticCustomError(
                "decimal", 'must be text or a whole number: write it in quotes, "{text}"', {"text": repr(value)}
            )
        if isinstance(value, Decimal):
            value = format_decimal(value) if value.is_finite() else str(value)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise PydanticCustomError("decimal", 'must be a decimal in quotes, such as "1.25", or a whole number')
        if not re.fullmatch(DECIMAL_PATTERN, str(value)):
            raise PydanticCustomError(
                "decimal", 'must be a plain decimal with at most 6 places, such as "1.25", {allowed}',
                {"allowed": self._allowed()[len("must be ") :]},
            )  # fmt: skip
        parsed = Decimal(value)
        low = Decimal(self.low)
        if parsed > Decimal(self.high) or parsed < low or (self.above and parsed == low):
            raise PydanticCustomError("decimal_range", "{allowed}", {"allowed": self._allowed()})
        return parsed


def _double(text: str) -> str:
    return text if "." in text else f"{text}.0"
