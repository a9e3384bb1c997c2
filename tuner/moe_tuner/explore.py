"""The slow loop as a pure state machine: what the next step of a trial is, from what has happened since the last tick.

Each trial is a switchback: the incumbent is measured, then the candidate, each after a wash-out. A candidate that
breaks a promise or costs more goes back at once; one that is cheaper beyond noise must win a second pair of windows
before it is promoted. An outside change censors a trial; a breach without one is the candidate's own failure.
The shell performs the requests (measure, ask, apply) and hands their results in with the next tick.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from moe_api.base import Model
from moe_core.config import SloConfig
from moe_core.setting import Setting
from moe_tuner.measure import Measurement, Outcome, Unmeasured, Verdict, constraints_of, judge, noise_of, shifted

WINS_NEEDED = 2
COSTS_KEPT = 12
IN_FORCE_WITHIN_S = 15.0
"""A candidate that ranks do not acknowledge in this time is given up."""
FREE_TRIALS, REST_STEP_WINDOWS, REST_MAX_WINDOWS = 8, 3.0, 60.0
"""After so many trials in a row without a promotion, each further one waits that much longer: little is left to win."""
UNFIT_COST = 10.0
"""Relative cost told for a candidate that was stopped before it was measured."""


class Phase(StrEnum):
    """Where a trial stands."""

    IDLE = "Idle"
    BASELINE = "Baseline"
    BASELINE_RESULT = "BaselineResult"
    ASKING = "Asking"
    APPLYING = "Applying"
    CANDIDATE = "Candidate"
    CANDIDATE_RESULT = "CandidateResult"


class End(StrEnum):
    """How a trial ends."""

    PROMOTED = "promoted"
    NO_GAIN = "no_gain"
    ROLLED_BACK = "rolled_back"
    CENSORED = "censored"


class Suggestion(Model):
    """What the study proposes."""

    number: int
    params: dict[str, float]
    setting: Setting


class Nothing(Model):
    """The study has nothing to propose, or cannot be reached."""

    reason: str


class Do(StrEnum):
    """What the shell is asked to do."""

    NOTHING = "Nothing"
    MEASURE = "Measure"
    ASK = "Ask"
    APPLY = "Apply"
    RETURN = "Return"
    FINISH = "Finish"


class Step(Model):
    """One request to the shell. FINISH carries what the study is told; `setting` is what must be in force after it."""

    do: Do = Do.NOTHING
    reason: str = ""
    setting: Setting | None = None
    end: End | None = None
    suggestion: Suggestion | None = None
    cost: float | None = Field(default=None, description="relative to the study's first incumbent; None if censored")
    constraints: dict[str, float] = Field(default_factory=dict)


class ExploreContext(Model):
    """What the slow loop may look at in one tick."""

    now_s: float
    window_s: float = Field(gt=0)
    home: Setting = Field(description="the incumbent")
    closed: str | None = Field(default=None, description="why no trial may run now; None: one may")
    outside: str | None = Field(default=None, description="a change of the traffic that the fast loop sees")
    breach: str | None = Field(default=None, description="a promise that is being broken now")
    restarted: tuple[str, ...] = Field(default=(), description="replicas that restarted since the last tick")
    in_force: bool = Field(default=True, description="every rank has acknowledged what was last sent")
    failed: str | None = Field(default=None, description="the last change could not be sent, or a rank refused it")
    slo: SloConfig
    max_lost_gate_mass: float
    measurement: Measurement | Unmeasured | None = None
    suggestion: Suggestion | Nothing | None = None


class ExploreState(Model):
    """What it remembers between ticks."""

    phase: Phase = Phase.IDLE
    since_s: float = 0.0
    until_s: float | None = None
    trial: Suggestion | None = None
    wins: int = 0
    fruitless: int = Field(default=0, description="trials in a row that were not promoted")
    ratio: float = 1.0
    baseline: Measurement | None = None
    costs: tuple[float, ...] = ()
    incumbent_cost: float = Field(default=1.0, description="the incumbent's, relative to the study's first incumbent")
    why: str = "starting"

    @property
    def candidate_in_force(self) -> bool:
        return self.phase in (Phase.APPLYING, Phase.CANDIDATE, Phase.CANDIDATE_RESULT)


def step(context: ExploreContext, state: ExploreState) -> tuple[Step, ExploreState]:
    """One tick."""
    if state.candidate_in_force:
        stopped = _stopped(context, state)
        if stopped is not None:
            return stopped
    elif context.closed is not None:
        return _closed(context, state)
    match state.phase:
        case Phase.IDLE:
            if state.until_s is not None and context.now_s < state.until_s:
                return Step(), state
            return Step(), _into(Phase.BASELINE, context, state, "measuring the incumbent", windows=1.5)
        case Phase.BASELINE:
            return _when_due(context, state, Phase.BASELINE_RESULT)
        case Phase.BASELINE_RESULT:
            return _baseline(context, state)
        case Phase.ASKING:
            return _asked(context, state)
        case Phase.APPLYING:
            if not context.in_force:
                return Step(), state
            # Half a window of wash-out: requests admitted under the incumbent finish.
            return Step(), _into(Phase.CANDIDATE, context, state, "measuring the candidate", windows=1.5)
        case Phase.CANDIDATE:
            return _when_due(context, state, Phase.CANDIDATE_RESULT)
        case Phase.CANDIDATE_RESULT:
            return _candidate(context, state)


def _closed(context: ExploreContext, state: ExploreState) -> tuple[Step, ExploreState]:
    reason = context.closed or ""
    idle = state.model_copy(update={"phase": Phase.IDLE, "until_s": None, "baseline": None, "why": reason})
    if state.trial is None:
        # A suggestion that arrives as the door closes is handed back, or its trial would run for ever.
        if isinstance(context.suggestion, Suggestion):
            return _finish_step(End.CENSORED, context.suggestion, reason, None), idle
        return Step(), idle
    return _finish_step(End.CENSORED, state.trial, reason, None), _ended(context, idle, reason)


def _stopped(context: ExploreContext, state: ExploreState) -> tuple[Step, ExploreState] | None:
    """Reasons to take the candidate out of force at once, the engine's crash first."""
    if context.restarted:
        constraints = {"crash": 1.0}
        return _roll_back(context, state, f"replica {context.restarted[0]} restarted under it", constraints)
    if context.failed is not None:
        return _censor(context, state, context.failed)
    late = state.phase is Phase.APPLYING and context.now_s - state.since_s > IN_FORCE_WITHIN_S
    if late and not context.in_force:
        return _censor(context, state, f"not every rank acknowledged it within {IN_FORCE_WITHIN_S:g} s")
    if context.outside is not None:
        return _censor(context, state, f"the traffic changed: {context.outside}")
    if context.breach is not None:
        return _roll_back(context, state, f"under it: {context.breach}", {"breach": 1.0})
    if context.closed is not None:
        return _censor(context, state, context.closed)
    return None


def _baseline(context: ExploreContext, state: ExploreState) -> tuple[Step, ExploreState]:
    window = context.measurement
    if window is None:
        return Step(), state
    if isinstance(window, Unmeasured):
        return _give_up_pair(context, state, window.reason)
    previous = state.baseline
    state = state.model_copy(
        update={"baseline": window, "costs": (*state.costs, window.busy_s_per_ktoken)[-COSTS_KEPT:]}
    )
    constraints = constraints_of(window, context.slo, context.max_lost_gate_mass)
    broken = [name for name, by in constraints.items() if by > 0 and name != "failed"]
    if broken:
        return _give_up_pair(
            context, state, f"the incumbent itself breaks {broken[0]}: that is the fast loop's to mend"
        )
    unsteady = None if previous is None else shifted(previous, window)
    if previous is None or unsteady is not None:
        # Two like windows in a row are what steady means.
        if state.trial is not None and unsteady is not None:
            return _give_up_pair(context, state, unsteady)
        if state.trial is None:
            costs = state.costs if unsteady is None else state.costs[-1:]
            state = state.model_copy(update={"costs": costs})
            why = unsteady or "a second window of the incumbent, to see that traffic is steady"
            return Step(), _into(Phase.BASELINE, context, state, why, windows=1.0)
    if state.trial is not None:
        return _apply(context, state, state.trial)
    return Step(do=Do.ASK), _into(Phase.ASKING, context, state, "asking the study for a candidate")


def _asked(context: ExploreContext, state: ExploreState) -> tuple[Step, ExploreState]:
    answer = context.suggestion
    if answer is None:
        return Step(), state
    if isinstance(answer, Nothing):
        return Step(), _into(Phase.IDLE, context, state, answer.reason, windows=REST_MAX_WINDOWS / 10)
    return _apply(context, state.model_copy(update={"trial": answer, "wins": 0, "ratio": 1.0}), answer)


def _apply(context: ExploreContext, state: ExploreState, trial: Suggestion) -> tuple[Step, ExploreState]:
    nth = "again " if state.wins else ""
    reason = f"trial {trial.number}: trying {trial.setting.text()} {nth}against {context.home.text()}"
    return Step(do=Do.APPLY, reason=reason, setting=trial.setting, suggestion=trial), _into(
        Phase.APPLYING, context, state, reason
    )


def _candidate(context: ExploreContext, state: ExploreState) -> tuple[Step, ExploreState]:
    window, baseline = context.measurement, state.baseline
    if window is None or baseline is None:
        return Step(), state
    if isinstance(window, Unmeasured):
        return _censor(context, state, window.reason)
    changed = shifted(baseline, window)
    if changed is not None:
        return _censor(context, state, f"the traffic changed: {changed}")
    capped = state.trial is not None and state.trial.setting.prefill_cap is not None
    if capped and window.lost_gate_mass is None:
        return _censor(context, state, "lost gate mass is missing: its quality cannot be judged")
    noise = noise_of(state.costs)
    verdict = judge(baseline, window, slo=context.slo, max_lost_gate_mass=context.max_lost_gate_mass, noise=noise)
    return _on_verdict(context, state, verdict)


def _on_verdict(context: ExploreContext, state: ExploreState, verdict: Verdict) -> tuple[Step, ExploreState]:
    trial = _trial_of(state)
    number = trial.number
    # The mean of the pairs so far: the first win alone flatters whoever was lucky.
    ratio = (state.ratio * state.wins + verdict.ratio) / (state.wins + 1)
    state = state.model_copy(update={"ratio": ratio})
    cost = state.incumbent_cost * ratio
    if verdict.outcome is Outcome.UNFIT:
        return _roll_back(context, state, verdict.reason, verdict.constraints, cost)
    if verdict.outcome is not Outcome.BETTER:
        end = End.NO_GAIN if verdict.outcome is Outcome.SAME else End.ROLLED_BACK
        reason = f"trial {number}: {verdict.reason}: back to {context.home.text()}"
        done = _finish_step(end, trial, reason, context.home, cost, verdict.constraints)
        return done, _ended(context, state, reason)
    wins = state.wins + 1
    if wins < WINS_NEEDED:
        reason = f"trial {number}: {verdict.reason}: back to {context.home.text()}, to see it win again"
        again = state.model_copy(update={"wins": wins})
        return Step(do=Do.RETURN, reason=reason, setting=context.home), _into(
            Phase.BASELINE, context, again, reason, windows=1.5
        )
    reason = f"trial {number}: {verdict.reason}, {wins} times: {trial.setting.text()} is promoted"
    done = _finish_step(End.PROMOTED, trial, reason, None, cost, verdict.constraints)
    # Costs of the old incumbent say nothing about the noise of the new one.
    promoted = state.model_copy(update={"incumbent_cost": cost, "costs": (), "fruitless": -1})
    return done, _ended(context, promoted, reason)


def _give_up_pair(context: ExploreContext, state: ExploreState, reason: str) -> tuple[Step, ExploreState]:
    if state.trial is None:
        fresh = state.model_copy(update={"baseline": None})
        return Step(), _into(Phase.IDLE, context, fresh, reason, windows=1.0)
    return _finish_step(End.CENSORED, state.trial, reason, None), _ended(context, state, reason)


def _roll_back(
    context: ExploreContext,
    state: ExploreState,
    why: str,
    constraints: dict[str, float],
    cost: float | None = None,
) -> tuple[Step, ExploreState]:
    trial = _trial_of(state)
    reason = f"trial {trial.number}: {why}: back to {context.home.text()}"
    told = UNFIT_COST if cost is None else cost
    done = _finish_step(End.ROLLED_BACK, trial, reason, context.home, told, constraints)
    return done, _ended(context, state, reason)


def _censor(context: ExploreContext, state: ExploreState, why: str) -> tuple[Step, ExploreState]:
    trial = _trial_of(state)
    reason = f"trial {trial.number} does not count ({why}): back to {context.home.text()}"
    return _finish_step(End.CENSORED, trial, reason, context.home), _ended(context, state, reason)


def _trial_of(state: ExploreState) -> Suggestion:
    if state.trial is None:
        raise RuntimeError(f"phase {state.phase} without a trial")
    return state.trial


def _finish_step(
    end: End,
    trial: Suggestion,
    reason: str,
    setting: Setting | None,
    cost: float | None = None,
    constraints: dict[str, float] | None = None,
) -> Step:
    return Step(
        do=Do.FINISH,
        reason=reason,
        setting=setting,
        end=end,
        suggestion=trial,
        cost=cost,
        constraints=constraints or {},
    )


def _when_due(context: ExploreContext, state: ExploreState, then: Phase) -> tuple[Step, ExploreState]:
    if state.until_s is not None and context.now_s < state.until_s:
        return Step(), state
    return Step(do=Do.MEASURE), _into(then, context, state, state.why)


def _ended(context: ExploreContext, state: ExploreState, why: str) -> ExploreState:
    fruitless = state.fruitless + 1
    cleared = {"trial": None, "wins": 0, "ratio": 1.0, "baseline": None, "fruitless": fruitless}
    rest = min(REST_MAX_WINDOWS, 1.0 + REST_STEP_WINDOWS * max(0, fruitless - FREE_TRIALS))
    return _into(Phase.IDLE, context, state.model_copy(update=cleared), why, windows=rest)


def _into(
    phase: Phase, context: ExploreContext, state: ExploreState, why: str, windows: float | None = None
) -> ExploreState:
    until_s = None if windows is None else context.now_s + windows * context.window_s
    return state.model_copy(update={"phase": phase, "since_s": context.now_s, "until_s": until_s, "why": why})
