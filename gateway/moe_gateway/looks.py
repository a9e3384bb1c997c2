"""Once a second: how fast the streams run that pass through here, so that the ITL of requests to come can be foreseen.

A stream's own mean ITL is known when it has ended; by then many others are under way. The gaps between the tokens of
all running streams tell within a second how long the engine's steps are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_core.latency import Look

if TYPE_CHECKING:
    from moe_gateway.state import Gateway
    from moe_gateway.upstream import Upstream

LOOK_EVERY_S = 1.0
GAPS_LEAST = 10
"""Fewer gaps than this in a second tell more of the moment than of the engine."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted of an upstream until `at_s`; `streams` and `running` are of that moment."""

    at_s: float
    gaps: int
    prompts: float
    streams: int
    running: float


def look(before: Counted, now: Counted, replicas: int) -> Look | None:
    """What lies between two counts; None where too little does."""
    span_s, gaps = now.at_s - before.at_s, now.gaps - before.gaps
    streams, running = 0.5 * (before.streams + now.streams), 0.5 * (before.running + now.running)
    if span_s <= 0 or gaps < GAPS_LEAST or streams < 0.5:
        return None
    itl_s = streams * span_s / gaps
    return Look(itl_s, running / replicas, (now.prompts - before.prompts) / replicas / span_s * itl_s)


class Looks:
    """The counts of the last look, by upstream."""

    def __init__(self) -> None:
        self._last: dict[str, Counted] = {}

    def take(self, gateway: Gateway, now_s: float) -> None:
        """Look at every revision, and learn from what is seen, where the last look is long enough ago."""
        for upstream in gateway.fleet.revisions:
            before = self._last.get(upstream.name)
            if before is not None and now_s - before.at_s < LOOK_EVERY_S:
                continue
            now = self._last[upstream.name] = _counted(gateway, upstream, now_s)
            report = upstream.report
            seen = None if before is None else look(before, now, 1 if report is None else max(1, report.replicas))
            if seen is not None:
                upstream.learn(seen, now_s, gateway.config.slo.itl_p95_s)


def _counted(gateway: Gateway, upstream: Upstream, now_s: float) -> Counted:
    report, ledger = upstream.report, upstream.ledger
    running = gateway.load(upstream, now_s).running + (0 if report is None else report.foreign_running)
    return Counted(now_s, ledger.gaps, upstream.prompts_done, ledger.streams, running)
