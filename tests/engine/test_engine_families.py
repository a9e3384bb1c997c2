"""Each model family on the real vLLM from its tiny checkpoint: plugin against stock, counts, capacity held."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moe_core.capacity import capacity
from tests.engine.families import KNOBS, PROMPTS
from tests.engine.stack import environment

pytestmark = pytest.mark.engine

torch = pytest.importorskip("torch")

GAMMA = Decimal(KNOBS[1]["capacityFactorPrefill"])
IN_CI = "deepseek_v3"
LONG = (
    "dbrx",
    "deepseek_v2",
    "gpt_oss",
    "granitemoe",
    "llama4",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)


def run_engine(folder: Path, family: str) -> dict[str, Any]:
    from moe_serving.tiny import cached_checkpoint

    job, out = folder / "job.json", folder / "out.json"
    source = cached_checkpoint(family)
    stock = {"dbrx": str(as_stock_finds_it(source, folder / "stock"))} if family == "dbrx" else {}
    job.write_text(json.dumps({"families": {family: str(source)}, "stock": stock, "out": str(out)}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("families.py")), str(job)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())[family]
    for number in range(len(KNOBS)):
        path = Path(f"{out}.{family}.1.phase{number}.rank0.pt")
        if path.is_file():
            found["hooked"]["phases"][number]["records"] = torch.load(path)
    return found


def as_stock_finds_it(source: Path, path: Path) -> Path:
    """A DBRX checkpoint with its experts where stock vLLM looks for them; the plugin finds the published ones."""
    from safetensors.torch import load_file, save_file

    from moe_serving.mends import moved

    shutil.copytree(source, path)
    weights = load_file(source / "model.safetensors")
    save_file({moved(name): weight for name, weight in weights.items()}, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("family", [IN_CI, *(pytest.param(family, marks=pytest.mark.full) for family in LONG)])
def test_a_family_counted_and_capped(family: str, tmp_path: Path) -> None:
    from moe_serving.tiny import facts

    found = run_engine(tmp_path, family)
    assert "error" not in found["stock"], found["stock"]["error"]
    assert "error" not in found["hooked"], found["hooked"]["error"]
    known = facts(family)
    hooked = found["hooked"]
    assert [(layer["hooked"], layer["why"]) for layer in hooked["layers"]] == [(True, "")] * known.moe_layers
    assert all((layer["experts"], layer["top_k"]) == (known.experts, known.top_k) for layer in hooked["layers"])
    free, held, lifted = hooked["phases"]
    stock = found["stock"]["phases"][0]
    assert free["tokens"] == stock["tokens"]
    assert free["logprobs"] == stock["logprobs"], "Unlimited is not bit-identical to stock vLLM"
    assert (lifted["tokens"], lifted["logprobs"]) == (free["tokens"], free["logprobs"])
    assert held["logprobs"] != free["logprobs"]
    for phase in (free, held, lifted):
        assert phase["ack"]["error"] is None
        counted_exactly(phase, known.top_k)
    held_to_capacity(held, known.experts)


def counted_exactly(phase: dict[str, Any], top_k: int) -> None:
    """Each request runs its prompt once, and each of its tokens but the last once more."""
    routed = sum(phase["prompt_tokens"]) + sum(len(tokens) - 1 for tokens in phase["tokens"])
    assert len(phase["tokens"]) == len(PROMPTS)
    for before, after in zip(phase["before"]["layers"], phase["after"]["layers"], strict=True):
        assert after["tokens"] - before["tokens"] == routed
        assert sum(after["demand"]) - sum(before["demand"]) == routed * top_k
        lost = after["dropped"] - before["dropped"]
        assert sum(after["assigned"]) - sum(before["assigned"]) == routed * top_k - lost


def held_to_capacity(phase: dict[str, Any], experts: int) -> None:
    """No expert takes more prefill slots than C, but for those that a group limit forces."""
    bound = forced = 0
    for record in phase["records"]:
        rows = record["phase"] == 1
        demand, load = (
            torch.bincount(record[ids][rows][record[ids][rows] >= 0].long(), minlength=experts)
            for ids in ("ids", "out_ids")
        )
        limit = capacity(GAMMA, record["ids"][rows].numel(), experts)
        bound += int(demand.max()) > limit
        forced += int((load - limit).clamp(min=0).sum())
        assert torch.equal(record["ids"][record["phase"] == 2], record["out_ids"][record["phase"] == 2])
    assert bound > 0, "capacity never bound: the test shows nothing"
    kept = [
        after["overflow_kept"] - before["overflow_kept"]
        for before, after in zip(phase["before"]["layers"], phase["after"]["layers"], strict=True)
    ]
    assert forced <= sum(kept)
