"""Installs what tests run by Node, by its lock, outside the checkout; prints where. Without a word the official clients
that the gateway's tests run; `node-browser` what drives the browser of the console's test.

The folder's name holds a hash of the lock, so that a new lock is a new folder and an old one is never half of each.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

FILES = ("package.json", "package-lock.json", ".npmrc")
SETS = ("node-sdks", "node-browser")


def main(name: str = SETS[0]) -> int:
    if name not in SETS:
        sys.stderr.write(f"{name} is none of {', '.join(SETS)}\n")
        return 2
    source = Path(__file__).parent / name
    if shutil.which("node") is None or shutil.which("npm") is None:
        sys.stderr.write("node and npm are needed for these tests; `make system` installs them\n")
        return 1
    digest = hashlib.sha256(b"".join((source / file).read_bytes() for file in FILES)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestack"
    folder = cache / name / digest
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers of pytest may come at once
        if not (folder / "installed").exists():
            for file in FILES:
                shutil.copy(source / file, folder / file)
            done = subprocess.run(["npm", "ci"], cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stderr.write(done.stderr)
                return 1
            (folder / "installed").touch()
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:2]))
