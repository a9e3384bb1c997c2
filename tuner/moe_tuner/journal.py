"""What outlives the process: the append-only decision log, and beside it the last safe setting with the budget spent.

The saved state is written before a change is sent, so a killed tuner knows on return whether the knobs it finds in
force are its own trial (which goes back at once), its own answer to a spike, or somebody else's.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from pydantic import Field, ValidationError

from moe_api.base import Model
from moe_core.clock import Clock
from moe_core.log import Log
from moe_core.retune import RetuneState
from moe_core.setting import Setting
from moe_tuner.report import DecisionRecord

KEPT = 1000
TAIL_BYTES = 4_000_000


class Saved(Model):
    """The saved state. Times of `state` are on the saving process's monotonic clock, which read `saved_monotonic_s`."""

    saved_at_s: float
    saved_monotonic_s: float
    state: RetuneState
    ours: tuple[Setting, ...] = Field(default=(), description="settings that this tuner has, or may have, put in force")
    trial: Setting | None = Field(default=None, description="a candidate that is, or may be, in force")
    pending: DecisionRecord | None = None


class Journal:
    """Owns both files. A disk that fails costs the record, never the loop."""

    def __init__(self, decision_log: str, clock: Clock, log: Log) -> None:
        self._path = Path(decision_log)
        self._state_path = self._path.with_name(self._path.name + ".state.json")
        self._clock = clock
        self._log = log
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._start = ""
        self._recent: deque[DecisionRecord] = deque(self._read_tail(), maxlen=KEPT)

    def append(self, record: DecisionRecord) -> None:
        self._recent.append(record)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{self._start}{record.model_dump_json(by_alias=True, exclude_none=True)}\n")
                self._start = ""
        except OSError as error:
            self._log.error("the decision log cannot be written", path=str(self._path), why=str(error))

    def recent(self, limit: int) -> tuple[DecisionRecord, ...]:
        """The last decisions, newest first."""
        return tuple(reversed(self._recent))[: max(0, limit)]

    def save(
        self, state: RetuneState, *, ours: tuple[Setting, ...], trial: Setting | None, pending: DecisionRecord | None
    ) -> None:
        """Replace the saved state in one step: a reader finds the old one or the new one."""
        saved = Saved(
            saved_at_s=self._clock.time(),
            saved_monotonic_s=self._clock.monotonic(),
            state=state,
            ours=ours,
            trial=trial,
            pending=pending,
        )
        beside = self._state_path.with_name(self._state_path.name + ".new")
        try:
            beside.write_text(saved.model_dump_json(by_alias=True), encoding="utf-8")
            os.replace(beside, self._state_path)
        except OSError as error:
            self._log.error("the tuner's state cannot be saved", path=str(self._state_path), why=str(error))

    def load(self) -> Saved | None:
        """The saved state; None where there is none, or none that can be read."""
        try:
            return Saved.model_validate_json(self._state_path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            why = type(error).__name__
            self._log.warning(
                "the saved state cannot be read: starting without it", path=str(self._state_path), why=why
            )
            return None

    def _read_tail(self) -> list[DecisionRecord]:
        try:
            with self._path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - TAIL_BYTES))
                text = file.read()
        except FileNotFoundError:
            return []
        lines, records = text.splitlines(), list[DecisionRecord]()
        if text and not text.endswith(b"\n"):
            self._start = "\n"  # A crash cut the last line: the next record begins its own.
        for line in lines[-KEPT:]:
            try:
                records.append(DecisionRecord.model_validate_json(line))
            except ValidationError:
                continue  # A line cut by a crash, or of another release.
        return records
