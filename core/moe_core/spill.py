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
from enum import StrEnum

from moe_core.forecast import (
    Failure,
    Forecast,
    RevisionView,
    SpillContext,
    TargetView,
    forecast_local,
    p_late,
    slow_truth,
)
from moe_core.latency import SHIFT_S, LatencyEstimate, predict_ttft_s
from moe_core.sessions import SESSION_SLACK, belonging

SHARE_WINDOW_S = 60.0
"""Time constant of the counts behind the share cap."""
HYSTERESIS = 0.8
"""A revision that spills takes requests again once P(miss) is below this share of the threshold."""
SHED_SLO_FACTOR = 8.0
"""With no target, a request is refused when its predicted TTFT is above this many SLOs."""
PROBE_AFTER_S = 2.0
"""An idle revision whose estimate is older gets a request whatever the estimate says: it may have recovered."""
NO_WEIGHT_RETRY_S = 10.0
"""With no weight on any revision, an upgrade is under way: that takes minutes, not seconds."""
HOLD_MOST = 0.6
"""Above this P(miss) waiting rarely changes the decision."""
HOLD_Z = 2.33
"""Standard deviations of ln TTFT that a target keeps in hand while a request is held: late in one of a hundred."""
HOLD_LEAST_S = 0.05
CROWDING = 4.0
"""Requests by which a P(ITL > SLO) counts: a step that is too long is too long for all that decode."""
LATE_PRICE = 3.0
"""What a late answer costs beside its price, in prices: of two targets a cheaper one is taken while it is worth it."""
WORTH_POWER = 4.0
WORTH_MOST = 8.0
"""Relief for a dollar to this power, and within this factor, moves the odds at which a request spills."""


class Action(StrEnum):
    """What happens to a request."""

    LOCAL = "local"
    SPILL = "spill"
    SHED = "shed"
    HOLD = "hold"
    """It waits at the gateway: ask again at `Decision.until_s`, or when something ends."""


class Reason(StrEnum):
    """Why, in words that fit a metric label."""

    WITHIN_SLO = "within_slo"
    PROBE = "probe"
    UNCERTAIN = "uncertain"
    """Held: it may still be in time here, and would still be at a target later."""
    LATE = "late"
    """It will probably miss, and no target may take it."""
    SLO_PREDICTED = "slo_predicted"
    NO_WEIGHT = "no_weight"
    """No revision is to take requests: the old one drains, the new one is not there yet."""
    LOCAL_DOWN = "local_down"
    LOCAL_FAILED = "local_failed"
    LOCAL_OVERLOADED = "local_overloaded"
    STREAM_BROKEN = "stream_broken"
    """Its answer broke at a revision in mid-stream, and a target goes on with it."""
    OVERLOAD = "overload"
    UNAVAILABLE = "unavailable"


class Blocked(StrEnum):
    """Why no target could take a request that should have been spilled."""

    NO_TARGET = "no_target"
    TARGET_DOWN = "target_down"
    SHARE_CAP = "share_cap"
    BUDGET = "budget"
    NO_GAIN = "no_gain"


@dataclass(frozen=True, slots=True)
class SpillState:
    """What decisions remember: credits of the weighted rotation, who is spilling, decayed counts for the share cap."""

    credits: tuple[tuple[str, int], ...] = ()
    spilling: frozenset[str] = frozenset()
    arrivals: float = 0.0
    spilled: float = 0.0
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Where the request goes. `forecast` is of the local revision that was weighed, None where none could be."""

    action: Action
    reason: Reason
    target: str | None = None
    forecast: Forecast | None = None
    blocked: Blocked | None = None
    retry_after_s: int = 0
    until_s: float = 0.0
    """Of a request that is held: when to ask again at the latest, monotonic seconds."""


def decide(context: SpillContext, state: SpillState) -> tuple[Decision, SpillState]:
    """Decide for one request, and the state that the next decision starts from."""
    if not any(r.weight > 0 for r in context.revisions):
        return _without_weights(context, state), state
    before, state = state, _decayed(context, state)
    usable = _usable(context)
    if not usable:
        return _without_local(context, state)
    chosen, credits = rotate(usable, dict(state.credits), context.session)
    forecast = forecast_local(context, chosen)
    # Built by hand, here and in _decayed: `replace` costs three times as much, and this runs for every request.
    merged = _merge(state.credits, credits)
    taken = SpillState(merged, state.spilling, state.arrivals, state.spilled, state.at_s)
    threshold = context.thresholds.miss_probability
    if threshold < 1.0 and chosen.name in state.spilling:  # 1 is never to spill by forecast, whatever was before
        threshold *= HYSTERESIS
    risk = crowded = _risk(context, chosen, forecast)
    # What it costs elsewhere is asked only where it can turn the choice: most requests never come near.
    if 0.0 < risk < 1.0 and threshold < 1.0:
        odds, limit = risk / (1.0 - risk), threshold / (1.0 - threshold)
        if limit / WORTH_MOST < odds < limit * WORTH_MOST:
            odds *= worth(context, chosen.estimate)
            risk = odds / (1.0 + odds)
    if risk <= threshold:
        if chosen.name in state.spilling:
            taken = replace(taken, spilling=state.spilling - {chosen.name})
        return Decision(Action.LOCAL, Reason.WITHIN_SLO, chosen.name, forecast), taken
    if _is_idle(chosen) and context.now_s - chosen.estimate.at_s >= PROBE_AFTER_S:
        return Decision(Action.LOCAL, Reason.PROBE, chosen.name, forecast), taken
    target, blocked = _pick_target(context, state, crowded)
    if target is not None:
        if (room_s := _room_s(context, target, forecast)) > 0.0:
            held = Decision(Action.HOLD, Reason.UNCERTAIN, None, forecast, until_s=context.now_s + room_s)
            return held, before  # as if it had not been asked: it counts when it is decided
        reason = _spill_reason(context.local_failure, Reason.SLO_PREDICTED)
        after = replace(_count_spill(context, state), spilling=state.spilling | {chosen.name})
        return Decision(Action.SPILL, reason, target.name, forecast), after
    if forecast.ttft_s > SHED_SLO_FACTOR * context.ttft_slo_s and not _is_idle(chosen):
        wait_s = _retry_after_s(forecast.ttft_s - context.ttft_slo_s)
        return Decision(Action.SHED, Reason.OVERLOAD, None, forecast, blocked, wait_s), state
    return Decision(Action.LOCAL, Reason.LATE, chosen.name, forecast, blocked), taken


def _room_s(context: SpillContext, target: TargetView, forecast: Forecast) -> float:
    """How long a request may wait for a decision that knows more: while the target would still be in time, surely, and
    it is not clear yet that the own replicas would not. 0 where it should not."""
    if not context.may_hold or context.tried or context.local_failure is not None or forecast.p_miss > HOLD_MOST:
        return 0.0
    median_s = predict_ttft_s(target.estimate, context.prompt_tokens) + SHIFT_S
    needed_s = median_s * math.exp(HOLD_Z * target.estimate.sigma) - SHIFT_S
    room_s = context.ttft_slo_s - context.elapsed_s - needed_s
    return room_s if room_s >= HOLD_LEAST_S else 0.0


def worth(context: SpillContext, estimate: LatencyEstimate) -> float:
    """Relief for a dollar if this request goes elsewhere, against that of one of mean length, as a factor on its odds.

    Relief is the work that it takes off the replicas, prompt and decode; the dollars are those of the cheapest target.
    """
    cheapest = min((t for t in context.targets if t.expected_usd > 0), key=lambda t: t.expected_usd, default=None)
    if cheapest is None or cheapest.typical_usd <= 0:
        return 1.0
    steps = estimate.steps
    token_s = steps.token_s if steps.token_s > 0 else estimate.line[1]
    decode_s = steps.seq_s * estimate.output_tokens
    work_s, typical_s = token_s * context.prompt_tokens + decode_s, token_s * estimate.prompt_tokens + decode_s
    if typical_s <= 0:
        return 1.0
    ratio = work_s / typical_s * cheapest.typical_usd / cheapest.expected_usd
    return float(min(WORTH_MOST, max(1.0 / WORTH_MOST, ratio**WORTH_POWER)))


def _risk(context: SpillContext, revision: RevisionView, forecast: Forecast) -> float:
    """P(miss) as the choice weighs it: a slow step is slow for all that decode, so that one request's P(ITL > SLO)
    counts for those that it slows as well."""
    p_slow = min(1.0, forecast.p_slow * slow_truth(revision.estimate))
    if p_slow <= 0.0:
        return forecast.p_miss
    return 1.0 - (1.0 - forecast.p_miss) / max(1e-9, 1.0 - p_slow) * max(0.0, 1.0 - CROWDING * p_slow)


def rotate(
    revisions: tuple[RevisionView, ...], credits: dict[str, int], session: str | None = None
) -> tuple[RevisionView, dict[str, int]]:
    """Smooth weighted round robin: in each run of Σ weights requests, every revision gets exactly its weight.

    Ties go to the first. The credits of revisions that take part are returned; they sum to what they did before. A
    request of a session goes where the session belongs, as long as no revision comes to be `SESSION_SLACK` requests
    above its share; what sessions take too much, requests of other sessions and of none make up for.
    """
    after = {r.name: credits.get(r.name, 0) + r.weight for r in revisions}
    total = sum(r.weight for r in revisions)
    chosen = max(revisions, key=lambda r: after[r.name])
    if session is not None:
        order = belonging(session, [(r, r.name, r.weight) for r in revisions])
        chosen = next((r for r in order if after[r.name] >= (1 - SESSION_SLACK) * total), chosen)
    after[chosen.name] -= total
    return chosen, after


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
    """The cheapest target, late answers priced in, of those that may take the request and are likelier in time than
    the own replicas; else why none. Ties go to the first in the order of the resource."""
    if not context.targets:
        return None, Blocked.NO_TARGET
    if capped and _over_share(context, state):
        return None, Blocked.SHARE_CAP
    blocked, able = Blocked.TARGET_DOWN, list[tuple[float, TargetView]]()
    for target in context.targets:
        if target.name in context.tried or not target.available:
            continue
        if target.cost_usd > 0 and (context.budget_left_usd is None or target.cost_usd > context.budget_left_usd):
            blocked = Blocked.BUDGET
            continue
        ttft_s = predict_ttft_s(target.estimate, context.prompt_tokens)
        late = p_late(ttft_s, target.estimate.sigma, context.ttft_slo_s - context.elapsed_s)
        if p_miss_local is not None and late >= p_miss_local:
            blocked = Blocked.NO_GAIN
            continue
        able.append((_price(target) * (1.0 + LATE_PRICE * late), target))
    if not able:
        return None, blocked
    _, cheapest = min(able, key=lambda one: one[0])
    return _of_session(cheapest, [target for _, target in able], context.session), None


def _of_session(cheapest: TargetView, able: list[TargetView], session: str | None) -> TargetView:
    """Of equally dear ones the one that the session belongs to: its cached prompt may be there."""
    if session is None or len(able) == 1:
        return cheapest
    return next(
        target
        for target in belonging(session, [(target, target.name, 1) for target in able])
        if (target.cost_usd, target.expected_usd) == (cheapest.cost_usd, cheapest.expected_usd)
    )


def _price(target: TargetView) -> float:
    """What the request likely costs there; where nobody knows, the most that it can."""
    return target.expected_usd or float(target.cost_usd)


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
