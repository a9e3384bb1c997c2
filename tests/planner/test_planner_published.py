"""Published runs: how rows are read, what is skipped and why, the split of sources, and the calibration from them."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks import planner as benchmark
from benchmarks import planner_twins
from benchmarks.planner import RUNS
from moe_cli.outcome import Refusal
from moe_cli.plan_check import check as command
from moe_planner import calibration, catalog, fitting, published
from moe_planner import table as tables
from moe_planner.calibration import BOUNDS
from moe_planner.check import Report, check, document, groups, summary
from moe_planner.published import Case, FitCase, Skipped
from moe_planner.table import TableInvalid
from moe_planner.weights import Layout

CATALOG = catalog.packaged()
HEADER = [
    *("id", "model", "precision", "engine", "engine_version", "hardware", "gpus", "tp", "dp", "ep", "pp"),
    *("disaggregated(yes/no)", "input_tokens", "output_tokens", "concurrency_or_batch", "metric", "value", "date"),
    *("source", "confidence", "note"),
]
ROW = {
    "id": "A1",
    "model": "Qwen3-235B-A22B",
    "precision": "FP8",
    "engine": "vLLM",
    "hardware": "H100-80GB",
    "gpus": "8",
    "tp": "8",
    "input_tokens": "1000",
    "output_tokens": "1000",
    "concurrency_or_batch": "64",
    "metric": "output_tok_s_total",
    "value": "2000",
    "source": "somebody",
}


def table(*rows: dict[str, str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADER, restval="")
    writer.writeheader()
    writer.writerows({**ROW, **row} for row in rows)
    return text.getvalue()


def only(**columns: str) -> Case | FitCase | Skipped:
    (found,) = published.cases(tables.read(table(columns)), CATALOG)
    return found


def case(**columns: str) -> Case:
    found = only(**columns)
    assert isinstance(found, Case), found
    return found


READ = {
    "an organisation before the model": ({"model": "Qwen/Qwen3-235B-A22B"}, "qwen3-235b-a22b", "fp8", "nvidia-h100"),
    "a date after it": ({"model": "DeepSeek-R1-0528", "hardware": "H200"}, "deepseek-v3", "fp8", "nvidia-h200"),
    "two names of one shape": ({"model": "DeepSeek-V3/R1", "hardware": "H200"}, "deepseek-v3", "fp8", "nvidia-h200"),
    "a short name": ({"model": "Mixtral-8x7B", "precision": "FP16"}, "mixtral-8x7b", "bf16", "nvidia-h100"),
    "a version is no suffix of another": (
        {"model": "DeepSeek-V3.2", "hardware": "H200"},
        "deepseek-v3.2",
        "fp8",
        "nvidia-h200",
    ),
    "a rack": (
        {"hardware": "GB200-186GB (NVL72)", "precision": "NVFP4"},
        "qwen3-235b-a22b",
        "nvfp4",
        "nvidia-gb200",
    ),
    "words around the GPU": ({"hardware": "H100-80GB + IB"}, "qwen3-235b-a22b", "fp8", "nvidia-h100"),
    "experts and the rest named apart": (
        {"model": "DeepSeek-V4-Pro", "precision": "FP4 experts + FP8 (~865 GB)", "hardware": "B200"},
        "deepseek-v4-pro",
        "mxfp4-fp8",
        "nvidia-b200",
    ),
}


@pytest.mark.parametrize("wanted", READ.values(), ids=READ)
def test_names_are_read(wanted: tuple[dict[str, str], str, str, str]) -> None:
    columns, model, precision, accelerator = wanted
    found = case(**columns)
    assert (found.model.key, found.precision.name, found.accelerator.name) == (model, precision, accelerator)


LAYOUTS = {
    "tensor": ({"tp": "8", "ep": "1"}, [Layout(8)]),
    "tensor and expert": ({"tp": "8", "ep": "8"}, [Layout(8, expert=8)]),
    "attention data parallel": ({"tp": "1", "dp": "8", "ep": "8"}, [Layout(1, 8, 8)]),
    "both told of the same GPUs: data counts": ({"tp": "8", "dp": "8", "ep": "8"}, [Layout(1, 8, 8)]),
    "SGLang's word": ({"tp": "8", "dp": "dp-attn", "ep": "8"}, [Layout(1, 8, 8)]),
    "stages": ({"tp": "4", "pp": "2", "ep": "1"}, [Layout(4, pipeline=2)]),
    "replicas side by side": ({"tp": "4", "gpus": "8", "ep": "1"}, [Layout(4)]),
    "the note enables attention DP": ({"note": "options also enable attention DP"}, [Layout(1, 8, 8)]),
    "the note denies it": ({"ep": "1", "note": "defaults, no attention DP"}, [Layout(8)]),
    "on some points": ({"note": "DP attention on the high-concurrency points"}, [Layout(8), Layout(1, 8, 8)]),
}


@pytest.mark.parametrize("wanted", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_are_read(wanted: tuple[dict[str, str], list[Layout]]) -> None:
    columns, layouts = wanted
    assert [option.layout for option in case(**columns).options] == layouts


def test_without_parallelism_the_fastest_layout_is_taken_and_said() -> None:
    found = case(tp="", gpus="16", hardware="H200-141GB")
    assert found.assumed == ("the fastest layout",)
    assert all(16 % option.layout.gpus == 0 and option.layout.gpus <= 8 for option in found.options)
    known = calibration.packaged()
    alone = [published.predict(replace(found, options=(option,)), known) for option in found.options]
    assert published.predict(found, known) == max(alone)


METRICS = {
    "all GPUs": ("output_tok_s_total", {}, "output", 2000.0),
    "each GPU": ("output_tok_s_per_gpu", {}, "output", 16_000.0),
    "input and output": ("total_tok_s_per_gpu", {}, "total", 16_000.0),
    "prompts": ("input_tok_s_per_gpu", {}, "input", 16_000.0),
    "a decode pool": ("output_tok_s_per_gpu", {"disaggregated(yes/no)": "yes"}, "decode", 16_000.0),
    "milliseconds": ("tpot_ms_p50", {}, "itl", 2.0),
    "first token": ("ttft_ms_mean", {}, "ttft", 2.0),
}


@pytest.mark.parametrize("wanted", METRICS.values(), ids=METRICS)
def test_metrics_are_read_by_name(wanted: tuple[str, dict[str, str], str, float]) -> None:
    metric, columns, kind, value = wanted
    found = case(metric=metric, **columns)
    assert (found.metric, found.value) == (kind, pytest.approx(value))
    assert found.throughput == (kind not in ("itl", "ttft"))


def test_total_counts_prompts_and_output() -> None:
    known = calibration.packaged()
    output = published.predict(case(input_tokens="3000"), known)
    total = published.predict(case(input_tokens="3000", metric="total_tok_s_total"), known)
    assert total == pytest.approx(4 * output)


LOADS = {
    "a number": ({"concurrency_or_batch": "64"}, 64),
    "for each GPU": ({"concurrency_or_batch": "16/GPU"}, 128),
    "queued, the shortest": ({"concurrency_or_batch": "max load (1000-3000 requests queued)"}, 3000),
    "queued, the longest": (
        {"concurrency_or_batch": "max load (1000-3000 requests queued)", "input_tokens": "32768"},
        1000,
    ),
    "offline": ({"concurrency_or_batch": "Offline"}, tables.UNLIMITED),
    "at most": ({"concurrency_or_batch": "<=128"}, 128),
}


@pytest.mark.parametrize("wanted", LOADS.values(), ids=LOADS)
def test_loads_are_read(wanted: tuple[dict[str, str], int]) -> None:
    columns, concurrency = wanted
    assert case(**columns).options[0].load.concurrency == concurrency


def test_lengths_of_recorded_conversations_spread_and_a_burst_is_slower_than_steady_state() -> None:
    known = calibration.packaged()
    columns = {"input_tokens": "ShareGPT ~216", "output_tokens": "197", "concurrency_or_batch": "1000"}
    burst = case(**columns, note="all requests sent at once (burst)")
    assert (burst.requests, burst.spread) == (1000.0, True)
    assert burst.options[0].load.input_tokens == 216
    steady = case(**{**columns, "input_tokens": "216"})
    assert published.predict(burst, known) < published.predict(steady, known)


def test_requests_of_equal_length_run_in_whole_waves() -> None:
    """What there is no room for takes a wave of its own, though it is no whole one."""
    known = calibration.packaged()
    columns = {"concurrency_or_batch": "max load (1000-3000 requests queued)", "engine": "TensorRT-LLM"}
    queued = case(**columns)
    room = queued.options[0].room
    full, over = (published.predict(replace(queued, requests=n), known) for n in (0.85 * room, 1.2 * room))
    assert over < 0.9 * full


ADMISSION = {
    "what is deployed": ("vLLM", "", (0.75, None)),
    "TensorRT-LLM never evicts": ("TensorRT-LLM", "", (1.0, 0.9)),
    "its note has a range": ("TensorRT-LLM", "offline, KV fraction 0.90-0.95", (1.0, 0.95)),
    "its note has one": ("TensorRT-LLM", "KV fraction 0.8", (1.0, 0.8)),
}


@pytest.mark.parametrize("wanted", ADMISSION.values(), ids=ADMISSION)
def test_room_is_what_the_engine_leaves(wanted: tuple[str, str, tuple[float, float | None]]) -> None:
    engine, note, told = wanted
    assert tables.admission({**ROW, "note": note}, tables.engine(engine)) == told


H200 = {"model": "DeepSeek-V3.2", "hardware": "H200", "concurrency_or_batch": "1000"}
COLD = {
    "SGLang compiles for a sparse indexer": ({**H200, "engine": "SGLang", "note": "burst"}, True),
    "vLLM has compiled before": ({**H200, "note": "burst"}, False),
    "a steady load has waited long ago": ({**H200, "engine": "SGLang"}, False),
    "SGLang has compiled for others": ({**H200, "engine": "SGLang", "note": "burst", "model": "DeepSeek-R1"}, False),
    "TensorRT-LLM compiles": ({**H200, "engine": "TRT-LLM", "note": "all sent at once", "model": "DeepSeek-R1"}, True),
    "no FP8": ({"engine": "TRT-LLM", "precision": "BF16", "note": "burst", "hardware": "H200"}, False),
}


@pytest.mark.parametrize("wanted", COLD.values(), ids=COLD)
def test_a_first_burst_waits_for_kernels(wanted: tuple[dict[str, str], bool]) -> None:
    columns, cold = wanted
    found = case(**columns)
    assert found.cold is cold
    known = calibration.packaged()
    slower = published.predict(found, replace(known, cold_s=2 * known.cold_s)) < published.predict(found, known)
    assert slower is cold


def test_a_server_run_keeps_its_latency() -> None:
    known = calibration.packaged()
    offline = case(concurrency_or_batch="Offline")
    server = case(concurrency_or_batch="Server", note=">=40 tok/s/user at p99")
    assert server.itl_limit_s == pytest.approx(0.025)
    assert published.predict(server, known) < published.predict(offline, known)


SKIPPED = {
    "an unknown model": ({"model": "Nobody-7B"}, "model: Nobody-7B"),
    "an unknown GPU": ({"hardware": "Abacus"}, "hardware: Abacus"),
    "an unknown metric": ({"metric": "peak_online_tok_s_total"}, "metric: peak_online"),
    "no number": ({"value": "fast"}, "value: fast"),
    "a negative value": ({"value": "-3"}, "value: -3"),
    "no GPUs": ({"gpus": ""}, "gpus: blank"),
    "a layout that does not make the GPUs": ({"tp": "3"}, "tp, dp, pp"),
    "more ranks than GPUs": ({"tp": "16"}, "tp: 16 needs more than 8 GPUs"),
    "more ranks in stages than GPUs": ({"tp": "8", "pp": "2"}, "tp: 8 in 2 stages needs more than 8 GPUs"),
    "a value that is none": ({"value": "nan"}, "value: nan"),
    "a negative length": ({"output_tokens": "-5"}, "output_tokens: -5 is no length"),
    "a negative load": ({"concurrency_or_batch": "-4"}, "concurrency_or_batch: -4"),
    "no prompt": ({"input_tokens": ""}, "input_tokens"),
    "no output": ({"output_tokens": ""}, "output_tokens"),
    "no load": ({"concurrency_or_batch": ""}, "concurrency_or_batch: not given"),
    "no limit of a server run": ({"concurrency_or_batch": "Server"}, "latency limit"),
    "speculative decoding": ({"note": "min-latency, MTP-3"}, "speculative"),
    "shared pools": ({"metric": "total_tok_s_per_gpu", "disaggregated(yes/no)": "yes"}, "disaggregated"),
    "no room at all": ({"gpus": "1", "tp": "1", "precision": "BF16"}, "no room"),
    "an unknown form of weights": ({"precision": "FP3"}, "precision: FP3"),
}


@pytest.mark.parametrize("wanted", SKIPPED.values(), ids=SKIPPED)
def test_what_is_not_predicted_has_its_reason(wanted: tuple[dict[str, str], str]) -> None:
    columns, why = wanted
    found = only(**columns)
    assert isinstance(found, Skipped)
    assert why in found.why


V32 = {"model": "DeepSeek-V3.2", "hardware": "H200-141GB", "gpus": "8", "tp": "1", "dp": "8", "ep": "8"}
FITS = {
    "V4-Pro not on eight H100": ({"model": "DeepSeek-V4-Pro", "precision": "FP4 experts + FP8", "tp": ""}, "0", True),
    "and whoever saw it there is contradicted": ({"model": "DeepSeek-V4-Pro", "precision": "", "tp": ""}, "1", False),
    "Qwen3 in FP8 on four": ({"gpus": "4", "tp": "4"}, "1", True),
    "V3.2 by data ranks at its full context": ({**V32, "note": "at full 163840 context OOMs"}, "0", True),
    "but where a shorter one was set": ({**V32, "note": "max-model-len 81920"}, "1", True),
    "and in more of the GPU": ({**V32, "note": "full 163840 context, gpu-memory-utilization 0.97"}, "1", True),
}


@pytest.mark.parametrize("wanted", FITS.values(), ids=FITS)
def test_fit_rows_are_judged_apart(wanted: tuple[dict[str, str], str, bool]) -> None:
    columns, value, right = wanted
    found = only(metric="fits(1=yes,0=no)", value=value, **columns)
    assert isinstance(found, FitCase)
    assert found.right is right


LEAST = "model,precision,engine,hardware,gpus,input_tokens,output_tokens,metric,value"
TABLES = {
    "a header alone": (LEAST, "no rows"),
    "blank lines alone": (f"{LEAST}\n,,,,,,,,\n\n", "no rows"),
    "parted by semicolons": (LEAST.replace(",", ";"), "not parted by commas"),
    "a column twice": (f"{LEAST},value", "column value is there twice"),
    "a row that is too long": (f"{LEAST}\na,b,c,d,1,2,3,e,9,000\n", "line 2: has more cells"),
}


@pytest.mark.parametrize("wanted", TABLES.values(), ids=TABLES)
def test_a_table_that_cannot_be_read_says_where(wanted: tuple[str, str]) -> None:
    text, why = wanted
    with pytest.raises(TableInvalid, match=why):
        tables.read(text)


def test_columns_come_in_any_order_and_case_and_rows_without_a_name_have_their_line() -> None:
    mixed = ",".join(name.upper() for name in reversed(LEAST.split(",")))
    rows = tables.read(f"\ufeff{mixed}\r\n9000,output_tok_s_total,512,1024,2,H100,vLLM,FP8,Mixtral-8x7B\r\n")
    assert (rows[0]["model"], rows[0]["value"], rows[0]["id"]) == ("Mixtral-8x7B", "9000", "line 2")


def test_a_table_without_a_column_is_refused_by_its_name() -> None:
    with pytest.raises(TableInvalid, match="column hardware is missing"):
        tables.read(table().replace("hardware", "machine"))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(HEADER), st.text(max_size=30) | st.from_regex(r"[0-9.,~/ ]{1,12}", fullmatch=True))
)
def test_any_row_is_a_case_or_has_a_reason(columns: dict[str, str]) -> None:
    plain = {name: value.replace("\0", "").replace("\r", " ") for name, value in columns.items()}
    for found in published.cases(tables.read(table(plain)), CATALOG):
        if isinstance(found, Case):
            assert published.predict(found, calibration.packaged()) > 0
        elif isinstance(found, Skipped):
            assert found.why


# The split, and the calibration that was fitted to one side.


@pytest.fixture(scope="module")
def runs() -> list[dict[str, str]]:
    return tables.read(RUNS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report() -> Report:
    text = RUNS.read_text(encoding="utf-8")
    return check(text, CATALOG, calibration.packaged(), calibration.fitted_sources())


def test_sources_take_turns_by_name_whatever_their_values(runs: list[dict[str, str]]) -> None:
    side = fitting.split(runs)
    assert not set(side.fitted) & set(side.held_out)
    changed = [{**row, "value": "1"} for row in reversed(runs)]
    assert fitting.split(changed) == side
    assert set(calibration.fitted_sources()) <= set(side.fitted)


def test_enough_is_held_out(report: Report) -> None:
    assert len(report.held_out) >= 10
    assert len(groups(report.held_out, "source")) >= 4
    total = summary(report.held_out)
    assert total is not None
    assert total.median <= 0.20
    # One sigma each way: about two rows of three.
    assert 0.6 <= total.inside <= 0.8


def test_fitting_again_leaves_the_committed_factors(runs: list[dict[str, str]]) -> None:
    """From the committed factors on, so that it takes seconds: the descent finds nothing better nearby."""
    side = fitting.split(runs)
    used = [
        found
        for found in published.cases(runs, CATALOG)
        if isinstance(found, Case) and found.throughput and found.source in side.fitted
    ]
    committed = calibration.parse(calibration.text())
    again = fitting.fit(used, start=committed)
    for name in BOUNDS:
        assert getattr(again, name) == pytest.approx(getattr(committed, name), rel=0.03), name
    assert again.engines == pytest.approx(committed.engines, rel=0.03)


def test_the_form_is_judged_by_fitted_sources_alone(
    runs: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Case] = []

    def left_out(cases: list[Case]) -> dict[str, NDArray[np.float64]]:
        seen.extend(cases)
        return {case.source: np.array([0.5, -0.2]) for case in cases}

    monkeypatch.setattr(fitting, "cross_validate", left_out)
    told = benchmark.validate(RUNS.read_text(encoding="utf-8"))
    side = fitting.split(runs)
    assert {case.source for case in seen} <= set(side.fitted)
    assert not {case.source for case in seen} & set(side.held_out)
    assert set(told) == {"all", "nvidia"}


def test_a_row_that_its_own_source_contradicts() -> None:
    """Level in two pairs and half in the third: whoever is exact on all else is wrong by a factor of two there."""
    runs = [("1000", "100", "100"), ("2000", "80", "80"), ("4000", "60", "30")]
    rows = [
        {"id": f"{tokens}{gpu}", "hardware": gpu, "input_tokens": tokens, "value": value}
        for tokens, first, second in runs
        for gpu, value in (("H100-80GB", first), ("H200-141GB", second))
    ]
    found = planner_twins.alone(
        [one for one in published.cases(tables.read(table(*rows)), CATALOG) if isinstance(one, Case)]
    )
    errors = {one.row: one.error for one in found}
    assert errors["4000H200-141GB"] == pytest.approx(1.0)
    assert errors["4000H100-80GB"] == pytest.approx(-0.5)
    assert len(found) == 6


def test_a_fit_finds_the_factors_that_made_its_rows() -> None:
    """Rows made by known factors: from the usual start the descent comes back to the speed that they give."""
    truth = replace(calibration.START, bandwidth=0.55, gemm_8=0.35, kernel_s=5e-6, engines={"vllm": 1.0})
    made = []
    for inputs, outputs, concurrency in ((1000, 1000, 8), (1000, 1000, 256), (8000, 200, 64), (200, 2000, 1000)):
        for tp in ("4", "8"):
            found = case(
                tp=tp, input_tokens=str(inputs), output_tokens=str(outputs), concurrency_or_batch=str(concurrency)
            )
            made.append(replace(found, value=published.predict(found, truth)))
    fitted = fitting.fit(made)
    assert max(abs(fitting.errors(made, fitted))) < 0.1
    assert max(abs(fitting.errors(made, calibration.START))) > 0.25


# `moectl plan --check`.


def test_the_command_prints_every_row_and_the_medians(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(table({}, {"id": "A2", "model": "Nobody-7B"}, {"id": "A3", "metric": "fits", "value": "1"}))
    assert command(file, False) == 0
    out = capsys.readouterr().out
    assert "A1" in out
    assert "not predicted: model: Nobody-7B" in out
    for words in ("by source", "by model", "by hardware", "fit rows right: 1 of 1; rows not predicted: 1"):
        assert words in out


def test_the_command_speaks_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(table({}))
    assert command(file, True) == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = told["rows"]
    assert row["error"] == pytest.approx(row["predicted"] / 2000 - 1)
    assert told["held_out"]["rows"] == 1
    assert set(told["by"]) == {"source", "model", "hardware"}


def test_the_command_refuses_what_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(Refusal, match="column model is missing"):
        command(tmp_path / "a.csv", False)
    with pytest.raises(Refusal, match="cannot be read"):
        command(tmp_path / "none.csv", False)


def test_the_document_keeps_every_row(report: Report, runs: list[dict[str, str]]) -> None:
    told = document(report)
    assert len(told["rows"]) == len(runs)
    assert {row["id"] for row in told["rows"]} == {row["id"] for row in runs}
