"""Installs the official Node clients that the gateway's tests run, by their lock, outside the checkout; prints where.

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
SOURCE = Path(__file__).parent / "node-sdks"


def main() -> int:
    if shutil.which("node") is None or shutil.which("npm") is None:
        sys.stderr.write("node and npm are needed for the tests of the Node clients; `make system` installs them\n")
        return 1
    digest = hashlib.sha256(b"".join((SOURCE / name).read_bytes() for name in FILES)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestack"
    folder = cache / "node-sdks" / digest
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers of pytest may come at once
        if not (folder / "installed").exists():
            for name in FILES:
                shutil.copy(SOURCE / name, folder / name)
            done = subprocess.run(["npm", "ci"], cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stderr.write(done.stderr)
                return 1
            (folder / "installed").touch()
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
