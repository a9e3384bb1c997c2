"""What a GPU attains by the form of its matrices: narrow experts, what is filled up, scales in blocks, attention."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_planner import catalog, roofline, speed, table, work
from moe_planner.calibration import START, Factors
from moe_planner.memory import Ask
from moe_planner.speed import Load
from moe_planner.weights import Layout

CATALOG = catalog.packaged()
QWEN = CATALOG.models["qwen3-235b-a22b"]
H200, H20, B200, A100 = (CATALOG.accelerators[f"nvidia-{name}"] for name in ("h200", "h20", "b200", "a100-80gb"))
FP8 = CATALOG.precisions["fp8"]
TENSOR = replace(FP8, block=1)


def _ask(accelerator: catalog.Accelerator, form: str = "fp8", fp8_cache: bool = True) -> Ask:
    return Ask(QWEN, CATALOG.precisions[form], accelerator, fp8_cache=fp8_cache)


def _rates(ask: Ask, factors: Factors = START) -> roofline.Rates:
    return factors.rates(speed.peaks_of(ask.accelerator, ask.precision, Layout(4), ask.fp8_cache))


WIDTHS = {
    "whole experts: of 4096 and 1536": (Layout(1, 4, 4), 2 * 4096 * 1536 / (4096 + 1536)),
    "a slice of four: of 4096 and 384": (Layout(4), 2 * 4096 * 384 / (4096 + 384)),
    "stages do not slice": (Layout(1, pipeline=4), 2 * 4096 * 1536 / (4096 + 1536)),
}


@pytest.mark.parametrize("case", WIDTHS.values(), ids=WIDTHS)
def test_an_experts_width_is_that_of_both_its_sides(case: tuple[Layout, float]) -> None:
    layout, wanted = case
    assert work.expert_width(QWEN, layout) == pytest.approx(wanted)


@pytest.mark.parametrize(("accelerator", "form", "slower"), [(B200, "nvfp4", True), (H200, "fp8", False)])
def test_narrow_experts_cost_gpus_with_large_tiles(accelerator: catalog.Accelerator, form: str, slower: bool) -> None:
    """At the width that `narrow` names an expert's GEMMs take twice as long as were they wide."""
    ask, layout = _ask(accelerator, form), Layout(1, 4, 4)
    width = work.expert_width(QWEN, layout)
    prepared = speed.prepare(ask, layout, Load(4096, 256, 64), CATALOG)

    def experts_s(narrow: float) -> float:
        rates = replace(_rates(ask, replace(START, narrow=narrow)), bandwidth=1e30)  # nothing but arithmetic
        return float(roofline.prefill(prepared.work, rates, 8192).experts)

    assert experts_s(width) / experts_s(1e-9) == pytest.approx(2.0 if slower else 1.0)


def test_tiles_are_filled_up_once_for_every_expert_that_is_touched() -> None:
    ask, layout = _ask(H200), Layout(1, 4, 4)
    w = speed.prepare(ask, layout, Load(1024, 1024, 64), CATALOG).work
    rates = replace(_rates(ask), bandwidth=1e30)
    exact = replace(rates, padding=0.0)

    def more(tokens: float) -> float:
        return float(roofline.prefill(w, rates, tokens).experts / roofline.prefill(w, exact, tokens).experts)

    # 8 rows for each expert, where as many tokens are as give each of 128 experts 64 rows: an eighth more.
    assert more(64 * 128 / 8 / 4) == pytest.approx(1 + START.padding / 64, rel=1e-3)
    # A single token of each rank: hardly two tokens meet in an expert, and each row costs a tile.
    assert more(1.0) == pytest.approx(1 + START.padding, rel=0.15)
    # Dense layers have as many rows as tokens.
    told, bare = (roofline.prefill(w, which, 32.0) for which in (rates, exact))
    assert told.linear / bare.linear == pytest.approx(1 + START.padding / 32)


def test_a_pass_that_samples_nothing_fills_up_no_tile_of_the_head() -> None:
    w = speed.prepare(_ask(H200), Layout(4), Load(1024, 1024, 64), CATALOG).work
    free = replace(w, linear_flops=0.0, mlp_flops=0.0)
    rates = replace(_rates(_ask(H200)), bandwidth=1e30)
    assert roofline.prefill(free, rates, 512.0).linear == pytest.approx(0.0, abs=1e-12)
    assert roofline.decode(free, rates, 512.0).linear > 1e-6


GEMMS = {
    "blocks on Hopper": (FP8, H200, "8 in blocks"),
    "one scale for a tensor": (TENSOR, H200, "8"),
    "matrix units that apply scales": (FP8, B200, "8"),
    "no 8-bit units": (FP8, A100, "dequantised"),
    "INT8 has blocks of another kind": (CATALOG.precisions["int8"], H200, "8"),
}


@pytest.mark.parametrize("case", GEMMS.values(), ids=GEMMS)
def test_scales_in_blocks_are_a_kind_of_their_own(
    case: tuple[catalog.Precision, catalog.Accelerator, work.Gemm],
) -> None:
    precision, accelerator, wanted = case
    assert work.gemm(precision, "experts", accelerator) == wanted


@pytest.mark.parametrize("gpu", [H200, H20], ids=["H200", "H20"])
def test_cores_beside_the_matrix_units_add_up_what_blocks_give(gpu: catalog.Accelerator) -> None:
    """One multiply-add in FP32 for the 128 columns under a scale, after what the matrix units take for them."""
    blocks, tensor = (_rates(replace(_ask(gpu), precision=form)) for form in (FP8, TENSOR))
    assert gpu.vector_flops is not None
    adding = 2.0 / (gpu.vector_flops * START.blocks)  # seconds for one sum of 128 products, in each GPU's own terms
    assert 256 / blocks.expert_flops == pytest.approx(256 / tensor.expert_flops + adding)
    assert 256 / blocks.linear_flops == pytest.approx(256 / tensor.linear_flops + adding)
    assert blocks.bandwidth == tensor.bandwidth


def test_blocks_cost_least_where_much_fp32_goes_with_little_fp8() -> None:
    """H20's FP32 peak is a seventh of its FP8 peak, H200's a thirtieth."""

    def left(gpu: catalog.Accelerator) -> float:
        blocks, tensor = (_rates(replace(_ask(gpu), precision=form)) for form in (FP8, TENSOR))
        return float(blocks.expert_flops / tensor.expert_flops)

    assert left(H200) < left(H20) < 1.0


def test_an_fp32_peak_that_nobody_published_is_a_thirtieth_of_the_fp8_peak() -> None:
    bare = replace(H20, vector_flops=None)
    assert speed.vector(bare) == pytest.approx(H20.flops[1.0] / 30)
    assert speed.vector(H20) == 44e12
    assert speed.vector(H200) / H200.flops[1.0] == pytest.approx(1 / 30, rel=0.02)


GRAPHED = {
    "up to the next graph": (600.0, (512, 1024), 1024.0),
    "a batch that has its graph": (512.0, (512, 1024), 512.0),
    "above the largest": (1500.0, (512, 1024), 1500.0),
    "nothing is padded": (600.0, (), 600.0),
}


@pytest.mark.parametrize("case", GRAPHED.values(), ids=GRAPHED)
def test_steps_are_padded_to_a_cuda_graph(case: tuple[float, tuple[int, ...], float]) -> None:
    sequences, graphs, wanted = case
    assert roofline.captured(sequences, graphs) == wanted


def test_padded_rows_compute_and_read_no_cache() -> None:
    w = speed.prepare(_ask(H200), Layout(1, 4, 4), Load(1024, 1024, 64), CATALOG).work
    rates = replace(_rates(_ask(H200)), padding=0.0)
    bare, padded, full = (
        roofline.decode(w, rates, batch, graphs=graphs) for batch, graphs in ((600, ()), (600, (1024,)), (1024, ()))
    )
    assert padded.linear == pytest.approx(full.linear)
    assert bare.experts < padded.experts == pytest.approx(full.experts, rel=0.02)
    assert (padded.core, padded.launch) == (bare.core, bare.launch)


OVERVIEW = {
    "TensorRT-LLM's overview": ("TensorRT-LLM", "1.0 (PyTorch backend)", "x/perf-overview.md @1", True),
    "an engine that was built": ("TensorRT-LLM", "0.14.0 (TensorRT engine)", "x/perf-overview.md @1", False),
    "somebody else's run": ("TensorRT-LLM", "1.0.0", "gpustack", False),
    "another engine": ("vLLM", "1.0", "x/perf-overview.md @1", False),
}


@pytest.mark.parametrize("case", OVERVIEW.values(), ids=OVERVIEW)
def test_whose_steps_are_padded(case: tuple[str, str, str, bool]) -> None:
    engine, version, source, padded = case
    assert bool(table.graphs({"engine": engine, "engine_version": version, "source": source})) is padded


ATTENTION = {
    "FP8 cache on Hopper: prompts alone": (H200, True, 1.0, 2.0),
    "FP8 cache on Blackwell: decode too": (B200, True, 2.0, 2.0),
    "no 8-bit units": (A100, True, 1.0, 1.0),
    "cache of 16 bits": (H200, False, 1.0, 1.0),
}


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_attention_in_fp8(case: tuple[catalog.Accelerator, bool, float, float]) -> None:
    accelerator, fp8, decode, prompts = case
    form = TENSOR if accelerator is not A100 else CATALOG.precisions["bf16"]
    peaks = speed.peaks_of(accelerator, form, Layout(1), fp8)
    wide = accelerator.flops[2.0]
    assert peaks.attention / wide == pytest.approx(decode, rel=0.01)
    assert peaks.prompts / wide == pytest.approx(prompts, rel=0.01)


ROW = {"precision": "FP8", "note": ""}
SCALED = {
    "TensorRT-LLM runs ModelOpt's checkpoint": (ROW, "tensorrt-llm", "qwen3-235b-a22b", 1),
    "the model comes in FP8 itself": (ROW, "tensorrt-llm", "deepseek-v3", 128),
    "another engine": (ROW, "vllm", "qwen3-235b-a22b", 128),
    "a burst to a new server": ({**ROW, "note": "1000 requests at once"}, "tensorrt-llm", "qwen3-235b-a22b", 128),
}


@pytest.mark.parametrize("case", SCALED.values(), ids=SCALED)
def test_whose_checkpoint_a_row_ran(case: tuple[dict[str, str], str, str, int]) -> None:
    row, engine, model, block = case
    assert table.scaled(row, engine, FP8, CATALOG.models[model]).block == block


@pytest.mark.parametrize(("said", "wanted"), [("FP8 attn + NVFP4 MoE", True), ("FP8 (BF16 attn)", False)])
def test_attention_that_is_said_to_be_in_fp8_has_such_a_cache(said: str, wanted: bool) -> None:
    """DeepSeek-V3 keeps its cache in BF16 where nothing is said; attention in FP8 is that of an FP8 cache (LMSYS)."""
    model, form = CATALOG.models["deepseek-v3"], CATALOG.precisions["nvfp4"]
    assert table.fp8_cache({"precision": said, "note": ""}, "sglang", form, model, B200) is wanted
