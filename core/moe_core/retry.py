"""The one retry: exponential back-off with full jitter, bounded by attempts and by a deadline.

Full jitter (a uniform draw below the exponential bound) spreads a crowd of clients best; see the AWS Architecture
Blog, "Exponential Backoff And Jitter", 2015.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from moe_core.clock import Clock

T = TypeVar("T")


@dataclass(frozen=True)
class Backoff:
    """How long to wait between attempts. `attempts` counts the first one."""

    initial_s: float = 0.1
    factor: float = 2.0
    max_s: float = 10.0
    attempts: int = 5
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if self.initial_s <= 0 or self.factor < 1 or self.max_s < self.initial_s or self.attempts < 1:
            raise ValueError("back-off needs initial_s > 0, factor >= 1, max_s >= initial_s and attempts >= 1")

    def bound_s(self, failures: int) -> float:
        """Longest wait after that many failures (1 after the first)."""
        exponent = min(failures - 1, 64)
        return float(min(self.max_s, self.initial_s * self.factor**exponent))


class RetryAfter(Exception):
    """Raised by an attempt that was told how long to wait; the wait is never shorter than that."""

    def __init__(self, seconds: float, cause: Exception) -> None:
        super().__init__(str(cause))
        self.seconds = seconds
        self.cause = cause


async def retry(
    attempt: Callable[[], Awaitable[T]],
    *,
    retry_on: tuple[type[Exception], ...],
    backoff: Backoff,
    clock: Clock,
    rng: random.Random | None = None,
    on_failure: Callable[[int, Exception], None] | None = None,
) -> T:
    """Run `attempt` until it returns; re-raise its last error when attempts or time run out.

    Only `retry_on` and `RetryAfter` are tried again; any other exception passes at once.
    """
    draw = rng or random.Random()
    caught: tuple[type[Exception], ...] = (*retry_on, RetryAfter)
    start = clock.monotonic()
    failures = 0
    while True:
        try:
            return await attempt()
        except caught as raised:
            floor_s = raised.seconds if isinstance(raised, RetryAfter) else 0.0
            error = raised.cause if isinstance(raised, RetryAfter) else raised
            failures += 1
            if on_failure is not None:
                on_failure(failures, error)
            wait_s = max(floor_s, draw.uniform(0.0, backoff.bound_s(failures)))
            spent_s = clock.monotonic() - start
            late = backoff.deadline_s is not None and spent_s + wait_s > backoff.deadline_s
            if failures >= backoff.attempts or late:
                raise error from None
        await clock.sleep(wait_s)
