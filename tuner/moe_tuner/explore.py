"""The guard of the slow loop as a pure state machine: the next step of a trial, from what happened since the last tick.

A candidate that the simulator lets pass is tried in pairs of blocks, incumbent and candidate in an order drawn by a
coin, each block at least three times the p95 of a request long and after a wash-out of one. It is promoted when the
pairs are evidence enough (moe_tuner.evidence); it goes back at once when it breaks a promise, an engine dies under it,
or it is dearer or no cheaper beyond noise. Only an outside change censors a trial; a breach without one is its own.
The shell performs the requests (measure, ask, apply) and hands their results in with the next tick.
"""

from __future__ import annotations

import math
from enum import StrEnum

from pydantic import Field

from moe_api.base import Model
from moe_core.config import SloConfig
from moe_core.setting import Setting
from moe_tuner.evidence import Pair, candidate_first, effect, pairs_needed
from moe_tuner.measure import Measurement, Outcome, Unmeasured, constraints_of, judge, noise_of, shifted
from moe_tuner.report import Effect

PAIRS_MAX = 12
SPOILT_MAX = 3
"""Pairs that the traffic may spoil before the trial is given up."""
BLOCK_REQUESTS, WASH_REQUESTS = 3.0, 1.0
"""Lengths of a block and of its wash-out in p95 request times: in the latter ends what the other setting began."""
BLOCK_MAX_S = 900.0
COSTS_KEPT = 12
IN_FORCE_WITHIN_S = 15.0
"""A candidate that ranks do not acknowledge in this time is given up."""
LINGER_S = 15.0
"""So long after a candidate was taken out, a breach may still be its work: percentiles remember 10 s."""
CHANGES_KEPT = 4
"""Changes of the hourly budget that a trial leaves to the fast loop."""
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
    SWITCHING = "Switching"
    BLOCK = "Block"
    BLOCK_RESULT = "BlockResult"


IN_TRIAL = (Phase.SWITCHING, Phase.BLOCK, Phase.BLOCK_RESULT)


class End(StrEnum):
    """How a trial ends."""

    PROMOTED = "promoted"
    NO_GAIN = "no_gain"
    ROLLED_BACK = "rolled_back"
    CENSORED = "censored"
    SIMULATED = "simulated"


class Predicted(Model):
    """The simulator's word on a candidate. `refused`: it would break a promise that the incumbent keeps."""

    effect: Effect
    constraints: dict[str, float] = Field(default_factory=dict)
    refused: str | None = None


class Suggestion(Model):
    """What the study proposes."""

    number: int
    params: dict[str, float]
    setting: Setting
    predicted: Predicted | None = Field(default=None, description="None: nothing could simulate it")


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
    window_s: float | None = Field(default=None, description="of MEASURE: seconds that end now")
    end: End | None = None
    suggestion: Suggestion | None = None
    cost: float | None = Field(default=None, description="relative to the study's first incumbent; None if censored")
    constraints: dict[str, float] = Field(default_factory=dict)
    measured: Effect | None = None


class ExploreContext(Model):
    """What the slow loop may look at in one tick."""

    now_s: float
    window_s: float = Field(gt=0, description="the shortest block")
    home: Setting = Field(description="the incumbent")
    closed: str | None = Field(default=None, description="why no trial may run now; None: one may")
    simulator_only: str | None = Field(default=None, description="why candidates may only be simulated now")
    outside: str | None = Field(default=None, description="a change of the traffic that the fast loop sees")
    breach: str | None = Field(default=None, description="a promise that is being broken now")
    restarted: tuple[str, ...] = Field(default=(), description="replicas that died or restarted since the last tick")
    in_force: bool = Field(default=True, description="every rank has acknowledged what was last sent")
    failed: str | None = Field(default=None, description="the last change could not be sent, or a rank refused it")
    changes_left: int = Field(default=1000, description="of the hourly budget")
    alpha: float = Field(default=0.05, gt=0, lt=1)
    seed: str = Field(default="", description="of the coins that order pairs")
    slo: SloConfig
    max_lost_gate_mass: float
    measurement: Measurement | Unmeasured | None = None
    suggestion: Suggestion | Nothing | None = None


class ExploreState(Model):
    """What it remembers between ticks."""

    phase: Phase = Phase.IDLE
    since_s: float = 0.0
    until_s: float | None = None
    block_s: float = Field(default=0.0, description="length of this trial's blocks")
    wash_s: float = 0.0
    trial: Suggestion | None = None
    pairs: tuple[Pair, ...] = ()
    spoilt: int = 0
    on_candidate: bool = Field(default=False, description="which of the two this block measures")
    first: Measurement | None = Field(default=None, description="the other block of this pair, where it is done")
    exposed_until_s: float | None = Field(default=None, description="when the candidate was last in force")
    fruitless: int = Field(default=0, description="trials in a row that were not promoted")
    baseline: Measurement | None = None
    costs: tuple[float, ...] = ()
    incumbent_cost: float = Field(default=1.0, description="the incumbent's, relative to the study's first incumbent")
    why: str = "starting"

    @property
    def in_trial(self) -> bool:
        """Between the first switch of a trial and its end."""
        return self.phase in IN_TRIAL

    @property
    def candidate_in_force(self) -> bool:
        return self.in_trial and self.on_candidate

    @property
    def measured(self) -> Effect | None:
        return effect(self.pairs) if self.pairs else None


Taken = tuple[Step, ExploreState]


def step(context: ExploreContext, state: ExploreState) -> Taken:
    """One tick."""
    if state.candidate_in_force:
        state = state.model_copy(update={"exposed_until_s": context.now_s})
    if state.in_trial:
        stopped = _stopped(context, state)
        if stopped is not None:
            return stopped
    elif context.closed is not None:
        return _closed(context, state)
    match state.phase:
        case Phase.IDLE:
            return _idle(context, state)
        case Phase.BASELINE:
            return _when_due(context, state, Phase.BASELINE_RESULT, context.window_s)
        case Phase.BASELINE_RESULT:
            return _baseline(context, state)
        case Phase.ASKING:
            return _asked(context, state)
        case Phase.SWITCHING:
            return _switching(context, state)
        case Phase.BLOCK:
            return _when_due(context, state, Phase.BLOCK_RESULT, state.block_s)
        case Phase.BLOCK_RESULT:
            return _block(context, state)


def _idle(context: ExploreContext, state: ExploreState) -> Taken:
    if state.until_s is not None and context.now_s < state.until_s:
        return Step(), state
    return Step(), _into(Phase.BASELINE, context, state, "measuring the incumbent", 1.5 * context.window_s)


def _switching(context: ExploreContext, state: ExploreState) -> Taken:
    if not context.in_force:
        return Step(), state
    return Step(), _into(Phase.BLOCK, context, state, _progress(context, state), state.wash_s + state.block_s)


def _closed(context: ExploreContext, state: ExploreState) -> Taken:
    reason = context.closed or ""
    idle = state.model_copy(update={"phase": Phase.IDLE, "until_s": None, "baseline": None, "why": reason})
    # A suggestion that arrives as the door closes is handed back, or its trial would run for ever.
    if isinstance(context.suggestion, Suggestion):
        return _finish_step(End.CENSORED, context.suggestion, reason, None), idle
    return Step(), idle


def _stopped(context: ExploreContext, state: ExploreState) -> Taken | None:
    """Reasons to end a trial at once, the engine's death first."""
    exposed_s = math.inf if state.exposed_until_s is None else context.now_s - state.exposed_until_s
    if context.restarted and state.exposed_until_s is not None:
        return _roll_back(context, state, f"replica {context.restarted[0]} died under it", {"crash": 1.0})
    if context.restarted:
        return _censor(context, state, f"replica {context.restarted[0]} died before it was in force")
    if context.failed is not None:
        return _censor(context, state, context.failed)
    late = state.phase is Phase.SWITCHING and context.now_s - state.since_s > IN_FORCE_WITHIN_S
    if late and not context.in_force:
        return _censor(context, state, f"not every rank acknowledged it within {IN_FORCE_WITHIN_S:g} s")
    if context.outside is not None:
        return _censor(context, state, f"the traffic changed: {context.outside}")
    if context.breach is not None and exposed_s <= LINGER_S:
        return _roll_back(context, state, f"under it: {context.breach}", {"breach": 1.0})
    if context.breach is not None:
        return _censor(context, state, f"the incumbent itself: {context.breach}")
    if context.closed is not None or context.simulator_only is not None:
        return _censor(context, state, context.closed or context.simulator_only or "")
    return None


def _baseline(context: ExploreContext, state: ExploreState) -> Taken:
    window = context.measurement
    if window is None:
        return Step(), state
    if isinstance(window, Unmeasured):
        return _rest(context, state, window.reason)
    previous = state.baseline
    state = state.model_copy(
        update={"baseline": window, "costs": (*state.costs, window.busy_s_per_ktoken)[-COSTS_KEPT:]}
    )
    constraints = constraints_of(window, context.slo, context.max_lost_gate_mass)
    broken = [name for name, by in constraints.items() if by > 0 and name != "failed"]
    if broken:
        return _rest(context, state, f"the incumbent itself breaks {broken[0]}: that is the fast loop's to mend")
    unsteady = None if previous is None else shifted(previous, window)
    if previous is None or unsteady is not None:
        # Two like windows in a row are what steady means.
        costs = state.costs if unsteady is None else state.costs[-1:]
        state = state.model_copy(update={"costs": costs})
        why = unsteady or "a second window of the incumbent, to see that traffic is steady"
        return Step(), _into(Phase.BASELINE, context, state, why, context.window_s)
    request_s = window.request_p95_s or 0.0
    block_s = max(context.window_s, BLOCK_REQUESTS * request_s)
    if block_s > BLOCK_MAX_S:
        why = f"requests of {request_s:.0f} s (p95) would need blocks of {block_s:.0f} s, above {BLOCK_MAX_S:g} s"
        return _rest(context, state, why)
    lengths = {"block_s": block_s, "wash_s": max(context.window_s / 2.0, WASH_REQUESTS * request_s)}
    asking = state.model_copy(update=lengths)
    return Step(do=Do.ASK), _into(Phase.ASKING, context, asking, "asking the study for a candidate")


def _asked(context: ExploreContext, state: ExploreState) -> Taken:
    answer = context.suggestion
    if answer is None:
        return Step(), state
    if isinstance(answer, Nothing):
        rest_s = context.window_s * REST_MAX_WINDOWS / 10
        return Step(), _into(Phase.IDLE, context, state, answer.reason, rest_s)
    predicted = answer.predicted
    if context.simulator_only is not None or (predicted is not None and predicted.refused is not None):
        return _simulated(context, state, answer)
    hindrance = _hindrance(context)
    if hindrance is not None:
        reason = f"trial {answer.number} was not begun: {hindrance}"
        return _finish_step(End.CENSORED, answer, reason, None), _ended(context, state, reason, fruitless=False)
    begun = state.model_copy(update={"trial": answer, "pairs": (), "spoilt": 0, "first": None, "exposed_until_s": None})
    return _switch(context, begun, candidate_first(context.seed, answer.number, 0))


def _hindrance(context: ExploreContext) -> str | None:
    """What happened while the study was asked, and would end a trial at once."""
    if context.restarted:
        return f"replica {context.restarted[0]} died"
    if context.outside is not None:
        return f"the traffic changed: {context.outside}"
    return context.failed or context.breach


def _simulated(context: ExploreContext, state: ExploreState, answer: Suggestion) -> Taken:
    """A trial that ends in the simulator: refused there, or not allowed anywhere else yet."""
    predicted = answer.predicted
    if predicted is None:
        reason = f"{context.simulator_only}, and the simulator has no word on it"
        return _finish_step(End.CENSORED, answer, reason, None), _ended(context, state, reason)
    told = f"{predicted.effect.ratio:.3f} of the incumbent's cost" if predicted.refused is None else predicted.refused
    why = predicted.refused or context.simulator_only
    where = "in the simulator alone" if predicted.refused is None else "refused by the simulator"
    reason = f"trial {answer.number}: {answer.setting.text()} {where}: {told}"
    cost = state.incumbent_cost * predicted.effect.ratio
    done = _finish_step(End.SIMULATED, answer, reason, None, cost, predicted.constraints)
    return done, _ended(context, state, reason if predicted.refused else f"{why}; {reason}", fruitless=False)


def _switch(context: ExploreContext, state: ExploreState, to_candidate: bool) -> Taken:
    """Put the setting of the next block in force, where it is not already."""
    trial = _trial_of(state)
    reason = f"trial {trial.number}, pair {len(state.pairs) + 1}: "
    reason += f"trying {trial.setting.text()}" if to_candidate else f"measuring {context.home.text()} beside it"
    there = state.candidate_in_force == to_candidate
    after = state.model_copy(update={"on_candidate": to_candidate})
    if there:
        return Step(), _into(Phase.BLOCK, context, after, _progress(context, after), state.wash_s + state.block_s)
    if context.changes_left <= CHANGES_KEPT:
        why = f"{context.changes_left} changes are left this hour, kept for spikes"
        return _censor(context, state, why)
    do, setting = (Do.APPLY, trial.setting) if to_candidate else (Do.RETURN, context.home)
    return Step(do=do, reason=reason, setting=setting, suggestion=trial), _into(Phase.SWITCHING, context, after, reason)


def _block(context: ExploreContext, state: ExploreState) -> Taken:
    """A block's measurement is in."""
    window, other = context.measurement, state.first
    if window is None:
        return Step(), state
    if isinstance(window, Unmeasured):
        return _censor(context, state, window.reason)
    if not state.on_candidate:
        state = state.model_copy(update={"costs": (*state.costs, window.busy_s_per_ktoken)[-COSTS_KEPT:]})
    else:
        unfit = _unfit(context, state, window)
        if unfit is not None:
            return unfit
    if other is None:
        return _switch(context, state.model_copy(update={"first": window}), not state.on_candidate)
    incumbent, candidate = (other, window) if state.on_candidate else (window, other)
    changed = shifted(incumbent, candidate)
    if changed is not None:
        return _spoilt(context, state, changed)
    pair = Pair(incumbent=incumbent.busy_s_per_ktoken, candidate=candidate.busy_s_per_ktoken)
    state = state.model_copy(update={"pairs": (*state.pairs, pair), "first": None})
    return _paired(context, state, incumbent, candidate)


def _unfit(context: ExploreContext, state: ExploreState, window: Measurement) -> Taken | None:
    """The candidate's own block breaks a promise: early abort."""
    trial = _trial_of(state)
    if trial.setting.prefill_cap is not None and window.lost_gate_mass is None:
        return _censor(context, state, "lost gate mass is missing: its quality cannot be judged")
    beside = state.first or state.baseline
    if beside is None:
        return None
    slo, most = context.slo, context.max_lost_gate_mass
    verdict = judge(beside, window, slo=slo, max_lost_gate_mass=most, noise=noise_of(state.costs))
    if verdict.outcome is not Outcome.UNFIT:
        return None
    changed = shifted(beside, window)
    if changed is not None:
        return _censor(context, state, f"the traffic changed: {changed}")
    return _roll_back(context, state, verdict.reason, verdict.constraints, state.incumbent_cost * verdict.ratio)


def _spoilt(context: ExploreContext, state: ExploreState, changed: str) -> Taken:
    """The traffic was another in the two blocks: the pair says nothing, whichever way it came out."""
    spoilt = state.spoilt + 1
    if spoilt >= SPOILT_MAX:
        return _censor(context, state, f"the traffic changed: {changed}")
    state = state.model_copy(update={"spoilt": spoilt, "first": None})
    return _switch(context, state, _coin(context, state))


def _paired(context: ExploreContext, state: ExploreState, incumbent: Measurement, candidate: Measurement) -> Taken:
    """A pair is complete: enough evidence, no use in going on, or the next pair."""
    trial, measured = _trial_of(state), effect(state.pairs)
    most = context.max_lost_gate_mass
    constraints = constraints_of(candidate, context.slo, most, incumbent)
    noise = noise_of(state.costs) / math.sqrt(measured.pairs)
    cost = state.incumbent_cost * measured.ratio
    found = (
        f"{_percent(measured.ratio)} over {measured.pairs} pairs"
        f" (95 % interval {_percent(measured.low or 1.0)} to {_percent(measured.high or 1.0)}),"
        f" evidence {measured.evidence:.1f} of {1 / context.alpha:.0f}, noise {noise:.1%}"
    )
    if measured.evidence >= 1.0 / context.alpha:
        reason = f"trial {trial.number}: {found}: {trial.setting.text()} is promoted"
        done = _finish_step(End.PROMOTED, trial, reason, trial.setting, cost, constraints, measured)
        # Costs of the old incumbent say nothing about the noise of the new one.
        promoted = state.model_copy(update={"incumbent_cost": cost, "costs": (), "fruitless": -1})
        return done, _ended(context, promoted, reason)
    if measured.ratio > 1.0 + noise:
        return _fruitless(context, state, End.ROLLED_BACK, found, constraints, cost)
    reachable = measured.pairs + pairs_needed(min(1.0, context.alpha * max(1.0, measured.evidence))) <= PAIRS_MAX
    if measured.ratio > 1.0 - noise or not reachable:
        return _fruitless(context, state, End.NO_GAIN, found, constraints, cost)
    return _switch(context, state, _coin(context, state))


def _fruitless(
    context: ExploreContext, state: ExploreState, end: End, found: str, constraints: dict[str, float], cost: float
) -> Taken:
    trial = _trial_of(state)
    words = "" if end is End.ROLLED_BACK else "no difference beyond noise: "
    reason = f"trial {trial.number}: {words}{found}: back to {context.home.text()}"
    done = _finish_step(end, trial, reason, context.home, cost, constraints, state.measured)
    return done, _ended(context, state, reason)


def _coin(context: ExploreContext, state: ExploreState) -> bool:
    return candidate_first(context.seed, _trial_of(state).number, len(state.pairs) + state.spoilt)


def _rest(context: ExploreContext, state: ExploreState, reason: str) -> Taken:
    fresh = state.model_copy(update={"baseline": None})
    return Step(), _into(Phase.IDLE, context, fresh, reason, context.window_s)


def _roll_back(
    context: ExploreContext, state: ExploreState, why: str, constraints: dict[str, float], cost: float | None = None
) -> Taken:
    trial = _trial_of(state)
    reason = f"trial {trial.number}: {why}: back to {context.home.text()}"
    told = UNFIT_COST if cost is None else cost
    done = _finish_step(End.ROLLED_BACK, trial, reason, context.home, told, constraints, state.measured)
    return done, _ended(context, state, reason)


def _censor(context: ExploreContext, state: ExploreState, why: str) -> Taken:
    trial = _trial_of(state)
    reason = f"trial {trial.number} does not count ({why}): back to {context.home.text()}"
    done = _finish_step(End.CENSORED, trial, reason, context.home, measured=state.measured)
    return done, _ended(context, state, reason)


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
    measured: Effect | None = None,
) -> Step:
    return Step(
        do=Do.FINISH,
        reason=reason,
        setting=setting,
        end=end,
        suggestion=trial,
        cost=cost,
        constraints=constraints or {},
        measured=measured,
    )


def _when_due(context: ExploreContext, state: ExploreState, then: Phase, window_s: float) -> Taken:
    if state.until_s is not None and context.now_s < state.until_s:
        return Step(), state
    return Step(do=Do.MEASURE, window_s=window_s), _into(then, context, state, state.why)


def _ended(context: ExploreContext, state: ExploreState, why: str, *, fruitless: bool = True) -> ExploreState:
    count = state.fruitless + 1 if fruitless else state.fruitless
    cleared = {
        **{"trial": None, "pairs": (), "spoilt": 0, "first": None, "baseline": None, "fruitless": count},
        **{"on_candidate": False, "exposed_until_s": None},
    }
    rest = min(REST_MAX_WINDOWS, 1.0 + REST_STEP_WINDOWS * max(0, count - FREE_TRIALS))
    return _into(Phase.IDLE, context, state.model_copy(update=cleared), why, rest * context.window_s)


def _into(
    phase: Phase, context: ExploreContext, state: ExploreState, why: str, seconds: float | None = None
) -> ExploreState:
    until_s = None if seconds is None else context.now_s + seconds
    return state.model_copy(update={"phase": phase, "since_s": context.now_s, "until_s": until_s, "why": why})


def _progress(context: ExploreContext, state: ExploreState) -> str:
    trial = _trial_of(state)
    what = trial.setting if state.on_candidate else context.home
    return f"trial {trial.number}, pair {len(state.pairs) + 1}: measuring {what.text()}"


def _percent(ratio: float) -> str:
    return f"{1 - ratio:.1%} cheaper" if ratio <= 1 else f"{ratio - 1:.1%} dearer"
