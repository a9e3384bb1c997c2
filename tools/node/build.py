"""Builds the parts of a node that `make e2e` runs, once, outside the checkout; prints the folder that holds them.

    python3 tools/node/build.py           build what is missing, show progress, print the folder
    python3 tools/node/build.py --where   print the folder, or say what to run where something is missing

The folder holds bin/ (kubelet, kube-proxy, containerd, its shim, ctr, coredns). The control plane has a folder of its
own (tools/controlplane/build.py), whose way to build this uses: other programs, and so another hash, because most who
need a control plane need no node.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tools.controlplane.build import KUBERNETES_VERSION, CannotBuild, check_go, run_go, say, usable  # noqa: E402

CONTAINERD = "github.com/containerd/containerd/v2/cmd"
PROGRAMS = {  # name: (folder of its go.mod, package); the quick ones first, so that a broken set-up shows at once
    "containerd-shim-runc-v2": ("containerd", f"{CONTAINERD}/containerd-shim-runc-v2"),
    "ctr": ("containerd", f"{CONTAINERD}/ctr"),
    "containerd": ("containerd", f"{CONTAINERD}/containerd"),
    "coredns": ("coredns", "github.com/coredns/coredns"),
    "kube-proxy": ("kubernetes", "k8s.io/kubernetes/cmd/kube-proxy"),
    "kubelet": ("kubernetes", "k8s.io/kubernetes/cmd/kubelet"),
}


def folder() -> Path:
    """Where this checkout's node lies, built or not."""
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()}".encode())
    for path in sorted([*HERE.glob("*/go.mod"), *HERE.glob("*/go.sum"), Path(__file__).resolve()]):
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "moestack" / "node" / digest.hexdigest()[:16]


def missing(where: Path) -> list[str]:
    return [name for name in PROGRAMS if not usable(where / "bin" / name)]


def build() -> Path:
    """Builds what is missing. A second one that runs at once waits for the first, then finds it done."""
    where = folder()
    (where / "bin").mkdir(parents=True, exist_ok=True)
    with (where / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lacking = missing(where)
        if lacking:
            check_go()
            say(f"to build for a node: {', '.join(lacking)}. The first time takes minutes")
        for name in lacking:
            module, package = PROGRAMS[name]
            part = where / f".{name}.part"
            flags = f"-s -w {KUBERNETES_VERSION}" if module == "kubernetes" else "-s -w"
            run_go(name, ["build", "-v", "-ldflags", flags, "-o", str(part), package], HERE / module)
            part.replace(where / "bin" / name)
    return where


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the parts of a node that `make e2e` runs.")
    parser.add_argument("--where", action="store_true", help="print the folder and build nothing")
    only_where = parser.parse_args().where
    try:
        where = folder() if only_where else build()
        if only_where and (lacking := missing(where)):
            raise CannotBuild(f"{where} lacks {', '.join(lacking)}: run `make node`")
    except CannotBuild as problem:
        say(str(problem))
        return 1
    print(where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
