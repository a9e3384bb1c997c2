"""`moectl plan`: the answer, its JSON and its pictures, and what cannot be asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moe_api.load import load_file
from moe_cli.main import main
from moe_planner.fit import check
from tests.cli.cli_world import QWEN, write_resource

Moectl = Callable[..., tuple[int, str, str]]
H100 = {"accelerator": "nvidia-h100", "gpusPerReplica": 4}
V4 = "deepseek-ai/DeepSeek-V4-Pro"
BIG = ("--model", QWEN, "--accelerator", "H100", "--gpus", "4")


@pytest.fixture
def moectl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moectl:
    """Runs `moectl plan` in this process: exit code, stdout, stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moectl", "plan", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def asked(moectl: Moectl, *words: str | Path) -> dict[str, Any]:
    code, out, err = moectl(*words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_answer_to_a_file(moectl: Moectl, tmp_path: Path) -> None:
    file = write_resource(tmp_path, hardware=H100, slo={"ttftP95": "800ms", "itlP95": "50ms"})
    code, out, err = moectl(file, "--explain")
    assert (code, err) == (0, "")
    for words in ("Memory of one GPU of 4, 79.6 GiB", "keeps the SLO", "Launch:", "vllm serve Qwen/", "$/1M", "gpt-5.5",
                  "Tokens a month from which", "Between GPUs: each sends", "Why this one"):  # fmt: skip
        assert words in out


def test_json_holds_together(moectl: Moectl, tmp_path: Path) -> None:
    found = asked(moectl, write_resource(tmp_path, hardware=H100), "--tokens-per-month", "20e9", "--rent", "2.5")
    chosen = found["chosen"]
    assert found["slo"]["kept"] is True
    assert chosen["usdPerMTokens"] >= min(row["usdPerMTokens"] for row in found["front"])
    assert found["usdPerMonth"] == pytest.approx(chosen["replicas"] * 4 * 2.5 * 730)
    assert chosen["usdPerMTokens"] == pytest.approx(found["usdPerMonth"] / 20e3)
    sizes = [row["size"] for row in found["fit"]["plan"]["memory"]]
    assert len(sizes) >= 4
    launch = found["launch"]
    assert launch["spec"]["parallelism"] == chosen["parallelism"]
    assert launch["engineArguments"]["tensor_parallel_size"] == chosen["parallelism"]["tensor"]
    assert launch["engineArguments"]["max_num_seqs"] == chosen["activeSeqsPerDataRank"]
    cost = found["cost"][0]
    api = cost["apis"][0]
    month = api["breakEvenTokensPerMonth"] * api["usdPerMTokens"] / 1e6
    assert month == pytest.approx(4 * 2.5 * 730)
    assert {row["workload"] for row in found["cost"]} == {"asked", "chat", "completion"}
    month = found["openCost"]["data"][0]["default/t"]
    assert (month["minutes"], month["externalCost"]) == (730 * 60, 0)
    assert month["totalCost"] == month["gpuCost"] == pytest.approx(found["usdPerMonth"])
    assert set(found["sensitivities"]) == {"gpt-5.5", "claude-opus-4.7"}


def test_a_files_own_targets_are_what_it_is_compared_with(moectl: Moectl, tmp_path: Path) -> None:
    target = {"name": "gpt", "provider": "openai", "model": "gpt-x", "secretRef": {"name": "s", "key": "k"}}
    priced = {**target, "price": {"inputUsdPerMTokens": 1, "outputUsdPerMTokens": 2}}
    listed = {**target, "name": "opus", "model": "claude-opus-4-7"}
    file = write_resource(tmp_path, hardware=H100, fallback={"targets": [priced, listed], "budget": {"usdPerDay": "5"}})
    found = asked(moectl, file)
    rows = {row["api"]: row["usdPerMTokens"] for row in found["cost"][0]["apis"]}
    assert rows == {"gpt-x": pytest.approx((2000 + 400) / 2200), "claude-opus-4.7": pytest.approx(15000 / 2200)}


def test_what_does_not_fit_is_refused_with_what_would(moectl: Moectl) -> None:
    code, out, err = moectl("--model", V4, "--accelerator", "nvidia-h100", "--gpus", "8")
    assert (code, err) == (2, "")
    assert "GiB a GPU too little" in out
    assert "Would do: 16 × nvidia-h100" in out


def test_where_nothing_serves_the_largest_is_judged(moectl: Moectl) -> None:
    code, out, _ = moectl("--model", V4, "--accelerator", "L4", "--accelerator", "A10", "--gpus", "1", "--gpus", "2")
    assert code == 2
    assert "2 × nvidia-l4 have" in out
    assert "Would do:" in out
    assert out.count("memory:") == 4


def test_what_the_file_sets_of_the_engine_stands(moectl: Moectl, tmp_path: Path) -> None:
    engine = {"maxActiveSeqs": 32, "maxBatchedTokens": 4096}
    file = write_resource(tmp_path, hardware=H100, engine=engine, tuning={"bounds": {"maxActiveSeqs": {"max": 32}}})
    launch = asked(moectl, file)["launch"]
    assert "engine" not in launch["spec"]
    assert launch["engineArguments"]["max_num_seqs"] == 32


def test_an_accelerator_whose_speed_is_not_known_still_fits(moectl: Moectl) -> None:
    words = ("--model", "openai/gpt-oss-20b", "--accelerator", "nvidia-rtx-3090", "--gpus", "1")
    code, out, err = moectl(*words)
    assert (code, err) == (0, "")
    assert "Memory of one GPU of 1" in out
    assert "unknown speed: accelerators.nvidia-rtx-3090" in out


def test_skew_may_bring_capacity_into_the_launch(moectl: Moectl) -> None:
    # Eight ranks cut FP8's blocks, so experts stay whole and their ranks wait for the busiest.
    eight = ("--model", QWEN, "--accelerator", "H100", "--gpus", "8", "--skew", "1.2")
    found = asked(moectl, *eight, "--capacity")
    assert {row["capacityFactor"] for row in found["front"]} - {None}
    if found["chosen"]["capacityFactor"] is not None:
        assert found["launch"]["spec"]["experts"]["overflow"] == "Reroute"
    assert {row["capacityFactor"] for row in asked(moectl, *eight)["front"]} == {None}


def test_the_cheapest_of_several_accelerators(moectl: Moectl) -> None:
    words = ("--model", QWEN, "--accelerator", "nvidia-h100", "--accelerator", "nvidia-h200", "--explain")
    found = asked(moectl, *words)
    assert {row["accelerator"] for row in found["front"]} == {"nvidia-h100", "nvidia-h200"}
    assert {row["gpusPerReplica"] for row in found["rejected"] if row["why"] == "memory"} >= {1, 2}
    code, out, _ = moectl(*words)
    assert code == 0
    assert "1 × nvidia-h100, tensor 1 × data 1 × pipeline 1, expert 1: memory:" in out


def test_an_slo_that_nothing_keeps_is_told(moectl: Moectl) -> None:
    found = asked(moectl, *BIG, "--itl-ms", "1")
    assert found["slo"]["kept"] is False
    assert found["chosen"]["concurrency"] == 1
    assert "misses the SLO least" in moectl(*BIG, "--itl-ms", "1")[1]


def test_a_trace_gives_the_mix_and_the_lengths(moectl: Moectl, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{t},{1000},{100}" for t in range(60) for _ in range(40 if t == 30 else 1)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    found = asked(moectl, *BIG, "--trace", trace)
    assert (found["traffic"]["inputTokens"], found["traffic"]["outputTokens"]) == (1000, 100)
    mix = found["mix"]
    assert mix["best"]["usd"] <= min(mix["allApi"]["usd"], mix["allOwn"]["usd"])
    month = found["openCost"]["data"][0]["default/plan"]
    assert month["totalCost"] == pytest.approx(mix["best"]["usd"] / mix["seconds"] * 730 * 3600)
    assert "For the trace" in moectl(*BIG, "--trace", trace)[1]


@pytest.mark.parametrize("name", ["report.svg", "report.html"])
def test_a_report_needs_nothing_from_elsewhere(moectl: Moectl, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    code, out, _ = moectl(*BIG, "--output", path, "--accuracy", "0.8")
    assert code == 0
    assert out.endswith(f"wrote {path}\n")
    text = path.read_text(encoding="utf-8")
    assert "accuracy 0.80" in text
    assert "KVCache" in text
    assert "href" not in text
    assert "src=" not in text
    start = text.index("<svg")
    ElementTree.fromstring(text[start : text.index("</svg>") + 6])


def test_the_radar_says_what_is_not_known(moectl: Moectl, tmp_path: Path) -> None:
    path = tmp_path / "report.svg"
    assert moectl(*BIG, "--output", path)[0] == 0
    assert "accuracy: not known" in path.read_text(encoding="utf-8")


def test_profiles(moectl: Moectl, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = moectl("--profiles")
    assert code == 0
    for letter in "ABCD":
        assert f"Profile {letter}:" in out
    assert "1.20B" in out
    assert "584M" in out


def test_profiles_as_json(moectl: Moectl) -> None:
    found = asked(moectl, "--profiles")
    assert [row["letter"] for row in found["profiles"]] == ["A", "B", "C", "D"]
    assert found["reproduced"][0]["found"]["unlimited"] == pytest.approx(1.2e9, rel=0.01)
    assert len(found["needed"]) >= 2


def test_what_is_planned_is_what_the_operator_launches(moectl: Moectl, tmp_path: Path) -> None:
    """Slices of experts are predicted to be cheaper there, which is said; the operator keeps whole experts."""
    file = write_resource(tmp_path, hardware=H100)
    launched = check(load_file(file).spec).plan
    assert launched is not None
    found = asked(moectl, file)
    assert found["fit"]["plan"]["expert"] == launched.expert == 4
    assert found["launch"]["spec"]["parallelism"] == {"tensor": 4, "data": 1, "expert": 4, "pipeline": 1}
    out = moectl(file)[1]
    assert "Cheaper for this traffic by prediction: tensor 4 × data 1 × pipeline 1, expert 1" in out
    written = asked(moectl, write_resource(tmp_path, hardware=H100, parallelism={"tensor": 4, "expert": 1}))
    assert written["launch"]["spec"]["parallelism"]["expert"] == 1


OWN = """
[accelerators.ours.memory]
memory_gb = 300
source = "our order"
date = "2026-11-23"
[accelerators.ours.speed]
bandwidth_gb_s = 5000
tflops_16bit = 1000
tflops_8bit = 2000
source = "our order"
date = "2026-11-23"
[accelerators.ours.rent]
rent_usd_per_hour = 1.5
source = "our contract"
date = "2026-11-23"
[prices.theirs]
provider = "them"
input_usd_per_m = 1
output_usd_per_m = 4
source = "their offer"
date = "2026-11-23"
"""


def test_figures_of_ones_own(moectl: Moectl, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(OWN)
    found = asked(moectl, "--model", QWEN, "--accelerator", "ours", "--gpus", "1", "--api", "theirs", "--catalog", own)
    assert found["usdPerMonth"] == pytest.approx(1.5 * 730)
    assert [row["api"] for row in found["cost"][0]["apis"]] == ["theirs"]
    own.write_text(OWN.replace('source = "their offer"', ""))
    code, _, err = moectl("--model", QWEN, "--catalog", own)
    assert (code, "--catalog:" in err, "source" in err) == (2, True, True)


def test_a_model_known_by_its_config_alone(moectl: Moectl, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    facts = {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
             "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
             "moe_intermediate_size": 768, "intermediate_size": 6144, "vocab_size": 151936,
             "max_position_embeddings": 40960, "torch_dtype": "bfloat16"}  # fmt: skip
    config.write_text(json.dumps(facts))
    words = ("--model", "acme/own-30b", "--accelerator", "H100", "--gpus", "2")
    assert moectl(*words)[0] == 2
    found = asked(moectl, *words, "--config", config)
    known = asked(moectl, "--model", "Qwen/Qwen3-30B-A3B", *words[2:])
    assert found["chosen"]["tokensPerSecond"] == pytest.approx(known["chosen"]["tokensPerSecond"], rel=0.01)
    config.write_text(json.dumps({**facts, "hidden_size": -1}))
    code, _, err = moectl(*words, "--config", config)
    assert (code, "--config:" in err, "hidden_size" in err) == (2, True, True)


def test_other_gpus_than_the_files_may_be_tried(moectl: Moectl, tmp_path: Path) -> None:
    file = write_resource(tmp_path)
    found = asked(moectl, file, "--accelerator", "H200", "--gpus", "2", "--gpus", "4")
    assert found["chosen"]["accelerator"] == "nvidia-h200"


COLUMNS = (
    "id,model,precision,engine,engine_version,hardware,gpus,tp,dp,ep,pp,disaggregated(yes/no),input_tokens,"
    "output_tokens,concurrency_or_batch,metric,value,date,source,confidence,note"
)
RUN = "x1,DeepSeek-R1,FP8,vLLM,0.9,H200,8,8,,,,no,1000,1000,64,output_tok_s_total,2000,2026-01,someone,high,"


def test_published_runs_are_held_against_the_prediction(moectl: Moectl, tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text(f"{COLUMNS}\n{RUN}\n")
    code, out, err = moectl("--check", table)
    assert (code, err) == (0, "")
    assert "x1" in out
    assert json.loads(moectl("--check", table, "--json")[1])
    code, _, err = moectl("--check", tmp_path / "nowhere.csv")
    assert (code, "nowhere.csv" in err) == (2, True)


WRONG: dict[str, tuple[tuple[str, ...], str, str]] = {
    "no model": ((), "--model", "name one"),
    "an unknown model": (("--model", "acme/other"), "acme/other is not in catalog", "catalog"),
    "an unknown accelerator": ((*BIG[:2], "--accelerator", "H9000"), "--accelerator: H9000", "nvidia-h100"),
    "an unknown API": ((*BIG, "--api", "gpt-9"), "--api: gpt-9", "gpt-5.5"),
    "a negative rent": ((*BIG, "--rent", "-1"), "--rent: -1", "at least 0"),
    "a negative prompt": ((*BIG, "--input-tokens", "-5"), "--input-tokens: -5", "at least 1"),
    "a rate of nothing": ((*BIG, "--rps", "0"), "--rps", "above 0"),
    "two rates": ((*BIG, "--rps", "1", "--tokens-per-month", "1e9"), "--rps", "leave one out"),
    "more cached than all": ((*BIG, "--cached-share", "1.5"), "--cached-share: 1.5", "0 to 1"),
    "no config": ((*BIG, "--config", "/nowhere.json"), "--config: /nowhere.json", "checkpoint"),
    "no trace": ((*BIG, "--trace", "/nowhere.csv"), "--trace", "CSV"),
    "a picture of another kind": ((*BIG, "--output", "x.pdf"), "--output: x.pdf", "endings"),
    "a picture nowhere": ((*BIG, "--output", "/nowhere/x.svg"), "--output: /nowhere/x.svg", "writable"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_asked_names_the_option_and_the_remedy(moectl: Moectl, name: str) -> None:
    words, field, remedy = WRONG[name]
    code, _, err = moectl(*words)
    assert code == 2
    assert field in err
    assert remedy in err
    assert "Traceback" not in err


def test_a_file_names_its_model(moectl: Moectl, tmp_path: Path) -> None:
    file = write_resource(tmp_path, hardware=H100)
    code, _, err = moectl(file, "--model", QWEN)
    assert (code, "--model" in err) == (2, True)


def test_parallelism_that_cannot_be_is_refused_by_field(moectl: Moectl, tmp_path: Path) -> None:
    file = write_resource(tmp_path, hardware={**H100, "gpusPerReplica": 6}, parallelism={"tensor": 3})
    code, out, _ = moectl(file)
    assert code == 2
    assert "spec.parallelism.tensor" in out


def test_stages_are_not_served(moectl: Moectl) -> None:
    code, out, _ = moectl("--model", QWEN, "--accelerator", "H200", "--gpus", "3")
    assert code == 2
    assert "not served yet" in out


def test_cpu_is_not_known(moectl: Moectl, tmp_path: Path) -> None:
    code, _, err = moectl(write_resource(tmp_path))
    assert code == 2
    assert "cpu" in err
