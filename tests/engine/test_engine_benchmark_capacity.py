"""Short form of the capacity benchmark, on vLLM's own kernel: it runs to its end and prints its keys last."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.engine.stack import ROOT

pytestmark = pytest.mark.engine

PARTS = ("api", "core", "serving", ".")


def test_capacity() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.capacity", "--quick"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in PARTS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for key in ("hook_overhead_count", "hook_overhead_reroute", "layer_speedup_over_bound", "gemm_share"):
        assert result[key] > 0, key
    assert abs(result["ppl_delta"]) < 1
    uniform = result["training"]["uniform_perplexity"]
    assert result["perplexity"]["Unlimited"]["perplexity"] < uniform / 6, "it learned next to nothing"
    for skew, rows in result["prefill"].items():
        loads = {name: row["rank_loads"] for name, row in rows.items()}
        slots = sum(loads["unlimited"])
        assert slots == result["shape"]["tokens"] * result["shape"]["k"], skew
        assert max(loads["unlimited"]) > 0.6 * slots, f"{skew}: no skew to win from"
        for name, row in rows.items():
            # What the vectorised path dropped is what the reference dropped: both saw the same batch.
            assert sum(row["rank_loads"]) + row["dropped_slots"] == slots, (skew, name)
        assert max(loads["Reroute 1"]) == slots // 2, skew
