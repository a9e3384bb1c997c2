"""The tutorial's laptop part, block by block, as a person types it: real engine, gateway, Prometheus, tuner."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.docs.shell import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.full]

PAGE = ROOT / "docs/tutorial.md"
LIMIT_S = 1800


def script() -> str:
    """Every shell block before the cluster's part, in order. `make up` is its own recipe: nothing is installed."""
    text = PAGE.read_text(encoding="utf-8").split("\n## In a cluster\n")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    recipe = re.search(r"^up: .*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    up = recipe.group(1).replace("$(PY)", ".venv/bin/python").replace("$(FILE)", "manifests/examples/laptop.yaml")
    assert blocks[0] == "make up\n"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return "set -e\n" + "\n".join([up, *blocks[1:]]).replace("9000", str(port))


def test_the_laptop_part_of_the_tutorial(tmp_path: Path) -> None:
    for name in (".venv", "manifests", "benchmarks", "planner"):
        (tmp_path / name).symlink_to(ROOT / name)
    packages = ("api", "core", "planner", "kube", "operator", "serving", "gateway", "tuner", "cli")
    path = os.pathsep.join([*(str(ROOT / name) for name in packages), str(ROOT)])
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONPATH": path}
    typed = tmp_path / "typed.sh"
    # `diff` ends with 1 where something would change: here it is meant to.
    typed.write_text(re.sub(r"^(moectl diff .*)$", r"\1 || test $? -eq 1", script(), flags=re.MULTILINE))
    log = tmp_path / "said"
    try:
        with log.open("w") as said:
            done = subprocess.run(
                ["bash", str(typed)],
                cwd=tmp_path,
                env=environment,
                stdout=said,
                stderr=said,
                timeout=LIMIT_S,
                check=False,
            )
        told = log.read_text()
        assert done.returncode == 0, told[-4000:]
    finally:
        subprocess.run([".venv/bin/python", "-m", "moe_cli.main", "down"], cwd=tmp_path, env=environment, check=False)
    for expected in (
        "left out (no secret openai/apiKey here, for target gpt)",
        "x-moestack-target: local",
        "max/mean",
        "target gpt: ",
        "today: $",
        "engine.maxActiveSeqs at 32",
        "everything was stopped",
    ):
        assert expected in told, expected
    assert re.search(r"fast Move version \d+: ", told), "the burst made the tuner turn a knob"
    assert (tmp_path / "experts.svg").read_text().startswith("<svg")
    assert "<html" in (tmp_path / "tuning.html").read_text()
