"""The retry budgets of one gateway process: of all attempts, and of those at each upstream."""

from __future__ import annotations

from moe_core import retry_budget
from moe_core.clock import Clock
from moe_core.retry_budget import RetryBudget

SHARE = 0.2
"""Attempts beyond the first, as a share of requests."""
FLOOR_PER_S = 10.0
"""So many a second may always be made: what a small gateway loses when its engine dies."""
UPSTREAMS_MAX = 1000


class Retries:
    """Counts attempts, and says whether one more may be made."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._all = RetryBudget()
        self._at: dict[str, RetryBudget] = {}

    def sent(self, upstream: str, *, retry: bool) -> None:
        now_s = self._clock.monotonic()
        self._all = retry_budget.on_sent(self._all, now_s, retry=retry)
        if len(self._at) > UPSTREAMS_MAX:
            self._at.clear()
        self._at[upstream] = retry_budget.on_sent(self._at.get(upstream, RetryBudget()), now_s, retry=retry)

    def failed(self, upstream: str) -> None:
        now_s = self._clock.monotonic()
        self._at[upstream] = retry_budget.on_failure(self._at.get(upstream, RetryBudget()), now_s)

    def left(self) -> bool:
        """Whether any attempt beyond a request's first may be made now."""
        return retry_budget.allows(self._all, self._clock.monotonic(), share=SHARE, floor_per_s=FLOOR_PER_S)

    def left_at(self, upstream: str) -> bool:
        """Whether this upstream may get one."""
        budget = self._at.get(upstream, RetryBudget())
        return retry_budget.allows_at(budget, self._clock.monotonic(), share=SHARE, floor_per_s=FLOOR_PER_S)
