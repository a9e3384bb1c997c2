"""What a call to a closed API costs: prices with context tiers and cached input, their sources, and exact sums.

A price comes from the resource itself, else from a file of the operator's own, else from the catalog that genai-prices
brings. The catalog is a package pinned by the lock, so that a price changes only with a release that a person took.
"""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, time, timedelta
from decimal import ROUND_CEILING, Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from moe_api.base import Model

PICO = Decimal(10) ** 12
FREE_PROVIDER = "openai-compatible"
"""Only behind this API may a model be free: it can be one's own server."""
CATALOG = "genai-prices"
CATALOG_DATES = {"0.2.3": "2026-11"}
"""Month in which a release of the catalog was published, where known."""
_CATALOG_PROVIDERS = {
    "openai": "openai",
    "anthropic": "anthropic",
    "gemini": "google",
    "azure-openai": "azure",
    "bedrock": "aws",
}


class PriceFileInvalid(Exception):
    """A file of prices that cannot be used; the message names the entry and the remedy."""


@dataclass(frozen=True)
class PriceTier:
    """Prices of a whole call whose prompt has more than so many tokens."""

    above_prompt_tokens: int
    input_usd_per_m: Decimal
    output_usd_per_m: Decimal
    cached_input_usd_per_m: Decimal | None = None


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens. Without a price of its own, cached input costs what input does."""

    input_usd_per_m: Decimal
    output_usd_per_m: Decimal
    cached_input_usd_per_m: Decimal | None = None
    tiers: tuple[PriceTier, ...] = ()
    source: str = ""
    dated: str = ""

    @functools.cached_property  # asked three times for each request
    def free(self) -> bool:
        return not any(tier.input_usd_per_m or tier.output_usd_per_m for tier in self._rates)

    def rates(self, prompt_tokens: int) -> PriceTier:
        """The tier of a call: the highest whose threshold its prompt passes; all of its tokens pay that."""
        return [tier for tier in self._rates if prompt_tokens > tier.above_prompt_tokens][-1]

    @functools.cached_property
    def _rates(self) -> tuple[PriceTier, ...]:
        base = PriceTier(-1, self.input_usd_per_m, self.output_usd_per_m, self.cached_input_usd_per_m)
        return (base, *sorted(self.tiers, key=lambda tier: tier.above_prompt_tokens))


FREE = Price(Decimal(0), Decimal(0))


def cost_usd(prompt_tokens: int, output_tokens: int, price: Price, cached_tokens: int = 0) -> Decimal:
    """Dollars for so many tokens, `cached_tokens` of the prompt read from the provider's cache: exact, but for a price
    finer than a millionth of a micro-dollar, rounded up."""
    rates = price.rates(prompt_tokens)
    cached = min(max(cached_tokens, 0), prompt_tokens)
    cached_rate = rates.input_usd_per_m if rates.cached_input_usd_per_m is None else rates.cached_input_usd_per_m
    usd_m = (prompt_tokens - cached) * rates.input_usd_per_m + cached * cached_rate
    return pico(usd_m + output_tokens * rates.output_usd_per_m, per=10**6) / PICO


def most_usd(prompt_bound: int, output_bound: int, price: Price) -> Decimal:
    """The most that a call can cost with at most so many tokens: at the dearest tier within reach, nothing cached."""
    reached = [tier for tier in price._rates if prompt_bound > tier.above_prompt_tokens]
    dear_input = max(max(tier.input_usd_per_m, tier.cached_input_usd_per_m or Decimal(0)) for tier in reached)
    dear_output = max(tier.output_usd_per_m for tier in reached)
    return pico(prompt_bound * dear_input + output_bound * dear_output, per=10**6) / PICO


def pico(usd: Decimal, per: int = 1) -> int:
    """Pico-dollars, rounded up. `per`: of so many dollars' worth."""
    return int((usd * (PICO / per)).to_integral_value(ROUND_CEILING))


# Prices of a file


class _FileTier(Model):
    above_prompt_tokens: int = Field(ge=0)
    input_usd_per_m: Decimal = Field(ge=0)
    output_usd_per_m: Decimal = Field(ge=0)
    cached_input_usd_per_m: Decimal | None = Field(default=None, ge=0)


class _FilePrice(Model):
    provider: str
    model: str
    input_usd_per_m: Decimal = Field(ge=0)
    output_usd_per_m: Decimal = Field(ge=0)
    cached_input_usd_per_m: Decimal | None = Field(default=None, ge=0)
    tiers: tuple[_FileTier, ...] = ()
    source: str = Field(min_length=1, description="where the price was read")
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="when it was read")


class _File(Model):
    prices: tuple[_FilePrice, ...]


Overrides = Mapping[tuple[str, str], Price]
"""(provider, model) → price."""


def read_overrides(path: Path) -> dict[tuple[str, str], Price]:
    """Prices in a TOML or JSON file. Raises PriceFileInvalid."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            document: Any = tomllib.loads(text, parse_float=Decimal)
        else:
            document = json.loads(text, parse_float=Decimal)
        entries = _File.model_validate(document).prices
    except OSError as error:
        raise PriceFileInvalid(f"{path}: {error.strerror}; name a readable file") from None
    except UnicodeDecodeError:
        raise PriceFileInvalid(f"{path}: is not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise PriceFileInvalid(f"{path}: is not {kind}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "prices"
        raise PriceFileInvalid(f"{path}: {place}: {first['msg']}") from None
    found: dict[tuple[str, str], Price] = {}
    for entry in entries:
        if (entry.provider, entry.model) in found:
            raise PriceFileInvalid(f"{path}: {entry.provider} {entry.model} has two prices; keep one")
        tiers = tuple(PriceTier(**dict(tier)) for tier in entry.tiers)
        found[entry.provider, entry.model] = Price(
            entry.input_usd_per_m,
            entry.output_usd_per_m,
            entry.cached_input_usd_per_m,
            tiers,
            entry.source,
            entry.date,
        )
    return found


# Prices of the catalog


def catalog_version() -> str | None:
    """Release of the catalog that is installed, or None."""
    try:
        return metadata.version(CATALOG)
    except metadata.PackageNotFoundError:
        return None


def from_catalog(provider: str, model: str, at: datetime) -> Price | None:
    """The catalog's price of a model, or None where it has none that could be kept to.

    Where a price depends on the hour, or a later one is known already, each part is the dearest of them: nobody looks
    at the clock again while the gateway runs.
    """
    known, version = _CATALOG_PROVIDERS.get(provider), catalog_version()
    if known is None or version is None:
        return None
    moments = _moments(known, model, at)
    prices = [price for price in (_at(known, model, moment) for moment in moments) if price is not None]
    if not prices or len(prices) < len(moments):
        return None
    dearest = functools.reduce(_dearer, prices)
    if dearest.free:
        return None  # A model without a price, or with one that we do not know how to count.
    return replace(dearest, source=f"{CATALOG} {version}", dated=CATALOG_DATES.get(version, "unknown"))


def in_catalog(provider: str, model: str) -> bool:
    """Whether the catalog has a price of a model."""
    return from_catalog(provider, model, datetime(2100, 1, 1, tzinfo=UTC)) is not None


def _entry(provider: str, model: str) -> Any:
    """The catalog's entry of a model, or None. The package takes half a second to load: only who asks pays."""
    from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415

    try:
        _, entry = get_snapshot().find_provider_model(model, None, provider, None)
    except LookupError:
        return None
    return entry


def _moments(provider: str, model: str, at: datetime) -> list[datetime]:
    """Times at which the price of a model may differ: each hour of today and of each day that begins a price."""
    entry = _entry(provider, model)
    conditional = [] if entry is None or not isinstance(entry.prices, list) else entry.prices
    if not conditional:
        return [at]
    starts = [getattr(price.constraint, "start_date", None) for price in conditional]
    days = {at.date(), *(day for day in starts if day is not None and day > at.date())}
    midnights = [datetime.combine(day, time(0), UTC) for day in sorted(days)]
    return [midnight + timedelta(minutes=30 * half) for midnight in midnights for half in range(48)]


def _at(provider: str, model: str, moment: datetime) -> Price | None:
    entry = _entry(provider, model)
    if entry is None:
        return None
    told = entry.get_prices(moment)
    given, made, cached = (getattr(told, name, None) for name in ("input_mtok", "output_mtok", "cache_read_mtok"))
    if given is None or made is None:
        return None
    starts = sorted({tier.start for part in (given, made, cached) for tier in getattr(part, "tiers", ())})
    tiers = tuple(
        PriceTier(start, _rate(given, start), _rate(made, start), None if cached is None else _rate(cached, start))
        for start in starts
    )
    return Price(_rate(given, -1), _rate(made, -1), None if cached is None else _rate(cached, -1), tiers)


def _rate(part: Any, start: int) -> Decimal:
    """A part's price of prompts just above a threshold; below all of them for -1."""
    rate = getattr(part, "base", part)
    for tier in getattr(part, "tiers", ()):
        if tier.start <= start:
            rate = tier.price
    return Decimal(rate)


def _dearer(one: Price, other: Price) -> Price:
    """Each part the dearer of two prices."""
    starts = sorted({tier.above_prompt_tokens for price in (one, other) for tier in price.tiers})
    tiers = tuple(_dearer_rates(one.rates(start + 1), other.rates(start + 1), start) for start in starts)
    base = _dearer_rates(one.rates(0), other.rates(0), -1)
    return Price(base.input_usd_per_m, base.output_usd_per_m, base.cached_input_usd_per_m, tiers)


def _dearer_rates(one: PriceTier, other: PriceTier, start: int) -> PriceTier:
    cached = (one.cached_input_usd_per_m, other.cached_input_usd_per_m)
    known: Iterable[Decimal] = [rate for rate in cached if rate is not None]
    return PriceTier(
        start,
        max(one.input_usd_per_m, other.input_usd_per_m),
        max(one.output_usd_per_m, other.output_usd_per_m),
        None if None in cached else max(known),
    )


# The price of a target


def price_of(
    provider: str,
    model: str,
    own: Price,
    overrides: Overrides,
    at: datetime,
) -> Price | None:
    """The price to keep a target's books by, or None where there is none: then nothing may be sent to it.

    `own` is what the resource says, free where it says nothing; only an OpenAI-compatible server may be that.
    """
    if not own.free:
        return replace(own, source=own.source or "the resource")
    found = overrides.get((provider, model))
    if found is not None and (not found.free or provider == FREE_PROVIDER):
        return found
    if provider == FREE_PROVIDER:
        return replace(own, source="said to be free")
    return from_catalog(provider, model, at)
