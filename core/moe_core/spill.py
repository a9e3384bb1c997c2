"""Where a request goes, before it is sent: a local revision, a closed API, or nowhere (shed). A pure function.

The gateway calls `decide` for each request, and again when an upstream failed before its first token, with what was
tried. The simulator and the tests call the same function. It spills when P(TTFT > SLO) at the revision passes the
threshold, a target is likelier to keep the promise, and budget and share cap allow; it sheds only where a request would
wait far past the promise, because a late answer is worth more than none. Where no revision has a weight, every request
spills or is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum

from moe_core.latency import SHIFT_S, UNKNOWN, LatencyEstimate, itl_sigma, predict_itl_s, predict_ttft_s

SHARE_WINDOW_S = 60.0
"""Time constant of the counts behind the share cap."""
HYSTERESIS = 0.8
"""A revision that spills takes requests again once P(miss) is below this share of the threshold."""
SHED_SLO_FACTOR = 8.0
"""With no target, a request is refused when its predicted TTFT is above this many SLOs."""
PROBE_AFTER_S = 2.0
"""An idle revision whose estimate is older gets a request whatever the estimate says: it may have recovered."""
REPORT_FRESH_S = 2.5
REPORT_USELESS_S = 10.0
NO_WEIGHT_RETRY_S = 10.0
"""With no weight on any revision, an upgrade is under way: that takes minutes, not seconds."""
_SIGMA_STALE = 0.5
_KV_FULL = 0.97


class Action(StrEnum):
    """What happens to a request."""

    LOCAL = "local"
    SPILL = "spill"
    SHED = "shed"


class Reason(StrEnum):
    """Why, in words that fit a metric label."""

    WITHIN_SLO = "within_slo"
    PROBE = "probe"
    LATE = "late"
    """It will probably miss, and no target may take it."""
    SLO_PREDICTED = "slo_predicted"
    NO_WEIGHT = "no_weight"
    """No revision is to take requests: the old one drains, the new one is not there yet."""
    LOCAL_DOWN = "local_down"
    LOCAL_FAILED = "local_failed"
    LOCAL_OVERLOADED = "local_overloaded"
    OVERLOAD = "overload"
    UNAVAILABLE = "unavailable"


class Failure(StrEnum):
    """How the last attempt at a local revision ended, before its first token."""

    OVERLOADED = "overloaded"
    FAILED = "failed"


class Blocked(StrEnum):
    """Why no target could take a request that should have been spilled."""

    NO_TARGET = "no_target"
    TARGET_DOWN = "target_down"
    SHARE_CAP = "share_cap"
    BUDGET = "budget"
    NO_GAIN = "no_gain"


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the engines of a revision said of themselves, summed over replicas, `age_s` seconds ago.

    `foreign_*` is the part that this gateway did not send (see `foreign_load`).
    """

    running: int
    waiting: int
    kv_usage: float
    active_limit: int
    age_s: float
    foreign_running: int = 0
    foreign_waiting: int = 0
    replicas: int = 1

    def aged(self, by_s: float) -> EngineReport:
        """The same report, `by_s` seconds later."""
        return replace(self, age_s=self.age_s + by_s)


@dataclass(frozen=True, slots=True)
class RevisionView:
    """A local revision as the gateway sees it now.

    `waiting_*`: sent by this gateway and those that share their ledgers with it, no first token yet. `head_tokens`: of
    the one that waits longest, on whose prompt the engine has been at work for at most `head_s` seconds.
    """

    name: str
    weight: int
    available: bool = True
    waiting_requests: int = 0
    waiting_tokens: float = 0.0
    running: int = 0
    report: EngineReport | None = None
    estimate: LatencyEstimate = UNKNOWN
    head_tokens: float = 0.0
    head_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TargetView:
    """A closed API now. `cost_usd` is the most that this request can cost there, `expected_usd` what it likely does."""

    name: str
    available: bool = True
    cost_usd: Decimal = Decimal(0)
    estimate: LatencyEstimate = UNKNOWN
    expected_usd: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Hot thresholds, from the resource or the knobs."""

    miss_probability: float
    share_cap: float


@dataclass(frozen=True, slots=True)
class SpillContext:
    """All that a decision may look at. Times are monotonic seconds; `elapsed_s` is since the request arrived."""

    now_s: float
    prompt_tokens: float
    ttft_slo_s: float
    thresholds: Thresholds
    revisions: tuple[RevisionView, ...]
    targets: tuple[TargetView, ...] = ()
    budget_left_usd: Decimal | None = None
    elapsed_s: float = 0.0
    tried: frozenset[str] = frozenset()
    local_failure: Failure | None = None
    itl_slo_s: float = math.inf


@dataclass(frozen=True, slots=True)
class SpillState:
    """What decisions remember: credits of the weighted rotation, who is spilling, decayed counts for the share cap."""

    credits: tuple[tuple[str, int], ...] = ()
    spilling: frozenset[str] = frozenset()
    arrivals: float = 0.0
    spilled: float = 0.0
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What sending the request to a revision now would bring."""

    ttft_s: float
    p_miss: float
    work_tokens: float
    slot_wait_s: float
    running: float = 0.0
    p_slow: float = 0.0
    """P(ITL > SLO) by the line alone; `p_miss` has it by what came true of it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where the request goes. `forecast` is of the local revision that was weighed, None where none could be."""

    action: Action
    reason: Reason
    target: str | None = None
    forecast: Forecast | None = None
    blocked: Blocked | None = None
    retry_after_s: int = 0


def decide(context: SpillContext, state: SpillState) -> tuple[Decision, SpillState]:
    """Decide for one request, and the state that the next decision starts from."""
    if not any(r.weight > 0 for r in context.revisions):
        return _without_weights(context, state), state
    state = _decayed(context, state)
    usable = _usable(context)
    if not usable:
        return _without_local(context, state)
    chosen, credits = rotate(usable, dict(state.credits))
    forecast = forecast_local(context, chosen)
    # Built by hand, here and in _decayed: `replace` costs three times as much, and this runs for every request.
    merged = _merge(state.credits, credits)
    taken = SpillState(merged, state.spilling, state.arrivals, state.spilled, state.at_s)
    threshold = context.thresholds.miss_probability
    if threshold < 1.0 and chosen.name in state.spilling:  # 1 is never to spill by forecast, whatever was before
        threshold *= HYSTERESIS
    if forecast.p_miss <= threshold:
        if chosen.name in state.spilling:
            taken = replace(taken, spilling=state.spilling - {chosen.name})
        return Decision(Action.LOCAL, Reason.WITHIN_SLO, chosen.name, forecast), taken
    if _is_idle(chosen) and context.now_s - chosen.estimate.at_s >= PROBE_AFTER_S:
        return Decision(Action.LOCAL, Reason.PROBE, chosen.name, forecast), taken
    target, blocked = _pick_target(context, state, forecast.p_miss)
    if target is not None:
        reason = _spill_reason(context.local_failure, Reason.SLO_PREDICTED)
        after = replace(_count_spill(context, state), spilling=state.spilling | {chosen.name})
        return Decision(Action.SPILL, reason, target.name, forecast), after
    if forecast.ttft_s > SHED_SLO_FACTOR * context.ttft_slo_s and not _is_idle(chosen):
        wait_s = _retry_after_s(forecast.ttft_s - context.ttft_slo_s)
        return Decision(Action.SHED, Reason.OVERLOAD, None, forecast, blocked, wait_s), state
    return Decision(Action.LOCAL, Reason.LATE, chosen.name, forecast, blocked), taken


def forecast_local(context: SpillContext, revision: RevisionView) -> Forecast:
    """P(TTFT > SLO) at a revision: ln TTFT is normal around the predicted median, wider where reports are old."""
    report = revision.report
    useful = report is not None and report.age_s < REPORT_USELESS_S
    foreign_running = report.foreign_running if report is not None and useful else 0
    foreign_waiting = report.foreign_waiting if report is not None and useful else 0
    replicas = max(1, report.replicas) if report is not None else 1
    estimate = revision.estimate
    work = revision.waiting_tokens + foreign_waiting * estimate.prompt_tokens
    running = (revision.running + foreign_running) / replicas
    if revision.head_tokens > 0:
        per_token_s = predict_ttft_s(estimate, 1.0, 0.0, running) - estimate.line[0]
        work -= min(revision.head_tokens, 0.9 * revision.head_s * replicas / max(per_token_s, 1e-9))
    work = work / replicas + context.prompt_tokens
    ahead = revision.running + revision.waiting_requests + foreign_running + foreign_waiting
    slot_wait_s = 0.0
    if report is not None and useful:
        limit = max(1, report.active_limit if report.kv_usage < _KV_FULL else min(report.active_limit, report.running))
        slot_wait_s = max(0, ahead + 1 - limit) * estimate.service_s / limit
    ttft_s = predict_ttft_s(estimate, work, slot_wait_s, running)
    sigma = math.hypot(estimate.sigma, _stale_sigma(report))
    left_s = context.ttft_slo_s - context.elapsed_s
    p_miss, p_slow = p_late(ttft_s, sigma, left_s), 0.0
    if context.itl_slo_s < math.inf and estimate.itl_weight > 0:
        p_slow = p_above(predict_itl_s(estimate, running), itl_sigma(estimate), context.itl_slo_s)
        # A line's error has no tail like the law's where steps can last no longer: by what came true of what was told.
        p_miss = 1.0 - (1.0 - p_miss) * (1.0 - p_slow * min(1.0, estimate.slow_seen / estimate.slow_told))
    return Forecast(ttft_s, p_miss, work, slot_wait_s, running, p_slow)


def p_late(median_s: float, sigma: float, left_s: float) -> float:
    """P(TTFT > left) where ln(TTFT + SHIFT_S) is normal: errors of a short TTFT are not relative to it."""
    return 1.0 if left_s <= 0 else p_above(median_s + SHIFT_S, sigma, left_s + SHIFT_S)


def p_above(median_s: float, sigma: float, limit_s: float) -> float:
    """P(X > limit) for a lognormal X with this median and this standard deviation of ln X."""
    if limit_s <= 0:
        return 1.0
    return 0.5 * math.erfc((math.log(limit_s) - math.log(max(median_s, 1e-6))) / (sigma * math.sqrt(2.0)))


def rotate(revisions: tuple[RevisionView, ...], credits: dict[str, int]) -> tuple[RevisionView, dict[str, int]]:
    """Smooth weighted round robin: in each run of Σ weights requests, every revision gets exactly its weight.

    Ties go to the first. The credits of revisions that take part are returned; they sum to what they did before.
    """
    after = {r.name: credits.get(r.name, 0) + r.weight for r in revisions}
    chosen = max(revisions, key=lambda r: after[r.name])
    after[chosen.name] -= sum(r.weight for r in revisions)
    return chosen, after


def foreign_load(running: int, waiting: int, own_running: int, own_waiting: int) -> tuple[int, int]:
    """(running, waiting) requests in the engines that this gateway did not send, from a report and its own ledger.

    Only totals are compared at first: what the ledger calls waiting (no first token) an engine may call running.
    """
    total = max(0, running + waiting - own_running - own_waiting)
    foreign_waiting = min(total, max(0, waiting - own_waiting))
    return total - foreign_waiting, foreign_waiting


def _usable(context: SpillContext) -> tuple[RevisionView, ...]:
    """Revisions that may take the request. Those without a weight help out, in turn, once all with one are down."""
    weighted = [r for r in context.revisions if r.weight > 0]
    if not any(r.available for r in weighted):
        weighted = [replace(r, weight=1) for r in context.revisions if r.weight == 0]
    return tuple(r for r in weighted if r.available and r.name not in context.tried)


def _without_weights(context: SpillContext, state: SpillState) -> Decision:
    """Spill what may be spilled. The share cap judges the policy, not an upgrade: it neither binds nor counts here."""
    target, blocked = _pick_target(context, state, None, capped=False)
    if target is not None:
        return Decision(Action.SPILL, _spill_reason(context.local_failure, Reason.NO_WEIGHT), target.name)
    wait_s = _retry_after_s(NO_WEIGHT_RETRY_S)
    return Decision(Action.SHED, Reason.NO_WEIGHT, blocked=blocked, retry_after_s=wait_s)


def _without_local(context: SpillContext, state: SpillState) -> tuple[Decision, SpillState]:
    target, blocked = _pick_target(context, state, None)
    if target is not None:
        reason = _spill_reason(context.local_failure, Reason.LOCAL_DOWN)
        return Decision(Action.SPILL, reason, target.name), _count_spill(context, state)
    if context.local_failure is Failure.OVERLOADED:
        return Decision(Action.SHED, Reason.OVERLOAD, blocked=blocked, retry_after_s=_retry_after_s(1.0)), state
    return Decision(Action.SHED, Reason.UNAVAILABLE, blocked=blocked, retry_after_s=_retry_after_s(2.0)), state


def _pick_target(
    context: SpillContext, state: SpillState, p_miss_local: float | None, *, capped: bool = True
) -> tuple[TargetView | None, Blocked | None]:
    """The first target, in the order of the resource, that may and should take the request; else why none."""
    if not context.targets:
        return None, Blocked.NO_TARGET
    if capped and _over_share(context, state):
        return None, Blocked.SHARE_CAP
    blocked = Blocked.TARGET_DOWN
    for target in context.targets:
        if target.name in context.tried or not target.available:
            continue
        if target.cost_usd > 0 and (context.budget_left_usd is None or target.cost_usd > context.budget_left_usd):
            blocked = Blocked.BUDGET
            continue
        if p_miss_local is not None:
            ttft_s = predict_ttft_s(target.estimate, context.prompt_tokens)
            if p_late(ttft_s, target.estimate.sigma, context.ttft_slo_s - context.elapsed_s) >= p_miss_local:
                blocked = Blocked.NO_GAIN
                continue
        return target, None
    return None, blocked


def _over_share(context: SpillContext, state: SpillState) -> bool:
    cap, weight = context.thresholds.share_cap, _weight(context)
    return cap <= 0 or (_first_spill(context) and state.spilled + weight > cap * max(state.arrivals, weight) + 1e-6)


def _first_spill(context: SpillContext) -> bool:
    """A request counts once: only its first spill asks for room under the share cap."""
    return not any(target.name in context.tried for target in context.targets)


def _count_spill(context: SpillContext, state: SpillState) -> SpillState:
    return replace(state, spilled=state.spilled + _weight(context)) if _first_spill(context) else state


def _weight(context: SpillContext) -> float:
    """A request counts from its arrival on, as an arrival and as a spill alike, however late it is decided."""
    return math.exp(-context.elapsed_s / SHARE_WINDOW_S)


def _decayed(context: SpillContext, state: SpillState) -> SpillState:
    keep = math.exp(-max(0.0, context.now_s - state.at_s) / SHARE_WINDOW_S)
    first = 0.0 if context.tried else _weight(context)
    return SpillState(
        credits=state.credits,
        spilling=state.spilling,
        arrivals=state.arrivals * keep + first,
        spilled=state.spilled * keep,
        at_s=max(state.at_s, context.now_s),
    )


def _stale_sigma(report: EngineReport | None) -> float:
    if report is None:
        return _SIGMA_STALE
    stale = (report.age_s - REPORT_FRESH_S) / (REPORT_USELESS_S - REPORT_FRESH_S)
    return _SIGMA_STALE * min(1.0, max(0.0, stale))


def _is_idle(revision: RevisionView) -> bool:
    own = revision.waiting_requests + revision.running
    report = revision.report
    return own + (0 if report is None else report.foreign_running + report.foreign_waiting) == 0


def _spill_reason(failure: Failure | None, otherwise: Reason) -> Reason:
    if failure is None:
        return otherwise
    return Reason.LOCAL_OVERLOADED if failure is Failure.OVERLOADED else Reason.LOCAL_FAILED


def _retry_after_s(wait_s: float) -> int:
    return int(min(60, max(1, math.ceil(wait_s))))


def _merge(credits: tuple[tuple[str, int], ...], changed: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted({**dict(credits), **changed}.items()))
