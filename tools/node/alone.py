"""Runs a command as root in network, mount and process namespaces of its own, and leaves nothing behind it.

    python3 tools/node/alone.py COMMAND...

For a Kubernetes node that is a test's: bridges, addresses, packet filters, mounts and daemons that its parts make end
with the namespaces, whatever the command did, because the kernel ends them. What namespaces do not hold is put back
here: cgroups, the kernel settings that a kubelet makes, folders that it wants under /var/lib.

The command finds in MOESTACK_ALONE a folder on disk for all it writes, which goes as well. After a failure its logs/
stay, and this says where. In the command's network there is `lo` and no way out.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
KERNEL = Path("/proc/sys")
SETTINGS = (  # that a kubelet sets for the whole machine
    *("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"),
    *("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"),
)
FOLDERS = ("/var/lib/kubelet", "/var/lib/cni")
"""Names that kubelet and network plugins have built in; each is an empty file system of its own in the namespace."""
INSIDE = """
set -eu
ip link set lo up
for folder in /run /var/log {folders}; do mount -t tmpfs tmpfs "$folder"; done
"$@"
"""
"""Not `exec`: the shell stays as the first process of its namespace, and reaps what others leave."""


def remove_cgroups(name: str) -> None:
    """Removes the cgroups under `name`, children first, in every hierarchy."""
    for top in [*CGROUPS.glob(name), *CGROUPS.glob(f"*/{name}")]:
        for path, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                os.rmdir(path)


def main(command: list[str]) -> int:
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("a node needs namespaces, mounts and cgroups: run this as root", file=sys.stderr)
        return 1
    state = Path(tempfile.mkdtemp(prefix="moe-node-"))
    state.chmod(0o755)  # pods that are not root reach their volumes through it
    made = [name for name in FOLDERS if not os.path.isdir(name)]
    for name in made:
        os.makedirs(name)
    before = {name: (KERNEL / name).read_text() for name in SETTINGS if (KERNEL / name).exists()}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's, which then ends in order
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what is put back below
    try:
        status = subprocess.run(
            [
                *("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL", "--"),
                *("sh", "-c", INSIDE.format(folders=" ".join(FOLDERS)), "alone", *command),
            ],
            env={**os.environ, "MOESTACK_ALONE": str(state)},
            check=False,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        ).returncode
    finally:
        remove_cgroups(state.name)
        for name, value in before.items():
            with suppress(OSError):
                (KERNEL / name).write_text(value)
        for name in made:
            with suppress(OSError):
                os.rmdir(name)
    if status and (state / "logs").is_dir():
        kept = Path(tempfile.mkdtemp(prefix="moe-node-logs-"))
        shutil.copytree(state / "logs", kept, dirs_exist_ok=True)
        print(f"logs: {kept}", file=sys.stderr)
    shutil.rmtree(state, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
