"""The shell of the slow loop: performs what `explore.step` asks for, off the tick: queries, the study's storage.

It never sends knobs itself; it hands the step to the daemon, which owns actuation.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from moe_core.clock import Clock
from moe_core.log import Log
from moe_core.setting import Setting, Signals
from moe_tuner.explore import (
    Do,
    End,
    ExploreContext,
    ExploreState,
    Nothing,
    Phase,
    Step,
    Suggestion,
    step,
)
from moe_tuner.live import Live
from moe_tuner.measure import Measurement, Unmeasured
from moe_tuner.signals import Source
from moe_tuner.simulator import predict
from moe_tuner.space import Space, space_of
from moe_tuner.study import StorageUnreachable, Study, Summary
from moe_tuner.workers import Workers, run_in

HEALTH_S = 3.0
"""Between two looks at Prometheus."""
STORAGE_RETRY_S = 15.0
WINDOWS_KEPT = 40

T = TypeVar("T")


class SlowLoop:
    """One deployment's slow loop."""

    def __init__(
        self, live: Live, *, source: Source, study: Study, clock: Clock, log: Log, workers: Workers | None = None
    ) -> None:
        self._live = live
        self._source = source
        self._study = study
        self._clock = clock
        self._log = log
        self._worker = (workers or Workers()).storage(live.config.storage_url)
        self._source_problem: str | None = "Prometheus was not asked yet"
        self._storage_problem: str | None = "the study is not open yet"
        self._next_storage_s = 0.0
        self._stopped = False
        self._watch: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._measurement: Measurement | Unmeasured | None = None
        self._suggestion: Suggestion | Nothing | None = None
        self._known_cost_of: Setting | None = None
        self._never: tuple[Setting, ...] = ()
        self._windows: deque[Measurement] = deque(maxlen=WINDOWS_KEPT)
        """The incumbent's, for the simulator to fit."""
        self.inputs: dict[str, Any] | None = None
        """What the last step that asked for something was decided from."""
        self.state = ExploreState()
        self.summary = Summary()

    def start(self, phase_s: float = 0.0) -> None:
        """Begin to watch Prometheus and storage; the first look comes after `phase_s`."""
        self._watch = asyncio.create_task(self._watching(phase_s))

    async def stop(self) -> None:
        """Let running calls end; the trial in progress was finished by the daemon."""
        if self._stopped:
            return
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await run_in(self._worker, self._study.close)
        self._stopped = True

    def closed(self, ceiling: int | None) -> str | None:
        """Why nothing can be explored for reasons of the slow loop's own; None: it can."""
        if self.space(ceiling).empty:
            return "every knob of the slow loop is pinned or has a single value: nothing to explore"
        if self._source_problem is not None:
            return f"{self._source_problem}: exploring nothing"
        if self._storage_problem is not None:
            return f"{self._storage_problem}: exploring nothing"
        return None

    def space(self, ceiling: int | None) -> Space:
        return space_of(self._live.config.bounds, ceiling)

    def tick(
        self,
        context: ExploreContext,
        signals: Signals,
        never: tuple[Setting, ...] = (),
    ) -> Step:
        """One step of the state machine. APPLY, RETURN and FINISH are the daemon's to carry out."""
        context = context.model_copy(update={"measurement": self._measurement, "suggestion": self._suggestion})
        self._measurement = self._suggestion = None
        if self._known_cost_of != context.home and not self.state.in_trial:
            # Another home, set by a person or by the quality guard: what it costs is not known.
            self.state = self.state.model_copy(update={"incumbent_cost": 1.0, "costs": (), "baseline": None})
            self._known_cost_of = context.home
            self._windows.clear()
            if self._storage_problem is None:
                self._spawn(self._load_cost(context.home))
        before = self.state
        taken, self.state = step(context, before)
        if taken.do is not Do.NOTHING:
            self.inputs = {"policy": "explore", "context": context.to_json(), "state": before.to_json()}
        self._never = never
        if taken.do is Do.MEASURE:
            self._spawn(self._measure(taken.window_s or context.window_s))
        elif taken.do is Do.ASK:
            self._spawn(self._ask(context, signals))
        elif taken.do is Do.FINISH:
            self._spawn(self._tell(taken))
            if taken.end is End.PROMOTED and taken.suggestion is not None:
                self._known_cost_of = taken.suggestion.setting
                self._spawn(self._remember(taken.suggestion.setting, self.state.incumbent_cost))
        return taken

    def abandon(self, reason: str) -> Step | None:
        """End a trial from outside (shutdown, another writer): the step to carry out, if there is a trial."""
        trial = self.state.trial
        cleared = {"phase": Phase.IDLE, "trial": None, "on_candidate": False, "pairs": (), "first": None}
        self.state = self.state.model_copy(update=cleared)
        if trial is None:
            return None
        ended = Step(do=Do.FINISH, end=End.CENSORED, suggestion=trial, reason=f"trial {trial.number}: {reason}")
        self._spawn(self._tell(ended))
        return ended

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def look(self) -> None:
        """Ask Prometheus how it is, and open the study where it is not open yet."""
        problem = await self._source.health()
        self._set_source_problem(None if problem is None else problem.reason)
        if self._storage_problem is not None and self._clock.monotonic() >= self._next_storage_s:
            self._next_storage_s = self._clock.monotonic() + STORAGE_RETRY_S
            await self._open_study()

    async def _watching(self, phase_s: float) -> None:
        await self._clock.sleep(phase_s)
        while True:
            await self.look()
            await self._clock.sleep(HEALTH_S)

    def _set_source_problem(self, problem: str | None) -> None:
        if problem != self._source_problem:
            if problem is None:
                self._log.info("Prometheus answers with fresh samples")
            else:
                self._log.warning(f"{problem}: exploring nothing")
        self._source_problem = problem

    async def _open_study(self) -> None:
        def open_and_summarise() -> Summary:
            self._study.open()
            return self._study.summary()

        summary = await self._on_study(open_and_summarise)
        if summary is not None:
            self.summary = summary
            self._known_cost_of = None

    async def _measure(self, window_s: float) -> None:
        window = await self._source.measure(window_s)
        if isinstance(window, Unmeasured) and window.source_down:
            self._set_source_problem(window.reason)
        if isinstance(window, Measurement) and not self.state.candidate_in_force:
            self._windows.append(window)
        # The trial may have ended meanwhile: a window that nobody waits for is dropped.
        if self.state.phase in (Phase.BASELINE_RESULT, Phase.BLOCK_RESULT):
            self._measurement = window

    async def _ask(self, context: ExploreContext, signals: Signals) -> None:
        home, bounds, never = context.home, self._live.config.bounds, self._never
        ceiling, limit_in_force = signals.active_ceiling, signals.active_limit
        windows = tuple(self._windows)

        def simulated(answer: Suggestion | Nothing) -> Suggestion | Nothing:
            if isinstance(answer, Nothing):
                return answer
            foreseen = predict(home, answer.setting, windows=windows, signals=signals, slo=context.slo)
            return answer.model_copy(update={"predicted": foreseen})

        answer = await self._on_study(
            lambda: simulated(self._study.ask(home, self.space(ceiling), bounds, limit_in_force, never))
        )
        if self.state.phase is Phase.ASKING:
            self._suggestion = answer or Nothing(reason=self._storage_problem or "the study has no answer")
        elif isinstance(answer, Suggestion):
            late = Step(do=Do.FINISH, end=End.CENSORED, suggestion=answer, reason="nobody waited for it any more")
            await self._on_study(lambda: self._study.tell(late))

    async def _tell(self, ended: Step) -> None:
        def tell() -> Summary:
            self._study.tell(ended)
            return self._study.summary()

        self.summary = await self._on_study(tell) or self.summary

    async def _remember(self, incumbent: Setting, cost: float) -> None:
        await self._on_study(lambda: self._study.remember_incumbent(incumbent, cost))

    async def _load_cost(self, home: Setting) -> None:
        cost = await self._on_study(lambda: self._study.incumbent_cost(home))
        if cost is not None and self._known_cost_of == home and not self.state.in_trial:
            self.state = self.state.model_copy(update={"incumbent_cost": cost})

    async def _on_study(self, call: Callable[[], T]) -> T | None:
        """Run a call in the study's thread; where the storage fails, say so, and explore nothing until it answers."""
        try:
            answer = await run_in(self._worker, call)
        except StorageUnreachable as error:
            if self._storage_problem != str(error):
                self._log.warning(f"{error}: exploring nothing")
            self._storage_problem = str(error)
            return None
        self._storage_problem = None
        return answer
