"""Which layout `parallelism: auto` takes: the order's first, unless another is predicted to give clearly more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_planner import calibration, prefer
from moe_planner.catalog import packaged
from moe_planner.choice import Choice, choose, first
from moe_planner.fit import asked, check
from moe_planner.memory import Ask
from moe_planner.prefer import rule
from moe_planner.weights import Layout
from tests.planner.planner_world import spec

R1, QWEN = "deepseek-ai/DeepSeek-R1", "Qwen/Qwen3-235B-A22B-FP8"
WIDE, MIXED, DATA = Layout(8, expert=8), Layout(4, 2, 8), Layout(1, 8, 8)
MARGIN = 1.34

# Outputs of three layouts in order, which is taken, and a word of the reason.
RULES: dict[str, tuple[tuple[float, ...], int, str]] = {
    "alike": ((100, 100, 100), 0, "first in order"),
    "within the error": ((100, 120, 134), 0, "1.34 times"),
    "beyond it, by one": ((100, 120, 140), 2, "1.4 times the output of tensor 8"),
    "beyond it by two that are alike: the one nearer in the order": ((100, 140, 170), 1, "1.4 times"),
    "beyond it by two, of which one beats the other as far": ((100, 140, 200), 2, "2.0 times"),
    "a middle one that is near the best and not clear of the first": ((100, 130, 150), 2, "1.5 times"),
    "only a later one keeps the SLO": ((0, 0, 50), 2, "keep the SLO"),
    "none keeps the SLO": ((0, 0, 0), 0, "first in order"),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule(name: str) -> None:
    outputs, index, words = RULES[name]
    found = rule((WIDE, MIXED, DATA), outputs, MARGIN)
    assert (found.index, words in found.why) == (index, True), found.why


@given(
    outputs=st.lists(st.floats(1, 1e5), min_size=1, max_size=8),
    noise=st.lists(st.floats(0.99, 1.01), min_size=8, max_size=8),
)
def test_whoever_takes_the_place_of_the_first_is_clear_of_it(outputs: list[float], noise: list[float]) -> None:
    layouts = [Layout(8)] * len(outputs)
    taken = rule(layouts, outputs, MARGIN).index
    assert taken == 0 or outputs[taken] > outputs[0] * MARGIN
    assert max(outputs) <= outputs[taken] * MARGIN
    # What a small error of every prediction could bring about: no choice whose output is clearly worse.
    shaken = [output * share for output, share in zip(outputs, noise, strict=False)]
    other = rule(layouts, shaken, MARGIN).index
    assert outputs[other] * MARGIN * 1.03 >= max(outputs)


def chosen(model: str, accelerator: str, gpus: int, **groups: Any) -> Choice:
    asks = spec(model, accelerator, gpus, **groups)
    ask = asked(asks, packaged())
    assert isinstance(ask, Ask)
    found = choose(asks, ask, packaged(), gpus)
    assert isinstance(found, Choice)
    return found


# Layouts that are launched, by what is asked: (model, accelerator, GPUs, groups, layout, words of the reason).
TAKEN: dict[str, tuple[str, str, int, dict[str, Any], Layout, str]] = {
    "latent attention: tensor ranks would each keep the whole cache": (
        R1, "nvidia-h200", 8, {"slo": {"itlP95": "1s"}}, Layout(4, 2, 8), "1.3 times the output of tensor 8 × data 1",
    ),
    "more output, and not clearly more": (
        R1, "nvidia-h200", 8, {}, WIDE, "no other is predicted to give 1.21 times",
    ),
    "grouped attention with a head for each rank": (
        QWEN, "nvidia-h100", 4, {}, Layout(4, expert=4), "first in order",
    ),
    "sizes that are all set": (
        R1, "nvidia-h200", 8, {"parallelism": {"tensor": 8, "expert": 8}}, WIDE, "the only layout that fits",
    ),
    "one size set": (R1, "nvidia-h200", 8, {"parallelism": {"data": 8}}, DATA, "the only layout that fits"),
    "an ITL that few requests keep: wide tensor groups are the quickest for each": (
        R1, "nvidia-h200", 8, {"slo": {"itlP95": "25ms"}}, WIDE, "first in order",
    ),
    "no speed is known": (R1, "amd-mi300x", 16, {}, Layout(8, 2, 16), "speeds here are not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_launched(name: str) -> None:
    model, accelerator, gpus, groups, layout, words = TAKEN[name]
    found = chosen(model, accelerator, gpus, **groups)
    assert (found.layout, words in found.why) == (layout, True), (found.layout, found.why)


def test_whole_experts_keep_their_place() -> None:
    """Slices are predicted to give a third more to Mixtral on four GPUs; capacity would have nothing to do there."""
    found = chosen("mistralai/Mixtral-8x22B-Instruct-v0.1", "nvidia-h200", 4)
    assert found.layout.expert == 4


def test_the_verdict_says_why_and_prints_the_memory_of_what_is_launched() -> None:
    found, verdict = chosen(R1, "nvidia-h200", 8), check(spec(R1, "nvidia-h200", 8))
    assert verdict.plan is not None
    assert verdict.plan.layout == found.layout
    assert f"This layout: {found.why}." in verdict.message
    parts = {row.part: row.size.bytes for row in verdict.plan.memory}
    assert parts["Weights"] == int(found.memory.weights)
    assert parts["KVCache"] == int(found.memory.cache)


def test_an_overlay_is_judged_by_its_own_figures() -> None:
    """A catalog whose accelerator has other peaks is not answered from what was kept of the packaged one."""
    catalog = packaged()
    known = catalog.accelerators["nvidia-h200"]
    blind = replace(catalog, accelerators={**catalog.accelerators, "nvidia-h200": replace(known, flops={})})
    assert "no other is predicted" in check(spec(R1, "nvidia-h200", 8), catalog).message
    assert "not known" in check(spec(R1, "nvidia-h200", 8), blind).message


MODELS = sorted(next(name for name, key in packaged().names.items() if key == wanted) for wanted in packaged().models)


@settings(max_examples=40, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    accelerator=st.sampled_from(sorted(packaged().accelerators)),
    gpus=st.sampled_from([1, 2, 4, 8, 16]),
    itl_ms=st.integers(5, 200),
)
def test_what_is_launched_fits_and_is_never_clearly_worse(model: str, accelerator: str, gpus: int, itl_ms: int) -> None:
    asks = spec(f"org/{model}", accelerator, gpus, slo={"itlP95": f"{itl_ms}ms"}, engine={"maxModelLen": 4096})
    ask = asked(asks, packaged())
    assert isinstance(ask, Ask)
    found, order = choose(asks, ask, packaged(), gpus), first(asks, ask, packaged().engine, gpus)
    if not isinstance(found, Choice) or not isinstance(order, Choice):
        assert found == order
        return
    assert (found.missing == 0) is (order.missing == 0)
    if found.layout == order.layout or found.missing:
        return
    factors = calibration.packaged()
    mine, firsts = (
        prefer.under_slo(
            ask,
            prefer.Room(one.layout, one.batched_tokens, one.memory.cache),
            prefer.Slo(asks.slo.ttft_p95.seconds, asks.slo.itl_p95.seconds),
            one.context,
            packaged(),
            factors,
        )
        for one in (found, order)
    )
    assert mine > firsts * math.exp(factors.error)
