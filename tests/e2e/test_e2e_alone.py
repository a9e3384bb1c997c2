"""tools/node/alone.py: whatever its command leaves, the machine is as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.control_plane import ROOT

pytestmark = [pytest.mark.full, pytest.mark.e2e]

ALONE = ROOT / "tools" / "node" / "alone.py"
LEAVES = """
ip link add left0 type bridge
nft add table ip left
mkdir "$MOESTACK_ALONE/mounted" && mount -t tmpfs tmpfs "$MOESTACK_ALONE/mounted"
for top in /sys/fs/cgroup /sys/fs/cgroup/pids; do
    [ ! -e "$top/cgroup.procs" ] || mkdir -p "$top/$(basename "$MOESTACK_ALONE")/inner"
done
setsid sleep 4242 &
mkdir "$MOESTACK_ALONE/logs" && echo said > "$MOESTACK_ALONE/logs/part.log"
echo "$MOESTACK_ALONE"
"""


def seen() -> tuple[str, str, str]:
    """Interfaces, packet filters and mounts of this namespace."""
    commands = (["ip", "-o", "link"], ["nft", "list", "tables"], ["cat", "/proc/self/mounts"])
    links, tables, mounts = (
        subprocess.run(words, capture_output=True, text=True, check=True).stdout for words in commands
    )
    return links, tables, mounts


def alone(script: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, ALONE, "sh", "-euc", script]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_nothing_is_left_of_what_the_command_made() -> None:
    before = seen()
    done = alone(LEAVES)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert not folder.exists()
    assert seen() == before
    assert not list(Path("/sys/fs/cgroup").rglob(folder.name))
    assert subprocess.run(["pgrep", "-x", "-f", "sleep 4242"], check=False).returncode == 1


def test_a_failure_keeps_the_logs_and_says_where() -> None:
    done = alone(f"{LEAVES}\nexit 7")
    assert done.returncode == 7
    kept = Path(done.stderr.strip().removeprefix("logs: "))
    assert (kept / "part.log").read_text() == "said\n"
    (kept / "part.log").unlink()
    kept.rmdir()
