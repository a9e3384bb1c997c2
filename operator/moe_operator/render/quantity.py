"""Kubernetes quantities as the API server writes them back: what we apply must read the same when it returns."""

from __future__ import annotations

from decimal import ROUND_CEILING, localcontext

from moe_api.scalars import parse_quantity

_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DECIMAL = ("m", "", "k", "M", "G", "T", "P", "E")


def canonical(text: str | int) -> str:
    """The canonical form of a quantity of a resource: whole thousandths at least, no fraction, and the largest suffix
    of its own kind that leaves a whole number. Binary suffixes stay binary from 1024 on, where the value is whole.

    (k8s.io/apimachinery/pkg/api/resource/quantity.go; resources of pods are rounded up to thousandths.)
    """
    text = str(text)
    with localcontext(prec=64):
        thousandths = int((parse_quantity(text) * 1000).to_integral_value(ROUND_CEILING))
    if text.endswith("i") and thousandths % 1000 == 0 and thousandths >= 1024 * 1000:
        return size(thousandths // 1000)
    return _scaled(thousandths, 1000, _DECIMAL)


def size(number: int) -> str:
    """A number of bytes, in the largest binary unit that leaves a whole number."""
    return _scaled(number, 1024, _BINARY)


def _scaled(number: int, base: int, suffixes: tuple[str, ...]) -> str:
    if number == 0:
        return "0"
    power = 0
    while number % base == 0 and power < len(suffixes) - 1:
        number //= base
        power += 1
    return f"{number}{suffixes[power]}"
