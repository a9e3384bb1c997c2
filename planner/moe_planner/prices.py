"""What closed and hosted APIs charge for tokens: list prices, each with its source and its day."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from moe_planner.catalog import CatalogInvalid, Figure, figures_of, toml

FILE = "prices.toml"
AMOUNTS = ("input_usd_per_m", "output_usd_per_m", "cached_usd_per_m")
LONG = ("long_input_usd_per_m", "long_output_usd_per_m", "long_cached_usd_per_m")
LONG_FROM = "long_from_tokens"


@dataclass(frozen=True)
class Price:
    """List price of a model at a provider, in USD for 10^6 tokens. `cached_usd_per_m`: input read from a cache.

    Requests with more input than `long_from_tokens` cost the `long` amounts instead, all of their tokens.
    """

    name: str
    provider: str
    input_usd_per_m: float
    output_usd_per_m: float
    cached_usd_per_m: float | None = None
    long_from_tokens: float | None = None
    long_input_usd_per_m: float | None = None
    long_output_usd_per_m: float | None = None
    long_cached_usd_per_m: float | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict, repr=False, compare=False)

    def at(self, input_tokens: float) -> Price:
        """The price of a request with so much input."""
        if self.long_from_tokens is None or input_tokens <= self.long_from_tokens:
            return self
        fresh, written = self.long_input_usd_per_m, self.long_output_usd_per_m
        return replace(
            self,
            input_usd_per_m=self.input_usd_per_m if fresh is None else fresh,
            output_usd_per_m=self.output_usd_per_m if written is None else written,
            cached_usd_per_m=self.long_cached_usd_per_m,
            long_from_tokens=None,
        )


@cache
def packaged() -> Mapping[str, Price]:
    """The prices that come with this version, by name."""
    return parse((resources.files("moe_planner") / "data" / FILE).read_text(encoding="utf-8"))


def parse(text: str) -> Mapping[str, Price]:
    """Prices from the text of a file. Raises CatalogInvalid."""
    return build(toml(FILE, text).get("prices", {}))


def build(entries: Mapping[str, Any]) -> Mapping[str, Price]:
    """Prices from the entries of files. Raises CatalogInvalid."""
    return {name: _price(name, entry) for name, entry in entries.items()}


def _price(name: str, entry: Mapping[str, Any]) -> Price:
    where = f"{entry.get('file', FILE) if isinstance(entry, dict) else FILE}: {name}"
    figures = figures_of(where, entry)
    figures.pop("file", None)
    wanted = [
        "provider",
        *AMOUNTS[:2],
        *([LONG_FROM, *LONG[:2]] if any(key.startswith("long_") for key in figures) else []),
    ]
    for key in wanted:
        if key not in figures:
            raise CatalogInvalid(f"{where}.{key}", "is missing: add it with its source")
    amounts: dict[str, float] = {}
    for key, figure in figures.items():
        if key == "provider":
            continue
        if key not in (*AMOUNTS, *LONG, LONG_FROM):
            known = ", ".join((*AMOUNTS, LONG_FROM, *LONG))
            raise CatalogInvalid(f"{where}.{key}", f"is not known: one of provider, {known}")
        value = figure.value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < LARGEST:
            unit = "tokens" if key == LONG_FROM else "USD"
            raise CatalogInvalid(f"{where}.{key}", f"must be an amount in {unit}, not negative")
        amounts[key] = float(value)
    provider = figures["provider"].value
    if not isinstance(provider, str) or not provider:
        raise CatalogInvalid(f"{where}.provider", "must be a name")
    return Price(name=name, provider=provider, figures=figures, **amounts)


LARGEST = 1e9
"""No price and no context is larger; what is, is a slip."""
