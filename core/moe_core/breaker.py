"""Circuit breaker of one upstream, as a pure state machine: a dead upstream costs one probe, not a timeout per request.

closed ── `FAILURES_TO_OPEN` failures in a row ──► open ── its time is up ──► half-open (one probe at a time)
half-open: a success closes; a failure opens again for twice as long, up to `OPEN_MAX_S`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

FAILURES_TO_OPEN = 3
OPEN_INITIAL_S = 1.0
OPEN_MAX_S = 10.0
# A probe that reports nothing for this long is taken for lost, so that another may go.
PROBE_LEASE_S = 60.0


class BreakerMode(StrEnum):
    """What the breaker lets through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Breaker:
    """State of one breaker. Times are monotonic seconds."""

    mode: BreakerMode = BreakerMode.CLOSED
    failures: int = 0
    open_s: float = OPEN_INITIAL_S
    until_s: float = 0.0


def allows(breaker: Breaker, now_s: float) -> bool:
    """Whether a request may be sent now: always when closed, as a probe once the open time or a lost probe's is up."""
    return breaker.mode is BreakerMode.CLOSED or now_s >= breaker.until_s


def on_send(breaker: Breaker, now_s: float) -> Breaker:
    """The state after a request was sent. A send through a breaker that is not closed is the probe."""
    if breaker.mode is BreakerMode.CLOSED:
        return breaker
    return replace(breaker, mode=BreakerMode.HALF_OPEN, until_s=now_s + PROBE_LEASE_S)


def on_success(_: Breaker) -> Breaker:
    """The state after the upstream answered as it should."""
    return Breaker()


def on_failure(breaker: Breaker, now_s: float) -> Breaker:
    """The state after the upstream failed: refused, reset, stalled or answered 5xx."""
    if breaker.mode is BreakerMode.CLOSED:
        if breaker.failures + 1 < FAILURES_TO_OPEN:
            return replace(breaker, failures=breaker.failures + 1)
        return Breaker(BreakerMode.OPEN, breaker.failures + 1, OPEN_INITIAL_S, now_s + OPEN_INITIAL_S)
    if breaker.mode is BreakerMode.OPEN:
        # A request sent before it opened: it says nothing new.
        return breaker
    open_s = min(OPEN_MAX_S, breaker.open_s * 2)
    return Breaker(BreakerMode.OPEN, breaker.failures + 1, open_s, now_s + open_s)


def on_abandoned(breaker: Breaker, now_s: float) -> Breaker:
    """The state after a request ended without a verdict (the client left): a probe's place is free again."""
    return replace(breaker, until_s=now_s) if breaker.mode is BreakerMode.HALF_OPEN else breaker
