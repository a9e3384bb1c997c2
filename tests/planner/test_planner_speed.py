"""Predicted speed: experts that a batch touches, what ranks send, and rules that a roofline must keep."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_planner import calibration, catalog, exchange, experts, layouts, roofline, speed, sweep, work
from moe_planner.calibration import BOUNDS, START
from moe_planner.memory import Ask
from moe_planner.speed import Load, SpeedUnknown
from moe_planner.weights import Layout

CATALOG = catalog.packaged()

TOUCHED = {
    "one token touches its own k": (8, 2, 1, 0.0, 2.0),
    "four tokens of Mixtral: 8·(1 − 0.75⁴)": (8, 2, 4, 0.0, 8 * (1 - 0.75**4)),
    "many tokens touch all": (256, 8, 10_000, 0.0, 256.0),
    "k = E touches all at once": (4, 4, 1, 0.0, 4.0),
    "one token of a skewed router still touches k": (128, 8, 1, 1.2, 8.0),
}


@pytest.mark.parametrize("case", TOUCHED.values(), ids=TOUCHED)
def test_experts_touched(case: tuple[int, int, int, float, float]) -> None:
    total, topk, tokens, skew, wanted = case
    assert experts.touched(total, topk, tokens, skew) == pytest.approx(wanted)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 256), st.integers(1, 8), st.floats(1, 5000), st.floats(0.01, 2.5))
def test_skew_touches_fewer_experts_and_every_token_has_its_k(
    total: int, topk: int, tokens: float, skew: float
) -> None:
    topk = min(topk, total)
    chances = experts.inclusion(total, topk, skew)
    assert sum(chances) == pytest.approx(topk)
    assert all(0 <= chance <= 1 for chance in chances)
    assert experts.touched(total, topk, tokens, skew) <= experts.touched(total, topk, tokens) * (1 + 1e-9)


@pytest.mark.parametrize(("total", "topk", "skew"), [(128, 8, 0.8), (256, 8, 0.6), (8, 2, 0.3), (16, 4, 1.2)])
def test_tokens_that_draw_their_experts_pick_each_as_often_as_predicted(total: int, topk: int, skew: float) -> None:
    """Gumbel noise on the logarithm of popularity, and the highest k: drawing one after another without repetition."""
    rng = np.random.default_rng(0)
    noisy = -skew * np.log(np.arange(1, total + 1)) + rng.gumbel(size=(20_000, total))
    drawn = np.argpartition(-noisy, topk, axis=1)[:, :topk]
    seen = np.bincount(drawn.ravel(), minlength=total) / len(noisy)
    assert np.abs(np.array(experts.inclusion(total, topk, skew)) - seen).max() < 0.025


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([2, 4, 8, 16, 32]),
    st.floats(1, 10_000),
    st.floats(0, 2),
    st.floats(1, 8),
    st.floats(1, 8),
)
def test_lower_capacity_never_raises_the_straggler(ranks: int, tokens: float, skew: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    placed, mean = experts.placement(128, 8, ranks, skew), tokens * 8 / ranks
    tight, loose, free = (roofline.straggler(placed, mean, ranks, gamma) for gamma in (low, high, None))
    assert 1.0 <= tight <= loose <= max(free, 1.0) <= ranks
    assert tight <= low


def test_one_rank_waits_for_nobody() -> None:
    assert roofline.straggler(experts.placement(128, 8, 1, 1.0), 64 * 8, 1) == 1.0


def test_all_to_all_of_deepseek_v3_is_nine_to_ten_megabytes_a_token_at_most() -> None:
    """58 layers × 8 ranks × 7168 × 3 bytes = 10.0 MB where each expert lies on another rank; fewer meet by chance."""
    model = CATALOG.models["deepseek-v3"]
    most = 58 * 8 * 7168 * 3
    sent = [exchange.traffic(model, Layout(1, ranks, ranks), domain=1024).route for ranks in (8, 16, 64, 256)]
    assert sent == sorted(sent)
    assert 9.0e6 < sent[-1] < most
    # The articles' "30 to 40 GB/s per token": at 2,785 tokens/s a GPU these are what one GPU sends each second.
    assert 20e9 < sent[-2] * 2785 < 30e9


def test_tokens_cross_to_a_domain_once() -> None:
    """NVLink between all ranks sends for each of them; across nodes a token goes once to each node."""
    model = CATALOG.models["deepseek-v3"]
    nodes = exchange.traffic(model, Layout(1, 32, 32), domain=8)
    rack = exchange.traffic(model, Layout(1, 32, 32), domain=72)
    assert rack.crossing == 0
    assert 0 < nodes.crossing < rack.route


LINKS = {
    "inside a node NVLink": ("nvidia-h100", 8, "nvlink", "none"),
    "two nodes cross the network": ("nvidia-h100", 16, "nvlink", "nic"),
    "a rack is one domain": ("nvidia-gb200", 64, "nvlink", "none"),
    "no NVLink: PCIe": ("nvidia-l40s", 4, "pcie", "none"),
    "one GPU sends nothing": ("nvidia-l40s", 1, "none", "none"),
}


@pytest.mark.parametrize("case", LINKS.values(), ids=LINKS)
def test_links(case: tuple[str, int, str, str]) -> None:
    name, group, inside, between = case
    link = exchange.link(CATALOG.accelerators[name], group)
    network = exchange.network(CATALOG.accelerators[name], group)
    assert isinstance(link, exchange.Link)
    assert isinstance(network, exchange.Link)
    assert (link.name, network.name) == (inside, between)


def _ask(model: str = "qwen3-235b-a22b", form: str = "fp8", accelerator: str = "nvidia-h100") -> Ask:
    return Ask(CATALOG.models[model], CATALOG.precisions[form], CATALOG.accelerators[accelerator], fp8_cache=False)


ASKS = {
    "Qwen3-235B on H100": (_ask(), Layout(8, expert=8)),
    "the same, attention data parallel": (_ask(), Layout(1, 8, 8)),
    "Mixtral on A100": (_ask("mixtral-8x7b", "bf16", "nvidia-a100-80gb"), Layout(4)),
    "R1 on B200": (_ask("deepseek-v3", "nvfp4", "nvidia-b200"), Layout(2, 4, 8)),
    "gpt-oss in two stages": (_ask("gpt-oss-120b", "mxfp4", "nvidia-h100"), Layout(1, pipeline=2)),
    "V4-Pro across nodes": (_ask("deepseek-v4-pro", "mxfp4-fp8", "nvidia-h200"), Layout(1, 16, 16)),
}
asks = st.sampled_from(list(ASKS.values()))
loads = st.builds(
    Load,
    input_tokens=st.integers(1, 16_000),
    output_tokens=st.integers(1, 4_000),
    concurrency=st.integers(1, 2_000),
    cached_share=st.floats(0, 1),
    skew=st.floats(0, 1.5),
    gamma=st.none() | st.floats(1, 4),
)


@settings(max_examples=30, deadline=None)
@given(asks, loads, st.floats(1, 8))
def test_faster_memory_arithmetic_or_links_never_slow_down(at: tuple[Ask, Layout], load: Load, times: float) -> None:
    ask, layout = at
    base = speed.predict(ask, layout, load, CATALOG, START)
    gpu = ask.accelerator
    faster = {
        "bandwidth": replace(gpu, bandwidth_bytes_s=(gpu.bandwidth_bytes_s or 0) * times),
        "arithmetic": replace(gpu, flops={width: peak * times for width, peak in gpu.flops.items()}),
        "links": replace(gpu, nvlink_bytes_s=(gpu.nvlink_bytes_s or 0) * times),
        "network": replace(gpu, nic_bytes_s=(gpu.nic_bytes_s or 1e9) * times),
    }
    for what, better in faster.items():
        if what == "network" and gpu.nic_bytes_s is None:
            continue
        told = speed.predict(replace(ask, accelerator=better), layout, load, CATALOG, START)
        assert told.output_tokens_per_s >= base.output_tokens_per_s * (1 - 1e-9), what
        assert told.step_s <= base.step_s * (1 + 1e-9), what


@settings(max_examples=30, deadline=None)
@given(asks, loads, st.integers(1, 500))
def test_a_larger_batch_never_lowers_throughput(at: tuple[Ask, Layout], load: Load, more: int) -> None:
    ask, layout = at
    less = speed.predict(ask, layout, load, CATALOG, START)
    told = speed.predict(ask, layout, replace(load, concurrency=load.concurrency + more), CATALOG, START)
    assert told.output_tokens_per_s >= less.output_tokens_per_s * (1 - 1e-6)
    assert told.step_s >= less.step_s * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(asks, loads, st.floats(1, 4), st.floats(1, 4))
def test_tighter_capacity_never_slows_down(at: tuple[Ask, Layout], load: Load, a: float, b: float) -> None:
    low, high = sorted((a, b))
    tight = speed.predict(*at, replace(load, gamma=low), CATALOG, START)
    loose = speed.predict(*at, replace(load, gamma=high), CATALOG, START)
    assert tight.output_tokens_per_s >= loose.output_tokens_per_s * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(asks, loads)
def test_conservation(at: tuple[Ask, Layout], load: Load) -> None:
    ask, layout = at
    told = speed.predict(ask, layout, load, CATALOG, START)
    requests = told.output_tokens_per_s / load.output_tokens
    # Every request that ends has brought its prompt and taken its output.
    assert told.total_tokens_per_s == pytest.approx(requests * (load.input_tokens + load.output_tokens))
    # Prompts are read no faster than the replica could read them, were they all it did.
    assert requests * load.new_tokens <= told.prefill_tokens_per_s * (1 + 1e-9)
    # Little's law: what is in the system = rate × time in it (the first step is counted in both latencies).
    if layout.pipeline == 1:
        time_s = told.ttft_s - told.step_s + load.output_tokens * told.itl_s
        assert requests * time_s == pytest.approx(max(load.concurrency, told.running))
    assert told.itl_s >= told.step_s * (1 - 1e-9)
    assert sum(told.parts.values()) == pytest.approx(told.step_s)
    assert min(told.parts.values()) >= 0
    assert 0 < told.s_mbu < 1
    assert 0 < told.s_mfu < 1
    assert told.running <= max(load.concurrency, 1)
    assert told.bound in ("memory", "compute", "exchange", "launch")


def test_cached_prompts_are_not_computed() -> None:
    ask, layout = ASKS["Qwen3-235B on H100"]
    cold = speed.predict(ask, layout, Load(8000, 100, 32), CATALOG, START)
    warm = speed.predict(ask, layout, Load(8000, 100, 32, cached_share=0.9), CATALOG, START)
    assert warm.output_tokens_per_s > 2 * cold.output_tokens_per_s
    assert warm.ttft_s < cold.ttft_s / 3


def test_long_prompts_are_bound_by_arithmetic_and_small_batches_by_memory() -> None:
    ask, layout = ASKS["Qwen3-235B on H100"]
    few = speed.predict(ask, layout, Load(1000, 1000, 16), CATALOG, replace(START, kernel_s=2.1e-7, step_s=1.1e-4))
    assert few.bound == "memory"
    assert few.parts["experts"] > few.parts["attention"]


REFUSED = {
    "a GPU without bandwidth": (_ask("gpt-oss-20b", "mxfp4", "nvidia-rtx-3090"), Layout(1), "bandwidth_gb_s"),
    "no room": (_ask("deepseek-v3", "fp8", "nvidia-h100"), Layout(8), "no room"),
    "two nodes and no network": (_ask("deepseek-v3", "fp8", "nvidia-h20"), Layout(1, 16, 16), "nic_gb_s"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_named(case: tuple[Ask, Layout, str]) -> None:
    ask, layout, names = case
    with pytest.raises(SpeedUnknown, match=names):
        speed.predict(ask, layout, Load(1000, 1000, 8), CATALOG, START)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("input_tokens", {"input_tokens": 0}),
        ("concurrency", {"concurrency": 0}),
        ("output_tokens", {"output_tokens": -1}),
        ("cached_share", {"cached_share": 1.5}),
        ("gamma", {"gamma": 0.5}),
    ],
)
def test_an_impossible_load_names_its_field(field: str, values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=field):
        Load(**{"input_tokens": 10, "output_tokens": 10, "concurrency": 1, **values})  # type: ignore[arg-type]


def test_a_burst_takes_longer_where_lengths_are_spread() -> None:
    at = speed.prepare(*ASKS["Qwen3-235B on H100"], Load(216, 197, 984), CATALOG)
    alike = speed.burst_s(at, START, 984, spread=False)
    spread = speed.burst_s(at, START, 984, spread=True)
    assert alike < spread < 5 * alike


def test_waves_of_a_room_that_nobody_knows_to_the_request() -> None:
    """Room for all in one wave, whatever it is: one cycle. Two more requests than it holds move it a little, not by a
    wave: rooms a little larger hold them too."""
    at = speed.prepare(*ASKS["Qwen3-235B on H100"], Load(1024, 512, 1_000_000), CATALOG)
    room = at.room
    one, full, over, twice = (speed.burst_s(at, START, room * n, spread=False) for n in (0.5, 1.0, 1.01, 2.0))
    assert one < full <= over < 1.1 * full
    assert 1.7 * full < twice < 2.3 * full


CHUNKS = {
    "inside the first: as any other": (0, 8192, 4096),
    "across one border": (8192, 9216, 512),
    "over many: half a chunk": (0, 10 * 8192, 4096),
}


@pytest.mark.parametrize("case", CHUNKS.values(), ids=CHUNKS)
def test_attention_in_chunks_reads_its_own_chunk(case: tuple[int, int, int]) -> None:
    first, last, seen = case
    model = CATALOG.models["llama-4-maverick"]
    each = 8 * 256 * 2  # bytes of an entry: heads × width × BF16
    wanted = 36 * each * seen + 12 * each * (first + last) / 2
    assert work.read_bytes(model, first, last, Layout(1), False) == pytest.approx(wanted, rel=1e-3)


def test_prompts_hold_up_other_data_ranks_only_where_they_decode() -> None:
    ask, layout = ASKS["the same, attention data parallel"]
    load = Load(2000, 500, 256)
    calm, late = (speed.predict(ask, layout, load, CATALOG, replace(START, stagger=s)) for s in (0.02, 2.0))
    assert late.output_tokens_per_s < calm.output_tokens_per_s
    assert late.prefill_tokens_per_s == calm.prefill_tokens_per_s
    alone = ASKS["Qwen3-235B on H100"]
    same = [speed.predict(*alone, load, CATALOG, replace(START, stagger=s)).output_tokens_per_s for s in (0.02, 2.0)]
    assert same[0] == same[1]


def test_a_sweep_says_what_predict_says() -> None:
    load = Load(1024, 512, 64)
    found = sweep.sweep(CATALOG, load, START, most=8)
    seen = 0
    for row in range(0, len(found.rows), 37):
        model, layout = found.rows[row]
        for column, accelerator in enumerate(found.accelerators):
            ask = Ask(model, CATALOG.precisions[model.native], accelerator, model.kv_dtype == "fp8")
            told = found.output_tokens_per_s[row, column]
            try:
                wanted = speed.predict(ask, layout, load, CATALOG, START).output_tokens_per_s
            except SpeedUnknown:
                assert math.isnan(told)
                continue
            seen += 1
            assert told == pytest.approx(wanted)
    assert seen > 50


def test_a_sweep_has_every_model_accelerator_and_parallelism() -> None:
    found = sweep.sweep(CATALOG, Load(1024, 512, 64), START, most=4)
    assert {model.key for model, _ in found.rows} == set(CATALOG.models)
    assert {accelerator.name for accelerator in found.accelerators} == set(CATALOG.accelerators)
    for model, layout in found.rows:
        assert layouts.problem(layout, model, CATALOG.precisions[model.native], 0) is None
    chosen = sweep.best(found)
    layout, each = chosen["mixtral-8x7b", "nvidia-h100"]
    assert layout.gpus <= 4
    assert each > 0
    assert ("deepseek-v4-pro", "nvidia-h100") not in chosen


# Live measurements.


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 3), st.integers(1, 50))
def test_measurements_move_the_factors_towards_what_is_seen(ratio: float, count: int) -> None:
    factors = replace(START, error=0.3)
    ask, layout = ASKS["Qwen3-235B on H100"]
    load = Load(1000, 200, 64)
    told = speed.predict(ask, layout, load, CATALOG, factors).output_tokens_per_s
    seen = {told * (1 + index / 1e9): told * ratio for index in range(count)}
    moved = calibration.recalibrate(factors, seen)
    again = speed.predict(ask, layout, load, CATALOG, moved).output_tokens_per_s
    assert abs(math.log(again / (told * ratio))) <= abs(math.log(ratio)) * 0.05 + 1e-6
    assert moved.error <= factors.error


def test_no_measurement_changes_nothing() -> None:
    assert calibration.recalibrate(START, {}) == START
    assert calibration.recalibrate(START, {0.0: 10.0, 10.0: 0.0}) == START


def test_measurements_that_disagree_leave_the_interval_wide() -> None:
    factors = replace(START, error=0.3)
    steady = calibration.recalibrate(factors, {100.0: 90.0, 101.0: 90.0, 102.0: 90.0})
    mixed = calibration.recalibrate(factors, {100.0: 50.0, 101.0: 90.0, 102.0: 160.0})
    assert steady.error < mixed.error <= factors.error


# The calibration file.


def test_packaged_factors_are_physical() -> None:
    factors = calibration.packaged()
    for name, bound in BOUNDS.items():
        assert bound.low < getattr(factors, name) < bound.high
    assert 0 < factors.error < 1


def test_a_factor_that_is_missing_or_impossible_is_named() -> None:
    text = calibration.text()
    with pytest.raises(ValueError, match=r"factors\.bandwidth is missing"):
        calibration.parse(text.replace("bandwidth = ", "width = ", 1))
    with pytest.raises(ValueError, match=r"factors\.bandwidth = 7"):
        calibration.parse(text.replace("bandwidth = ", "bandwidth = 7 #", 1))


def test_a_prediction_needs_no_numpy() -> None:
    """The operator's image has none, and may ask for a layout's speed."""
    code = "import moe_planner.fit, moe_planner.speed, moe_planner.published, sys; assert 'numpy' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


ATTAINED = {
    "little arithmetic for its bandwidth: nearly all of it": ("nvidia-h20", 1.1, 1.3),
    "what the shares were fitted to": ("nvidia-h200", 0.97, 1.03),
    "a card of 72 W": ("nvidia-l4", 0.6, 0.8),
    "nobody's figure is known": ("nvidia-gb200", 1.0, 1.0),
}


@pytest.mark.parametrize("case", ATTAINED.values(), ids=ATTAINED)
def test_measured_products_move_the_share_of_peak(case: tuple[str, float, float]) -> None:
    name, low, high = case
    assert low <= speed.attained(CATALOG.accelerators[name]) <= high


def test_a_slower_host_costs_its_steps_more() -> None:
    gb200 = CATALOG.accelerators["nvidia-gb200"]
    assert gb200.host_time_ratio > 2
    ask, layout = _ask(accelerator="nvidia-gb200"), Layout(4)
    slow = speed.predict(ask, layout, Load(128, 256, 32), CATALOG)
    fast = speed.predict(
        replace(ask, accelerator=replace(gb200, host_time_ratio=1.0)), layout, Load(128, 256, 32), CATALOG
    )
    assert slow.parts["launch"] > fast.parts["launch"]
    assert slow.parts["experts"] == fast.parts["experts"]


def test_an_engine_nobody_measured_has_the_references_factor() -> None:
    factors = calibration.parse(calibration.text())
    assert factors.of_engine("vllm").software != 1.0
    assert factors.of_engine("another").software == 1.0
