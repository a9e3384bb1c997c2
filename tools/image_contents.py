"""What lies in the images that `make e2e` gives its node: this machine's own programs, Python and locked packages.

    base      a shell, wget and Python, with the libraries that they need, and nothing else of this machine
    control   base, and what images/install-control installs: the steps of images/control.Dockerfile
    engine    base, the environment of `make setup` in place of a stock image with vLLM and Ray, our packages, and a
              tiny checkpoint at /models/tiny

Layers lie in the user's cache, by a hash of what they are made from. The programs are at the paths of the Dockerfiles.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from tools.local_images import Image, Layer, made_once

ROOT = Path(__file__).resolve().parents[1]
PYTHON, PREFIX, MODEL = "/opt/python", "/opt/moestack", "/models/tiny"
PROGRAMS = (
    *("bash", "sh", "env", "sleep", "cat", "ls", "id", "mkdir", "rm", "grep", "sed", "hostname", "ps", "uname", "wget"),
    *("date", "head", "tail", "nproc", "true", "cut", "tr", "sort", "awk", "ldconfig", "lscpu"),
)
"""What Ray, KubeRay's probes and vLLM start by name."""
FORMAT = 3
"""Raised when what is written changes: part of the names of small layers. Environments go by what is installed."""
ENVIRONMENT = (
    f"PATH={PREFIX}/bin:{PYTHON}/bin:/usr/bin:/bin",
    "PYTHONUNBUFFERED=1",
    "PYTHONDONTWRITEBYTECODE=1",
    "LANG=C.UTF-8",
)
NOBODY = 65532
_SYSTEM = re.compile(r"(?:=> |^\s*)(/(?:usr/)?lib\S*) \(0x", re.MULTILINE)
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
_SPARE = {"test", "idlelib", "turtledemo", "ensurepip", "lib2to3", "site-packages", "dist-packages"}


class CannotMake(Exception):
    """What is missing, and the remedy."""


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestack" / "images"


def key(*parts: object) -> str:
    """A hash of files and texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
    return digest.hexdigest()[:16]


def libraries(files: Sequence[Path]) -> set[str]:
    """This machine's libraries that these programs and libraries are linked to, the loader too, by their paths."""
    found: set[str] = set()
    for first in range(0, len(files), 200):
        words = ["ldd", *map(str, files[first : first + 200])]
        found |= set(_SYSTEM.findall(subprocess.run(words, capture_output=True, text=True, check=False).stdout))
    return found


def put_libraries(layer: Layer, paths: Iterable[str]) -> None:
    """Libraries where the loader looks: /lib and /lib64 are links into /usr, as in Debian."""
    for path in sorted(paths):
        layer.file(path if path.startswith("/usr/") else f"/usr{path}", Path(path))


def busybox() -> Image:
    """One static program: what holds the namespaces of a pod."""
    program = shutil.which("busybox")
    if program is None:
        raise CannotMake("busybox is not there: run `tools/system-packages node`")

    def fill(layer: Layer) -> None:
        layer.file("/bin/busybox", Path(program))
        layer.link("/bin/sleep", "busybox")

    layer = made_once(cache(), "busybox", key(FORMAT, Path(program)), fill)
    return Image("moestack.test/pause:1", (layer,), {"Env": ["PATH=/bin"], "Cmd": ["sleep", "2147483647"]})


def base_layer() -> Path:
    return made_once(cache(), "base", key(FORMAT, sys.version, sys.base_prefix, PROGRAMS), _fill_base)


def _fill_base(layer: Layer) -> None:
    for name in ("bin", "lib", "lib64", "sbin"):
        layer.link(f"/{name}", f"usr/{name}")
    layer.folder("/tmp", 0o1777)  # noqa: S108  the image's own
    layer.folder("/home/moestack", 0o755, owner=NOBODY)
    layer.text("/etc/passwd", f"root:x:0:0::/:/bin/sh\nmoestack:x:{NOBODY}:{NOBODY}::/home/moestack:/bin/sh\n")
    layer.text("/etc/group", f"root:x:0:\nmoestack:x:{NOBODY}:\n")
    layer.text("/etc/nsswitch.conf", "hosts: files dns\n")
    layer.link("/usr/bin/python3", f"{PYTHON}/bin/{_VERSION}")
    layer.link(f"{PYTHON}/bin/python", _VERSION)
    prefix = Path(sys.base_prefix)
    python = prefix / "bin" / _VERSION
    programs = [Path(found) for name in PROGRAMS if (found := shutil.which(name)) is not None]
    for program in programs:
        layer.file(f"/usr/bin/{program.name}", program)
    layer.file(f"{PYTHON}/bin/{_VERSION}", python)
    standard = prefix / "lib" / _VERSION
    layer.tree(
        f"{PYTHON}/lib/{_VERSION}", standard, lambda path: path.name in _SPARE or path.name.startswith("config-")
    )
    put_libraries(layer, libraries([*programs, python, *(standard / "lib-dynload").glob("*.so")]))
    for library in (prefix / "lib").glob("libpython*.so*"):
        layer.file(f"/usr/lib/x86_64-linux-gnu/{library.name}", library)


def base(tag: str) -> Image:
    """Nothing but the base, for clients of a test."""
    return Image(tag, (base_layer(),), {"Env": list(ENVIRONMENT), "User": f"{NOBODY}:{NOBODY}"})


def _environment(layer: Layer, prefix: Path, leave_out: frozenset[str] = frozenset()) -> None:
    """A virtual environment of this machine, at PREFIX and on the image's Python."""
    layer.text(f"{PREFIX}/pyvenv.cfg", f"home = {PYTHON}/bin\ninclude-system-site-packages = false\n")
    for name in ("python", "python3", _VERSION):
        layer.link(f"{PREFIX}/bin/{name}", f"{PYTHON}/bin/{_VERSION}")
    for script in sorted((prefix / "bin").iterdir()):
        if script.is_symlink() or script.name.lower().startswith(("activate", "python")):
            continue
        content = script.read_bytes()
        if content.startswith(b"#!") and b"python" in content.split(b"\n", 1)[0]:
            layer.text(
                f"{PREFIX}/bin/{script.name}", f"#!{PREFIX}/bin/python\n{content.decode().split(chr(10), 1)[1]}", 0o755
            )
    packages = prefix / "lib" / _VERSION / "site-packages"
    layer.tree(f"{PREFIX}/lib/{_VERSION}/site-packages", packages, lambda path: path.name in leave_out)
    put_libraries(layer, libraries(sorted(packages.rglob("*.so*"))))


def _our_packages() -> list[Path]:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    return [ROOT / name for name in wheel["packages"]]


def _sources() -> list[Path]:
    return sorted(path for package in _our_packages() for path in package.rglob("*") if _kept(path))


def _kept(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def control(tag: str) -> Image:
    """Operator, gateway, tuner and the chart's Jobs, installed as the Dockerfile does."""
    scripts = [ROOT / "images" / name for name in ("install-control", "build-wheel")]
    made_from = [ROOT / "requirements" / "control.txt", ROOT / "pyproject.toml", *scripts, *_sources()]
    layer = made_once(cache(), "control", key(*made_from), _fill_control)
    command = ["python", "-m", "moe_operator", "--help"]
    config = {"Env": list(ENVIRONMENT), "User": f"{NOBODY}:{NOBODY}", "Cmd": command, "WorkingDir": "/"}
    return Image(tag, (base_layer(), layer), config)


def _fill_control(layer: Layer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "moestack"
        path = f"{sys.base_prefix}/bin:{os.environ['PATH']}"
        subprocess.run(
            [ROOT / "images" / "install-control", prefix], cwd=ROOT, env={**os.environ, "PATH": path}, check=True
        )
        _environment(layer, prefix)


def engine(tag: str, checkpoint: Path) -> Image:
    """vLLM and Ray of the environment that runs this, and our packages on top of them."""
    packages = Path(sys.prefix) / "lib" / _VERSION / "site-packages"
    installed = sorted(path.name for path in packages.glob("*.dist-info"))
    # Ours are a layer of their own: what `make setup` installs of them are addresses of this checkout.
    stock = made_once(
        cache(),
        "engine",
        key(*installed),
        partial(_environment, prefix=Path(sys.prefix), leave_out=frozenset({"_moestack.pth"})),
    )

    def fill(layer: Layer) -> None:
        for package in _our_packages():
            inside = f"{PREFIX}/lib/{_VERSION}/site-packages/{package.name}"
            layer.tree(inside, package, lambda path: path.name == "__pycache__")
        layer.tree(MODEL, checkpoint)

    own = made_once(cache(), "plugin", key(FORMAT, *_sources(), checkpoint.name), fill)
    environment = [*ENVIRONMENT, "HOME=/home/moestack", "HF_HUB_OFFLINE=1", "VLLM_CPU_KVCACHE_SPACE=1"]
    config = {"Env": environment, "User": f"{NOBODY}:{NOBODY}", "WorkingDir": "/home/moestack"}
    return Image(tag, (base_layer(), stock, own), config)
