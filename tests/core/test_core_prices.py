"""Prices: where they come from, in which order, and that sums of them are exact."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core import prices
from moe_core.prices import FREE, Price, PriceFileInvalid, PriceTier, cost_usd, most_usd, price_of, read_overrides

AT = datetime(2026, 11, 23, 12, tzinfo=UTC)
TIERED = Price(Decimal(5), Decimal(30), Decimal("0.5"), (PriceTier(1000, Decimal(10), Decimal(45), Decimal(1)),))
MONEY = st.decimals(0, 1000, places=6)


@pytest.mark.parametrize(
    ("prompt", "output", "cached", "micro_usd"),
    [
        pytest.param(1000, 10, 0, 5000 + 300, id="at the threshold, the base price"),
        pytest.param(1001, 10, 0, 10010 + 450, id="above it, all tokens pay the tier"),
        pytest.param(1000, 10, 400, 600 * 5 + 200 + 300, id="cached input"),
        pytest.param(1001, 0, 1001, 1001, id="cached input of a tier"),
        pytest.param(100, 0, 999, 50, id="no more is cached than there is"),
        pytest.param(0, 0, 0, 0, id="nothing"),
    ],
)
def test_a_call_pays_by_its_tier(prompt: int, output: int, cached: int, micro_usd: int) -> None:
    assert cost_usd(prompt, output, TIERED, cached) * 10**6 == micro_usd


def test_cached_input_without_a_price_costs_in_full() -> None:
    assert cost_usd(100, 0, Price(Decimal(5), Decimal(30)), 60) == cost_usd(100, 0, Price(Decimal(5), Decimal(30)))


@given(st.integers(0, 10**7), st.integers(0, 10**6), MONEY, MONEY)
def test_costs_are_exact(prompt: int, output: int, price_in: Decimal, price_out: Decimal) -> None:
    assert cost_usd(prompt, output, Price(price_in, price_out)) * 10**6 == prompt * price_in + output * price_out


_RATES = st.tuples(MONEY, MONEY, st.one_of(st.none(), MONEY))


@given(
    _RATES,
    st.lists(st.tuples(st.integers(0, 3000), _RATES), max_size=3, unique_by=lambda tier: tier[0]),
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.data(),
)
def test_nothing_within_the_bounds_costs_more_than_the_most(
    base: tuple[Decimal, Decimal, Decimal | None],
    tiers: list[tuple[int, tuple[Decimal, Decimal, Decimal | None]]],
    prompt_bound: int,
    output_bound: int,
    data: st.DataObject,
) -> None:
    price = Price(*base, tuple(PriceTier(start, *rates) for start, rates in tiers))
    prompt = data.draw(st.integers(0, prompt_bound))
    output, cached = data.draw(st.integers(0, output_bound)), data.draw(st.integers(0, prompt))
    assert cost_usd(prompt, output, price, cached) <= most_usd(prompt_bound, output_bound, price)


def test_the_catalog_knows_tiers_and_says_which_release_it_is() -> None:
    price = prices.from_catalog("openai", "gpt-5.5", AT)
    assert price is not None
    assert price.input_usd_per_m < price.rates(10**6).input_usd_per_m
    assert price.cached_input_usd_per_m is not None
    assert price.source == f"genai-prices {prices.catalog_version()}"
    assert price.dated == "2026-11"


def test_a_price_by_the_hour_counts_as_its_dearest() -> None:
    prices_of_a_day = [prices._at("deepseek", "deepseek-chat", AT.replace(hour=hour)) for hour in range(24)]
    told = {price.input_usd_per_m for price in prices_of_a_day if price is not None}
    assert len(told) > 1
    first, *others = [price for price in prices_of_a_day if price is not None]
    for other in others:
        first = prices._dearer(first, other)
    assert first.input_usd_per_m == max(told)
    assert {moment.hour for moment in prices._moments("deepseek", "deepseek-chat", AT)} == set(range(24))


OWN = Price(Decimal(1), Decimal(2))
FILE = {("openai", "gpt-5.5"): Price(Decimal(3), Decimal(4), source="a letter", dated="2026-11-23")}
ORDER = {
    "the resource's own price": (("openai", "gpt-5.5", OWN, FILE), "the resource"),
    "then the file's": (("openai", "gpt-5.5", FREE, FILE), "a letter"),
    "then the catalog's": (("openai", "gpt-5.5", FREE, {}), "genai-prices"),
    "an unknown model has none": (("openai", "no-such-model", FREE, {}), None),
    "no model of a closed API is free": (("openai", "no-such-model", FREE, {("openai", "no-such-model"): FREE}), None),
    "one's own server may be": (("openai-compatible", "gpt-5.5", FREE, {}), "said to be free"),
}


@pytest.mark.parametrize(("asked", "source"), ORDER.values(), ids=ORDER)
def test_whose_price_counts(asked: tuple[str, str, Price, dict[tuple[str, str], Price]], source: str | None) -> None:
    found = price_of(*asked, AT)
    assert (None if found is None else found.source.rsplit(" 0.", 1)[0]) == source


ENTRY = {
    "provider": "openai",
    "model": "m",
    "inputUsdPerM": "1.10",
    "outputUsdPerM": 4,
    "tiers": [{"abovePromptTokens": 10, "inputUsdPerM": 2, "outputUsdPerM": 8, "cachedInputUsdPerM": "0.2"}],
    "source": "https://example.org/prices",
    "date": "2026-11-23",
}


def test_a_file_in_toml_and_in_json_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"prices": [ENTRY]}))
    (tmp_path / "p.toml").write_text(
        '[[prices]]\nprovider = "openai"\nmodel = "m"\ninputUsdPerM = 1.10\noutputUsdPerM = 4\n'
        'source = "https://example.org/prices"\ndate = "2026-11-23"\n'
        '[[prices.tiers]]\nabovePromptTokens = 10\ninputUsdPerM = 2\noutputUsdPerM = 8\ncachedInputUsdPerM = "0.2"\n'
    )
    from_json, from_toml = read_overrides(tmp_path / "p.json"), read_overrides(tmp_path / "p.toml")
    assert from_json == from_toml
    assert from_json["openai", "m"].input_usd_per_m == Decimal("1.10")
    assert cost_usd(11, 0, from_json["openai", "m"], 11) * 10**6 == Decimal("2.2")


REFUSED = {
    "no file": (None, "No such file"),
    "no JSON": ("{", "is not JSON"),
    "a price below zero": (json.dumps({"prices": [ENTRY | {"inputUsdPerM": -1}]}), "prices.0.inputUsdPerM"),
    "no source": (json.dumps({"prices": [ENTRY | {"source": ""}]}), "prices.0.source"),
    "no date": (json.dumps({"prices": [ENTRY | {"date": "soon"}]}), "prices.0.date"),
    "two prices of one model": (json.dumps({"prices": [ENTRY, ENTRY]}), "openai m has two prices"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_file_is_refused_by_entry(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PriceFileInvalid, match=message):
        read_overrides(path)
