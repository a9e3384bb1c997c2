"""Whether what was foretold of requests came true: P(miss) at admission against the promise kept or missed.

Only a stream that ran where it was weighed shows the truth. What was spilled is censored: nobody knows whether it would
have missed, and it is just those whose P(miss) was high, so that the score is of what was kept. Shadow mode spills
nothing and has no such gap. Neither have requests of a tier that may not spill.
"""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry

from moe_core import metrics
from moe_core.calibration import BINS, FRESH, Calibration, bin_of, observe, score
from moe_core.clock import Clock
from moe_core.forecasts import ForecastReport, scored
from moe_gateway.call import Call, Outcome
from moe_gateway.shadow import Shadow
from moe_gateway.tallies import Counts

REVISIONS_MAX = 16
"""Revisions of which it is known; the oldest are forgotten."""


def came_true(call: Call, duration_s: float) -> bool | None:
    """Whether a request missed its promise as the forecast meant it, by TTFT or mean ITL; None where nobody knows: it
    was spilled, ran elsewhere than where it was weighed, broke off, or was no stream and showed no first token."""
    if call.slo is None or call.forecast is None or not call.stream or not call.local or call.attempts != 1:
        return None
    if call.ttft_s is None:
        return True if call.outcome is Outcome.CANCELLED and duration_s > call.slo.ttft_p95_s else None
    if call.ttft_s > call.slo.ttft_p95_s:
        return True
    if call.outcome is not Outcome.OK:
        return None
    return call.itl_s is not None and call.itl_s > call.slo.itl_p95_s


class Forecasts:
    """Counts of one gateway process."""

    def __init__(self, deployment: str, registry: CollectorRegistry, clock: Clock) -> None:
        self._deployment, self._clock = deployment, clock
        self._known: dict[str, Calibration] = {}
        self._count = Counts(metrics.GATEWAY_FORECASTS)
        self._foretold = Counts(metrics.GATEWAY_FORECAST_PROBABILITY)
        self._squared = Counts(metrics.GATEWAY_FORECAST_SQUARED)
        for mine in (self._count, self._foretold, self._squared):
            registry.register(mine)
        self._brier = metrics.gauge(metrics.GATEWAY_FORECAST_BRIER, registry)

    def ended(self, call: Call) -> None:
        """Count a request that has ended and of which something was foretold."""
        if call.forecast is None or call.upstream is None:
            return
        now_s, p_miss = self._clock.monotonic(), call.forecast.p_miss
        missed = came_true(call, now_s - call.arrived_s)
        result = "spilled" if call.spilled else "unknown"
        if missed is not None:
            result = "missed" if missed else "met"
            self._learn(call.upstream, now_s, p_miss, missed)
        self._count.add((self._deployment, call.upstream, lower(bin_of(p_miss)), result))

    def _learn(self, revision: str, now_s: float, p_miss: float, missed: bool) -> None:
        known = self._known.get(revision)
        if known is None:
            known = FRESH
            if len(self._known) >= REVISIONS_MAX:
                oldest = next(iter(self._known))
                del self._known[oldest]
                self._brier.remove(self._deployment, oldest)
            self._brier.labels(self._deployment, revision).set_function(partial(self._brier_of, revision))
        self._known[revision] = observe(known, now_s, p_miss, missed)
        self._foretold.add((self._deployment, revision, lower(bin_of(p_miss))), p_miss)
        self._squared.add((self._deployment, revision), (p_miss - missed) ** 2)

    def _brier_of(self, revision: str) -> float:
        found = score(self._known[revision], self._clock.monotonic())
        return 0.0 if found is None else found.brier

    def report(self, gateway: str, shadow: Shadow, *, shadowed: bool) -> ForecastReport:
        """What the admin port says."""
        now_s = self._clock.monotonic()
        rows = (scored(name, known, now_s) for name, known in self._known.items())
        return ForecastReport(
            gateway=gateway,
            shadow=shadowed,
            revisions=tuple(row for row in rows if row is not None),
            would_have_spilled=shadow.requests,
            would_have_cost_usd=shadow.usd,
        )


def lower(index: int) -> str:
    """A bin's label: the lower end of its probabilities."""
    return f"{index / BINS:g}"
