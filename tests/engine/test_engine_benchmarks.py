"""Short forms of the benchmarks: each runs to its end and prints its keys last."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from tests.engine.stack import ROOT, environment

pytestmark = pytest.mark.engine


def run(name: str, *options: str) -> dict[str, Any]:
    """The last line of a benchmark that ran to its end."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_startup() -> None:
    result = run("startup", "--runs", "1", "--warm-up", "0", "--only", "up")
    assert result["up_to_first_token_s"] > 0
    assert set(result) >= {"up_to_first_token_s", "over_bare_serve_run", "over_vllm_serve"}


def test_simulator() -> None:
    """Loads, fit and replay on the real engine; how large the errors are is the long form's business."""
    result = run("simulator", "--quick")
    assert result["requests_per_s"] > 0
    assert result["tokens"]["asked"] == result["tokens"]["stepped"] > 0
    assert set(result["loads"]) == {"0.3", "0.45", "0.6", "0.75"}
    for load, row in result["loads"].items():
        assert row["requests"] >= 3, load
        assert all(math.isfinite(value) and value >= 0 for value in row.values()), load
    for name in ("ttft_p95_error", "itl_p95_error"):
        assert result[name] == max(result["loads"][load][name] for load in ("0.45", "0.75")), name
    assert sum(result["engine_ms"].values()) > 0


@pytest.mark.full
def test_skew() -> None:
    result = run("skew", "--only", "trained", "--rounds", "1")["trained"]
    together = result["skewed"]
    assert max(together["unlimited"]["slots_by_rank"]) > 1.5 * min(together["unlimited"]["slots_by_rank"])
    # Another placement is the same model: it answers alike, up to the order of sums.
    assert together["unlimited"]["perplexity"] == pytest.approx(result["even"]["perplexity"], rel=1e-3)
    for name, won in result["won_back"].items():
        assert won["bound"] >= 1, name
        assert abs(won["ppl_delta"]) < 0.05, name
