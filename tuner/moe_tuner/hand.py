"""Puts settings in force and agrees with the board about them: the one sender, with the records of what it did.

It decides nothing. It knows whose the knobs are that it finds at the board: its own, its own trial's, or somebody
else's, which become the home.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moe_core import retune_state
from moe_core.clock import Clock
from moe_core.log import Log
from moe_core.retune_state import Action, RetuneState
from moe_core.setting import Setting, Signals
from moe_core.wire import Knobs
from moe_tuner.actuate import AckReport, ActuationFailed, Actuator, Overtaken, Sent
from moe_tuner.exporter import Exporter
from moe_tuner.journal import GuardMemory, Journal, Saved
from moe_tuner.live import Live
from moe_tuner.report import AckSummary, DecisionRecord, Loop
from moe_tuner.world import Reading, boot_setting

REFUSED_S = 60.0
"""After a rank refused a setting, the fast loop makes no further move for this long."""
OWED_AGAIN_S = 5.0
RETURNS = ("RollBack", "Restore", "Refused")
COUNTED_BY_POLICY = frozenset(action.value for action in Action)


class Hand:
    """Actuation of one deployment. `state` is the fast policy's, saved with every change."""

    def __init__(
        self,
        live: Live,
        *,
        actuator: Actuator,
        journal: Journal,
        exporter: Exporter,
        clock: Clock,
        log: Log,
        told: Callable[[DecisionRecord], None] = lambda record: None,
    ) -> None:
        self._live = live
        self._told = told
        self._actuator = actuator
        self._journal = journal
        self._exporter = exporter
        self._clock = clock
        self._log = log
        self.state = RetuneState()
        self.signals = Signals()
        self.in_force: Setting | None = None
        self.knobs: Knobs | None = None
        self.acks: AckSummary | None = None
        self.trial_failed: str | None = None
        self.overtaken: str | None = None
        self.no_moves_until_s = 0.0
        self.memory = GuardMemory()
        self._trial: Setting | None = None
        self._owed: tuple[Setting, str] | None = None
        self._owed_again_s = 0.0
        self._doubtful: tuple[Knobs, DecisionRecord] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._unsettled: DecisionRecord | None = None

    @property
    def may_send(self) -> bool:
        return self._live.config.mode == "Auto" and not self._live.config.paused

    @property
    def may_repair(self) -> bool:
        """Sending what is in force already, to one that lost it, changes no knob: a pause allows it."""
        return self._live.config.mode == "Auto"

    @property
    def holds_trial(self) -> bool:
        """A candidate is in force, or could not be taken back yet."""
        return self._owed is not None or (self._trial is not None and self.in_force == self._trial)

    @property
    def owes(self) -> bool:
        """A candidate could not be taken back yet."""
        return self._owed is not None

    def history(self, limit: int) -> tuple[DecisionRecord, ...]:
        """The last decisions, newest first, of those in memory."""
        return self._journal.recent(limit)

    def read(self, limit: int) -> tuple[DecisionRecord, ...]:
        """The same from the file. Blocks."""
        return self._journal.read(limit)

    @property
    def journal_problem(self) -> str | None:
        return self._journal.problem

    def journal_again(self) -> None:
        """See whether a disk that failed takes records again."""
        self._journal.retry()

    # Agreement with the board

    async def agree(self, reading: Reading) -> None:
        """Adopt at first; then repair what the board lost, and respect what somebody else sent it."""
        if not reading.board_up:
            return
        if self.in_force is None:
            await self._adopt(reading)
            return
        theirs, ours = reading.in_force, self.knobs
        if theirs is not None and (ours is None or theirs.version > ours.version):
            self._meet(theirs)
        elif ours is not None and self.may_repair:
            try:
                await self._actuator.resend(theirs, reading.gateway_versions)
            except ActuationFailed as error:
                self._log.warning("knobs that were lost could not be sent again", why=str(error))
            except Overtaken as error:
                if error.knobs is not None:
                    self._meet(error.knobs)
        # A candidate that nobody has proven goes back whatever the mode is by now.
        if self._owed is not None and self._clock.monotonic() >= self._owed_again_s:
            setting, reason = self._owed
            self._owed_again_s = self._clock.monotonic() + OWED_AGAIN_S
            if await self.send(setting, "slow", "RollBack", f"{reason} (sent again)"):
                self._owed = None

    async def _adopt(self, reading: Reading) -> None:
        """Take over what is in force, and tell from the saved state whose it is."""
        saved = self._journal.resume()
        if saved is not None:
            self._actuator.heard([saved.version])
            self.state = self._resumed(saved)
            self.memory = GuardMemory(saved.auto_since_s, saved.trials_at_s, saved.crashed)
        home = self.state.home
        if reading.in_force is None:
            await self._adopt_boot(reading, home)
            return
        found = Setting.of(reading.in_force)
        self.knobs, self.in_force = reading.in_force, found
        self._actuator.adopt(reading.in_force)
        if saved is None or home is None or found not in (home, *saved.ours):
            if saved is not None and saved.elsewhere and home is not None and self._actuator.signed_by_us:
                # The one before sent it and was gone before it could say so: a candidate, for all that is known.
                self._trial = found
                why = f"version {reading.in_force.version} came after the last record: back to the last safe setting"
                await self.take_back(home, "RollBack", why)
                return
            self._rebase(found, f"version {reading.in_force.version} of the board is taken over as the home")
            return
        if saved.pending is not None and found == saved.pending.after:
            version = reading.in_force.version
            note = "sent before a restart; its acknowledgements are unknown"
            self._write(saved.pending.model_copy(update={"note": note, "version": version}))
        self._log.info("knobs taken over from the board", version=reading.in_force.version, setting=found.text())
        if found == saved.trial and found != home:
            self._trial = found
            await self.take_back(home, "RollBack", "a restart found a trial in force: back to the incumbent")

    async def _adopt_boot(self, reading: Reading, home: Setting | None) -> None:
        """A board without knobs: a new one, or one that lost its memory with all its replicas."""
        # Gateways outlive it, and refuse what is older than what they have.
        self._actuator.heard(reading.gateway_versions.values())
        boot = boot_setting(reading.observation.replicas or ())
        if boot is None:
            return
        self.in_force = boot
        if home is None:
            self.state = retune_state.rebase(self.state, boot)
            self.save()
        elif home != boot and self.may_repair:
            reason = "the board has no knobs: the last safe setting is sent again"
            await self.send(home, "fast", "Restore", reason)

    def _meet(self, theirs: Knobs) -> None:
        """A newer version than ours: our own whose answer was lost, or another writer's."""
        if self._doubtful is not None and theirs == self._doubtful[0]:
            record = self._doubtful[1].model_copy(update={"note": "its answer was lost; the board has it"})
            self._close_record(note=f"superseded by version {theirs.version}")
            self._write(record.model_copy(update={"version": theirs.version, "sent": True}))
            self.knobs, self.in_force, self._doubtful = theirs, Setting.of(theirs), None
            self._actuator.adopt(theirs)
            if self.in_force == self._trial and self.state.home is not None:
                # The trial was given up when its answer did not come.
                self._owed = (self.state.home, f"{record.reason}: its answer was lost, back to the incumbent")
            self.save()
            return
        self._close_record(note=f"superseded by version {theirs.version} of another writer")
        self.overtaken = f"another writer sent version {theirs.version}"
        self._owed = self._trial = self._doubtful = None
        self.knobs = theirs
        self._actuator.adopt(theirs)
        before, self.in_force = self.in_force, Setting.of(theirs)
        self._rebase(self.in_force, f"version {theirs.version} came from another writer: it is the home now", before)

    def _rebase(self, home: Setting, reason: str, before: Setting | None = None) -> None:
        self.state = retune_state.rebase(self.state, home)
        self.save()
        self.record("fast", "Adopt", reason, before or home, home)

    def _resumed(self, saved: Saved) -> RetuneState:
        elapsed_s = self._clock.time() - saved.saved_at_s
        now_s = self._clock.monotonic()
        return retune_state.resume(saved.state, saved_at_s=saved.saved_monotonic_s, elapsed_s=elapsed_s, now_s=now_s)

    # Changes

    async def send(
        self,
        setting: Setting,
        loop: Loop,
        action: str,
        reason: str,
        *,
        trial: bool = False,
        told: dict[str, Any] | None = None,
    ) -> bool:
        """Put a setting in force; its record, with what is `told` beside, is written when the acknowledgements are in.
        False: it was not sent."""
        record = self._new_record(loop, action, reason, self.in_force or setting, setting, told)
        if trial:
            self._trial = setting
        # Before sending: whoever finds these knobs after a crash must know whose they are.
        self.save(intended=setting, pending=record)
        try:
            sent = await self._actuator.send(setting)
        except (ActuationFailed, Overtaken) as error:
            self._write(record.model_copy(update={"sent": False, "note": str(error)}))
            if isinstance(error, Overtaken):
                if error.knobs is not None:
                    self._meet(error.knobs)
            elif error.doubtful is not None:
                self._doubtful = (error.doubtful, record)
            return False
        self._close_record(note=f"superseded by version {sent.knobs.version}")
        self.knobs, self.in_force, self._doubtful = sent.knobs, setting, None
        if not trial:
            self._trial = None
        if action not in COUNTED_BY_POLICY:
            self.state = retune_state.spend(self.state, self._clock.monotonic())
        self.acks = AckSummary(complete=False)
        self._unsettled = record.model_copy(update={"version": sent.knobs.version})
        self.save()
        self._settling = asyncio.create_task(self._settle(sent))
        return True

    async def take_back(self, home: Setting, action: str, reason: str, told: dict[str, Any] | None = None) -> None:
        """Put the incumbent back in place of a candidate; owed until the board has taken it."""
        if not await self.send(home, "slow", action, reason, told=told):
            self._owed = (home, reason)

    async def promote(self, setting: Setting, reason: str, told: dict[str, Any] | None = None) -> None:
        """The candidate becomes the home, in force already or put there now."""
        before = self.state.home or setting
        self.state = retune_state.rebase(self.state, setting)
        if self.in_force == setting:
            self._trial = None
            self.save()
            self.record("slow", "Promote", reason, before, setting, told)
        elif not await self.send(setting, "slow", "Promote", reason, told=told):
            self.state = retune_state.rebase(self.state, before)
            self.save()

    def pinned(self, setting: Setting) -> None:
        """Knobs that a person holds at a value are part of the home."""
        self.state = retune_state.rebase(self.state, setting)
        self.save()

    # What the guard remembers

    def auto_began(self) -> float:
        """Unix seconds at which mode Auto first began; noted now where it never had."""
        if self.memory.auto_since_s is None:
            self.memory = replace(self.memory, auto_since_s=self._clock.time())
            self.save()
        return self.memory.auto_since_s or 0.0

    def trials_today(self) -> int:
        """Live trials of the last 24 hours."""
        return len(self.memory.trials(self._clock.time()))

    def count_trial(self) -> None:
        self.memory = self.memory.with_trial(self._clock.time())

    def remember_crash(self, setting: Setting) -> None:
        """An engine died under this setting: it is never tried again, whatever becomes of the study."""
        self.memory = self.memory.with_crash(setting)
        self.save()

    async def close(self) -> None:
        """Take back a candidate if one is in force, and close the record that is open."""
        home = self.state.home
        if self.holds_trial and home is not None and home != self.in_force:
            await self.send(home, "slow", "RollBack", "the tuner was told to stop: back to the incumbent")
        self._close_record(note="the tuner stopped before all acknowledgements were in")
        if self.in_force is not None:
            self.save()

    async def _settle(self, sent: Sent) -> None:
        report = await self._actuator.settle(sent)
        self.acks = AckSummary(
            complete=report.complete, seconds=report.seconds, missing=report.missing, errors=report.errors
        )
        if report.seconds is not None:
            self._exporter.acknowledged(report.seconds)
        record = self._close_record(report=report)
        if report.errors and record is not None:
            await self._refused(record, report)

    async def _refused(self, record: DecisionRecord, report: AckReport) -> None:
        """A rank cannot do what was asked: back to what it could do."""
        why = f"version {report.version} was refused by {report.errors[0]}"
        if self.holds_trial:
            self.trial_failed = why
        elif record.action not in RETURNS:
            self.no_moves_until_s = self._clock.monotonic() + REFUSED_S
            self._settling = None  # This very task; it ends here and must not be cancelled by the change that follows.
            await self.send(record.before, record.loop, "Refused", f"{why}: back to {record.before.text()}")

    # Records

    def record(
        self,
        loop: Loop,
        action: str,
        reason: str,
        before: Setting,
        after: Setting | None,
        told: dict[str, Any] | None = None,
    ) -> DecisionRecord:
        """Write down a decision that sends nothing."""
        record = self._new_record(loop, action, reason, before, after, told).model_copy(update={"sent": False})
        self._write(record)
        return record

    def save(self, *, intended: Setting | None = None, pending: DecisionRecord | None = None) -> None:
        """Keep what a restart needs."""
        doubtful = None if self._doubtful is None else Setting.of(self._doubtful[0])
        ours = tuple(setting for setting in (self.in_force, intended, doubtful) if setting is not None)
        self._journal.save(
            self.state,
            ours=ours,
            trial=self._trial,
            pending=pending or self._unsettled,
            guard=self.memory,
            version=self._actuator.version,
        )

    def _new_record(
        self,
        loop: Loop,
        action: str,
        reason: str,
        before: Setting,
        after: Setting | None,
        told: dict[str, Any] | None = None,
    ) -> DecisionRecord:
        record = DecisionRecord(
            time=self._clock.time(),
            loop=loop,
            action=action,
            reason=reason,
            mode=self._live.config.mode,
            sent=True,
            signals=self.signals,
            before=before,
            after=after,
        )
        return record if told is None else record.model_copy(update=told)

    def _close_record(self, *, report: AckReport | None = None, note: str | None = None) -> DecisionRecord | None:
        """Write the record of the change that waits for its acknowledgements, with what came of them."""
        record, self._unsettled = self._unsettled, None
        if report is None and self._settling is not None:
            self._settling.cancel()
            self._settling = None
        if record is None:
            return None
        update: dict[str, object] = {"note": note}
        if report is not None:
            update |= {"ack_seconds": report.seconds, "ack_missing": report.missing, "ack_errors": report.errors}
            update["note"] = None if report.complete else "not acknowledged by all"
        record = record.model_copy(update=update)
        self._write(record)
        self.save()
        return record

    def _write(self, record: DecisionRecord) -> None:
        self._journal.append(record)
        self._exporter.decided(record.loop, record.action)
        self._told(record)
        self._log.info(
            "decision",
            loop=record.loop,
            action=record.action,
            reason=record.reason,
            version=record.version,
            sent=record.sent,
            after=None if record.after is None else record.after.text(),
            ack_s=record.ack_seconds,
            note=record.note,
        )
