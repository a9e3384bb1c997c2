"""The benchmark of many deployments in its short form: it runs, all are tuned, and its last line is what GOALS asks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_short_form_tunes_every_deployment() -> None:
    command = [sys.executable, "-m", "benchmarks.tuner_scale", "--deployments", "6", "--seconds", "2"]
    parts = ("api", "core", "planner", "tuner", "")
    path = ":".join(str(ROOT / part) for part in parts)
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": path}, capture_output=True, text=True, check=True, timeout=120
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["n"], found["tuned"], found["refused"]) == (6, 6, 1)
    assert found["tick_p99_ms"] > 0
    assert found["rss_mib"] > 0
