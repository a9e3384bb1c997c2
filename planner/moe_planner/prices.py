"""What closed and hosted APIs charge for tokens: list prices, each with its source and its day."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from moe_planner.catalog import CatalogInvalid, Figure, figures_of, toml

FILE = "prices.toml"
AMOUNTS = ("input_usd_per_m", "output_usd_per_m", "cached_usd_per_m")


@dataclass(frozen=True)
class Price:
    """List price of a model at a provider, in USD for 10^6 tokens. `cached_usd_per_m`: input read from a cache."""

    name: str
    provider: str
    input_usd_per_m: float
    output_usd_per_m: float
    cached_usd_per_m: float | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict, repr=False, compare=False)


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
    for wanted in ("provider", "input_usd_per_m", "output_usd_per_m"):
        if wanted not in figures:
            raise CatalogInvalid(f"{where}.{wanted}", "is missing: add it with its source")
    for key, figure in figures.items():
        if key == "provider":
            continue
        if key not in AMOUNTS:
            raise CatalogInvalid(f"{where}.{key}", f"is not known: one of provider, {', '.join(AMOUNTS)}")
        if not isinstance(figure.value, int | float) or isinstance(figure.value, bool) or figure.value < 0:
            raise CatalogInvalid(f"{where}.{key}", "must be an amount in USD, not negative")
    amounts = {key: float(figures[key].value) for key in AMOUNTS if key in figures}
    return Price(name=name, provider=str(figures["provider"].value), figures=figures, **amounts)
