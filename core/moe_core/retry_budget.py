"""How many attempts beyond the first a gateway may make, so that a failing upstream is not hammered. Pure.

Without a bound each request of an outage costs every upstream one attempt, and load grows by as much just when there is
too much of it (Google, Site Reliability Engineering, "Addressing Cascading Failures", 2016). So second attempts are a
share of requests, with a floor a second for gateways of little traffic. Counts fade with a time constant of `WINDOW_S`,
which needs no buckets: a steady rate r counts r · WINDOW_S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """Faded counts at monotonic second `at_s`: of all upstreams together, or of one."""

    requests: float = 0.0
    retries: float = 0.0
    failures: float = 0.0
    at_s: float = 0.0


def faded(budget: RetryBudget, now_s: float) -> RetryBudget:
    """The counts as they weigh now."""
    if now_s <= budget.at_s:
        return budget
    left = math.exp((budget.at_s - now_s) / WINDOW_S)
    return RetryBudget(budget.requests * left, budget.retries * left, budget.failures * left, now_s)


def on_sent(budget: RetryBudget, now_s: float, *, retry: bool) -> RetryBudget:
    """An attempt was sent: a request's first, or a later one."""
    left, at_s = 1.0, budget.at_s
    if now_s > at_s:
        left, at_s = math.exp((at_s - now_s) / WINDOW_S), now_s
    # Built by hand: `replace` costs three times as much, and this runs twice for every request.
    first, later = (0.0, 1.0) if retry else (1.0, 0.0)
    return RetryBudget(budget.requests * left + first, budget.retries * left + later, budget.failures * left, at_s)


def on_failure(budget: RetryBudget, now_s: float) -> RetryBudget:
    now = faded(budget, now_s)
    return replace(now, failures=now.failures + 1)


def allows(budget: RetryBudget, now_s: float, *, share: float, floor_per_s: float) -> bool:
    """Whether one more attempt beyond a request's first may be sent."""
    now = faded(budget, now_s)
    return now.retries + 1 <= share * now.requests + floor_per_s * WINDOW_S


def allows_at(budget: RetryBudget, now_s: float, *, share: float, floor_per_s: float) -> bool:
    """The same at one upstream. One that has failed nothing of late is not hammered by what others lost."""
    return faded(budget, now_s).failures < 1 or allows(budget, now_s, share=share, floor_per_s=floor_per_s)
