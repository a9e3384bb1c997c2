"""One process of the test control plane: started on free ports, waited for, stopped by its own process id."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moe_cli.processes import die_with_parent, tail

READY_S = 60.0
STOP_S = 20.0
POLL_S = 0.05
ATTEMPTS = 3  # another process may take a port between our look at it and the component's start
# Below Linux's range for outgoing connections (32768 up), so that no connection of a busy machine takes one by chance.
PORTS = range(20_000, 32_000)


class ComponentFailed(Exception):
    """A component ended or was not ready in time; the message ends with its last log lines."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    for port in random.SystemRandom().sample(PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ComponentFailed("no free port among 200 tried")


@dataclass
class Component:
    """A running process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def rss_bytes(self) -> int:
        """Resident memory now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def failure(self, what: str) -> ComponentFailed:
        return ComponentFailed("\n".join([f"{self.name} {what}; the end of {self.log}:", *tail(self.log, 30)]))

    def stop(self) -> None:
        """Asks it to end, makes it end after STOP_S."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def kill(self) -> None:
        """Ends it at once, as a crash would."""
        self.process.kill()
        self.process.wait()


def start(
    name: str,
    command: Sequence[str | Path],
    log: Path,
    ready: Callable[[], bool],
    deadline_s: float = READY_S,
    environment: Mapping[str, str] | None = None,
) -> Component:
    """Starts one process and waits until `ready` says so. Raises ComponentFailed."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for pytest alone, which then stops the parts in order
            # Not SIGTERM: an API server whose etcd went first would wait for minutes to end gracefully.
            preexec_fn=partial(die_with_parent, signal.SIGKILL),  # noqa: PLW1509  one system call, no lock
        )
    component = Component(name, process, log)
    end = time.monotonic() + deadline_s
    while not ready():
        if process.poll() is not None:
            raise component.failure(f"ended with status {process.returncode}")
        if time.monotonic() > end:
            component.stop()
            raise component.failure(f"was not ready after {deadline_s:.0f} s")
        time.sleep(POLL_S)
    return component


def start_on_free_ports(count: int, start_with: Callable[[list[int]], Component]) -> tuple[Component, list[int]]:
    """Starts a component with `count` fresh ports, and again with others where somebody took one of them first."""
    for attempt in range(1, ATTEMPTS + 1):
        ports = [free_port() for _ in range(count)]
        try:
            return start_with(ports), ports
        except ComponentFailed as failed:
            if attempt == ATTEMPTS or "address already in use" not in str(failed):
                raise
    raise AssertionError("unreachable")
