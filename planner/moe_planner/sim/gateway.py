"""One gateway as production's is built: a ledger, estimates, breakers and reports feed `moe_core.spill`.

It keeps for each upstream what `moe_gateway.state` and `moe_gateway.attempt` keep, and moves it at the same moments by
the same functions of moe_core: breakers on send, success and failure; estimates on first tokens and ends.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from moe_core import breaker as breakers
from moe_core.breaker import Breaker
from moe_core.latency import LatencyEstimate, observe_decode, observe_ttft
from moe_core.spill import (
    Decision,
    EngineReport,
    Failure,
    RevisionView,
    SpillContext,
    TargetView,
    Thresholds,
    foreign_load,
)
from moe_planner.sim.policy import Decide
from moe_planner.sim.world import LOCAL, World

CLOSED = Breaker()
BYTES_PER_TOKEN = 4
"""The most that a request can cost counts every byte of its body as a token."""
_MILLION = Decimal(1_000_000)


class Gateway:
    """Live state of one gateway process."""

    def __init__(self, world: World, decide: Decide, state: Any) -> None:
        self._decide, self._state = decide, state
        self.names = (LOCAL, *(api.name for api in world.apis))
        self.estimates: dict[str, LatencyEstimate] = {name: LatencyEstimate() for name in self.names}
        self.breakers: dict[str, Breaker] = dict.fromkeys(self.names, CLOSED)
        self.waiting = self.running = 0
        self.waiting_tokens = 0
        self._report: tuple[int, int, float, int, int, int] | None = None
        self._report_at_s = 0.0
        self._slo_s = world.slo.ttft_s
        self._prices = tuple(
            (
                api.name,
                Decimal(str(api.usd_per_m_input)) * BYTES_PER_TOKEN / _MILLION,
                Decimal(str(api.usd_per_m_output)) * world.output_bound / _MILLION,
            )
            for api in world.apis
        )

    def cost_bound_usd(self, name: str, input_tokens: int) -> Decimal:
        """The most that a request can cost at a target."""
        return next(fixed + input_tokens * each for target, each, fixed in self._prices if target == name)

    def reported(self, running: int, waiting: int, kv_usage: float, active_limit: int, at_s: float) -> None:
        """A report of the engines has come; it says how things were at `at_s`."""
        foreign = foreign_load(running, waiting, self.running, self.waiting)
        self._report = (running, waiting, kv_usage, active_limit, *foreign)
        self._report_at_s = at_s

    def decide(
        self,
        now_s: float,
        input_tokens: int,
        elapsed_s: float,
        thresholds: Thresholds,
        budget_left_usd: Decimal,
        tried: frozenset[str],
        failure: Failure | None,
    ) -> Decision:
        """Ask the policy, and keep its next state."""
        known, report = self._report, None
        if known is not None:
            running, waiting, kv_usage, limit, foreign_running, foreign_waiting = known
            age_s = now_s - self._report_at_s
            report = EngineReport(running, waiting, kv_usage, limit, age_s, foreign_running, foreign_waiting)
        allowed, estimates = self.breakers, self.estimates
        revision = RevisionView(
            LOCAL,
            100,
            breakers.allows(allowed[LOCAL], now_s),
            self.waiting,
            self.waiting_tokens,
            self.running,
            report,
            estimates[LOCAL],
        )
        targets = tuple(
            TargetView(name, breakers.allows(allowed[name], now_s), fixed + input_tokens * each, estimates[name])
            for name, each, fixed in self._prices
        )
        context = SpillContext(
            now_s,
            input_tokens,
            self._slo_s,
            thresholds,
            (revision,),
            targets,
            budget_left_usd if targets else None,
            elapsed_s,
            tried,
            failure,
        )
        decision, self._state = self._decide(context, self._state)
        return decision

    # What becomes of requests

    def sent(self, name: str, now_s: float) -> None:
        if self.breakers[name] is not CLOSED:
            self.breakers[name] = breakers.on_send(self.breakers[name], now_s)

    def succeeded(self, name: str) -> None:
        if self.breakers[name] is not CLOSED:
            self.breakers[name] = CLOSED

    def failed(self, name: str, now_s: float) -> None:
        self.breakers[name] = breakers.on_failure(self.breakers[name], now_s)

    def abandoned(self, name: str, now_s: float) -> None:
        """It ended without a verdict on the upstream, such as 429."""
        if self.breakers[name] is not CLOSED:
            self.breakers[name] = breakers.on_abandoned(self.breakers[name], now_s)

    def first_token(
        self, name: str, now_s: float, work_tokens: float, input_tokens: int, slot_wait_s: float, ttft_s: float
    ) -> None:
        self.succeeded(name)
        self.estimates[name] = observe_ttft(
            self.estimates[name],
            now_s,
            work_tokens=work_tokens,
            prompt_tokens=input_tokens,
            slot_wait_s=slot_wait_s,
            ttft_s=ttft_s,
        )

    def ended(self, name: str, itl_s: float | None, output_tokens: int) -> None:
        self.estimates[name] = observe_decode(self.estimates[name], itl_s=itl_s, output_tokens=output_tokens)
