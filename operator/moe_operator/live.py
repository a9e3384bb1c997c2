"""Totals of the last half minute for status: written at most every 30 s, and only where they tell something new."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from moe_api.annotations import OPERATOR_MANAGER
from moe_api.scalars import Duration
from moe_api.status import LiveStatus
from moe_core.moments import rfc3339, unix_s
from moe_operator.snapshot import Snapshot

PERIOD_S = 30
WINDOW_S = 30.0


def due(live: LiveStatus | None, now: int) -> bool:
    """Whether it is time to ask the gateways again."""
    at = unix_s(live.at) if live is not None else None
    return at is None or now - at >= PERIOD_S


def update(snapshot: Snapshot) -> LiveStatus | None:
    """The totals that status should show: those of before where nothing new is known or nothing has changed."""
    before = snapshot.status.live
    if snapshot.gateways is None or not snapshot.gateways.digests or not due(before, snapshot.now):
        return before
    digests = snapshot.gateways.digests
    window_s = max(digest.window_s for digest in digests)
    arrivals = sum(digest.arrivals for digest in digests)
    spilled = sum(digest.spilled for digest in digests)
    fresh = LiveStatus.model_validate(
        {
            "writtenBy": OPERATOR_MANAGER,
            "at": rfc3339(snapshot.now),
            "rps": _number(arrivals / window_s if window_s > 0 else None),
            "ttftP95": _slowest([digest.ttft_p95_s for digest in digests]),
            "itlP95": _slowest([digest.itl_p95_s for digest in digests]),
            "imbalance": _number(snapshot.gateways.imbalance),
            # Spills count as they end: those of a burst outnumber what has come since.
            "spillShare": _number(min(1.0, spilled / arrivals) if arrivals else None),
        }
    )
    if before is not None and fresh.model_copy(update={"at": before.at}) == before:
        return before
    return fresh


def _number(value: float | None) -> str | None:
    return None if value is None else format(Decimal(f"{value:.3g}").normalize(), "f")


def _slowest(values: Sequence[float | None]) -> Duration | None:
    """The slowest gateway's figure: percentiles of several cannot be merged, and a mean would flatter."""
    known = [value for value in values if value is not None]
    return Duration(f"{round(max(known) * 1000)}ms") if known else None
