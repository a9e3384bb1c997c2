"""What `moectl` writes down about a stack, in its state folder: the plan it starts from, and the state it is in."""

from __future__ import annotations

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from moe_api.base import Model
from moe_cli.outcome import Problem
from moe_cli.processes import Proc

PLAN = "plan.json"
STATE = "state.json"
KEY = "signing.pem"
"""The stack's own key: its operator's and its tuner's at once."""
READ, OPERATE = "console.read", "console.operate"
"""Files with the tokens of the console."""
TARGETS = "targets.json"
"""What Prometheus scrapes (file_sd), written by the supervisor as parts become ready."""


class Part(Model):
    """One process of a stack. `${part.fact}` in its command and documents stands for what an earlier part announced."""

    name: str
    title: str
    command: tuple[str, ...]
    documents: dict[str, Any] = Field(
        default_factory=dict, description="file name in the state folder → text, or a JSON document"
    )
    env: dict[str, str] = Field(default_factory=dict)
    needs: tuple[str, ...] = Field(default=(), description="parts that must be ready before this one starts")
    once: bool = Field(default=False, description="a step that ends by itself; ready when it has ended well")
    probe: str | None = Field(
        default=None,
        description="path that answers 200 once the part is ready, on the port it listens on; "
        'None: the part prints {"ready": true, …} on its standard output',
    )
    start_s: float = Field(default=60.0, description="longest time to become ready")
    stop_s: float = Field(default=10.0, description="longest time from SIGTERM to the end, then SIGKILL")


class Change(Model):
    """One thing that this machine serves differently from what the file says."""

    field: str
    asked: str
    used: str
    why: str

    def __str__(self) -> str:
        return f"{self.field}: {self.asked} → {self.used} ({self.why})"


class StackPlan(Model):
    """Everything that a supervisor needs: what to start, in which order, with which files."""

    stack_id: str
    deployment: str = Field(description="namespace/name")
    model: str = Field(description="model name that clients use")
    ranks: int
    context: int | None = Field(default=None, description="longest context, tokens")
    parts: tuple[Part, ...]
    scrape: dict[str, str] = Field(default_factory=dict, description="job → base URL of what Prometheus scrapes")
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    wipe: tuple[str, ...] = Field(default=(), description="files with secrets, deleted when the stack ends")


class Phase(StrEnum):
    """Where a stack, or a part of it, stands."""

    WAITING = "waiting"
    STARTING = "starting"
    UP = "up"
    DONE = "done"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Stage(Model):
    """A step that a part reports while it starts."""

    name: str
    state: Literal["start", "done"]
    detail: str = ""
    since_s: float
    done_s: float | None = None


class PartState(Model):
    """One process of a running stack."""

    name: str
    title: str
    phase: Phase = Phase.WAITING
    proc: Proc | None = None
    since_s: float | None = Field(default=None, description="unix time of its start")
    ready_s: float | None = Field(default=None, description="unix time at which it was ready")
    facts: dict[str, str] = Field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    exit_code: int | None = None
    log: str = ""


class StackState(Model):
    """A stack as its supervisor last wrote it down."""

    stack_id: str
    deployment: str
    model: str
    ranks: int
    context: int | None = Field(default=None, description="longest context, tokens")
    phase: Phase = Phase.STARTING
    supervisor: Proc
    started_s: float
    parts: tuple[PartState, ...] = ()
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    problem: Problem | None = None
    log_tail: tuple[str, ...] = ()
    exit_code: int | None = None

    def part(self, name: str) -> PartState | None:
        return next((part for part in self.parts if part.name == name), None)

    def fact(self, part: str, name: str) -> str | None:
        found = self.part(part)
        return None if found is None else found.facts.get(name)

    @property
    def gateway_url(self) -> str | None:
        """Base of the OpenAI API that clients use."""
        port = self.fact("gateway", "port")
        return None if port is None else f"http://127.0.0.1:{port}/v1"

    @property
    def ended(self) -> bool:
        return self.phase in (Phase.STOPPED, Phase.FAILED)


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file as a whole, so that a reader never sees half of it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_state(folder: Path, state: StackState) -> None:
    write(folder / STATE, state.model_dump_json(by_alias=True, exclude_none=True, indent=1))


def read_state(folder: Path) -> StackState | None:
    """The state in a folder; None where there is none, or one that this version cannot read."""
    try:
        return StackState.model_validate_json((folder / STATE).read_bytes())
    except (OSError, ValidationError):
        return None


def read_token(folder: Path, name: str = READ) -> str | None:
    """A token of a stack's console, which its tuner wants of who asks how it is; None where there is none."""
    try:
        return (folder / name).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def wipe(files: tuple[str, ...]) -> None:
    """Delete files with secrets."""
    for name in files:
        Path(name).unlink(missing_ok=True)
