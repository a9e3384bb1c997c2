"""Profiles A to D and the articles' break-evens, from inputs that have names."""

from __future__ import annotations

import pytest

from moe_planner.breakeven import Tariffed, break_even, output_share
from moe_planner.prices import packaged
from moe_planner.profiles import (
    ARTICLE_RENTS,
    CHAT,
    COMPLETION,
    GPT,
    OPEN_MODEL,
    OPUS,
    STATED_CHAT,
    STATED_COMPLETION,
    assumptions,
    needed,
    profiles,
    reproduced,
)


def test_stated_break_evens_are_met_within_three_per_cent() -> None:
    rows = reproduced()
    assert {row.stated.name for row in rows} >= {STATED_CHAT.name, STATED_COMPLETION.name}
    assert [row.stated.name for row in rows if abs(row.error) > 0.03] == []
    assert all(ARTICLE_RENTS[0] <= row.found.own.usd_per_gpu_hour <= ARTICLE_RENTS[1] for row in rows)


@pytest.mark.parametrize("stated", [GPT, OPUS, OPEN_MODEL], ids=lambda tariff: tariff.name)
def test_the_articles_prices_are_in_the_catalog(stated: Tariffed) -> None:
    listed = packaged()[stated.name]
    assert (listed.input_usd_per_m, listed.output_usd_per_m) == (stated.input_usd_per_m, stated.output_usd_per_m)
    assert stated.cached_usd_per_m in (None, listed.cached_usd_per_m)


def test_what_the_stated_figures_imply() -> None:
    assert STATED_CHAT.implied() == pytest.approx((4.87, 7.30), abs=0.005)
    assert STATED_COMPLETION.implied() == pytest.approx((9.73, 14.60), abs=0.005)


def test_both_at_one_rent_take_a_completion_token_for_twice_a_chat_token() -> None:
    chat, completion = (break_even(row.found.own, GPT, row.found.workload) for row in reproduced()[:2])
    assert completion.api_usd_per_m / chat.api_usd_per_m == pytest.approx(2.0, rel=0.03)


NEEDED = {
    "uncached chat at the lowest rent: not even input alone is so cheap": (STATED_CHAT, 2.0, 0.0, None),
    "half cached, it is": (STATED_CHAT, 2.0, 0.5, 11.87),
    "uncached chat at the highest": (STATED_CHAT, 3.0, 0.0, 9.87),
    "completion at the highest": (STATED_COMPLETION, 3.0, 0.0, 1.60),
}


@pytest.mark.parametrize("name", NEEDED)
def test_the_assumption_is_solved_for(name: str) -> None:
    stated, rent, cached, wanted = NEEDED[name]
    found = needed(stated, GPT, rent, cached).input_per_output
    assert found == (None if wanted is None else pytest.approx(wanted, abs=0.01))


def test_an_open_models_api_is_never_so_dear() -> None:
    prices = {row.usd_per_m for row in assumptions()}
    assert all(output_share(OPEN_MODEL, price) is None for price in prices)


def test_what_the_profiles_say() -> None:
    found = {(p.letter, r.found.workload.name, r.tokens_per_month): r.cheaper for p in profiles() for r in p.rows}
    assert {letter for letter, _, _ in found} == {"A", "B", "C", "D"}
    assert {kind for (letter, _, _), kind in found.items() if letter == "A"} == {"API"}
    assert found["B", CHAT.name, 1.2e9] == "neither decides"
    assert found["B", COMPLETION.name, 1e9] == "own"
    assert found["B", CHAT.name, 1e9] == "API"  # the lower end of the profile, below its own break-even
    assert {kind for (letter, _, _), kind in found.items() if letter == "C"} == {"own"}
