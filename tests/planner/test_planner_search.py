"""The search: what it keeps, what it rejects and why, and rules that hold for any speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_api.spec_model import ParallelismSpec
from moe_planner import memory
from moe_planner.calibration import Factors
from moe_planner.catalog import Catalog, packaged
from moe_planner.cost import CostInvalid
from moe_planner.memory import Ask
from moe_planner.search import GAMMAS, Found, Option, Place, Slo, Traffic, pareto, places, plan
from moe_planner.speed import Load, Speed, SpeedUnknown
from moe_planner.weights import Layout

QWEN, V4 = "Qwen/Qwen3-235B-A22B-FP8", "deepseek-ai/DeepSeek-V4-Pro"
CHAT = Traffic(2000, 200)


def ask(model: str = QWEN) -> Ask:
    known = packaged().model(model)
    assert known is not None
    return Ask(*known, packaged().accelerators["nvidia-h100"], fp8_cache=False)


def at(*gpus: int, accelerator: str = "nvidia-h100") -> tuple[Place, ...]:
    return places(packaged(), (accelerator,), gpus)


def speed_of(ask: Ask, layout: Layout, load: Load, catalog: Catalog, factors: Factors | None = None) -> Speed:
    """A replica that takes 10 ms for a step and 0.1 ms more for each request; tensor ranks share that out."""
    step = 0.010 + 0.0001 * load.concurrency / layout.tensor
    output = load.concurrency / step
    total = output * (load.input_tokens + load.output_tokens) / load.output_tokens
    return Speed(
        prefill_tokens_per_s=10_000.0,
        output_tokens_per_s=output,
        total_tokens_per_s=total,
        ttft_s=0.1 + step,
        itl_s=step,
        step_s=step,
        s_mbu=0.5,
        s_mfu=0.2,
        bound="memory",
        parts={"linear": step},
        low=output / 2,
        high=output * 2,
        running=load.concurrency,
        batched_tokens=2048,
    )


def searched(model: str, where: tuple[Place, ...], slo: Slo, traffic: Traffic = CHAT, **rest: object) -> Found:
    return plan(ask(model), traffic, slo, packaged(), where, predict=speed_of, **rest)  # type: ignore[arg-type]


def test_the_slo_bounds_the_batch_and_the_cheapest_is_chosen() -> None:
    """An ITL of 12 ms leaves room for 20 requests by tensor rank, and one in sixteen less by the search's grain."""
    found = searched(QWEN, at(4), Slo(itl_s=0.012))
    assert found.best is not None
    assert found.best.over(found.slo) <= 1
    widest = [o for o in found.options if o.layout.tensor == 4]
    assert 75 <= max(o.concurrency for o in widest) <= 80
    assert found.best.usd_per_m == min(o.usd_per_m or math.inf for o in found.options)
    assert found.best in found.front
    assert {row.why for row in found.rejected} <= {"SLO"}


def test_without_an_slo_the_cache_bounds_it() -> None:
    found = searched(QWEN, at(4), Slo())
    for option in found.options:
        held = memory.sequence_bytes(ask(), option.layout, 2200, 0) * option.concurrency / option.layout.data
        assert held <= option.memory.cache


def test_an_slo_that_nothing_keeps_names_the_nearest() -> None:
    found = searched(QWEN, at(4), Slo(itl_s=0.001))
    assert (found.best, found.options) == (None, ())
    assert found.nearest is not None
    assert found.nearest.concurrency == 1
    assert {row.why for row in found.rejected} == {"SLO"}
    assert "ITL of 10 ms against 1 with 1 in flight" in found.rejected[0].text


def unknown(ask: Ask, layout: Layout, load: Load, catalog: Catalog, factors: Factors | None = None) -> Speed:
    raise SpeedUnknown("accelerators.x.bandwidth_gb_s: not known")


REJECTED: dict[str, tuple[str, tuple[Place, ...], dict[str, object], str, str]] = {
    "too large": (V4, at(8), {}, "memory", "GiB a GPU too little"),
    "a context too long": (QWEN, at(4), {"context": 40_000_000}, "memory", "one sequence of 40,000,000"),
    "heads do not divide": (QWEN, at(4), {"parallelism": ParallelismSpec(tensor=3)}, "impossible", "spec.parallelism"),
    "three GPUs, which only stages can share": (QWEN, at(3), {}, "impossible", "not served yet"),
    "no bandwidth known": (QWEN, at(4), {"predict": unknown}, "unknown speed", "bandwidth_gb_s"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_rejected_says_why(name: str) -> None:
    model, where, rest, why, words = REJECTED[name]
    found = plan(ask(model), CHAT, Slo(), packaged(), where, **{"predict": speed_of, **rest})  # type: ignore[arg-type]
    assert found.options == ()
    assert {row.why for row in found.rejected} == {why}
    assert all(words in row.text for row in found.rejected)


def test_only_what_is_served_unless_asked_for() -> None:
    found = searched(QWEN, at(8), Slo())
    assert {o.layout.pipeline for o in found.options} == {1}
    assert {o.layout.expert for o in found.options if o.layout.data > 1} == {8}
    piped = searched(QWEN, at(8), Slo(), parallelism=ParallelismSpec(pipeline=2))
    assert {o.layout.pipeline for o in piped.options} == {2}


def test_skew_brings_capacity_and_spare_experts() -> None:
    skewed = replace(CHAT, skew=0.8)
    found = searched(QWEN, at(8), Slo(), skewed)
    assert {o.gamma for o in found.options} == set(GAMMAS)
    assert {o.redundant for o in found.options} == {0, 16}
    plain = searched(QWEN, at(8), Slo(), skewed, gammas=(None,))
    assert {o.gamma for o in plain.options} == {None}
    assert {(o.gamma, o.redundant) for o in searched(QWEN, at(8), Slo()).options} == {(None, 0)}
    assert found.best is not None
    assert (found.best.gamma, found.best.redundant) == (None, 0), "of equals, the one that changes no answer"


def test_a_rate_takes_whole_replicas() -> None:
    one = searched(QWEN, at(4), Slo(itl_s=0.012)).best
    assert one is not None
    rate = one.speed.total_tokens_per_s * 2.5
    found = searched(QWEN, at(4), Slo(itl_s=0.012), replace(CHAT, tokens_per_s=rate, utilisation=0.8)).best
    assert found is not None
    assert (found.replicas, found.gpus) == (4, 16)
    rent = packaged().accelerators["nvidia-h100"].rent_usd_per_hour
    assert rent is not None
    assert found.usd_per_m == pytest.approx(16 * rent / 3600 / rate * 1e6)


def test_a_rent_given_stands_for_the_catalogs_and_none_is_no_cost() -> None:
    given_rent = searched(QWEN, tuple(replace(p, rent=10.0) for p in at(4)), Slo()).best
    assert given_rent is not None
    assert given_rent.usd_per_m == pytest.approx(40 / 3600 / given_rent.speed.total_tokens_per_s * 1e6)
    accelerator = replace(packaged().accelerators["nvidia-h100"], rent_usd_per_hour=None)
    found = searched(QWEN, (Place(accelerator, 4),), Slo())
    assert {o.usd_per_m for o in found.options} == {None}
    assert found.front


@settings(max_examples=30, deadline=None)
@given(
    gpus=st.sets(st.sampled_from([1, 2, 4, 8]), min_size=1),
    itl=st.floats(0.010, 0.1),
    ttft=st.floats(0.11, 1.0),
    rent=st.floats(0.1, 20),
    tokens=st.tuples(st.integers(1, 8000), st.integers(1, 2000)),
)
def test_the_front_is_not_beaten_and_dearer_gpus_never_cheapen(
    gpus: set[int], itl: float, ttft: float, rent: float, tokens: tuple[int, int]
) -> None:
    where = tuple(replace(p, rent=rent) for p in at(*gpus))
    slo, traffic = Slo(ttft, itl), Traffic(*map(float, tokens))
    found = searched(QWEN, where, slo, traffic)
    for option in found.options:
        assert option.usd_per_m is not None
        assert option.usd_per_m >= 0
        assert option.over(slo) <= 1
        assert any(all(a <= b for a, b in zip(kept.bounds, option.bounds, strict=True)) for kept in found.front)
    for one in found.front:
        assert not any(
            all(a <= b for a, b in zip(o.bounds, one.bounds, strict=True)) and o.bounds != one.bounds
            for o in found.options
        )
    dearer = searched(QWEN, tuple(replace(p, rent=rent * 2) for p in where), slo, traffic)
    assert [o.usd_per_m for o in dearer.options] == pytest.approx([2 * (o.usd_per_m or 0) for o in found.options])


def test_a_front_of_nothing() -> None:
    assert pareto(()) == ()


WRONG: dict[str, tuple[Callable[[], Traffic | Option], str]] = {
    "no input": (lambda: Traffic(0, 10), "input_tokens"),
    "no output": (lambda: Traffic(10, 0), "output_tokens"),
    "a negative rate": (lambda: Traffic(10, 10, tokens_per_s=-1.0), "tokens_per_s"),
    "negative skew": (lambda: Traffic(10, 10, skew=-0.5), "skew"),
    "a load above capacity": (lambda: Traffic(10, 10, utilisation=1.2), "utilisation"),
    "more cached than there is": (lambda: Traffic(10, 10, cached_share=2.0), "cached_share"),
}


@pytest.mark.parametrize("name", WRONG)
def test_traffic_that_cannot_be(name: str) -> None:
    make, field = WRONG[name]
    with pytest.raises(CostInvalid) as caught:
        make()
    assert caught.value.field == field


def test_the_real_prediction_over_every_accelerator() -> None:
    found = plan(ask(), CHAT, Slo(2.0, 0.1), packaged(), places(packaged()))
    assert found.best is not None
    assert len({o.place.accelerator.name for o in found.options}) >= 4
    assert {"memory", "impossible"} & {row.why for row in found.rejected}
