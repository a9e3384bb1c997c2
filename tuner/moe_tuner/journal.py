"""What outlives the process: the append-only decision log, and beside it the last safe setting with the budget spent.

The saved state is written before a change is sent, so a killed tuner knows on return whether the knobs it finds in
force are its own trial (which goes back at once), its own answer to a spike, or somebody else's.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, ValidationError

from moe_api.base import Model
from moe_core.clock import Clock
from moe_core.log import Log
from moe_core.retune_state import RetuneState
from moe_core.setting import Setting
from moe_tuner.report import DecisionRecord

KEPT = 50
"""Records in memory; older ones are read from the file."""
TAIL_BYTES = 500_000
DAY_S = 86_400.0
CRASHED_KEPT = 100
RECORD_BYTES = 10_000
"""Above the usual length of a line: what is read of the file for one record."""


CRASHED = "died under it"
"""Words of the guard where an engine did not survive a candidate."""
HOMES = ("Undo", "Settle", "Promote", "Adopt", "RollBack", "Return", "Restore", "Pin")
"""Actions whose setting stands while nothing presses: each was in force before, or won, or is a person's."""


@dataclass(frozen=True)
class GuardMemory:
    """What the guard of the slow loop must know after a restart."""

    auto_since_s: float | None = None
    trials_at_s: tuple[float, ...] = ()
    crashed: tuple[Setting, ...] = ()

    def trials(self, now_s: float) -> tuple[float, ...]:
        """Live trials of the last 24 hours, in unix seconds."""
        return tuple(at_s for at_s in self.trials_at_s if at_s > now_s - DAY_S)

    def with_trial(self, now_s: float) -> GuardMemory:
        return replace(self, trials_at_s=(*self.trials(now_s), now_s))

    def with_crash(self, setting: Setting) -> GuardMemory:
        kept = tuple(known for known in self.crashed if known != setting)
        return replace(self, crashed=(*kept, setting)[-CRASHED_KEPT:])


@dataclass(frozen=True)
class Kept:
    """What is kept of a deployment outside of this disk."""

    saved: Saved
    newer: bool
    """Another process wrote it after this one's files: they are of an earlier time."""


class Saved(Model):
    """The saved state. Times of `state` are on the saving process's monotonic clock, which read `saved_monotonic_s`."""

    saved_at_s: float
    saved_monotonic_s: float
    state: RetuneState
    ours: tuple[Setting, ...] = Field(default=(), description="settings that this tuner has, or may have, put in force")
    trial: Setting | None = Field(default=None, description="a candidate that is, or may be, in force")
    pending: DecisionRecord | None = None
    auto_since_s: float | None = Field(default=None, description="unix seconds at which mode Auto first began")
    trials_at_s: tuple[float, ...] = Field(default=(), description="unix seconds of live trials of the last day")
    crashed: tuple[Setting, ...] = Field(default=(), description="settings under which an engine died: never again")
    version: int = Field(default=0, description="highest version that was sent")
    elsewhere: bool = Field(
        default=False, description="not from this disk: what its writer sent afterwards is not in it"
    )


class Journal:
    """Owns both files. A disk that fails costs the record, never the loop."""

    def __init__(self, decision_log: str, clock: Clock, log: Log, kept: Kept | None = None) -> None:
        self._path = Path(decision_log)
        self._state_path = self._path.with_name(self._path.name + ".state.json")
        self._kept = kept
        self._clock = clock
        self._log = log
        self._start = ""
        self.problem: str | None = None
        """Why it cannot be written now: what a restart would not know must not be tried."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._failed("the decision log's folder cannot be made", self._path.parent, error)
        self._recent: deque[DecisionRecord] = deque(self._read_tail(KEPT, TAIL_BYTES), maxlen=KEPT)

    def append(self, record: DecisionRecord) -> None:
        self._recent.append(record.model_copy(update={"inputs": None}))
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{self._start}{record.model_dump_json(by_alias=True, exclude_none=True)}\n")
                self._start = ""
        except OSError as error:
            self._failed("the decision log cannot be written", self._path, error)

    def recent(self, limit: int) -> tuple[DecisionRecord, ...]:
        """The last decisions, newest first, of those in memory."""
        return tuple(reversed(self._recent))[: max(0, limit)]

    def read(self, limit: int) -> tuple[DecisionRecord, ...]:
        """The last decisions from the file, newest first, with their inputs. Blocks."""
        return tuple(reversed(self._read_tail(limit, limit * RECORD_BYTES)))

    def save(
        self,
        state: RetuneState,
        *,
        ours: tuple[Setting, ...],
        trial: Setting | None,
        pending: DecisionRecord | None,
        guard: GuardMemory,
        version: int = 0,
    ) -> None:
        """Replace the saved state in one step: a reader finds the old one or the new one."""
        saved = Saved(
            saved_at_s=self._clock.time(),
            saved_monotonic_s=self._clock.monotonic(),
            state=state,
            ours=ours,
            trial=trial,
            pending=pending,
            auto_since_s=guard.auto_since_s,
            trials_at_s=guard.trials_at_s,
            crashed=guard.crashed,
            version=version,
        )
        beside = self._state_path.with_name(self._state_path.name + ".new")
        try:
            beside.write_text(saved.model_dump_json(by_alias=True), encoding="utf-8")
            os.replace(beside, self._state_path)
        except OSError as error:
            self._failed("the tuner's state cannot be saved", self._state_path, error)
        else:
            if self.problem is not None:
                self._log.info("the decision log can be written again", path=str(self._path))
            self.problem = None

    def retry(self) -> None:
        """Look whether a log that failed can be written again."""
        if self.problem is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8"):
                self.problem = None
        except OSError:
            return

    def resume(self) -> Saved | None:
        """What a new start goes on from: the newest that is known."""
        kept = self._kept
        if kept is not None and kept.newer:
            return kept.saved
        return self.load() or self.rebuilt() or (None if kept is None else kept.saved)

    def load(self) -> Saved | None:
        """The saved state; None where there is none, or none that can be read."""
        try:
            return Saved.model_validate_json(self._state_path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            why = type(error).__name__
            self._log.warning(
                "the saved state cannot be read: starting from the decision log", path=str(self._state_path), why=why
            )
            return None

    def rebuilt(self) -> Saved | None:
        """What the decision log alone tells, where the saved state is lost: the last safe setting, and whose the knobs
        in force are. The budget counts as spent as far as the log shows it."""
        known = [record for record in self.recent(KEPT) if record.after is not None]
        home = next((record.after for record in known if record.action in HOMES), None)
        if home is None and known:
            home = known[-1].before
        if home is None:
            return None
        last = next((record for record in known if record.sent), None)
        ours = () if last is None or last.after is None else (last.after,)
        changes = tuple(record.time for record in reversed(known) if record.sent)
        return Saved(
            saved_at_s=self._clock.time(),
            saved_monotonic_s=self._clock.time(),
            state=RetuneState(home=home, changes_at_s=changes),
            ours=ours,
            trial=last.after if last is not None and last.action == "Try" else None,
            trials_at_s=tuple(record.time for record in reversed(known) if record.action == "Try"),
            crashed=tuple(
                record.before for record in known if record.action == "RollBack" and CRASHED in record.reason
            ),
        )

    def _failed(self, what: str, path: Path, error: OSError) -> None:
        if self.problem is None:
            self._log.error(what, path=str(path), why=str(error))
        self.problem = f"{what} ({error.strerror or type(error).__name__})"

    def _read_tail(self, limit: int, most_bytes: int) -> list[DecisionRecord]:
        try:
            with self._path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - most_bytes))
                text = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._failed("the decision log cannot be read", self._path, error)
            return []
        lines, records = text.splitlines(), list[DecisionRecord]()
        if text and not text.endswith(b"\n"):
            self._start = "\n"  # A crash cut the last line: the next record begins its own.
        for line in lines[-limit:]:
            try:
                records.append(DecisionRecord.model_validate_json(line))
            except ValidationError:
                continue  # A line cut by a crash, or of another release.
        return records
