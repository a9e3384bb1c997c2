"""What tokens cost, from which volume own GPUs pay, and the mix of both: laws, and figures worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_planner.breakeven import (
    Own,
    Tariffed,
    break_even,
    implied_usd_per_m,
    output_share,
    scaled,
    sensitivities,
)
from moe_planner.cost import MILLION, CostInvalid, Workload, allocation, allocation_set, api_usd_per_m, own_cost
from moe_planner.mix import Mix, Replica, Trace, mixes

GPT = Tariffed("gpt", 5.0, 30.0, 0.5)
CHAT = Workload("chat", 1800, 200, cached_share=0.5)
PRICE = st.floats(0.01, 100)
TARIFFS = st.builds(Tariffed, st.just("api"), PRICE, PRICE, st.one_of(st.none(), PRICE))
WORKLOADS = st.builds(
    Workload, st.just("w"), st.floats(0, 1e5), st.floats(1, 1e4), cached_share=st.floats(0.0, 1.0, allow_nan=False)
)
RENTS = st.floats(0.01, 50)
SPEEDS = st.floats(10, 1e6)

PRICES: dict[str, tuple[Workload, Tariffed, float]] = {
    "output alone": (Workload("w", 0, 100), GPT, 30.0),
    "input alone": (Workload("w", 100, 0), GPT, 5.0),
    "three for one": (Workload("w", 300, 100), GPT, 11.25),
    "half of the input cached": (CHAT, GPT, 5.475),
    "a cache that saves nothing": (CHAT, Tariffed("plain", 5.0, 30.0), 7.5),
}


@pytest.mark.parametrize("name", PRICES)
def test_an_apis_price_by_workload(name: str) -> None:
    workload, tariff, wanted = PRICES[name]
    assert api_usd_per_m(tariff, workload) == pytest.approx(wanted)


def test_own_cost_by_hand() -> None:
    """3,600 USD an hour is one a second; 3,000 tokens of input are read in 1 s of the 4 s that a request takes."""
    found = own_cost(3600, 3000, 1000, Workload("w", 3000, 1000))
    assert (found.mean_usd_per_m, found.input_usd_per_m) == pytest.approx((1000, 1e6 / 3000))
    assert found.output_usd_per_m == pytest.approx(3 / 1000 * 1e6)
    assert own_cost(3600, 3000, 1000, Workload("w", 3000, 1000), utilisation=0.5).mean_usd_per_m == pytest.approx(2000)


@given(rent=RENTS, prefill=SPEEDS, total=SPEEDS, workload=WORKLOADS, used=st.floats(0.05, 1.0))
def test_own_cost_adds_up_and_is_never_negative(
    rent: float, prefill: float, total: float, workload: Workload, used: float
) -> None:
    found = own_cost(rent, prefill, total, workload, used)
    fresh, cached = (workload.input_tokens * s for s in (1 - workload.cached_share, workload.cached_share))
    parts = fresh * found.input_usd_per_m + cached * found.cached_usd_per_m
    parts += workload.output_tokens * found.output_usd_per_m
    assert parts == pytest.approx(found.mean_usd_per_m * workload.tokens)
    assert min(found.input_usd_per_m, found.cached_usd_per_m, found.output_usd_per_m) >= 0
    dearer = own_cost(rent * 1.5, prefill, total, workload, used)
    assert dearer.mean_usd_per_m > found.mean_usd_per_m
    assert own_cost(rent, prefill, total * 2, workload, used).mean_usd_per_m < found.mean_usd_per_m


@given(rent=RENTS, gpus=st.integers(1, 64), tariff=TARIFFS, workload=WORKLOADS)
def test_break_even_times_the_price_is_the_rent(rent: float, gpus: int, tariff: Tariffed, workload: Workload) -> None:
    own = Own(gpus, rent)
    found = break_even(own, tariff, workload)
    assert found.tokens_per_month is not None
    assert found.tokens_per_month * found.api_usd_per_m / MILLION == pytest.approx(own.usd_per_month)
    assert implied_usd_per_m(own.usd_per_month, found.tokens_per_month) == pytest.approx(found.api_usd_per_m)
    dearer = break_even(replace(own, usd_per_gpu_hour=rent * 2), tariff, workload)
    assert dearer.tokens_per_month == pytest.approx(found.tokens_per_month * 2)


@given(rent=RENTS, speed=SPEEDS, tariff=TARIFFS, workload=WORKLOADS, times=st.floats(1.0, 50.0))
def test_beyond_the_break_even_whole_replicas_are_cheaper_where_each_is_full(
    rent: float, speed: float, tariff: Tariffed, workload: Workload, times: float
) -> None:
    own = Own(4, rent, capacity_tokens_per_s=speed)
    found = break_even(own, tariff, workload)
    full = own.tokens_per_month * round(times)
    api = full / MILLION * found.api_usd_per_m
    if found.tokens_per_month is None:
        assert own.usd(full) > api * (1 - 1e-9)
    else:
        assert own.usd(full) <= api * (1 + 1e-9)


@given(tariff=TARIFFS, share=st.floats(0.0, 1.0), cached=st.floats(0.0, 1.0))
def test_a_price_says_the_share_of_output(tariff: Tariffed, share: float, cached: float) -> None:
    price = api_usd_per_m(tariff, Workload("w", 1000 * (1 - share), 1000 * share, cached))
    found = output_share(tariff, price, cached)
    if found is not None:
        again = api_usd_per_m(tariff, Workload("w", 1000 * (1 - found), 1000 * found, cached))
        assert again == pytest.approx(price)


def test_a_price_that_no_mix_has() -> None:
    assert output_share(GPT, 31.0) is None
    assert output_share(GPT, 4.9) is None
    assert output_share(Tariffed("flat", 2.0, 2.0), 2.0) is None


def test_sensitivities_move_as_they_must() -> None:
    own = Own(4, 2.0, capacity_tokens_per_s=2000, utilisation=0.6)
    rows = {row.input: row for row in sensitivities(own, GPT, CHAT)}
    now = break_even(own, GPT, CHAT).tokens_per_month
    assert now is not None
    rent, api = rows["rent, USD per GPU-hour"], rows["API, USD per 1M tokens"]
    assert (rent.low[1], rent.high[1]) == pytest.approx((now * 0.75, now * 1.25))
    assert (api.low[1], api.high[1]) == pytest.approx((now / 0.75, now / 1.25))
    cached = rows["cached share of input"]
    assert cached.low[1] is not None
    assert cached.high[1] is not None
    assert cached.low[1] < now < cached.high[1]
    assert rows["utilisation"].high == (pytest.approx(0.75), now)
    longer = rows["input tokens per output token"]
    assert longer.now == 9
    assert longer.high[1] is not None
    assert longer.high[1] > now


def test_a_replica_too_slow_for_its_rent_never_pays() -> None:
    slow = Own(8, 3.0, capacity_tokens_per_s=500)
    found = break_even(slow, GPT, CHAT)
    assert found.tokens_per_month is None
    assert found.unlimited > slow.tokens_per_month
    assert break_even(replace(slow, capacity_tokens_per_s=5000), GPT, CHAT).tokens_per_month == found.unlimited
    assert break_even(replace(slow, capacity_tokens_per_s=5000, utilisation=0.1), GPT, CHAT).tokens_per_month is None
    assert break_even(slow, Tariffed("free", 0, 0), CHAT).tokens_per_month is None


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a negative price": (lambda: Tariffed("gpt", -5.0, 30.0), "gpt.input_usd_per_m"),
    "a negative price of the cache": (lambda: Tariffed("gpt", 5.0, 30.0, -1.0), "gpt.cached_usd_per_m"),
    "a price that is no number": (lambda: Tariffed("gpt", 5.0, float("nan")), "gpt.output_usd_per_m"),
    "a negative rent": (lambda: Own(4, -2.0), "rent"),
    "no GPU": (lambda: Own(0, 2.0), "gpus"),
    "more than all": (lambda: Workload("w", 10, 10, cached_share=1.5), "workload.cached_share"),
    "no tokens": (lambda: Workload("w", 0, 0), "workload.output_tokens"),
    "used more than all the time": (lambda: Own(4, 2.0, utilisation=1.5), "utilisation"),
    "no speed": (lambda: own_cost(1, 0, 1, CHAT), "prefill_tokens_per_s"),
    "no capacity": (lambda: Own(4, 2.0, capacity_tokens_per_s=0.0), "capacity"),
    "an empty trace": (lambda: Trace((), (), ()), "trace"),
    "columns of two lengths": (lambda: Trace((1.0,), (1.0,), ()), "trace"),
    "time that runs back": (lambda: allocated(hours=-1), "end"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_cost_can_have_is_refused_by_field(name: str) -> None:
    make, field = WRONG[name]
    with pytest.raises(CostInvalid) as caught:
        make()
    assert caught.value.field == field
    assert caught.value.remedy


REPLICA = Replica(usd_per_hour=36.0, prefill_tokens_per_s=1000, output_tokens_per_s=100)
"""One cent a second."""


def test_a_mix_by_hand() -> None:
    """Ten windows of 10 s, each with 10 s of work, and one with 30 s more: 0.90 USD at the API, or three replicas more.

    1,000 tokens of output take 10 s, and cost 30 cents at the API; a replica costs a dollar for the 100 s.
    """
    at = [float(10 * n) for n in range(10)] + [55.0] * 3
    trace = Trace(at, [0.0] * 13, [1000.0] * 13)
    found = mixes(trace, REPLICA, Tariffed("api", 5.0, 300.0))
    assert [mix.replicas for mix in found.options] == [0, 1, 2, 3, 4]
    assert [mix.usd for mix in found.options] == pytest.approx([13 * 0.3, 1.0 + 0.9, 2.0 + 0.6, 3.0 + 0.3, 4.0])
    assert found.best.replicas == 1
    assert (found.best.api_token_share, found.best.busy_share) == pytest.approx((3 / 13, 1.0))
    assert mixes(trace, REPLICA, Tariffed("cheap", 5.0, 30.0)).best == found.all_api.__class__(
        replicas=0, own_usd=0.0, api_usd=pytest.approx(0.39), api_token_share=1.0, busy_share=0.0
    )


def test_what_the_api_serves_cheapest_goes_there() -> None:
    """Two requests of 10 s each for one replica: the one of input costs 5 cents at the API, the other 30."""
    trace = Trace([0.0, 1.0], [10_000.0, 0.0], [0.0, 1000.0])
    found = mixes(trace, REPLICA, Tariffed("api", 5.0, 300.0))
    assert found.options[1].api_usd == pytest.approx(0.05)


REQUESTS = st.lists(st.tuples(st.floats(0, 600), st.integers(0, 9000), st.integers(1, 2000)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, tariff=TARIFFS, rent=RENTS, cached=st.floats(0.0, 1.0), window=st.floats(1.0, 60.0))
def test_the_best_mix_is_never_dearer_than_either(
    requests: list[tuple[float, int, int]], tariff: Tariffed, rent: float, cached: float, window: float
) -> None:
    at, inputs, outputs = zip(*requests, strict=True)
    replica = Replica(rent, 20_000, 2000)
    found = mixes(Trace(at, inputs, outputs), replica, tariff, window_s=window, cached_share=cached)
    assert found.best.usd <= min(found.all_api.usd, found.all_own.usd)
    everything = sum(api_usd_per_m(tariff, Workload("w", i, o, cached)) * (i + o) / MILLION for _, i, o in requests)
    assert found.all_api.usd == pytest.approx(everything)
    assert (found.all_own.api_usd, found.all_own.api_token_share) == (0.0, 0.0)
    for fewer, more in zip(found.options, found.options[1:], strict=False):
        assert more.api_usd <= fewer.api_usd + 1e-9
        assert more.api_token_share <= fewer.api_token_share + 1e-9
        assert 0 <= more.busy_share <= 1
    dearer = mixes(Trace(at, inputs, outputs), replace(replica, usd_per_hour=rent * 2), tariff, window_s=window)
    cheaper = mixes(Trace(at, inputs, outputs), replica, tariff, window_s=window)
    assert dearer.best.usd >= cheaper.best.usd - 1e-12
    assert mixes(Trace(at, inputs, outputs), replica, scaled(tariff, 2), window_s=window).best.usd >= cheaper.best.usd


def allocated(hours: float = 6.0) -> dict[str, object]:
    start = datetime(2026, 11, 23, tzinfo=UTC)
    return allocation(
        "qwen3",
        start=start,
        end=start + timedelta(hours=hours),
        gpus=4,
        gpu_usd_per_hour=2.0,
        external_usd=1.5,
        gpu_busy_share=0.4,
        properties={"namespace": "default"},
    )


def test_an_allocation_as_opencost_has_it() -> None:
    found = allocation_set(allocated())
    assert found["code"] == 200
    entry = json.loads(json.dumps(found))["data"][0]["qwen3"]
    assert (entry["minutes"], entry["gpuHours"], entry["gpuCost"], entry["totalCost"]) == (360, 24, 48, 49.5)
    assert entry["window"] == {"start": entry["start"], "end": entry["end"]}
    costs = [value for key, value in entry.items() if key.endswith("Cost") and key != "totalCost"]
    assert sum(costs) == entry["totalCost"]


def test_mixes_are_plain_values() -> None:
    assert Mix(1, 2.0, 3.0, 0.5, 0.5).usd == 5.0
