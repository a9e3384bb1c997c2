"""Short forms of the benchmarks: each runs to its end and prints its keys last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
PACKAGES = ("api", "core", "serving", "gateway", "tuner", "cli")


def test_startup() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--runs", "1", "--warm-up", "0", "--only", "up"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in PACKAGES)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["up_to_first_token_s"] > 0
    assert set(result) >= {"up_to_first_token_s", "over_bare_serve_run", "over_vllm_serve"}
