"""Builds the control plane that the cluster tests run, once, outside the checkout; prints the folder that holds it.

    python3 tools/controlplane/build.py           build what is missing, show progress, print the folder
    python3 tools/controlplane/build.py --where   print the folder, or say what to run where something is missing

The folder holds bin/ (etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl, helm, ray-operator,
kwok), crds/ (KubeRay's) and stages/ (kwok's, which say how its pods come and go). Its name is a hash of what it is
built from, so an old one is never taken for a new one. `KUBEBUILDER_ASSETS` (Go's envtest convention) names a folder of
ready binaries: what is there is linked, not built. Needs no package but Python's own, for it runs before there is a
virtual environment. etcd is built too: with the 3.4 of Debian 12, watches that begin with a list never get their
first bookmark, and controllers miss what happens for up to a minute.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
GO_NEEDED = (1, 26)
PROGRESS_S = 5.0
# kubectl refuses to compare itself with a server whose version it cannot parse.
KUBERNETES_VERSION = "-X k8s.io/component-base/version.gitVersion=v1.37.2"
KUBERAY = "github.com/ray-project/kuberay/ray-operator"
PROGRAMS = {  # name: (folder of its go.mod, package); the quick one first, so that a broken set-up shows at once
    "etcd": ("etcd", "go.etcd.io/etcd/server/v3"),
    "kwok": ("kwok", "sigs.k8s.io/kwok/cmd/kwok"),
    "ray-operator": ("kuberay", KUBERAY),
    "kube-apiserver": ("kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver"),
    "kube-controller-manager": ("kubernetes", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    "kube-scheduler": ("kubernetes", "k8s.io/kubernetes/cmd/kube-scheduler"),
    "kubectl": ("kubernetes", "k8s.io/kubernetes/cmd/kubectl"),
    "helm": ("helm", "helm.sh/helm/v4/cmd/helm"),
}
COPIES = {  # folder: (folder of the go.mod, module, what to copy of it); not ours, so copied here and not committed
    "crds": ("kuberay", KUBERAY, "config/crd/bases/*.yaml"),
    "stages": ("kwok", "sigs.k8s.io/kwok", "kustomize/stage/*/fast/[np]*-*.yaml"),
}


class CannotBuild(Exception):
    """What is missing, and the remedy."""


def say(text: str) -> None:
    print(f"control plane: {text}", file=sys.stderr, flush=True)


def ready_binaries() -> Path | None:
    """The folder that KUBEBUILDER_ASSETS names."""
    named = os.environ.get("KUBEBUILDER_ASSETS", "")
    if not named:
        return None
    if not Path(named).is_dir():
        raise CannotBuild(f"KUBEBUILDER_ASSETS is {named}, which is no folder: unset it, or name a folder of binaries")
    return Path(named).resolve()


def folder() -> Path:
    """Where this checkout's control plane lies, built or not."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*/go.mod"), *HERE.glob("*/go.sum"), Path(__file__).resolve()]):
        digest.update(path.read_bytes())
    digest.update(f"{platform.system()} {platform.machine()} {ready_binaries() or ''}".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "moestack" / "controlplane" / digest.hexdigest()[:16]


def usable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def missing(where: Path) -> list[str]:
    found = [name for name in PROGRAMS if not usable(where / "bin" / name)]
    return found + [name for name in COPIES if not (where / name).is_dir()]


def go_environment() -> dict[str, str]:
    # A person's own GOFLAGS could turn readonly off, and then a build would rewrite the checked-in go.mod.
    return {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false -mod=readonly"}


def check_go() -> None:
    """Raises CannotBuild where Go is missing or too old to build these modules."""
    needed = ".".join(map(str, GO_NEEDED))
    remedy = f"install Go {needed} or newer from https://go.dev/dl/, or set KUBEBUILDER_ASSETS to a folder of binaries"
    if shutil.which("go") is None:
        raise CannotBuild(f"go is not on the PATH: {remedy}")
    answer = subprocess.run(
        ["go", "env", "GOVERSION"],
        cwd=HERE / "kubernetes",
        env=go_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    version = re.match(r"go(\d+)\.(\d+)", answer.stdout)
    if answer.returncode or version is None or (int(version[1]), int(version[2])) < GO_NEEDED:
        said = (answer.stderr or answer.stdout).strip()
        raise CannotBuild(f"this Go cannot build the control plane ({said}): {remedy}")


@dataclass
class Progress:
    """Prints a line every few seconds while a compiler works: how long, and how many packages are through."""

    what: str
    started: float = field(default_factory=time.monotonic)
    packages: int = 0
    last: str = ""
    done: threading.Event = field(default_factory=threading.Event)

    def report(self) -> None:
        while not self.done.wait(PROGRESS_S):
            elapsed = round(time.monotonic() - self.started)
            say(f"building {self.what}: {elapsed} s, {self.packages} packages compiled, now {self.last or 'starting'}")


def run_go(what: str, arguments: list[str], cwd: Path) -> None:
    """Runs the go command with progress; raises CannotBuild with what it printed last."""
    progress = Progress(what)
    reporter = threading.Thread(target=progress.report, daemon=True)
    process = subprocess.Popen(
        ["go", *arguments], cwd=cwd, env=go_environment(), stderr=subprocess.PIPE, stdout=sys.stderr, text=True
    )
    reporter.start()
    printed: list[str] = []
    try:
        for line in process.stderr or ():  # `-v` prints each package when it is compiled, downloads begin with "go:"
            progress.last = line.strip()
            progress.packages += not line.startswith("go:")
            printed = [*printed[-30:], line]
        status = process.wait()
    finally:
        progress.done.set()
        if process.poll() is None:
            process.terminate()
            process.wait()
    if status:
        raise CannotBuild(f"{what} was not built (go {' '.join(arguments[:1])}: {status}):\n{''.join(printed)}")
    say(f"built {what} in {time.monotonic() - progress.started:.0f} s")


def put(source: Path, target: Path) -> None:
    """Makes `target` a link to `source`, in one step."""
    part = target.with_name(f".{target.name}.{os.getpid()}")
    part.symlink_to(source)
    part.replace(target)


def build_program(name: str, where: Path) -> None:
    module, package = PROGRAMS[name]
    part = where / f".{name}.part"
    flags = f"-s -w {KUBERNETES_VERSION}" if module == "kubernetes" else "-s -w"
    run_go(name, ["build", "-v", "-ldflags", flags, "-o", str(part), package], HERE / module)
    part.replace(where / "bin" / name)


def copy_of(name: str, where: Path) -> None:
    """Copies what belongs to the very version that is built."""
    folder_of, module, pattern = COPIES[name]
    run_go(name, ["mod", "download", module], HERE / folder_of)
    listed = subprocess.run(
        ["go", "list", "-m", "-f", "{{.Dir}}", module],
        cwd=HERE / folder_of,
        env=go_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    part = where / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for source in sorted(Path(listed.stdout.strip()).glob(pattern)):
        (part / source.name).write_bytes(source.read_bytes())  # not its mode: the module cache is read-only
    part.replace(where / name)


def link_ready(where: Path) -> None:
    """Links what KUBEBUILDER_ASSETS has."""
    assets = ready_binaries()
    for name in PROGRAMS:
        if assets is not None and usable(assets / name):
            put(assets / name, where / "bin" / name)


def build() -> Path:
    """Builds what is missing. A second one that runs at once waits for the first, then finds it done."""
    where = folder()
    (where / "bin").mkdir(parents=True, exist_ok=True)
    with (where / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another build of {where} is running: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lacking = missing(where)
        if not lacking:
            return where
        link_ready(where)
        lacking = missing(where)
        if lacking:
            check_go()
            say(
                f"to build: {', '.join(lacking)}. Go's own cache makes later builds quick; the first takes many minutes"
            )
        for name in PROGRAMS:
            if name in lacking:
                build_program(name, where)
        for name in COPIES:
            if name in lacking:
                copy_of(name, where)
    return where


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the control plane that the cluster tests run.")
    parser.add_argument("--where", action="store_true", help="print the folder and build nothing")
    only_where = parser.parse_args().where
    try:
        where = folder() if only_where else build()
        if only_where and (lacking := missing(where)):
            raise CannotBuild(f"{where} lacks {', '.join(lacking)}: run `make control-plane`")
    except CannotBuild as problem:
        say(str(problem))
        return 1
    print(where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
