"""What a request would meet: revisions and closed APIs as a decision sees them, and what is foreseen of them.

`forecast_local` says what sending a request to a revision now would bring: TTFT, ITL and the chance that one of them
misses its promise. Nothing here chooses; `moe_core.spill` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from moe_core.latency import SHIFT_S, UNKNOWN, LatencyEstimate, predict_ttft_s
from moe_core.steps import LIFE_LEAST_S, LIFE_MOST_S, RATE_S, predict_itl_s

REPORT_FRESH_S = 2.5
REPORT_USELESS_S = 10.0
LIFE_SHARE = 0.3
"""Of a mean request's time in decode: over this the prompts that wait now are taken to be done. Short answers feel them
most, and miss first."""
_SIGMA_STALE = 0.5
_KV_FULL = 0.97


class Failure(StrEnum):
    """How the last attempt at a local revision ended, before its first token."""

    OVERLOADED = "overloaded"
    FAILED = "failed"


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
    step_tokens: int = 0
    """Tokens of one step at most, prompt and decode; 0 where nobody says."""

    def aged(self, by_s: float) -> EngineReport:
        """The same report, `by_s` seconds later."""
        return EngineReport(  # built by hand, as below
            self.running,
            self.waiting,
            self.kv_usage,
            self.active_limit,
            self.age_s + by_s,
            self.foreign_running,
            self.foreign_waiting,
            self.replicas,
            self.step_tokens,
        )


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
    """A closed API now.

    `cost_usd` is the most that this request can cost there, `expected_usd` what it likely does, `typical_usd` what one
    of mean length does: both are 0 where nobody knows.
    """

    name: str
    available: bool = True
    cost_usd: Decimal = Decimal(0)
    estimate: LatencyEstimate = UNKNOWN
    expected_usd: float = 0.0
    typical_usd: float = 0.0


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
    targets: Sequence[TargetView] = ()
    budget_left_usd: Decimal | None = None
    elapsed_s: float = 0.0
    tried: frozenset[str] = frozenset()
    local_failure: Failure | None = None
    itl_slo_s: float = math.inf
    session: str | None = None
    """Key of the session that the request belongs to; None: it belongs to none."""
    may_hold: bool = False
    """Whether who asks can keep the request and ask again."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What sending the request to a revision now would bring."""

    ttft_s: float
    p_miss: float
    work_tokens: float
    slot_wait_s: float
    running: float = 0.0
    p_slow: float = 0.0
    """P(ITL > SLO) by the law alone; `p_miss` has it by what came true of it."""
    itl_s: float = 0.0
    """The ITL foreseen, 0 where it cannot be."""


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
    itl_s, steps = 0.0, estimate.steps
    if context.itl_slo_s < math.inf and steps.weight > 0:
        life_s = min(LIFE_MOST_S, max(LIFE_LEAST_S, LIFE_SHARE * estimate.service_s))
        recent = estimate.prompt_rate / replicas * math.exp(-max(0.0, context.now_s - estimate.at_s) / RATE_S)
        room = float(report.step_tokens) if report is not None and report.step_tokens > 0 else math.inf
        itl_s = predict_itl_s(steps, running, recent + max(0.0, work) / life_s, room)
        p_slow = p_above(itl_s, steps.sigma, context.itl_slo_s)
        p_miss = 1.0 - (1.0 - p_miss) * (1.0 - p_slow * slow_truth(estimate))
    return Forecast(ttft_s, p_miss, work, slot_wait_s, running, p_slow, itl_s)


def slow_truth(estimate: LatencyEstimate) -> float:
    """What came true of a told P(ITL > SLO), as a factor of at most 1: steps last no longer than a full one, and the
    lognormal law knows no such end."""
    return min(1.0, estimate.slow_seen / estimate.slow_told)


def p_late(median_s: float, sigma: float, left_s: float) -> float:
    """P(TTFT > left) where ln(TTFT + SHIFT_S) is normal: errors of a short TTFT are not relative to it."""
    return 1.0 if left_s <= 0 else p_above(median_s + SHIFT_S, sigma, left_s + SHIFT_S)


def p_above(median_s: float, sigma: float, limit_s: float) -> float:
    """P(X > limit) for a lognormal X with this median and this standard deviation of ln X."""
    if limit_s <= 0:
        return 1.0
    return 0.5 * math.erfc((math.log(limit_s) - math.log(max(median_s, 1e-6))) / (sigma * math.sqrt(2.0)))


def foreign_load(running: int, waiting: int, own_running: int, own_waiting: int) -> tuple[int, int]:
    """(running, waiting) requests in the engines that this gateway did not send, from a report and its own ledger.

    Only totals are compared at first: what the ledger calls waiting (no first token) an engine may call running.
    """
    total = max(0, running + waiting - own_running - own_waiting)
    foreign_waiting = min(total, max(0, waiting - own_waiting))
    return total - foreign_waiting, foreign_waiting


def _stale_sigma(report: EngineReport | None) -> float:
    if report is None:
        return _SIGMA_STALE
    stale = (report.age_s - REPORT_FRESH_S) / (REPORT_USELESS_S - REPORT_FRESH_S)
    return _SIGMA_STALE * min(1.0, max(0.0, stale))
