"""The steps of the images, run without an engine for containers, and what their files must say."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, lines joined, comments left out."""
    text = (IMAGES / name).read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


@pytest.mark.parametrize("name", [path.name for path in IMAGES.glob("*.Dockerfile")])
def test_nothing_is_fetched_but_by_lock(name: str) -> None:
    steps = instructions(name)
    assert {step for step, _ in steps} <= {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}
    scripts = [path.read_text() for path in (IMAGES / "build-wheel", IMAGES / "install-control")]
    for text in [rest for step, rest in steps if step == "RUN"] + scripts:
        assert "curl" not in text
        assert "apt-get" not in text
        for command in text.replace("&&", "\n").splitlines():
            if "pip install" in command:
                assert "--require-hashes" in command or "--no-deps" in command, command
    for step, rest in steps:
        if step == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest


def test_the_control_image_runs_as_nobody() -> None:
    assert [rest for step, rest in instructions("control.Dockerfile") if step == "USER"] == ["65532:65532"]


def test_the_context_is_what_the_build_needs() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"pyproject.toml", "README.md", "images", "requirements"} <= allowed
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    parts = {package.split("/")[0] for package in wheel["packages"]}
    assert parts <= allowed


def test_a_base_that_lacks_something_is_refused_by_name(tmp_path: Path) -> None:
    check = [sys.executable, str(IMAGES / "check-engine")]
    here = subprocess.run(check, capture_output=True, text=True, check=False)
    assert here.returncode == 0, here.stderr
    old = tmp_path / "ray-2.40.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.40.0\n")
    there = subprocess.run(
        check, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert there.returncode == 1
    assert "the image has 2.40.0" in there.stderr


@pytest.mark.full
def test_the_steps_of_the_control_image_make_programs_that_start(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SOURCE_DATE_EPOCH": "0"}
    steps = [rest for step, rest in instructions("control.Dockerfile") if step == "RUN"]
    for step in steps:
        made = step.replace("/opt/moestack", str(tmp_path / "moestack"))
        subprocess.run(["sh", "-euc", made], cwd=ROOT, env=environment, check=True, timeout=900)
    for program in ("moe_operator", "moe_gateway", "moe_tuner", "moe_operator.keys", "moe_operator.prerequisites"):
        python = tmp_path / "moestack" / "bin" / "python"
        done = subprocess.run(
            [python, "-m", program, "--help"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout
    assert not list((tmp_path / "moestack" / "lib").glob("python*/site-packages/pip"))
