"""Kubernetes quantities as the API server writes them back: what we apply must read the same when it returns."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal, localcontext

from moe_api.scalars import parse_quantity

_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DECIMAL = {-9: "n", -6: "u", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}


def canonical(text: str | int) -> str:
    """The canonical form of a quantity: no fraction, the largest suffix of its own kind that leaves a whole number.

    As k8s.io/apimachinery/pkg/api/resource/quantity.go has it: binary suffixes stay binary from 1024 on, and are
    rounded up to whole units; decimal ones are rounded up to nano-units.
    """
    text = str(text)
    value = parse_quantity(text)
    with localcontext(prec=64):
        if text.endswith("i") and value >= 1024:
            return _binary(int(value.to_integral_value(ROUND_CEILING)))
        return _decimal(value)


def size(number: int) -> str:
    """A number of bytes, in binary units where they are whole."""
    return _binary(number)


def _binary(whole: int) -> str:
    power = 0
    while whole and whole % 1024 == 0 and power < len(_BINARY) - 1:
        whole //= 1024
        power += 1
    return f"{whole}{_BINARY[power]}"


def _decimal(value: Decimal) -> str:
    whole, exponent = int((value * 10**9).to_integral_value(ROUND_CEILING)), -9
    while whole and whole % 1000 == 0 and exponent < 18:
        whole //= 1000
        exponent += 3
    return f"{whole}{_DECIMAL[exponent]}" if whole else "0"
