"""What fits which GPUs: public claims, runs that others saw fit or fail, and rules that hold for any spec."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_api.load import load_file, load_object
from moe_planner.catalog import packaged
from moe_planner.fit import FitVerdict, check
from tests.planner.planner_world import spec

ROOT = Path(__file__).parents[2]
GIB = 2**30
V4, R1 = "deepseek-ai/DeepSeek-V4-Pro", "deepseek-ai/DeepSeek-R1"
QWEN = "Qwen/Qwen3-235B-A22B"
BIG, SMALL = "mistralai/Mixtral-8x22B-Instruct-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"
RECIPE = {"extraArgs": {"gpu-memory-utilization": "0.95"}}

# Claims of public articles, and what arithmetic makes of them: (model, accelerator, GPUs, form, groups, fits, words).
CLAIMS: dict[str, tuple[str, str, int, str, dict[str, Any], bool, tuple[str, ...]]] = {
    "V4-Pro in FP8 on 8×H100: said to fit in 640 GB": (
        V4, "nvidia-h100", 8, "FP8", {}, False,
        ("1,488 GiB for weights", "8 × nvidia-h100 have 637 GiB, 586 GiB of it usable", "32 × nvidia-h100"),
    ),
    "V4-Pro in FP8 on 8×H200: said to fit in 768 GB": (
        V4, "nvidia-h200", 8, "FP8", {}, False,
        ("1,488 GiB for weights", "8 × nvidia-h200 have 1,123 GiB", "its own checkpoint (mxfp4-fp8)", "16 × nvidia"),
    ),
    "V4-Pro-Base, whose checkpoint is FP8, on 8×H200": (f"{V4}-Base", "nvidia-h200", 8, "Auto", {}, False, ("fp8",)),
    "V4-Pro as published on 8×H200": (V4, "nvidia-h200", 8, "Auto", {}, True, ("mxfp4-fp8",)),
    "V4-Pro as published on 8×H100": (V4, "nvidia-h100", 8, "Auto", {}, False, ("16 × nvidia-h100",)),
    "R1 on 8×H200": (R1, "nvidia-h200", 8, "Auto", {}, True, ("tensor 8",)),
    "R1 on 8×H100": (R1, "nvidia-h100", 8, "Auto", {}, False, ("16 × nvidia-h100", "8 × nvidia-h200")),
    "Qwen3-235B in BF16 on 4×H100": (
        QWEN, "nvidia-h100", 4, "Auto", {}, False, ("438 GiB for weights", "319 GiB", "weights in fp8"),
    ),
    "Qwen3-235B in FP8 on 4×H100": (f"{QWEN}-FP8", "nvidia-h100", 4, "Auto", {}, True, ("55.1 GiB for weights",)),
    "Qwen3-235B made FP8 while loading on 4×H100": (QWEN, "nvidia-h100", 4, "FP8", {}, True, ("fp8",)),
    "Mixtral 8x22B in BF16 on 2×H100": (BIG, "nvidia-h100", 2, "Auto", {}, False, ("weights in fp8",)),
    "Mixtral 8x22B in 4 bits on 2×H100": (f"{BIG}-AWQ", "nvidia-h100", 2, "Auto", {}, True, ("awq",)),
    "Mixtral 8x22B in 4 bits on 1×H200": (BIG, "nvidia-h200", 1, "AWQ", {}, True, ("awq",)),
    "Mixtral 8x22B in FP8 on 1×H200": (f"{BIG}-FP8", "nvidia-h200", 1, "Auto", {}, False, ("2 × nvidia-h200",)),
    "Mixtral 8x7B in 4 bits in 24 GB: its weights alone are 23 GiB": (
        f"{SMALL}-AWQ", "nvidia-rtx-4090", 1, "Auto", {}, False, ("23.0 GiB for weights", "2 × nvidia-rtx-4090"),
    ),
    "Mixtral 8x7B in 4 bits on two such": (f"{SMALL}-GPTQ", "nvidia-rtx-4090", 2, "Auto", {}, True, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_claims(name: str) -> None:
    model, accelerator, gpus, form, groups, fits, words = CLAIMS[name]
    verdict = check(spec(model, accelerator, gpus, form, **groups))
    assert (verdict.fits, [word for word in words if word not in verdict.message]) == (fits, []), verdict.message


# What others saw, by the id of ../shared/data/published_runs.csv, with the source that it names.
SEEN: dict[str, tuple[str, str, int, str, dict[str, Any], bool]] = {
    "P500 V4-Pro 8×H200, context 200,000, utilization 0.95 (vllm-project/recipes)": (
        V4, "nvidia-h200", 8, "Auto", {"engine": {"maxModelLen": 200_000, "maxActiveSeqs": 16, **RECIPE}}, True),
    "P501 V4-Pro 8×H200, DP8 and EP8, context 800,000 (recipes issues 381, 832)": (
        V4, "nvidia-h200", 8, "Auto",
        {"parallelism": {"data": 8, "expert": 8}, "engine": {"maxModelLen": 800_000, "kvCacheDtype": "FP8", **RECIPE}},
        True),
    "P502 V4-Pro 8×H100 (recipes PR 779)": (V4, "nvidia-h100", 8, "Auto", {}, False),
    "P503 V4-Pro one GB200 tray (recipes)": (V4, "nvidia-gb200", 4, "Auto", {}, False),
    "P504 V4-Pro two GB200 trays, DP8 and EP8 (recipes)": (
        V4, "nvidia-gb200", 8, "Auto", {"parallelism": {"data": 8, "expert": 8}}, True),
    "P505 V4-Pro one GB300 tray (recipes)": (V4, "nvidia-gb300", 4, "Auto", {}, True),
    "P506 V4-Pro 8×MI355X, TP8 (recipes)": (V4, "amd-mi355x", 8, "Auto", {"parallelism": {"tensor": 8}}, True),
    "P507 V4-Flash 4×H200, DP4 and EP4 (recipes)": (
        "deepseek-ai/DeepSeek-V4-Flash", "nvidia-h200", 4, "Auto", {"parallelism": {"data": 4, "expert": 4}}, True),
    "P508 R1 8×H200 (docs.sglang.io)": (R1, "nvidia-h200", 8, "Auto", {}, True),
    "P509 R1 8×H100 (docs.sglang.io)": (R1, "nvidia-h100", 8, "Auto", {}, False),
    "P510 R1 16×H100 (docs.sglang.io)": (R1, "nvidia-h100", 16, "Auto", {}, True),
    "P511 R1 NVFP4 4×B200 (docs.sglang.io)": ("nvidia/DeepSeek-R1-FP4", "nvidia-b200", 4, "Auto", {}, True),
    "P513 V3.2 8×H200, TP8, whole context (gpustack)": (
        "deepseek-ai/DeepSeek-V3.2", "nvidia-h200", 8, "Auto", {"parallelism": {"tensor": 8}}, True),
    "P515 Qwen3-235B FP8 4×H100, TP4 (gpustack)": (
        f"{QWEN}-Instruct-2507-FP8", "nvidia-h100", 4, "Auto", {"parallelism": {"tensor": 4}}, True),
    "P516 Qwen3-235B BF16 8×H100, TP8 (gpustack)": (
        f"{QWEN}-Instruct-2507", "nvidia-h100", 8, "Auto", {"parallelism": {"tensor": 8}}, True),
    "P517 gpt-oss-120b 1×H100, context 32,768 (gpustack)": (
        "openai/gpt-oss-120b", "nvidia-h100", 1, "Auto", {"engine": {"maxModelLen": 32_768}}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_others_saw(name: str) -> None:
    model, accelerator, gpus, form, groups, fits = SEEN[name]
    verdict = check(spec(model, accelerator, gpus, form, **groups))
    assert verdict.fits is fits, verdict.message


# P513 (gpustack's performance lab, vLLM 0.13.0): V3.2 with DP8 and EP8 on 8×H200 ran out of memory at its whole context
# and ran at half of it. That vLLM took steps of 8,192 tokens, which data ranks gather from each other (15 GiB to
# run experts in), and nine tenths of the GPU; with the smaller step that is chosen here, one sequence of it fits.
DEFAULTS = {"maxBatchedTokens": 8192, "extraArgs": {"gpu-memory-utilization": "0.9"}}
V32: dict[str, tuple[dict[str, Any], bool]] = {
    "as it was run, whole context": ({"maxModelLen": 163_840, **DEFAULTS}, False),
    "as it was run, half of it": ({"maxModelLen": 81_920, **DEFAULTS}, True),
    "steps as the planner chooses them": ({"maxModelLen": 163_840}, True),
}


@pytest.mark.parametrize("name", V32)
def test_a_run_is_judged_by_what_it_was_run_with(name: str) -> None:
    engine, fits = V32[name]
    ranks = {"parallelism": {"data": 8, "expert": 8}, "engine": engine}
    verdict = check(spec("deepseek-ai/DeepSeek-V3.2", "nvidia-h200", 8, **ranks))
    assert verdict.fits is fits, verdict.message


def test_examples_of_the_project_fit() -> None:
    verdicts = {path.name: check(load_file(path).spec) for path in (ROOT / "manifests" / "examples").glob("*.yaml")}
    assert len(verdicts) >= 6
    assert {name: verdict.message for name, verdict in verdicts.items() if not verdict.fits} == {}


VERDICTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], bool | None, str, str]] = {
    "an unknown model": (("org/other", "nvidia-h100", 8), {}, None, "UnknownModel", "published configuration"),
    "a misspelt accelerator": ((R1, "nvidia-h20O", 8), {}, None, "UnknownAccelerator", "nvidia-h200"),
    "cpu ranks": (("org/tiny", "cpu", 2), {}, None, "MemoryUnknown", "2 ranks"),
    "one cpu rank": (("org/tiny", "cpu", 1), {}, None, "MemoryUnknown", "1 rank of org/tiny is placed"),
    "a form that says no bits": ((QWEN, "nvidia-h100", 4, "CompressedTensors"), {}, None, "UnknownPrecision", "Auto"),
    "a context above the model's": (
        (R1, "nvidia-h200", 8), {"engine": {"maxModelLen": 200_000}}, False, "ContextTooLong", "163840",
    ),
    "a context that is too long for the GPUs": (
        (f"{BIG}-FP8", "nvidia-h100", 2), {"engine": {"maxModelLen": 65_536}}, False, "DoesNotFit",
        "spec.engine.maxModelLen of at most",
    ),
    "the same, unset": ((f"{BIG}-FP8", "nvidia-h100", 2), {}, True, "FitsShorterContext", "capped at"),
    "GPUs that only pipeline stages could share": (
        (BIG, "nvidia-h200", 5), {}, False, "ParallelismImpossible", "Would do: 4 × nvidia-h200 or 8 × nvidia-h200.",
    ),
    "pipeline stages that are asked for by name": (
        (BIG, "nvidia-h200", 5), {"parallelism": {"pipeline": 5}}, True, "Fits", "tensor 1 × data 1 × pipeline 5",
    ),
    "a thousand GPUs": (
        (QWEN, "nvidia-h100", 1000), {}, False, "ParallelismImpossible",
        "spec.hardware.gpusPerReplica: 1000 GPUs would need",
    ),
    "one GPU more than what holds it": (
        (R1, "nvidia-h200", 9), {}, False, "ParallelismImpossible", "Would do: 8 × nvidia-h200 or 16 × nvidia-h200.",
    ),
    "a tensor size that heads do not divide by": (
        (R1, "nvidia-h200", 6), {"parallelism": {"tensor": 3}}, False, "ParallelismImpossible",
        "spec.parallelism.tensor: 128 attention heads of deepseek-v3 do not divide by 3: choose one of 1, 2, 4",
    ),
    "heads that cpu ranks do not divide": (
        (QWEN, "cpu", 3), {"parallelism": {"tensor": 3}}, False, "ParallelismImpossible", "64 attention heads",
    ),
    "expert slices that cut a block of scales": (
        (f"{QWEN}-FP8", "nvidia-h100", 8), {"parallelism": {"tensor": 8, "expert": 1}}, False, "ParallelismImpossible",
        "set expert to 8",
    ),
    "redundant experts that do not divide": (
        (R1, "nvidia-h200", 8), {"experts": {"redundant": 3}, "parallelism": {"expert": 8, "tensor": 8}}, False,
        "ParallelismImpossible", "experts.redundant",
    ),
    "more ranks than experts": (
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "nvidia-h100", 16), {"parallelism": {"tensor": 16, "expert": 16}},
        False, "ParallelismImpossible", "spec.parallelism.expert: 8 experts of mixtral-8x7b do not divide by 16",
    ),
    "redundant experts that take the last room": (
        (V4, "nvidia-h200", 8),
        {"experts": {"redundant": 64}, "parallelism": {"data": 8, "expert": 8}, "engine": {"maxModelLen": 8192}},
        False, "DoesNotFit", "no redundant experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str) -> None:
    arguments, groups, fits, reason, words = VERDICTS[name]
    verdict = check(spec(*arguments, **groups))
    assert (verdict.fits, verdict.reason) == (fits, reason), verdict.message
    assert words in verdict.message
    assert (verdict.plan is None) is (fits is False)


def test_an_external_engine_takes_no_gpu() -> None:
    document = {
        "apiVersion": "moestack.dev/v1alpha1",
        "kind": "MoEDeployment",
        "metadata": {"name": "m"},
        "spec": {"model": {"id": "m"}, "engine": {"kind": "External", "url": "http://sglang:30000/v1"}},
    }
    verdict = check(load_object(document).spec)
    assert (verdict.fits, verdict.reason, verdict.plan) == (True, "ExternalEngine", None)


def test_a_checkpoint_elsewhere_is_known_by_its_id() -> None:
    placed = spec(f"{QWEN}-FP8", "nvidia-h100", 4)
    moved = placed.model_copy(update={"model": placed.model.model_copy(update={"source": "s3://models/own-folder"})})
    assert check(moved) == check(placed)


def test_the_plan_honours_what_is_set() -> None:
    asked = {
        "parallelism": {"tensor": 4, "data": 2, "expert": 8, "pipeline": 1},
        "engine": {"maxModelLen": 16_384, "maxActiveSeqs": 48, "maxBatchedTokens": 3072},
    }
    plan = check(spec(R1, "nvidia-h200", 8, **asked)).plan
    assert plan is not None
    assert (plan.tensor, plan.data, plan.expert, plan.pipeline) == (4, 2, 8, 1)
    assert (plan.max_model_len, plan.max_active_seqs, plan.max_batched_tokens) == (16_384, 48, 3072)


def test_a_replica_on_several_nodes() -> None:
    plan = check(spec(R1, "nvidia-h100", 16)).plan
    assert plan is not None
    assert (plan.tensor, plan.data, plan.nodes_per_replica, plan.gpus_per_node) == (8, 2, 2, 8)
    tray = check(spec(V4, "nvidia-gb200", 8)).plan
    assert tray is not None
    assert (tray.nodes_per_replica, tray.gpus_per_node) == (2, 4)


def test_more_of_the_gpu_may_be_used_and_weights_may_lie_elsewhere() -> None:
    refused = spec(f"{SMALL}-AWQ", "nvidia-rtx-4090", 1, engine={"maxModelLen": 8192})
    helped = {"maxModelLen": 8192, "extraArgs": {"gpu-memory-utilization": "0.98", "cpu-offload-gb": "8"}}
    assert check(refused).fits is False
    assert check(spec(f"{SMALL}-AWQ", "nvidia-rtx-4090", 1, engine=helped)).fits is True


def test_a_cache_of_a_set_size() -> None:
    cache = 20 * GIB
    plan = check(spec(R1, "nvidia-h200", 8, engine={"extraArgs": {"kv-cache-memory-bytes": str(cache)}})).plan
    assert plan is not None
    assert {row.part: row.size.bytes for row in plan.memory}["KVCache"] == cache
    tiny = check(spec(R1, "nvidia-h200", 8, engine={"extraArgs": {"kv-cache-memory-bytes": "1000000"}}))
    assert tiny.fits is False


MODELS = sorted(next(name for name, key in packaged().names.items() if key == wanted) for wanted in packaged().models)
FORMS = ["Auto", "FP8", "NVFP4", "AWQ"]
ANY = {
    "model": st.sampled_from(MODELS),
    "accelerator": st.sampled_from(sorted(packaged().accelerators)),
    "gpus": st.integers(1, 64),
    "form": st.sampled_from(FORMS),
    "redundant": st.sampled_from([0, 8, 32]),
}


def judged(model: str, accelerator: str, gpus: int, form: str, redundant: int, **engine: Any) -> FitVerdict:
    groups = {"experts": {"redundant": redundant}, "engine": engine}
    return check(spec(f"org/{model}", accelerator, gpus, form, **groups))


@settings(max_examples=60, deadline=None)
@given(**ANY)
def test_whatever_is_asked(model: str, accelerator: str, gpus: int, form: str, redundant: int) -> None:
    verdict = judged(model, accelerator, gpus, form, redundant)
    assert 0 < len(verdict.message) <= 1024
    assert verdict.reason.isalpha()
    if verdict.plan is None:
        assert verdict.fits is False
        return
    plan, facts = verdict.plan, packaged().models[packaged().names[model]]
    assert verdict.fits
    assert plan.tensor * plan.data * plan.pipeline == gpus == plan.nodes_per_replica * plan.gpus_per_node
    assert plan.expert in (1, plan.tensor * plan.data)
    assert facts.heads % plan.tensor == 0
    assert (facts.experts + redundant) % plan.expert == 0
    sizes = [row.size.bytes for row in plan.memory]
    assert min(sizes) >= 0
    assert sum(sizes) == plan.memory_per_gpu == packaged().accelerators[accelerator].memory_bytes
    assert plan.max_model_len is not None
    assert plan.max_model_len <= facts.max_context
    assert plan.max_active_seqs is not None
    assert plan.max_batched_tokens is not None
    assert 1 <= plan.max_active_seqs <= plan.max_batched_tokens
    status = plan.to_status()
    assert prod((status.tensor, status.data, status.pipeline)) == gpus


SIZE = st.one_of(st.none(), st.sampled_from([1, 2, 3, 4, 8]))


@settings(max_examples=80, deadline=None)
@given(**ANY, tensor=SIZE, data=SIZE, pipeline=SIZE, whole=st.sampled_from([None, True, False]))
def test_sizes_that_are_set_stand_or_are_refused_by_name(
    model: str,
    accelerator: str,
    gpus: int,
    form: str,
    redundant: int,
    tensor: int | None,
    data: int | None,
    pipeline: int | None,
    whole: bool | None,
) -> None:
    asked = {"tensor": tensor, "data": data, "pipeline": pipeline}
    set_sizes = {name: size for name, size in asked.items() if size is not None}
    product = prod(set_sizes.values())
    gpus = product if len(set_sizes) == 3 else product * gpus
    if whole is not None and tensor and data:
        set_sizes["expert"] = tensor * data if whole else 1
    groups = {"parallelism": set_sizes, "experts": {"redundant": redundant}}
    verdict = check(spec(f"org/{model}", accelerator, min(gpus, 1024 // product * product), form, **groups))
    if verdict.plan is not None:
        assert {name: getattr(verdict.plan, name) for name in set_sizes} == set_sizes
    elif verdict.reason == "ParallelismImpossible":
        assert "spec." in verdict.message


@settings(max_examples=40, deadline=None)
@given(**ANY, length=st.integers(1024, 32_768), share=st.floats(0.1, 1.0))
def test_a_shorter_context_never_needs_more(
    model: str, accelerator: str, gpus: int, form: str, redundant: int, length: int, share: float
) -> None:
    assume(length <= packaged().models[packaged().names[model]].max_context)
    longer = judged(model, accelerator, gpus, form, redundant, maxModelLen=length)
    shorter = judged(model, accelerator, gpus, form, redundant, maxModelLen=max(1, int(length * share)))
    assert shorter.fits or not longer.fits


@settings(max_examples=60, deadline=None)
@given(**ANY | {"gpus": st.integers(1, 16)}, more=st.integers(1, 15), nodes=st.booleans())
def test_another_gpu_never_lowers_what_fits(
    model: str, accelerator: str, gpus: int, form: str, redundant: int, more: int, nodes: bool
) -> None:
    """What n GPUs hold is never refused with more of them for want of memory. A number that heads and experts do not
    divide by is refused as such, and the nearest smaller one that holds it is named: n or above."""
    node = packaged().accelerators[accelerator].gpus_per_node if nodes else 1
    fewer, larger = gpus * node, (gpus + more) * node
    small = judged(model, accelerator, fewer, form, redundant, maxModelLen=2048)
    large = judged(model, accelerator, larger, form, redundant, maxModelLen=2048)
    if not small.fits or large.fits:
        return
    assert large.reason == "ParallelismImpossible", large.message
    named = [int(count) for count in re.findall(rf"(\d+) × {accelerator}", large.message.partition("Would do")[2])]
    assert fewer <= min(named) < larger, large.message


@settings(max_examples=40, deadline=None)
@given(**ANY, share=st.floats(1.0, 4.0))
def test_more_memory_never_lowers_what_fits(
    model: str, accelerator: str, gpus: int, form: str, redundant: int, share: float
) -> None:
    catalog = packaged()
    known = catalog.accelerators[accelerator]
    larger = replace(known, memory_bytes=int(known.memory_bytes * share))
    wider = replace(catalog, accelerators={**catalog.accelerators, accelerator: larger})
    asked = spec(f"org/{model}", accelerator, gpus, form, experts={"redundant": redundant})
    small, large = check(asked, catalog), check(asked, wider)
    assert large.fits or not small.fits, large.message
    if small.plan is not None and large.plan is not None:
        assert (large.plan.max_model_len or 0) >= (small.plan.max_model_len or 0)
