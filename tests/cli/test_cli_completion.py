"""Completion as a person has it: keys typed into real shells; and moectl as kubectl's plugin `kubectl moe`."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tools.controlplane import build

ROOT = Path(__file__).parents[2]
ZSH = 'unset zle_bracketed_paste; autoload -Uz compinit; compinit -u -D; PS1="ready> "'
BASH = 'bind "set enable-bracketed-paste off"; PS1="ready> "'


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with moectl and the plugin as an installation has them. moectl itself only writes down its words."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, place in scripts.items():
        module, function = place.split(":")
        shim = folder / name
        call = f"import sys; sys.argv[0] = '{name}'; from {module} import {function}; {function}()"
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{call}" "$@"\n')
        shim.chmod(0o755)
    recorder = f'[ -n "$_MOECTL_COMPLETE" ] || {{ echo "$@" > {tmp_path}/words; exit; }}\n'
    text = (folder / "moectl").read_text().split("\n", 1)
    (folder / "moectl").write_text(f"{text[0]}\n{recorder}{text[1]}")
    return folder


def environment(programs: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in {"PYTHONPATH", "LD_LIBRARY_PATH"}}
    path = f"{programs}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "HOME": str(programs.parent), "TERM": "dumb", "LC_ALL": "C.UTF-8", **more}


def script(programs: Path, shell: str) -> Path:
    """The file that `moectl completion SHELL` gives."""
    file = programs.parent / f"completion.{shell}"
    command = [sys.executable, "-m", "moe_cli.main", "completion", shell]
    file.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return file


class Terminal:
    """A shell that a person types into."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._shown = ""

    def keys(self, text: str) -> None:
        self._shown = ""
        os.write(self._descriptor, text.encode())

    def shows(self, pattern: str, within_s: float = 30.0) -> None:
        """Wait until what came since the last keys has it."""
        until = time.monotonic() + within_s
        while not re.search(pattern, self._shown):
            left_s = until - time.monotonic()
            assert left_s > 0, f"{pattern!r} is not in {self._shown!r}"
            if select.select([self._descriptor], [], [], left_s)[0]:
                self._shown += os.read(self._descriptor, 4096).decode(errors="replace")


@contextmanager
def terminal(command: list[str], env: dict[str, str]) -> Iterator[Terminal]:
    process, descriptor = pty.fork()
    if process == 0:
        os.execvpe(command[0], command, env)
    try:
        yield Terminal(descriptor)
    finally:
        os.close(descriptor)
        os.waitpid(process, 0)


@pytest.mark.parametrize(
    ("command", "settings"),
    [(["bash", "--norc", "-i"], BASH), (["zsh", "-f", "-i"], ZSH)],
    ids=["bash", "zsh"],
)
def test_keys_complete_commands_and_options(command: list[str], settings: str, programs: Path) -> None:
    name = command[0]
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    file = script(programs, name)
    with terminal(command, environment(programs)) as shell:
        shell.keys(f"{settings}; source {file}\n")
        shell.shows("ready> $")
        shell.keys("moectl tu\t")
        shell.shows("ne ")
        shell.keys("his\t")
        shell.shows("tory ")
        shell.keys("--li\t")
        shell.shows("mit ")
        shell.keys("7\n")
        shell.shows("ready> ")
    assert (programs.parent / "words").read_text().split() == ["tune", "history", "--limit", "7"]


def test_fish_completes_commands_and_options(programs: Path) -> None:
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("fish is not installed")

    def offered(typed: str) -> set[str]:
        asked = f"source {script(programs, 'fish')}; complete -C '{typed}'"
        done = subprocess.run(
            [fish, "-N", "-c", asked], capture_output=True, text=True, check=True, env=environment(programs)
        )
        return {line.split("\t")[0] for line in done.stdout.splitlines()}

    assert offered("moectl tu") == {"tune"}
    assert offered("moectl tune ") >= {"history", "why", "pause", "pin"}
    assert offered("moectl tune history --li") == {"--limit"}


@pytest.mark.parametrize("shell", ["tcsh", ""])
def test_another_shell_is_refused_by_name(shell: str) -> None:
    command = [sys.executable, "-m", "moe_cli.main", "completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'bash', 'zsh', 'fish'" in done.stderr


def kubectl(programs: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A real kubectl, the machine's or the one that `make control-plane` built: it finds the plugin on the PATH."""
    built = build.folder() / "bin" / "kubectl"
    found = shutil.which("kubectl") or (str(built) if built.is_file() else None)
    if found is None:
        pytest.skip("kubectl is not installed, and `make control-plane` has not built it")
    return subprocess.run(
        [found, *words], capture_output=True, text=True, check=False, env=environment(programs), timeout=120
    )


def test_kubectl_runs_it_as_its_plugin(programs: Path, tmp_path: Path) -> None:
    assert str(programs / "kubectl-moe") in kubectl(programs, "plugin", "list").stdout.split()
    told = kubectl(programs, "moe", "diff", "--help")
    assert (told.returncode, told.stdout.split("[")[0]) == (0, "Usage: kubectl moe diff ")
    example = ROOT / "manifests" / "examples" / "laptop.yaml"
    (other := tmp_path / "other.yaml").write_text(example.read_text().replace("gpusPerReplica: 4", "gpusPerReplica: 8"))
    changed = kubectl(programs, "moe", "diff", str(other), "--against", str(example))
    assert changed.returncode == 1, "as kubectl diff: 1 where something would change"
    assert "gpusPerReplica" in changed.stdout
    wrong = kubectl(programs, "moe", "no-such-command")
    assert wrong.returncode == 2
    assert "kubectl moe --help" in wrong.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("tu",), {"tune"}),
        (("tune", ""), {"status", "history", "why", "replay", "pause", "resume", "pin", "unpin", "report"}),
        (("tune", "history", "--li"), {"--limit"}),
    ],
)
def test_kubectls_own_completion_asks_it(words: tuple[str, ...], expected: set[str], programs: Path) -> None:
    """As kubectl's script for a shell does, through kubectl's own `__complete`."""
    done = kubectl(programs, "__complete", "moe", *words)
    assert done.returncode == 0, done.stderr
    offered = {line.split("\t")[0] for line in done.stdout.splitlines() if not line.startswith(":")}
    assert offered == expected


def test_it_calls_itself_by_the_name_it_has() -> None:
    told = subprocess.run([sys.executable, "-m", "moe_cli.main", "--help"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("Usage: moectl ")
