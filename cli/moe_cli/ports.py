"""Ports on this machine: whether one is free and, where it is not, who has it."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

import psutil

from moe_cli.outcome import Exit, Problem, Refusal

MAX_COMMAND_CHARS = 120
LISTEN = psutil.CONN_LISTEN


@dataclass(frozen=True)
class Holder:
    """The process that listens on a port; `pid` is None where the system does not say (another user's process)."""

    port: int
    pid: int | None
    command: str

    def __str__(self) -> str:
        who = f"pid {self.pid} ({self.command})" if self.pid is not None else "a process of another user"
        return f"port {self.port} is in use by {who}"


def holder_of(port: int, host: str = "127.0.0.1") -> Holder | None:
    """Who listens on a TCP port of `host`; None where it is free. Port 0 is always free."""
    if port == 0 or _can_bind(host, port):
        return None
    pid = None
    with contextlib.suppress(psutil.AccessDenied):
        rows = psutil.net_connections("tcp")
        pid = next((row.pid for row in rows if row.status == LISTEN and row.laddr and row.laddr.port == port), None)
    return Holder(port, pid, "" if pid is None else command_of(pid))


def command_of(pid: int) -> str:
    """Command line of a process, shortened; empty where it is gone or hidden."""
    try:
        line = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
    return line if len(line) <= MAX_COMMAND_CHARS else f"{line[: MAX_COMMAND_CHARS - 1]}…"


def refuse_taken(ports: dict[str, int]) -> None:
    """Raise Refusal for every option whose port is in use, saying who has it, or that two options share a port."""
    problems = []
    for option, port in ports.items():
        twin = next((other for other, value in ports.items() if value == port != 0 and other != option), None)
        if twin is not None and option > twin:
            problems.append(Problem(field=option, message=f"{port} is also {twin}", remedy="choose two ports, or 0"))
        elif (holder := holder_of(port)) is not None:
            remedy = "stop that process, or choose another port (0 takes any free one)"
            problems.append(Problem(field=option, message=str(holder), remedy=remedy))
    if problems:
        raise Refusal(*problems, code=Exit.COULD_NOT_START)


def listening(pid: int) -> int | None:
    """The lowest TCP port that a process listens on, or None."""
    try:
        rows = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return None
    return min((row.laddr.port for row in rows if row.status == LISTEN and row.laddr), default=None)


def _can_bind(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port in TIME_WAIT is free, one that is listened on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
