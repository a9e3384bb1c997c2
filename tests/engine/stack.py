"""A stack started by `moectl up` for tests: the same command that a person gives, in its own state folder.

Also the environment of every process that the engine's tests start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import requests

from moe_core.clock import SystemClock
from moe_core.passes import Passes
from moe_core.signing import Signer
from moe_core.wire import Knobs

ROOT = Path(__file__).parents[2]
PACKAGES = ("api", "core", "planner", "kube", "operator", "serving", "gateway", "tuner", "cli")
T = TypeVar("T")


def environment() -> dict[str, str]:
    """This process's environment, with our packages to import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in PACKAGES)}


class Stack:
    """Commands and endpoints of one stack."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir

    def moectl(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "moe_cli.main", *arguments, "--state-dir", str(self.state_dir)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state_dir / "state.json").read_text())
        return found

    def fact(self, part: str, name: str) -> str:
        return str(next(p for p in self.state["parts"] if p["name"] == part)["facts"][name])

    def pid(self, part: str) -> int:
        return int(next(p for p in self.state["parts"] if p["name"] == part)["proc"]["pid"])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.fact('gateway', 'port')}/v1"

    @property
    def board(self) -> str:
        return self.fact("serving", "boardUrl")

    @property
    def deployment(self) -> str:
        return "default/stack"

    def newest(self) -> int:
        """Newest version of the knobs that the board has had."""
        return int(self.get(f"{self.board}/v1/acks")["version"])

    def matrix(self) -> list[dict[str, Any]]:
        """Expert load of each layer since the replica started, asked from its ranks now."""
        found: list[dict[str, Any]] = self.get(f"{self.board}/v1/experts")[0]["layers"]
        return found

    def get(self, url: str) -> Any:
        """Asked with a pass by the stack's key."""
        shown = Passes(self.signer(), SystemClock()).token(self.deployment)
        return requests.get(url, headers={"Authorization": f"Bearer {shown}"}, timeout=10).json()

    def digest(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"{self.board}/v1/digests")[0]
        return found

    def prometheus(self, query: str) -> list[dict[str, Any]]:
        answer = requests.get(f"{self.fact('prometheus', 'url')}/api/v1/query", params={"query": query}, timeout=10)
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def tuner(self, path: str) -> Any:
        """Asked with the token of the stack's console."""
        token = (self.state_dir / "console.read").read_text()
        url = f"http://127.0.0.1:{self.fact('tuner', 'port')}{path}"
        return requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10).json()

    def signer(self) -> Signer:
        return Signer.load(next(self.state_dir.rglob("*.pem")))

    def send(self, knobs: Knobs) -> requests.Response:
        """To the board and the gateway, as the tuner does; returns the board's answer."""
        envelope = self.signer().sign(knobs).to_json()
        admin = f"http://127.0.0.1:{self.fact('gateway', 'adminPort')}"
        requests.post(f"{admin}/v1/knobs", json=envelope, timeout=10).raise_for_status()
        return requests.post(f"{self.board}/v1/knobs", json=envelope, timeout=10)

    def processes(self, name: str) -> list[psutil.Process]:
        """Processes of this stack whose command line or title holds `name`."""
        found = []
        for process in psutil.process_iter():
            try:
                if self.state["stackId"] not in process.environ().values():
                    continue
                if name in " ".join(process.cmdline()) or name in process.name():
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def until(check: Callable[[], T], seconds: float, what: str) -> T:
    """Ask again until the answer is true; AssertionError with the last answer after `seconds`."""
    deadline = time.monotonic() + seconds
    answer: T | None = None
    while time.monotonic() < deadline:
        try:
            answer = check()
        except (requests.RequestException, KeyError, IndexError, StopIteration):
            answer = None
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}; last answer: {answer}")


def complete(
    stack: Stack, prompt: str, max_tokens: int = 8, headers: dict[str, str] | None = None, **more: Any
) -> requests.Response:
    """Ask the gateway for a completion of just so many tokens."""
    body = {"model": "tiny-skewed", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **more}
    sent = {"x-moestack-explain": "1", **(headers or {})}
    streamed = bool(more.get("stream"))
    return requests.post(f"{stack.url}/completions", json=body, headers=sent, timeout=60, stream=streamed)


def acknowledged(stack: Stack, version: int) -> None:
    """Wait until every rank has acknowledged; an AssertionError shows who has not."""
    answer: dict[str, Any] = {}
    for _ in range(250):
        answer = stack.get(f"{stack.board}/v1/acks?version={version}")
        if answer["complete"]:
            return
        time.sleep(0.02)
    raise AssertionError(f"version {version} is not in force after 5 s: {answer}; {stack.digest()['engine']}")


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process for the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
