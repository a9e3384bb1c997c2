"""The end of the serving process: bounded, whatever Ray does, and nothing of it stays. No engine, no Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe_serving import run

ROOT = Path(__file__).parents[2]
SCRIPT = """
import atexit, pathlib, subprocess, sys, tempfile, threading, time
from types import SimpleNamespace as Fake
from moe_serving import run

run.SERVE_STOP_S, run.RAY_STOP_S, run.CHILD_STOP_S = 0.3, 0.3, 0.5
serve_end, ray_end, folder = sys.argv[1:]
temp = pathlib.Path(folder) / "moe-x"

def ends(how):
    def shutdown():
        if how == "hangs":
            threading.Event().wait()
        if how == "raises":
            raise RuntimeError("the controller is gone")
        if how == "ends its children":
            child.terminate()
            child.wait()
    return shutdown

def _serve(*_):
    global child
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    run._shutdown(Fake(shutdown=ends(ray_end)), Fake(shutdown=ends(serve_end)))
    return 0

run._serve = _serve
run.tempfile = Fake(mkdtemp=lambda **_: temp.mkdir() or str(temp))
atexit.register(threading.Event().wait)  # as Ray's, once its processes are gone
config = pathlib.Path(folder) / "config.json"
config.write_text('{"deployment": "a/b", "model": "m", "source": "s"}')
sys.argv = ["run", "--config", str(config), "--board-port", "1", "--http-port", "1"]
run.leave(run.main())
"""


@pytest.mark.parametrize(
    ("serve", "ray"),
    [
        ("returns", "ends its children"),
        ("returns", "returns"),
        ("raises", "raises"),
        ("hangs", "returns"),
        ("returns", "hangs"),
    ],
)
def test_the_end_is_bounded_and_leaves_nothing(serve: str, ray: str, tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / name) for name in ("api", "core", "serving"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, serve, ray, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(int(done.stdout))
    assert not (tmp_path / "moe-x").exists()
    assert ("does not shut down" in done.stderr) == ("hangs" in (serve, ray))
    assert ("did not shut down cleanly" in done.stderr) == ("raises" in (serve, ray))
    assert ("killed a process" in done.stderr) == (ray != "ends its children")


def test_the_end_comes_before_the_supervisor_loses_patience() -> None:
    from moe_cli.stack import SERVING_STOP_S

    assert run.SERVE_STOP_S + run.RAY_STOP_S + 2 * run.CHILD_STOP_S < SERVING_STOP_S


def test_a_call_that_comes_back_costs_no_wait() -> None:
    started = time.monotonic()
    assert run._within(30.0, "it", lambda: None)
    assert time.monotonic() - started < 5
