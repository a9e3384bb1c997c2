"""The remedies of the fast loop, one function each: what a knob would move to now and why, or why it does not move.

Each returns a `Move`, or a sentence. They know nothing of time, budgets or one another; `retune` composes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

from moe_core.config import KnobBounds, SloConfig
from moe_core.setting import ACTIVE_SEQS, CAPACITY, GRAIN, OVERFLOW, SPILL, Setting, Signals, on_grain, pinned
from moe_core.wire import Overflow

PRESSED_TTFT = 0.9
"""Share of the TTFT objective from which requests are in danger."""
PRESSED_ITL = 1.0
PRESSED_SHED = 0.01
CALM_TTFT, CALM_ITL, CALM_QUEUE = 0.6, 0.8, 0.1
SLACK_TTFT, SLACK_ITL, SLACK_RUNNING = 0.4, 0.7, 0.6
SKEW_WORTH = 1.2
"""Rank demand max/mean from which capping experts gains time worth its quality."""
SKEW_WORTH_LASTING = 1.05
"""The same where pressure lasts: every step is a little shorter, then, for as long as it does."""
BALANCED = 1.05
LEAST_STEP = 1 / 3
"""Of a step of γ: less changes nothing that can be seen."""
QUALITY_SPARE = 0.5
"""Capacity is tightened only while lost gate mass is below this share of its limit."""
LOST_POWER, PRICE_MOST = 1.7, 4.0
KV_FULL, KV_ROOM = 0.95, 0.85
BUSY_SHARE, FULL_SHARE = 0.7, 0.9
ITL_ROOM = 0.7
RAISE, LOWER = 1.25, 0.8
SPILL_STEP, SPILL_FLOOR, SPILL_DEFAULT = 0.15, 0.2, 0.5
"""At a threshold p, the last request that spills would have missed with probability p: the closed API is paid 1/p times
for each miss that it saves. Below the floor that is more than five times, and the tuner does not go there of itself."""
SPILL_NOW = 1.5
"""TTFT risk at which paying is right although a cheaper remedy is on its way."""


@dataclass(frozen=True)
class Move:
    """One knob's move: the whole setting with that knob moved."""

    knob: str
    setting: Setting
    why: str


@dataclass(frozen=True)
class Pressure:
    """How near the SLO is to being lost, as shares of the objectives; None is unknown."""

    ttft: float | None
    itl: float | None
    queue: float | None
    shed: float
    pressed: bool
    calm: bool
    slack: bool
    text: str


def pressure_of(signals: Signals, slo: SloConfig) -> Pressure:
    """Read pressure from TTFT (observed, and predicted from the queue by Little's law), ITL and shed requests."""
    wait_s = _queue_wait_s(signals, slo)
    known = [value for value in (signals.ttft_p95_s, wait_s) if value is not None]
    ttft = max(known) / slo.ttft_p95_s if known else None
    itl = None if signals.itl_p95_s is None else signals.itl_p95_s / slo.itl_p95_s
    limit = _limit_total(signals)
    queue = signals.waiting / limit if signals.waiting is not None and limit else None
    shed = signals.shed_share or 0.0
    pressed = (ttft or 0.0) >= PRESSED_TTFT or (itl or 0.0) >= PRESSED_ITL or shed > PRESSED_SHED
    complete = queue is not None and signals.arrivals_per_s is not None
    calm = (
        complete
        and (ttft or 0.0) <= CALM_TTFT
        and (itl or 0.0) <= CALM_ITL
        and (queue or 0.0) <= CALM_QUEUE
        and shed == 0.0
    )
    slack = (
        calm
        and (ttft or 0.0) <= SLACK_TTFT
        and (itl or 0.0) <= SLACK_ITL
        and signals.waiting == 0
        and (signals.running or 0) <= SLACK_RUNNING * (limit or 0)
    )
    return Pressure(ttft, itl, queue, shed, pressed, calm, slack, _text(signals, slo, wait_s, shed))


def tighten_capacity(
    setting: Setting,
    signals: Signals,
    bounds: KnobBounds,
    pressure: Pressure,
    max_lost_gate_mass: float,
    *,
    lossy: Decimal | None = None,
    lasting: bool = False,
) -> Move | str:
    """Lower γ a step, so that the busiest rank stops holding up the others. For TTFT only: prefill is what it caps.

    `lossy` is a factor that has cost too much quality; `lasting`, whether the pressure is no spike.
    """
    current, skew = setting.prefill_cap, signals.rank_demand
    lost = signals.lost_gate_mass or 0.0
    overflow = setting.experts.overflow if pinned(OVERFLOW, bounds) else Overflow(bounds.overflow)
    if pinned(CAPACITY, bounds):
        return "capacity factor: pinned"
    if overflow is Overflow.UNLIMITED:
        return "capacity factor: overflow is pinned at Unlimited"
    if (pressure.ttft or 0.0) < PRESSED_TTFT:
        return "capacity factor: TTFT is not in danger"
    if skew is None:
        return "capacity factor: expert load is unknown"
    least = SKEW_WORTH_LASTING if lasting else SKEW_WORTH
    if skew < least:
        return f"capacity factor: ranks are balanced (demand max/mean {skew:.2f} < {least})"
    if current is not None and signals.rank_assigned is not None and signals.rank_assigned <= BALANCED:
        return f"capacity factor: ranks are level already (assigned max/mean {signals.rank_assigned:.2f})"
    if lost > QUALITY_SPARE * max_lost_gate_mass:
        return f"capacity factor: lost gate mass {lost:.4f} is near its limit {max_lost_gate_mass:g}"
    # What this model's gate mass costs is not known before the first cap: half of the room is left to be wrong.
    spare = QUALITY_SPARE if current is not None else QUALITY_SPARE / 2
    target = _next_factor(current, signals, bounds, spare * max_lost_gate_mass)
    if target is None:
        return f"capacity factor: at {bounds.capacity_factor_max:f} it would cost more gate mass than quality allows"
    if current is not None and float(current - target) < LEAST_STEP * float(_step(bounds)):
        return f"capacity factor: lower than {current.normalize():f} is out of bounds, or costs too much gate mass"
    if lossy is not None and target <= lossy:
        return f"capacity factor: {lossy.normalize():f} has cost too much gate mass"
    was = "uncapped" if current is None else f"{current.normalize():f}"
    why = f"γ {was} → {target.normalize():f} ({overflow.value}), because rank demand max/mean is {skew:.2f}"
    return Move(CAPACITY, setting.capped(target, overflow), why)


def foreseen_lost(spread: float, factor: float) -> float:
    """Gate mass that γ would cost, from the coefficient of variation of demand over experts.

    Loads as if log-normal with mean 1: a share E[(load − γ)⁺] of slots moves; what that costs was measured
    (docs/benchmarks.md: 0.055, 0.014, 0.003 of gate mass where 18.6, 8.4, 3.1 % of slots moved).
    """
    sigma = math.sqrt(math.log1p(spread * spread))
    if sigma <= 0:
        return math.pow(max(0.0, 1.0 - factor), LOST_POWER)
    high = sigma / 2 - math.log(factor) / sigma
    moved = _below(high) - factor * _below(high - sigma)
    return math.pow(max(0.0, moved), LOST_POWER)


def _next_factor(current: Decimal | None, signals: Signals, bounds: KnobBounds, allowed: float) -> Decimal | None:
    """γ one step lower, no lower than gate mass allows; None where even the mildest cap would cost too much.

    Where the spread of demand is known, quality is foreseen, and corrected by what the present γ is seen to cost.
    Where it is not, the mildest cap comes first, and each step waits for what the last one cost.
    """
    spread, skew = signals.expert_cv, signals.rank_demand or 1.0
    lowest = bounds.capacity_factor_min if current is None else on_grain(current - _step(bounds), bounds)
    if current is None:
        start = bounds.capacity_factor_max if spread is None else Decimal(str(round(skew, 4)))
        lowest = on_grain(start, bounds)
    if spread is None:
        return lowest
    return _cheapest(current, lowest, signals, bounds, allowed)


def loosen_capacity(
    setting: Setting, home: Setting, signals: Signals, bounds: KnobBounds, allowed: float
) -> Move | str:
    """Raise γ to where it would cost no more gate mass than `allowed`, by what the present one is seen to cost; to the
    capacity of `home` where no factor would do."""
    current = setting.prefill_cap
    if current is None or pinned(CAPACITY, bounds):
        return "capacity factor: not capped, or pinned"
    low = on_grain(current + _step(bounds) / 3, bounds)
    target = low if signals.expert_cv is None else _cheapest(current, low, signals, bounds, allowed)
    to = (
        setting.with_capacity(home)
        if target is None or target <= current
        else setting.capped(target, setting.experts.overflow)
    )
    if to == setting:
        return "capacity factor: no looser one is in bounds"
    now = "uncapped" if to.prefill_cap is None else f"{to.prefill_cap.normalize():f}"
    return Move(CAPACITY, to, f"γ {current.normalize():f} → {now}")


def _cheapest(
    current: Decimal | None, lowest: Decimal, signals: Signals, bounds: KnobBounds, allowed: float
) -> Decimal | None:
    """The lowest γ from `lowest` on that is foreseen to cost no more than `allowed`; None where none is."""
    spread, lost, price = signals.expert_cv or 0.0, signals.lost_gate_mass, 1.0
    if current is not None and lost is not None:
        told = foreseen_lost(spread, float(current))
        price = min(PRICE_MOST, max(1.0 / PRICE_MOST, lost / told)) if told > 0 and lost > 0 else 1.0
    factor = lowest
    while factor <= bounds.capacity_factor_max:
        if price * foreseen_lost(spread, float(factor)) <= allowed:
            return factor
        factor += GRAIN
    return None


def _step(bounds: KnobBounds) -> Decimal:
    return max(GRAIN, (bounds.capacity_factor_max - bounds.capacity_factor_min) / 4)


def _below(z: float) -> float:
    """Standard normal distribution function."""
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def active_seqs(
    setting: Setting, signals: Signals, bounds: KnobBounds, pressure: Pressure, *, too_many: int | None = None
) -> Move | str:
    """Fewer sequences at once where ITL or the KV cache suffers; more where requests queue and ITL has room.

    `too_many` is a limit that has already proved too high in this spike.
    """
    if pinned(ACTIVE_SEQS, bounds):
        return "maxActiveSeqs: pinned"
    current = setting.engine.max_active_seqs or signals.active_limit
    limit = _limit_total(signals)
    if current is None or signals.running is None or not limit:
        return "maxActiveSeqs: the engine's state is unknown"
    filled = signals.running / limit
    top = min(bounds.active_seqs_max, signals.active_ceiling or bounds.active_seqs_max)
    itl, kv = pressure.itl, signals.kv_usage or 0.0
    thrashing = kv >= KV_FULL and (signals.preemptions_per_s or 0.0) > 0.0
    if thrashing or ((itl or 0.0) >= PRESSED_ITL and filled >= BUSY_SHARE):
        # Down from what runs, not from a limit that nothing reaches: else the first steps would do nothing.
        target = max(bounds.active_seqs_min, min(top, math.floor(LOWER * current)))
        if target >= current:
            return f"maxActiveSeqs: at its lower bound {bounds.active_seqs_min}"
        cause = f"KV cache {kv:.0%} full and preempting" if thrashing else f"ITL is {itl or 0.0:.0%} of its objective"
        why = f"maxActiveSeqs {current} → {target}, because {cause}"
        return Move(ACTIVE_SEQS, setting.with_active_seqs(target), why)
    if not signals.waiting or filled < FULL_SHARE:
        return "maxActiveSeqs: the batch is not what requests wait for"
    if itl is None or itl > ITL_ROOM:
        return f"maxActiveSeqs: ITL {'unknown' if itl is None else f'at {itl:.0%}'}, no room for a larger batch"
    if kv > KV_ROOM:
        return f"maxActiveSeqs: KV cache {kv:.0%} full"
    target = min(top, max(bounds.active_seqs_min, math.ceil(RAISE * current)))
    if target <= current:
        return f"maxActiveSeqs: at its upper bound {top}"
    if too_many is not None and target >= too_many:
        return f"maxActiveSeqs: {too_many} were too many in this spike"
    why = f"maxActiveSeqs {current} → {target}, because {signals.waiting} wait and ITL is {itl:.0%} of its objective"
    return Move(ACTIVE_SEQS, setting.with_active_seqs(target), why)


def spill(
    setting: Setting, signals: Signals, bounds: KnobBounds, pressure: Pressure, *, cheaper_left: bool
) -> Move | str:
    """Spill sooner: a lower threshold on P(TTFT > SLO). It costs money, so it comes after what is free."""
    if pinned(SPILL, bounds):
        return "spill threshold: pinned"
    if not signals.can_spill:
        return "spill threshold: no closed API is configured"
    if signals.api_failing:
        return "spill threshold: the closed API is failing"
    risk = pressure.ttft or 0.0
    if risk < PRESSED_TTFT and pressure.shed <= PRESSED_SHED:
        return "spill threshold: TTFT is not in danger"
    if cheaper_left and risk < SPILL_NOW:
        return "spill threshold: a cheaper remedy goes first"
    current = setting.fallback.miss_probability
    start = SPILL_DEFAULT if current is None else current
    floor = SPILL_FLOOR if bounds.miss_probability_min is None else bounds.miss_probability_min
    ceiling = 1.0 if bounds.miss_probability_max is None else bounds.miss_probability_max
    step = 2 * SPILL_STEP if risk >= SPILL_NOW else SPILL_STEP
    target = round(min(ceiling, max(floor, start - step)), 4)
    if target >= start:
        return f"spill threshold: at its floor {floor:g}"
    why = f"missProbability {start:g} → {target:g}, because TTFT risk is {risk:.0%} of its objective"
    return Move(SPILL, setting.with_miss_probability(target), why)


def quality_guard(setting: Setting, home: Setting, bounds: KnobBounds) -> Move | str:
    """Loosen expert capacity at once, as far as it goes: quality is a limit, not a price."""
    current = setting.prefill_cap
    if current is None:
        return "prefill is uncapped: it is not lost to a capacity factor that the tuner moves"
    if pinned(CAPACITY, bounds):
        return f"{CAPACITY} is pinned: unpin it, or raise quality.maxLostGateMass"
    was = f"{current.normalize():f}"
    may_switch = home.experts.overflow is setting.experts.overflow or not pinned(OVERFLOW, bounds)
    if home.prefill_cap is None and may_switch:
        return Move(CAPACITY, setting.with_capacity(home), f"γ {was} → uncapped")
    top = bounds.capacity_factor_max
    if current >= top:
        return f"γ is at its upper bound {top:f}: raise tuning.bounds or quality.maxLostGateMass"
    return Move(CAPACITY, setting.capped(top, setting.experts.overflow), f"γ {was} → {top.normalize():f}")


def _queue_wait_s(signals: Signals, slo: SloConfig) -> float | None:
    """Little's law: those who wait at the replicas, over the rate at which these finish requests. What a closed API
    answers shortens no queue: counted in, spilling would hide the pressure that it comes from."""
    if not signals.waiting or signals.local_per_s is None:
        return None
    if signals.local_per_s > 0:
        return signals.waiting / signals.local_per_s
    # Nothing has finished in the window: in danger once the queue is as long as the batch.
    limit = _limit_total(signals)
    return slo.ttft_p95_s * signals.waiting / limit if limit else None


def _limit_total(signals: Signals) -> int | None:
    if signals.active_limit is None or signals.replicas is None:
        return None
    return signals.active_limit * signals.replicas


def _text(signals: Signals, slo: SloConfig, wait_s: float | None, shed: float) -> str:
    def seconds(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.3g} s"

    parts = [
        f"TTFT p95 {seconds(signals.ttft_p95_s)} of {slo.ttft_p95_s:g} s",
        f"ITL p95 {seconds(signals.itl_p95_s)} of {slo.itl_p95_s:g} s",
        "queue unknown" if signals.waiting is None else f"{signals.waiting} waiting",
    ]
    if wait_s is not None:
        parts.append(f"queue wait {wait_s:.3g} s")
    if shed:
        parts.append(f"{shed:.1%} shed")
    return ", ".join([*parts, *(f"no answer from {source}" for source in signals.missing)])
