"""Short form of the operator's benchmark: it runs to its end, prints its keys last, and a settled cluster stays so."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.cluster.control_plane import ROOT

pytestmark = pytest.mark.cluster

PARTS = ("api", "core", "planner", "kube", "operator", "cli", ".")


def test_operator_scale() -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in PARTS)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.operator_scale", "--n", "12"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["n"] == 12
    assert result["idle_writes"] == 0
    assert result["reconciles"] >= 24
    for key in ("rate_over_bare_client", "reconcile_p99_ms", "rss_mib"):
        assert result[key] > 0, key
