"""The tuner's heart: each tick it reads the world, lets the two policies decide, and has the hand carry it out."""

from __future__ import annotations

import asyncio

from moe_core import retune
from moe_core.clock import Clock
from moe_core.config import TunerConfig
from moe_core.log import Log
from moe_core.retune import Action, RetuneContext, RetuneDecision
from moe_core.setting import Setting, Signals
from moe_tuner.explore import WINS_NEEDED, Do, End, ExploreContext, Step
from moe_tuner.exporter import Exporter
from moe_tuner.hand import Hand
from moe_tuner.observe import Folded, Track, fold
from moe_tuner.report import Budget, DecisionRecord, TrialReport, TuningReport
from moe_tuner.slow import SlowLoop
from moe_tuner.world import World

SHOWN = 20
TRIAL_CHANGES = 2 * WINS_NEEDED + 1
"""Changes that one trial may need, with the one that always stays for the guard."""
HEALTHY_TICKS = 10
WAITING = "waiting for the board: it has not answered yet"


class Tuner:
    """The daemon of one deployment."""

    def __init__(
        self,
        config: TunerConfig,
        *,
        world: World,
        hand: Hand,
        slow: SlowLoop,
        exporter: Exporter,
        clock: Clock,
        log: Log,
    ) -> None:
        self._config = config
        self._world = world
        self._hand = hand
        self._slow = slow
        self.exporter = exporter
        self._clock = clock
        self._log = log
        self._started_at_s = clock.time()
        self._track = Track()
        self._folded = Folded(Signals())
        self._decision = RetuneDecision(action=Action.HOLD, reason=WAITING)
        self._closed: str | None = f"{WAITING}: exploring nothing"
        self._recommended: DecisionRecord | None = None
        self._last_tick_s = clock.monotonic()
        exporter.exploring(False)

    async def run(self, stop: asyncio.Event) -> None:
        """Tick until told to stop; then take a trial's candidate out of force and close the records."""
        self._slow.start()
        due = self._clock.monotonic()
        while not stop.is_set():
            started = self._clock.monotonic()
            try:
                await self.tick()
                self._last_tick_s = self._clock.monotonic()
            except Exception:
                # A fault in one tick must not end tuning: knobs stay, the next tick starts from fresh readings.
                self._log.exception("a tick failed; knobs stay as they are")
            self.exporter.ticked(self._clock.monotonic() - started)
            due = max(due + self._config.tick_s, self._clock.monotonic())
            await self._pause_until(due, stop)
        await self._hand.close()
        self._end_trial("the tuner was told to stop")
        await self._slow.stop()

    async def tick(self) -> None:
        """One round of both loops."""
        hand = self._hand
        reading = await self._world.read()
        now_s = self._clock.monotonic()
        self._folded, self._track = fold(reading.observation, self._track, now_s)
        hand.signals = self._folded.signals
        await hand.agree(reading)
        if hand.overtaken is not None:
            self._end_trial(hand.overtaken)
            hand.overtaken = None
        in_force = hand.in_force
        if in_force is None:
            return
        await self._fast(in_force, now_s)
        await self._explore(in_force, now_s)
        self.exporter.version(0 if hand.knobs is None else hand.knobs.version)

    @property
    def healthy(self) -> bool:
        """Whether the loop ticks. A board that is gone is no fault of this process."""
        return self._clock.monotonic() - self._last_tick_s < HEALTHY_TICKS * max(1.0, self._config.tick_s)

    def history(self, limit: int) -> tuple[DecisionRecord, ...]:
        return self._hand.history(limit)

    def report(self) -> TuningReport:
        config, hand, trial = self._config, self._hand, self._slow.state.trial
        left = retune.budget_left(hand.state, self._clock.monotonic(), config.changes_per_hour)
        return TuningReport(
            deployment=config.deployment,
            mode=config.mode,
            paused=config.paused,
            pins=config.bounds.pinned,
            started_at_s=self._started_at_s,
            version=0 if hand.knobs is None else hand.knobs.version,
            knobs=hand.in_force,
            home=hand.state.home,
            displaced=hand.in_force is not None and hand.in_force != hand.state.home,
            acks=hand.acks,
            exploring=self._exploring,
            exploring_reason=self._closed or self._slow.state.why,
            trial=None if trial is None else TrialReport(number=trial.number, params=trial.params, outcome="running"),
            best_trial=self._slow.summary.best,
            study_size=self._slow.summary.size,
            fast_reason=self._decision.reason,
            spike=self._decision.spike,
            signals=self._folded.signals,
            budget=Budget(used=config.changes_per_hour - left, per_hour=config.changes_per_hour),
            recommendation=self._recommended,
            decisions=hand.history(SHOWN),
        )

    # The fast loop

    async def _fast(self, in_force: Setting, now_s: float) -> None:
        config, hand = self._config, self._hand
        context = RetuneContext(
            now_s=now_s,
            signals=self._folded.signals,
            setting=in_force,
            slo=config.slo,
            bounds=config.bounds,
            max_lost_gate_mass=config.max_lost_gate_mass,
            changes_per_hour=config.changes_per_hour,
            mode=config.mode,
            paused=config.paused,
            trial=self._slow.state.candidate_in_force or hand.holds_trial,
        )
        decision, state = retune.decide(context, hand.state)
        if decision.action is Action.MOVE and now_s < hand.no_moves_until_s:
            why = f"a rank refused the last setting: no moves for {hand.no_moves_until_s - now_s:.0f} s"
            self._decision = decision.model_copy(update={"action": Action.HOLD, "reason": why, "setting": None})
            return
        self._decision, hand.state = decision, state
        if decision.setting is None:
            if not decision.spike:
                self._recommended = None
        elif config.mode == "Auto":
            await hand.send(decision.setting, "fast", decision.action.value, decision.reason)
        elif self._recommended is None or self._recommended.after != decision.setting:
            why = f"would change knobs: {decision.reason}"
            self._recommended = hand.record("fast", decision.action.value, why, in_force, decision.setting)

    # The slow loop

    @property
    def _exploring(self) -> bool:
        return self._closed is None or self._slow.state.candidate_in_force

    async def _explore(self, in_force: Setting, now_s: float) -> None:
        config, hand, signals = self._config, self._hand, self._folded.signals
        self._closed = self._gate(now_s)
        context = ExploreContext(
            now_s=now_s,
            window_s=config.window_s,
            home=hand.state.home or in_force,
            closed=self._closed,
            outside=self._decision.outside,
            breach=self._decision.breach,
            restarted=self._folded.restarted,
            in_force=hand.acks is not None and hand.acks.complete,
            failed=hand.trial_failed,
            slo=config.slo,
            max_lost_gate_mass=config.max_lost_gate_mass,
        )
        hand.trial_failed = None
        taken = self._slow.tick(context, signals.active_limit, signals.active_ceiling)
        await self._carry_out(taken, hand.in_force or in_force)
        self.exporter.exploring(self._exploring)

    def _gate(self, now_s: float) -> str | None:
        """Why no trial may run now."""
        config, signals, explore = self._config, self._folded.signals, self._slow.state
        if config.mode != "Auto":
            return f"mode is {config.mode}: exploring nothing"
        if config.paused:
            return "paused: exploring nothing"
        own = self._slow.closed(signals.active_ceiling)
        if own is not None:
            return own
        if signals.missing:
            return f"no answer from {', '.join(signals.missing)}: exploring nothing"
        if self._hand.owes:
            return "a candidate must be taken back first: exploring nothing"
        left = retune.budget_left(self._hand.state, now_s, config.changes_per_hour)
        if explore.trial is None and left < max(TRIAL_CHANGES, config.changes_per_hour // 2):
            return f"{left} of {config.changes_per_hour} changes are left this hour, kept for spikes: exploring nothing"
        decision = self._decision
        if decision.spike and not explore.candidate_in_force:
            return f"a spike freezes exploration: {decision.outside or decision.breach or decision.reason}"
        return None

    async def _carry_out(self, taken: Step, in_force: Setting) -> None:
        hand, setting = self._hand, taken.setting
        if taken.do is Do.APPLY and setting is not None:
            if not await hand.send(setting, "slow", "Try", taken.reason, trial=True):
                hand.trial_failed = "the candidate could not be sent"
        elif taken.do is Do.RETURN and setting is not None:
            await hand.take_back(setting, "Return", taken.reason)
        elif taken.do is Do.FINISH and taken.end is not None:
            self.exporter.trial_ended(taken.end)
            if taken.end is End.PROMOTED and taken.suggestion is not None:
                hand.promote(taken.suggestion.setting, taken.reason)
            elif setting is not None and setting != in_force:
                await hand.take_back(setting, "RollBack", taken.reason)
            else:
                hand.record("slow", "GiveUp", taken.reason, in_force, None)

    def _end_trial(self, reason: str) -> None:
        ended = self._slow.abandon(reason)
        if ended is not None and ended.end is not None:
            self.exporter.trial_ended(ended.end)

    async def _pause_until(self, due: float, stop: asyncio.Event) -> None:
        """Sleep until the next tick is due, or until told to stop."""
        sleeping = asyncio.ensure_future(self._clock.sleep(max(0.0, due - self._clock.monotonic())))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({sleeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (sleeping, stopping):
            task.cancel()
        await asyncio.gather(sleeping, stopping, return_exceptions=True)
