"""Durations, quantities and exact decimals: text in, the same value out, and nothing that a float would blur."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from moe_api.scalars import Between, Duration, Exact, Quantity, format_decimal, parse_duration, parse_quantity

UNITS_S = {"ns": "1e-9", "us": "1e-6", "µs": "1e-6", "ms": "1e-3", "s": "1", "m": "60", "h": "3600"}
DURATION = TypeAdapter(Duration)
QUANTITY = TypeAdapter(Quantity)
SHARE = TypeAdapter(Annotated[Decimal, Exact("0", "1")])
GAMMA = TypeAdapter(Annotated[Decimal, Exact("0", "1024", above=True)])
LENIENT = TypeAdapter(Annotated[Decimal, Exact("0", "1000000", lenient=True)])

DURATIONS = {
    "milliseconds": ("800ms", Decimal("0.8")),
    "a fraction": ("1.5s", Decimal("1.5")),
    "several parts": ("1h30m", Decimal(5400)),
    "minutes beside milliseconds": ("1m1ms", Decimal("60.001")),
    "microseconds": ("250us", Decimal("0.00025")),
}


@pytest.mark.parametrize("case", DURATIONS, ids=list(DURATIONS))
def test_durations(case: str) -> None:
    text, seconds = DURATIONS[case]
    assert parse_duration(text) == seconds
    assert DURATION.validate_python(text).seconds == float(seconds)
    assert DURATION.dump_json(DURATION.validate_python(text)) == f'"{text}"'.encode()


@given(st.lists(st.tuples(st.integers(0, 999_999), st.sampled_from(list(UNITS_S))), min_size=1, max_size=4))
def test_a_duration_is_the_sum_of_its_parts(parts: list[tuple[int, str]]) -> None:
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert parse_duration(text) == sum(number * Decimal(UNITS_S[unit]) for number, unit in parts)


@pytest.mark.parametrize("value", [800, 0.8, "800", "1.5"])
def test_a_number_without_a_unit_is_refused_with_the_remedy(value: object) -> None:
    with pytest.raises(ValidationError, match=r"write 800ms or 1\.5s"):
        DURATION.validate_python(value)


@pytest.mark.parametrize("value", ["", "s", "1d", "-1s", "1 s", "1s ", "1e3s", "١s", "1s\n", True, None, [], "1s" * 5])
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(ValidationError):
        DURATION.validate_python(value)


def test_bounds_of_a_duration_are_inclusive() -> None:
    bounded = TypeAdapter(Annotated[Duration, Between("1ms", "1h")])
    assert [bounded.validate_python(text) for text in ("1ms", "60m")] == ["1ms", "60m"]
    for text in ("0.999999ms", "3600.001s"):
        with pytest.raises(ValidationError, match="must be from 1ms to 1h"):
            bounded.validate_python(text)


QUANTITIES = {
    "binary": ("80Gi", 80 * 2**30),
    "decimal": ("2k", 2000),
    "plain": ("12", 12),
    "a fraction": ("1.5Ki", 1536),
    "thousandths round up": ("1500m", 2),
}


@pytest.mark.parametrize("case", QUANTITIES, ids=list(QUANTITIES))
def test_quantities(case: str) -> None:
    text, size = QUANTITIES[case]
    assert QUANTITY.validate_python(text).bytes == size


@given(st.integers(0, 10**18 - 1), st.sampled_from(["Ki", "Mi", "Gi", "Ti"]))
def test_a_binary_suffix_multiplies_by_1024(number: int, suffix: str) -> None:
    power = ["Ki", "Mi", "Gi", "Ti"].index(suffix) + 1
    assert parse_quantity(f"{number}{suffix}") == number * 1024**power


def test_a_whole_number_is_a_quantity_and_stays_text() -> None:
    assert QUANTITY.dump_python(QUANTITY.validate_python(4)) == "4"


@pytest.mark.parametrize("value", ["", "Gi", "80GB", "-1Gi", "1.Gi", "1e3", 1.5, True, -1, 2**63, None, "8 Gi"])
def test_what_is_no_quantity(value: object) -> None:
    with pytest.raises(ValidationError):
        QUANTITY.validate_python(value)


@given(st.decimals(0, 1, places=6))
def test_a_decimal_keeps_its_value_through_json(value: Decimal) -> None:
    parsed = SHARE.validate_python(format(value, "f"))
    assert parsed == value
    assert SHARE.validate_json(SHARE.dump_json(parsed)) == value
    assert "E" not in format_decimal(parsed)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_float_is_never_taken(value: float) -> None:
    with pytest.raises(ValidationError, match="write it in quotes"):
        SHARE.validate_python(value)


@given(st.floats(0, 1000, allow_nan=False))
def test_only_the_status_takes_floats_and_it_writes_text(value: float) -> None:
    written = LENIENT.dump_python(LENIENT.validate_python(value))
    assert isinstance(written, str)
    assert float(written) == pytest.approx(value, abs=1e-6)


DECIMALS = {
    "text": ("0.02", Decimal("0.02")),
    "a whole number": (1, Decimal(1)),
    "a whole number as text": ("0", Decimal(0)),
    "trailing zeros": ("0.500", Decimal("0.5")),
}


@pytest.mark.parametrize("case", DECIMALS, ids=list(DECIMALS))
def test_decimals(case: str) -> None:
    value, parsed = DECIMALS[case]
    assert SHARE.validate_python(value) == parsed


@pytest.mark.parametrize("value", ["", ".5", "1.", "-0.1", "1e-3", "NaN", "0.1234567", "1,5", True, None, "1.00001", 2])
def test_what_is_no_share(value: object) -> None:
    with pytest.raises(ValidationError):
        SHARE.validate_python(value)


def test_a_capacity_factor_is_above_zero() -> None:
    assert GAMMA.validate_python("0.000001") > 0
    with pytest.raises(ValidationError, match="must be above 0 and at most 1024"):
        GAMMA.validate_python("0.0")
