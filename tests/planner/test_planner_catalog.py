"""The catalog against what others published, and what a wrong entry is told."""

from __future__ import annotations

from importlib import resources

import pytest

from moe_planner import kv, prices, weights
from moe_planner.catalog import FILES, UNSOURCED, CatalogInvalid, packaged, parse
from moe_planner.cost import Workload, request_usd
from moe_planner.weights import Layout

GIB, GB = 2**30, 10**9
FOLDER = resources.files("moe_planner") / "data"
TEXTS = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
ROUNDED = {"deepseek-v4-pro", "deepseek-v4-pro-base", "glm-4.5-air"}
"""Published as "1.6T" and "106B": rounded to about one per cent."""
WITH_VISION = {"llama-4-scout", "llama-4-maverick"}
"""The published total counts the vision tower too."""
WITH_SPECULATION = {"glm-4.5", "glm-4.6"}
"""The published total counts layers that only speculate."""


@pytest.mark.parametrize("key", sorted(packaged().models))
def test_parameters_reproduce_the_published_total(key: str) -> None:
    facts = packaged().models[key]
    error = abs(weights.total_params(facts) / 1e9 / facts.total_params_b - 1)
    assert error < (0.02 if key in ROUNDED | WITH_VISION | WITH_SPECULATION else 0.007)


@pytest.mark.parametrize("key", sorted(key for key, facts in packaged().models.items() if facts.checkpoint_gb))
def test_bytes_reproduce_the_published_checkpoint(key: str) -> None:
    """The checkpoints hold one more layer, which only speculates: 1.6 to 2.4 % of them."""
    facts = packaged().models[key]
    size = weights.total_bytes(facts, packaged().precisions[facts.native]) / GB
    assert facts.checkpoint_gb is not None
    assert 0.97 < size / facts.checkpoint_gb < 1.0


# Table 1 of the gpt-oss model card (OpenAI): checkpoints without a layer that speculates, in GiB.
CARDS = {"gpt-oss-20b": 12.8, "gpt-oss-120b": 60.8}


@pytest.mark.parametrize("key", CARDS)
def test_bytes_of_mxfp4_are_those_of_the_card(key: str) -> None:
    facts = packaged().models[key]
    size = weights.total_bytes(facts, packaged().precisions[facts.native]) / GIB
    assert size == pytest.approx(CARDS[key], rel=0.002)


MADE_SMALLER: dict[str, tuple[str, str, float]] = {
    "R1 in NVFP4, by TensorRT-LLM's blog03": ("deepseek-v3", "nvfp4", 400),
    "V4-Pro in NVFP4, by vllm-project/recipes PR 779": ("deepseek-v4-pro", "nvfp4", 913),
    "Qwen3-235B in BF16, by two bytes a weight": ("qwen3-235b-a22b", "bf16", 470),
    "Mixtral 8x7B in 4 bits, before scales and cache 23.4": ("mixtral-8x7b", "awq", 24.3 + 0.4),
}


@pytest.mark.parametrize("name", MADE_SMALLER)
def test_bytes_in_other_forms(name: str) -> None:
    key, form, wanted_gb = MADE_SMALLER[name]
    size = weights.total_bytes(packaged().models[key], packaged().precisions[form])
    assert size / GB == pytest.approx(wanted_gb, rel=0.02)


def test_cache_of_v4_reproduces_the_engines_figure() -> None:
    """vLLM's account of DeepSeek V4: 9.62 GiB for a sequence of 1M tokens in bfloat16."""
    facts = packaged().models["deepseek-v4-pro"]
    size = kv.sequence_bytes(facts, 1_048_576, Layout(1), fp8=False)
    assert size / GIB == pytest.approx(9.62, abs=0.03)


CACHE: dict[str, tuple[str, int, Layout, bool, float]] = {
    "GQA: two of 4 heads of 128 in 94 layers": ("qwen3-235b-a22b", 1000, Layout(1), False, 94 * 2 * 4 * 128 * 2 * 1000),
    "its heads divide": ("qwen3-235b-a22b", 1000, Layout(4), False, 94 * 2 * 128 * 2 * 1000),
    "and then repeat": ("qwen3-235b-a22b", 1000, Layout(8), False, 94 * 2 * 128 * 2 * 1000),
    "MLA: one latent of 576, which tensor ranks repeat": ("deepseek-v3", 1000, Layout(8), False, 61 * 576 * 2 * 1000),
    "half of it in FP8": ("deepseek-v3", 1000, Layout(1), True, 61 * 576 * 1000),
    "sparse MLA in FP8: scales, and an indexer": ("deepseek-v3.2", 1000, Layout(1), True, 61 * (656 + 132) * 1000),
    "a window of 128 in half of the layers": (
        "gpt-oss-120b", 1000, Layout(1), False, 18 * 2 * 8 * 64 * 2 * (1000 + 128)),
    "chunks of 8192 in three of four layers": (
        "llama-4-scout", 100_000, Layout(1), False, 2 * 8 * 128 * 2 * (12 * 100_000 + 36 * 8192)),
    "stages share layers out, 16 of 61 on the fullest": (
        "deepseek-v3", 1000, Layout(1, pipeline=4), False, 16 * 576 * 2 * 1000),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHE)
def test_cache_by_kind_of_attention(name: str) -> None:
    key, tokens, layout, fp8, wanted = CACHE[name]
    assert kv.sequence_bytes(packaged().models[key], tokens, layout, fp8=fp8) == pytest.approx(wanted)


def test_a_recurrent_state_does_not_grow() -> None:
    facts = packaged().models["qwen3-next-80b-a3b"]
    one, ten = (kv.sequence_bytes(facts, tokens, Layout(1), fp8=False) for tokens in (1, 10))
    each = 12 * 2 * 2 * 256 * 2
    assert ten - one == pytest.approx(9 * each)
    assert one - each == pytest.approx(36 * (32 * 128 * 128 + 8192 * 4) * 2)


@pytest.mark.parametrize("key", ["deepseek-v4-pro", "gpt-oss-120b", "qwen3-next-80b-a3b", "deepseek-v3"])
def test_longest_is_the_inverse_of_the_size(key: str) -> None:
    facts, at = packaged().models[key], Layout(2)
    room = kv.sequence_bytes(facts, 20_000, at, fp8=True, in_flight=512)
    found = kv.longest(facts, room, at, fp8=True, in_flight=512, most=facts.max_context)
    assert found >= 20_000
    assert kv.sequence_bytes(facts, found + 1, at, fp8=True, in_flight=512) > room


NAMES: dict[str, tuple[str, tuple[str, str] | None]] = {
    "a vendor's own": ("deepseek-ai/DeepSeek-R1-0528", ("deepseek-v3", "fp8")),
    "in any case": ("mirror/deepseek-r1", ("deepseek-v3", "fp8")),
    "made smaller by others": ("nvidia/DeepSeek-R1-NVFP4", ("deepseek-v3", "nvfp4")),
    "the longer suffix wins": ("org/Mixtral-8x7B-v0.1-GPTQ-Int4", ("mixtral-8x7b", "gptq")),
    "made larger": ("unsloth/gpt-oss-20b-BF16", ("gpt-oss-20b", "bf16")),
    "a longer context under its own entry": ("Qwen/Qwen3-235B-A22B-Instruct-2507", ("qwen3-235b-a22b-2507", "bf16")),
    "a file address": ("s3://models/Mixtral-8x22B-v0.1-AWQ/", ("mixtral-8x22b", "awq")),
    "unknown": ("org/other", None),
    "a suffix alone": ("org/-fp8", None),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    repository, wanted = NAMES[name]
    found = packaged().model(repository)
    assert (found and (found[0].key, found[1].name)) == wanted


# Hardware as tables of published runs write it (the project's published_runs.csv), and the entry that it means.
HARDWARE: dict[str, str | None] = {
    "H100-80GB": "nvidia-h100",
    "H100-80GB + IB": "nvidia-h100",
    "H100-NVL-94GB": "nvidia-h100-nvl",
    "H100-PCIe-80GB": "nvidia-h100-pcie",
    "H200-SXM-141GB": "nvidia-h200",
    "H200 + CX7 IB (CoreWeave)": "nvidia-h200",
    "H800": "nvidia-h800",
    "H20-96GB": "nvidia-h20",
    "B200 + RoCEv2 400G": "nvidia-b200",
    "B200-SXM-180GB (DGX B200)": "nvidia-b200",
    "HGX B200": "nvidia-b200",
    "GB200 NVL72": "nvidia-gb200",
    "GB200-192GB tray": "nvidia-gb200",
    "GB300 (4x NVL72, IB scale-out)": "nvidia-gb300",
    "A100-SXM4-80GB": "nvidia-a100-80gb",
    "MI300X-192GB": "amd-mi300x",
    "MI325X-256GB": "amd-mi325x",
    "MI355X-288GB": "amd-mi355x",
    "RTX PRO 6000 Blackwell SE": "nvidia-rtx-pro-6000",
    "TPU v5p": "tpu-v5p",
    "TPU v6e": "tpu-v6e",
    "nvidia-h100": "nvidia-h100",
    "H1000": None,
    "": None,
}


@pytest.mark.parametrize("text", HARDWARE)
def test_hardware_by_the_names_of_others(text: str) -> None:
    found = packaged().accelerator_named(text)
    assert (found and found.name) == HARDWARE[text]


def test_no_two_accelerators_share_a_name() -> None:
    names = [alias.lower() for known in packaged().accelerators.values() for alias in (known.name, *known.aliases)]
    assert len(names) == len(set(names))


# Models as the same tables write them.
RUNS: dict[str, str] = {
    "DeepSeek-V3/R1": "deepseek-v3",
    "DeepSeek-R1/V3": "deepseek-v3",
    "DeepSeek-R1-0528": "deepseek-v3",
    "DeepSeek-V4-Flash": "deepseek-v4-flash",
    "GLM-4.6": "glm-4.6",
    "Kimi-K2": "kimi-k2",
    "Llama-4-Maverick": "llama-4-maverick",
    "Llama-4-Scout": "llama-4-scout",
    "Mixtral-8x22B": "mixtral-8x22b",
    "Qwen3-235B-A22B-2507": "qwen3-235b-a22b-2507",
    "gpt-oss-120b": "gpt-oss-120b",
}


@pytest.mark.parametrize("text", RUNS)
def test_models_by_the_names_of_others(text: str) -> None:
    found = packaged().model(text)
    assert found is not None
    assert found[0].key == RUNS[text]


def test_links_and_peaks_are_of_one_gpu_in_one_direction() -> None:
    """An H100 has 900 GB/s of NVLink and 128 GB/s of PCIe in both directions; racks of NVL72 are one domain."""
    found = packaged().accelerators
    h100, rack = found["nvidia-h100"], found["nvidia-gb200"]
    assert (h100.nvlink_bytes_s, h100.pcie_bytes_s, h100.nic_bytes_s) == (450e9, 64e9, 50e9)
    assert (h100.domain_gpus, h100.gpus_per_node) == (8, 8)
    assert (rack.domain_gpus, rack.gpus_per_node) == (72, 4)
    assert rack.flops == {2: 2500e12, 1: 5000e12, 0.5: 10000e12}
    assert found["nvidia-l40s"].nvlink_bytes_s is None
    for known in found.values():
        rates = [known.flops[size] for size in (2.0, 1.0, 0.5) if size in known.flops]
        assert rates == sorted(rates), f"{known.name}: fewer bits are never slower"


# What drivers report, in MiB: datasheets say GB and mean GiB, which would cost 7 %.
REPORTED = {
    "nvidia-h100": 81_559, "nvidia-h200": 143_771, "nvidia-h20": 97_871, "nvidia-b200": 182_630,
    "amd-mi300x": 196_592, "amd-mi325x": 262_144, "tpu-v5p": 95 * 1024,
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_memory_is_what_the_driver_reports(name: str) -> None:
    assert packaged().accelerators[name].memory_bytes == REPORTED[name] * 2**20


def test_prices_have_a_source_and_a_day() -> None:
    found = prices.packaged()
    assert {"gpt-5.5", "claude-opus-4.7", "gemini-3.1-pro", "deepseek-v4-pro"} <= set(found)
    assert all(figure.sourced and figure.date for known in found.values() for figure in known.figures.values())
    opus = found["claude-opus-4.7"]
    assert opus.cached_usd_per_m == pytest.approx(0.1 * opus.input_usd_per_m), "90 % off cached reads"


# Of the mission's closed models: input, output, cached input, in USD for 10^6 tokens, as genai-prices 0.2.3 has them.
TARGETS = {
    "gpt-5.5": (5.0, 30.0, 0.5), "claude-opus-4.7": (5.0, 25.0, 0.5), "gemini-3-pro": (2.0, 12.0, 0.2),
    "gemini-3.1-pro": (2.0, 12.0, 0.2), "gpt-5.4": (2.5, 15.0, 0.25), "claude-haiku-4.5": (1.0, 5.0, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_prices_of_the_usual_targets(name: str) -> None:
    found = prices.packaged()[name]
    assert (found.input_usd_per_m, found.output_usd_per_m, found.cached_usd_per_m) == TARGETS[name]


def test_a_long_context_costs_more_from_its_threshold_on() -> None:
    gpt, opus = prices.packaged()["gpt-5.5"], prices.packaged()["claude-opus-4.7"]
    assert gpt.at(272_000) is gpt
    long = gpt.at(272_001)
    assert (long.input_usd_per_m, long.output_usd_per_m, long.cached_usd_per_m) == (10.0, 45.0, 1.0)
    assert opus.at(900_000) is opus
    short, above = (request_usd(gpt, Workload("x", tokens, 1000)) for tokens in (272_000, 272_001))
    assert above == pytest.approx(272_001 * 10e-6 + 1000 * 45e-6)
    assert short == pytest.approx(272_000 * 5e-6 + 1000 * 30e-6)


def test_every_figure_has_a_source_and_a_day_or_is_marked() -> None:
    catalog = packaged()
    entries = [*catalog.models.values(), *catalog.accelerators.values(), catalog.engine]
    figures = [figure for entry in entries for figure in entry.figures.values()]
    figures += [precision.figure for precision in catalog.precisions.values()]
    assert len(figures) > 500
    assert [figure for figure in figures if not figure.sourced and figure.date] == []
    assert [figure for figure in figures if figure.sourced and not figure.date] == []
    assert 0 < sum(figure.source == UNSOURCED for figure in figures) < 0.05 * len(figures)


def test_the_version_follows_the_figures() -> None:
    changed = {**TEXTS, "accelerators.toml": TEXTS["accelerators.toml"].replace("81559", "81560")}
    assert parse(TEXTS).version == packaged().version
    assert parse(changed).version != packaged().version


BROKEN: dict[str, tuple[str, str, str, str]] = {
    "a missing figure": ("models.toml", "layers = 32\n", "", "mixtral-8x7b.layers: is missing"),
    "an unknown figure": ("models.toml", "layers = 32\n", "layers = 32\nlayres = 1\n", "layres: is not known"),
    "a negative figure": ("models.toml", "layers = 32\n", "layers = -32\n", "layers: must not be negative"),
    "an unknown form": ("models.toml", 'native = "bf16"', 'native = "bf17"', "native: bf17 is none of"),
    "no source": ("models.toml", 'source = "unsourced"\n', "", "has no source"),
    "no day": ("models.toml", 'date = "2026-11-23"\n', "", "has no date"),
    "a name twice": ("models.toml", '"Mixtral-8x22B-v0.1"', '"mixtral-8x7b-V0.1"', "is a name of mixtral-8x7b already"),
    "like nothing": ("models.toml", 'like = "deepseek-v4-pro"', 'like = "deepseek-v5"', "deepseek-v5 is no other"),
    "a wrong cache": ("models.toml", "fp8_bytes = 656", "fp9_bytes = 656", "fp9_bytes"),
    "no memory": ("accelerators.toml", "memory_mib = 81559\n", "", "neither memory_mib nor memory_gb"),
    "memory of nothing": ("accelerators.toml", "memory_mib = 81559", "memory_mib = 0", "must be above zero"),
    "a form without bits": ("engine.toml", "linear = 16.0\n", "", "precisions.bf16.linear: is missing"),
    "no default": ("engine.toml", "[memory.utilization]", "[memory.utilisation]", "memory.utilization: is missing"),
    "no TOML": ("engine.toml", "[memory.utilization]", "[memory.utilization", "engine.toml: is no TOML"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_catalog_names_the_figure(name: str) -> None:
    file, old, new, words = BROKEN[name]
    assert old in TEXTS[file]
    with pytest.raises(CatalogInvalid) as caught:
        parse({**TEXTS, file: TEXTS[file].replace(old, new, 1)})
    assert words in str(caught.value)
