"""tools/controlplane/build.py with a made-up Go: what it builds, links, refuses and leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.control_plane import ROOT, eventually

SCRIPT = ROOT / "tools" / "controlplane" / "build.py"
CONTROL_PLANE = {"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"}
PROGRAMS = {*CONTROL_PLANE, "helm", "kwok", "ray-operator"}
# Says its version, "builds" by writing the -o file, and finds every module in one folder.
GO = """#!/bin/sh
case "$1" in
env) echo {version} ;;
list) echo {module} ;;
build)
    while [ "$1" != -o ]; do shift; done
    echo "$2" >> {calls}
    echo "example.org/some/package" >&2
    {build}
    printf '#!/bin/sh\\n' > "$2"; chmod 755 "$2" ;;
esac
"""


class Machine:
    """A PATH with a made-up Go, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "XDG_CACHE_HOME": str(folder / "cache")}
        for made in ("config/crd/bases/ray.io_rayservices.yaml", "kustomize/stage/pod/fast/pod-ready.yaml"):
            path = folder / "module" / made
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x: 1\n")
        (folder / "bin").mkdir()

    def go(self, version: str = "go1.26.1", build: str = ":") -> Machine:
        text = GO.format(version=version, module=self.folder / "module", calls=self.calls, build=build)
        (self.folder / "bin" / "go").write_text(text)
        (self.folder / "bin" / "go").chmod(0o755)
        return self

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, SCRIPT, *arguments],
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out.strip(), err

    def built(self) -> list[str]:
        """The programs that Go was asked for, in order."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [Path(line).name.removeprefix(".").removesuffix(".part") for line in lines]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_it_builds_once_and_prints_the_folder(machine: Machine) -> None:
    status, where, said = machine.go().run()
    assert status == 0, said
    assert set(machine.built()) == PROGRAMS
    assert {path.name for path in (Path(where) / "bin").iterdir()} == PROGRAMS
    assert (Path(where) / "crds" / "ray.io_rayservices.yaml").exists()
    assert (Path(where) / "stages" / "pod-ready.yaml").exists()
    assert "built kube-apiserver in" in said
    assert Path(where).is_relative_to(machine.folder / "cache"), "not in the checkout"
    again = machine.run()
    assert again == (0, where, "")
    assert len(machine.built()) == len(PROGRAMS)
    assert machine.run("--where") == (0, where, "")


def test_where_says_what_to_run_before_there_is_anything(machine: Machine) -> None:
    status, _, said = machine.go().run("--where")
    assert status == 1
    assert "run `make control-plane`" in said
    assert machine.built() == []


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [("no Go", None, "go is not on the PATH"), ("an old Go", "go1.22.5", "this Go cannot build"), ("", "", "this Go")],
)
def test_a_go_that_cannot_build_is_named_with_the_remedy(
    name: str, version: str | None, says: str, machine: Machine
) -> None:
    if version is not None:
        machine.go(version)
    status, _, said = machine.run(**({"PATH": str(machine.folder / "bin")} if version is None else {}))
    assert status == 1, name
    assert says in said
    assert "https://go.dev/dl/" in said
    assert "KUBEBUILDER_ASSETS" in said
    assert machine.built() == []


def test_ready_binaries_are_linked_and_not_built(machine: Machine) -> None:
    assets = machine.folder / "assets"
    assets.mkdir()
    for name in ("etcd", "kube-apiserver", "kubectl"):
        (assets / name).write_text("#!/bin/sh\n")
        (assets / name).chmod(0o755)
    status, where, said = machine.go().run(KUBEBUILDER_ASSETS=str(assets))
    assert status == 0, said
    assert set(machine.built()) == PROGRAMS - {"etcd", "kube-apiserver", "kubectl"}
    assert os.readlink(Path(where) / "bin" / "kube-apiserver") == str(assets / "kube-apiserver")
    assert machine.run()[1] != where, "without them the folder is another one"
    wrong = machine.run(KUBEBUILDER_ASSETS=str(assets / "nothing"))
    assert wrong[0] == 1
    assert "KUBEBUILDER_ASSETS" in wrong[2]


def test_a_failed_build_shows_the_compiler_and_the_next_one_goes_on(machine: Machine) -> None:
    fails = 'case "$2" in *kube-scheduler*) echo "undefined: x" >&2; exit 1 ;; esac'
    status, where, said = machine.go(build=fails).run()
    assert (status, where) == (1, "")
    assert "kube-scheduler was not built" in said
    assert "undefined: x" in said
    before = machine.built()
    status, where, said = machine.go().run()
    assert status == 0, said
    assert machine.built()[len(before) :][0] == "kube-scheduler"
    assert machine.built().count("kube-apiserver") == 1, "what was built stays"


def test_two_at_once_build_each_program_once(machine: Machine) -> None:
    go_on = machine.folder / "go-on"
    first = machine.go(build=f"while [ ! -e {go_on} ]; do sleep 0.02; done").start()
    eventually("the first one builds", machine.built)
    second = machine.start()
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    go_on.touch()
    answers = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert sorted(machine.built()) == sorted(PROGRAMS)
