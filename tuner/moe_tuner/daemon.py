"""The tuner's heart: each tick it reads the world, lets the two policies decide, and has the hand carry it out."""

from __future__ import annotations

import asyncio

from moe_core import retune, retune_state
from moe_core.clock import Clock
from moe_core.log import Log
from moe_core.retune_state import Action, RetuneContext, RetuneDecision
from moe_core.setting import Setting, Signals, pinned
from moe_tuner.evidence import pairs_needed
from moe_tuner.explore import CHANGES_KEPT, Do, End, ExploreContext, Step, Suggestion
from moe_tuner.exporter import Exporter
from moe_tuner.hand import Hand
from moe_tuner.live import Live, held
from moe_tuner.measure import NOISE_FLOOR
from moe_tuner.observe import Folded, Track, fold
from moe_tuner.report import Budget, DecisionRecord, TrialReport, TuningReport
from moe_tuner.slow import SlowLoop
from moe_tuner.world import World

SHOWN = 20
HEALTHY_TICKS = 10
WAITING = "waiting for the board: it has not answered yet"


class Tuner:
    """The daemon of one deployment."""

    def __init__(
        self,
        live: Live,
        *,
        world: World,
        hand: Hand,
        slow: SlowLoop,
        exporter: Exporter,
        clock: Clock,
        log: Log,
    ) -> None:
        self._live = live
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
        self._counted: int | None = None
        exporter.exploring(False)

    async def run(self, stop: asyncio.Event, phase_s: float = 0.0) -> None:
        """Tick until told to stop; then take a trial's candidate out of force and close the records. `phase_s`: the
        wait before the first tick, so that many deployments do not tick at once."""
        self._slow.start(phase_s)
        due = self._clock.monotonic() + phase_s
        await self._pause_until(due, stop)
        while not stop.is_set():
            started = self._clock.monotonic()
            try:
                await self.tick()
                self._last_tick_s = self._clock.monotonic()
            except Exception:
                # A fault in one tick must not end tuning: knobs stay, the next tick starts from fresh readings.
                self._log.exception("a tick failed; knobs stay as they are")
            self.exporter.ticked(self._clock.monotonic() - started)
            due = max(due + self._live.config.tick_s, self._clock.monotonic())
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
        hand.journal_again()
        await self._fast(in_force, now_s)
        await self._explore(in_force, now_s)
        await self._hold_pins()
        self.exporter.version(self.version)

    @property
    def healthy(self) -> bool:
        """Whether the loop ticks. A board that is gone is no fault of this process."""
        return self._clock.monotonic() - self._last_tick_s < HEALTHY_TICKS * max(1.0, self._live.config.tick_s)

    @property
    def deployment(self) -> str:
        return self._live.config.deployment

    @property
    def live(self) -> Live:
        return self._live

    @property
    def signals(self) -> Signals:
        """What the last tick saw."""
        return self._folded.signals

    @property
    def in_force(self) -> Setting | None:
        """None until the board has answered."""
        return self._hand.in_force

    @property
    def version(self) -> int:
        """Of the knobs in force; 0 before any were sent."""
        return 0 if self._hand.knobs is None else self._hand.knobs.version

    def history(self, limit: int) -> tuple[DecisionRecord, ...]:
        """The last decisions from the log, newest first. Blocks."""
        return self._hand.read(limit)

    def report(self) -> TuningReport:
        config, hand, trial = self._live.config, self._hand, self._slow.state.trial
        left = retune_state.budget_left(hand.state, self._clock.monotonic(), config.changes_per_hour)
        return TuningReport(
            deployment=config.deployment,
            mode=config.mode,
            paused=config.paused,
            pins=config.bounds.pinned,
            started_at_s=self._started_at_s,
            version=self.version,
            knobs=hand.in_force,
            home=hand.state.home,
            displaced=hand.in_force is not None and hand.in_force != hand.state.home,
            on_trial=hand.holds_trial,
            acknowledged=min(self._folded.versions, default=0),
            auto_since_s=hand.memory.auto_since_s,
            crashed=hand.memory.crashed,
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
            trials_today=hand.trials_today(),
            trials_per_day=config.trials_per_day,
            orders=self._live.orders,
            journal_problem=hand.journal_problem,
            recommendation=self._recommended,
            decisions=hand.history(SHOWN),
        )

    # The fast loop

    async def _fast(self, in_force: Setting, now_s: float) -> None:
        config, hand = self._live.config, self._hand
        trial = self._slow.state.candidate_in_force or hand.holds_trial
        # A pin placed while a candidate is in force holds what was there before it, not the candidate's.
        bounds = config.bounds.model_copy(update={"pinned": ()}) if trial else config.bounds
        context = RetuneContext(
            now_s=now_s,
            signals=self._folded.signals,
            setting=in_force,
            slo=config.slo,
            bounds=bounds,
            max_lost_gate_mass=config.max_lost_gate_mass,
            changes_per_hour=config.changes_per_hour,
            mode=config.mode,
            paused=config.paused,
            trial=trial,
        )
        before = hand.state
        decision, state = retune.decide(context, before)
        if decision.action in (Action.MOVE, Action.SETTLE) and now_s < hand.no_moves_until_s:
            why = f"a rank refused the last setting: no moves for {hand.no_moves_until_s - now_s:.0f} s"
            self._decision = decision.model_copy(update={"action": Action.HOLD, "reason": why, "setting": None})
            return
        self._decision, hand.state = decision, state
        if decision.setting is None:
            if not decision.spike and self._recommended is not None and self._recommended.loop == "fast":
                self._recommended = None
        elif config.mode == "Auto":
            told = {"inputs": {"policy": "retune", "context": context.to_json(), "state": before.to_json()}}
            await hand.send(decision.setting, "fast", decision.action.value, decision.reason, told=told)
        elif self._recommended is None or self._recommended.after != decision.setting:
            why = f"would change knobs: {decision.reason}"
            self._recommended = hand.record("fast", decision.action.value, why, in_force, decision.setting)

    async def _hold_pins(self) -> None:
        """Put the values in force at which a person pinned knobs."""
        config, hand, in_force = self._live.config, self._hand, self._hand.in_force
        if in_force is None or not config.pins or not hand.may_send or hand.holds_trial:
            return
        if self._clock.monotonic() < hand.no_moves_until_s:  # A rank refused it a moment ago.
            return
        wanted = held(in_force, config.pins, config.bounds)
        if wanted != in_force and await hand.send(wanted, "fast", "Pin", "a person holds these knobs at a value"):
            hand.pinned(held(hand.state.home or wanted, config.pins, config.bounds))

    # The slow loop

    @property
    def _exploring(self) -> bool:
        return self._closed is None or self._slow.state.candidate_in_force

    async def _explore(self, in_force: Setting, now_s: float) -> None:
        config, hand, signals = self._live.config, self._hand, self._folded.signals
        self._closed = self._gate(now_s)
        context = ExploreContext(
            now_s=now_s,
            window_s=config.window_s,
            home=hand.state.home or in_force,
            closed=self._closed,
            simulator_only=self._simulator_only(),
            changes_left=retune_state.budget_left(hand.state, now_s, config.changes_per_hour),
            alpha=config.promote_alpha,
            seed=config.deployment,
            outside=self._decision.outside,
            breach=self._decision.breach,
            restarted=self._folded.died,
            in_force=hand.acks is not None and hand.acks.complete,
            failed=hand.trial_failed,
            slo=config.slo,
            max_lost_gate_mass=config.max_lost_gate_mass,
        )
        hand.trial_failed = None
        taken = self._slow.tick(context, signals, hand.memory.crashed)
        await self._carry_out(taken, hand.in_force or in_force)
        self.exporter.exploring(self._exploring)

    def _gate(self, now_s: float) -> str | None:
        """Why no trial may run now."""
        config, signals, explore = self._live.config, self._folded.signals, self._slow.state
        if config.mode == "Off":
            return "mode is Off: exploring nothing"
        if config.paused:
            return "paused: exploring nothing"
        own = self._slow.closed(signals.active_ceiling)
        if own is not None:
            return own
        if self._hand.journal_problem is not None:
            return f"{self._hand.journal_problem}: exploring nothing, as a restart would not know of it"
        if signals.missing:
            return f"no answer from {', '.join(signals.missing)}: exploring nothing"
        if self._hand.owes:
            return "a candidate must be taken back first: exploring nothing"
        if explore.trial is not None:
            return self._trial_gate()
        left = retune_state.budget_left(self._hand.state, now_s, config.changes_per_hour)
        if left < max(trial_changes(config.promote_alpha), config.changes_per_hour // 2):
            return f"{left} of {config.changes_per_hour} changes are left this hour, kept for spikes: exploring nothing"
        today = self._hand.trials_today()
        if today >= config.trials_per_day and self._simulator_only() is None:
            return f"{today} of {config.trials_per_day} trials a day are done: exploring nothing"
        decision = self._decision
        if decision.spike:
            return f"a spike freezes exploration: {decision.outside or decision.breach or decision.reason}"
        return None

    def _trial_gate(self) -> str | None:
        """Why the trial in progress may not go on."""
        explore, hand = self._slow.state, self._hand
        home = hand.state.home
        if explore.trial is None or home is None:
            return None
        if self._live.config.mode != "Auto":
            return f"mode is {self._live.config.mode}: nothing is tried"
        taken = [name for name in home.differences(explore.trial.setting) if pinned(name, self._live.config.bounds)]
        if taken:
            return f"a person pinned {taken[0]}"
        # The fast loop answers for the incumbent's blocks: where it had to act, the pair is spoilt.
        if not explore.on_candidate and not hand.holds_trial and hand.in_force != home:
            return f"the fast loop acted: {self._decision.reason}"
        return None

    def _simulator_only(self) -> str | None:
        """Why candidates may only be simulated now: mode Recommend, or the first day in Auto."""
        config = self._live.config
        if config.mode == "Recommend":
            return "mode is Recommend: trials run in the simulator alone"
        if config.mode != "Auto" or not config.simulator_only_s:
            return None
        left_s = self._hand.auto_began() + config.simulator_only_s - self._clock.time()
        if left_s <= 0:
            return None
        return f"first day in Auto ({left_s / 3600:.1f} h left): trials run in the simulator alone"

    async def _carry_out(self, taken: Step, in_force: Setting) -> None:
        hand, setting, suggestion = self._hand, taken.setting, taken.suggestion
        if taken.do in (Do.NOTHING, Do.MEASURE, Do.ASK):
            return
        told: dict[str, object] = {"inputs": self._slow.inputs, "measured": taken.measured}
        if suggestion is not None:
            predicted = None if suggestion.predicted is None else suggestion.predicted.effect
            told |= {"trial": suggestion.number, "predicted": predicted}
        if taken.do is Do.APPLY and setting is not None:
            if suggestion is not None and suggestion.number != self._counted:
                self._counted = suggestion.number
                hand.count_trial()
            if not await hand.send(setting, "slow", "Try", taken.reason, trial=True, told=told):
                hand.trial_failed = "the candidate could not be sent"
        elif taken.do is Do.RETURN and setting is not None:
            await hand.take_back(setting, "Return", taken.reason, told)
        elif taken.do is Do.FINISH and taken.end is not None:
            self.exporter.trial_ended(taken.end)
            if suggestion is not None and taken.constraints.get("crash", 0.0) > 0:
                hand.remember_crash(suggestion.setting)
            if taken.end is End.PROMOTED and suggestion is not None:
                await hand.promote(suggestion.setting, taken.reason, told)
            elif setting is not None and hand.holds_trial:
                await hand.take_back(setting, "RollBack", taken.reason, told)
            else:
                action = "Simulate" if taken.end is End.SIMULATED else "GiveUp"
                after = suggestion.setting if suggestion is not None and taken.end is End.SIMULATED else None
                record = hand.record("slow", action, taken.reason, in_force, after, told)
                if self._live.config.mode == "Recommend" and worth_trying(suggestion):
                    self._recommended = record.model_copy(update={"inputs": None})

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


def worth_trying(suggestion: Suggestion | None) -> bool:
    """Whether the simulator foresees a gain that noise would not hide."""
    predicted = None if suggestion is None else suggestion.predicted
    return predicted is not None and predicted.refused is None and predicted.effect.ratio < 1.0 - NOISE_FLOOR


def trial_changes(alpha: float) -> int:
    """Changes that a trial needs to show anything, with what stays for the fast loop."""
    return 2 * pairs_needed(alpha) + CHANGES_KEPT + 1
