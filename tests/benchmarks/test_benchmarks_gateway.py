"""The gateway's benchmark in its short form: the gateway alone in front of the mock, every answer whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_short_form_measures_the_gateway_with_everything_on() -> None:
    command = [sys.executable, "-m", "benchmarks.gateway", "--quick", "--only", "ours", "--soak", "300"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cpu_ms"]["ours"]["unary"] > 0
    assert found["cpu_ms"]["ours"]["stream"] > 0
    assert all(set(ways) == {"ours"} and ways["ours"]["cpu"] > 0 for ways in found["added_ms"].values())
    assert found["added_p50_ms"] in {ways["ours"]["p50"] for ways in found["added_ms"].values()}
    assert found["soak_requests"] == 300
    assert found["fds_growth"] < 16, "connections to the engine are kept, as many as were ever needed at once; no more"
    assert "cpu_ratio_unary" not in found  # nothing to compare with
