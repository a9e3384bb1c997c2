"""tools/system-packages with made-up machines: what it installs, and what it says elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "system-packages"
APT = """#!/bin/sh
echo "$DEBIAN_FRONTEND apt-get $*" >> {log}
[ -e /usr/sbin/policy-rc.d ] && echo policy >> {log}
case "$1" in install) ln -s "$(command -v true)" {folder}/prometheus;; esac
"""


def machine(folder: Path, **programs: str) -> Path:
    """A PATH with the few tools that the script uses, and the given ones."""
    for name in ("sh", "chmod", "rm", "true", "ln"):
        (folder / name).symlink_to(shutil.which(name) or "")
    for name in ("g++", "node", "npm", "postgres", "redis-server"):
        (folder / name).symlink_to(shutil.which("true") or "")
    for name, text in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(text.format(folder=folder, log=folder / "log"))
        path.chmod(0o755)
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *words], env={"PATH": str(folder)}, capture_output=True, text=True, check=False)


def user(number: int) -> str:
    return f"#!/bin/sh\necho {number}\n"


def test_nothing_to_do(tmp_path: Path) -> None:
    found = run(machine(tmp_path, prometheus="#!/bin/sh\n", apt_get="#!/bin/sh\nexit 1\n"))
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_debian_as_root_installs_and_starts_no_service(tmp_path: Path) -> None:
    policy = Path("/usr/sbin/policy-rc.d")
    before = policy.exists()
    found = run(machine(tmp_path, apt_get=APT, id=user(0)))
    assert found.returncode == 0, found.stderr
    calls = (tmp_path / "log").read_text().splitlines()
    apt = [line for line in calls if "apt-get" in line]
    assert apt == [" apt-get update -q", "noninteractive apt-get install -y --no-install-recommends prometheus"]
    if os.access("/usr/sbin", os.W_OK):
        assert calls.count("policy") == 2, "services are held back while packages are installed"
    assert policy.exists() is before


@pytest.mark.parametrize(
    ("name", "programs", "command"),
    [
        ("Debian without root", {"apt_get": APT, "id": user(1000)}, "sudo apt-get update && sudo apt-get install"),
        ("Fedora", {"dnf": ""}, "sudo dnf install"),
        ("Arch", {"pacman": ""}, "sudo pacman -S prometheus"),
        ("macOS", {"brew": ""}, "brew install prometheus"),
        ("anything else", {}, "https://prometheus.io/download/"),
    ],
)
def test_elsewhere_the_command_is_named(name: str, programs: dict[str, str], command: str, tmp_path: Path) -> None:
    found = run(machine(tmp_path, **programs))
    assert found.returncode == 1
    assert command in found.stderr
    assert not (tmp_path / "log").exists()


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    here = machine(tmp_path, prometheus="#!/bin/sh\n", dnf="")
    (here / "g++").unlink()
    found = run(here)
    assert found.returncode == 1
    assert "not installed: g++." in found.stderr


def test_a_browser_is_installed_for_who_asks_for_one_alone(tmp_path: Path) -> None:
    here = machine(tmp_path, prometheus="#!/bin/sh\n", dnf="")
    assert run(here).returncode == 0
    asked = run(here, "browser")
    assert (asked.returncode, "not installed: chromium." in asked.stderr) == (1, True)


def test_what_a_node_needs_is_installed_only_when_it_is_asked_for(tmp_path: Path) -> None:
    here = machine(tmp_path, prometheus="#!/bin/sh\n", apt_get='#!/bin/sh\necho "$*" >> {log}\n', id=user(0))
    assert run(here).returncode == 0
    assert not (tmp_path / "log").exists()
    assert run(here, "node").returncode == 0
    installed = (tmp_path / "log").read_text().splitlines()[-1].split()
    assert {"runc", "iproute2", "busybox-static"} <= set(installed)
