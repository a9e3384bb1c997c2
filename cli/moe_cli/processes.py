"""Processes of a stack: found by a mark in their environment, and ended without touching any other.

Every process that a stack starts, and every process those start, inherits MOESTACK_STACK_ID. So even after a crash of
the supervisor, and for children that Ray has detached, what belongs to the stack is known for certain.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil

from moe_api.base import Model

MARK = "MOESTACK_STACK_ID"
SAME_START_S = 2.0
"""Start times of one process, read twice, may differ by this much (the boot time they count from is adjusted)."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Proc(Model):
    """A process by number and start time, so that a reused number is never mistaken for it."""

    pid: int
    started_at_s: float

    @classmethod
    def of(cls, pid: int) -> Proc | None:
        try:
            return cls(pid=pid, started_at_s=psutil.Process(pid).create_time())
        except psutil.Error:
            return None

    def alive(self) -> bool:
        """Whether this very process runs. A zombie does not."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started_at_s) < SAME_START_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def marked(stack_id: str, *, besides: Collection[int] = ()) -> list[psutil.Process]:
    """Every live process that carries the stack's mark, and all below those (some overwrite their environment)."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == stack_id:
                found[process.pid] = process
                found.update((child.pid, child) for child in process.children(recursive=True))
    return [process for process in found.values() if process.pid not in besides and _runs(process)]


def descendants() -> list[psutil.Process]:
    """Every live process below this one."""
    return [child for child in psutil.Process().children(recursive=True) if _runs(child)]


def end(processes: Iterable[psutil.Process], sign: signal.Signals) -> int:
    """Send a signal to each (psutil checks that the number was not reused). Returns how many took it."""
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(sign)
            count += 1
    return count


def end_marked(stack_id: str, *, besides: Collection[int] = (), grace_s: float = 10.0) -> int:
    """End all with the stack's mark: TERM, `grace_s`, KILL until nothing is left. Returns how many there were."""
    left = marked(stack_id, besides=besides)
    total = len(left)
    end(left, signal.SIGTERM)
    psutil.wait_procs(left, timeout=grace_s)
    for _ in range(10):
        # Looked up again each time: a process may have started another one before it was killed.
        left = marked(stack_id, besides=besides)
        if not left:
            break
        end(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=2.0)
    return total


def kill_group(pid: int) -> None:
    """Kill the process group that a child leads. Children lead their own: each is started in a new session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies (Linux), so that none escapes to init."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(own: Collection[int]) -> None:
    """Collect adopted children that have ended, all but `own`, which their starter waits for."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.pid not in own and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


if sys.platform == "linux":
    _LIBC = ctypes.CDLL(None)

    def die_with_parent(sign: int = signal.SIGTERM) -> None:
        """For `preexec_fn`: get `sign` when the parent ends, however it ends."""
        _LIBC.prctl(_PR_SET_PDEATHSIG, sign, 0, 0, 0)

else:

    def die_with_parent(sign: int = signal.SIGTERM) -> None:
        """Other systems have no such signal; `moectl down` finds what is left by its mark."""


def tail(path: Path, lines: int = 15, max_bytes: int = 16_384) -> tuple[str, ...]:
    """Last lines of a log file; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - max_bytes))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ()
    return tuple(text.splitlines()[-lines:])


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
