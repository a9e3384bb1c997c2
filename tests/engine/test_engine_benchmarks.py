"""Short forms of the benchmarks: each runs to its end and prints its keys last."""

from __future__ import annotations

import json
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
