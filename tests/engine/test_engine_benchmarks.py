"""Short forms of the benchmarks: each runs to its end and prints its keys last."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.engine.stack import ROOT, environment

pytestmark = pytest.mark.engine


def test_startup() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--runs", "1", "--warm-up", "0", "--only", "up"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["up_to_first_token_s"] > 0
    assert set(result) >= {"up_to_first_token_s", "over_bare_serve_run", "over_vllm_serve"}
