"""Everything that changes in a gateway process, in one object: upstreams, ledger, spill state, knobs, weights, budget.

Several workers would share exactly this: each keeps its own `Gateway`, and the ledger, the spill state and the budget
are the three parts that a shared store would stand behind.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import aiohttp

from moe_core import breaker as breakers
from moe_core import http
from moe_core.clock import Clock
from moe_core.config import GatewayConfig
from moe_core.log import get_log
from moe_core.spill import (
    Decision,
    Failure,
    RevisionView,
    SpillContext,
    SpillState,
    TargetView,
    Thresholds,
    decide,
)
from moe_core.wire import GatewayDigest, Knobs, Weights
from moe_gateway.budget import Budget, cost_usd
from moe_gateway.call import Call, Phase, Stop
from moe_gateway.openai_api import ApiRequest, prompt_bound, takes
from moe_gateway.telemetry import Telemetry
from moe_gateway.upstream import Upstream, build


class Gateway:
    """The state of one gateway process and the few rules that bind its parts."""

    def __init__(self, config: GatewayConfig, clock: Clock, name: str = "gateway") -> None:
        self.config = config
        self.clock = clock
        self.name = name
        self.log = get_log("gateway", deployment=config.deployment)
        self.revisions, self.targets = build(config, clock)
        self.upstreams = {upstream.name: upstream for upstream in (*self.revisions, *self.targets)}
        self.telemetry = Telemetry(config.deployment, config.slo, self.upstreams.values(), self.log)
        path = None if config.state_dir is None else Path(config.state_dir) / "budget.sqlite"
        self.budget = Budget(path, config.spill.usd_per_day, clock)
        self.spill = SpillState()
        self.knobs: Knobs | None = None
        self.weights_version = 0
        self.calls: dict[int, Call] = {}
        self.draining = False
        self._ids = itertools.count(1)
        self._client: aiohttp.ClientSession | None = None

    @property
    def client(self) -> aiohttp.ClientSession:
        """The one session to upstreams. Made inside the event loop, at first use."""
        if self._client is None:
            self._client = http.session(connect_s=2.0, read_s=self.config.limits.response_s)
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        await self.budget.close()

    # Requests in flight

    def begin(self, request_id: str, task: asyncio.Task[object]) -> Call:
        now_s = self.clock.monotonic()
        call = Call(next(self._ids), request_id, now_s, task, since_s=now_s)
        self.calls[call.id] = call
        self.telemetry.arrived(now_s)
        return call

    def end(self, call: Call) -> None:
        del self.calls[call.id]
        self.telemetry.finished(call, self.clock.monotonic())

    def stop_stalled(self) -> None:
        """Stop every request whose client or upstream has been silent for too long. Called a few times a second."""
        limits, now_s = self.config.limits, self.clock.monotonic()
        for call in list(self.calls.values()):
            silent_s = now_s - call.since_s
            if call.phase is Phase.READING and silent_s > limits.idle_s:
                call.cancel(Stop.UPSTREAM_STALLED)
            elif call.phase in {Phase.RECEIVING, Phase.SENDING} and silent_s > limits.client_stall_s:
                call.cancel(Stop.CLIENT_STALLED)

    def stop_all(self) -> None:
        """The drain is over: every request left gets its honest end."""
        for call in list(self.calls.values()):
            call.cancel(Stop.DRAINING)

    # Decisions

    def thresholds(self) -> Thresholds:
        """What the resource says, replaced by what the knobs say."""
        spill, knobs = self.config.spill, self.knobs.fallback if self.knobs is not None else None
        miss = None if knobs is None else knobs.miss_probability
        cap = None if knobs is None else knobs.share_cap
        return Thresholds(spill.miss_probability if miss is None else miss, spill.share_cap if cap is None else cap)

    def decide(self, request: ApiRequest, call: Call, tried: frozenset[str], failure: Failure | None) -> Decision:
        """Decide where a request goes and remember it."""
        decision, self.spill = decide(self._context(request, call, tried, failure), self.spill)
        return decision

    def foresee(self, request: ApiRequest, call: Call, tried: frozenset[str], failure: Failure | None) -> Decision:
        """What `decide` would say, leaving no trace."""
        return decide(self._context(request, call, tried, failure), self.spill)[0]

    def output_bound(self, request: ApiRequest) -> int:
        """Most output tokens that a request can be billed for at a priced target."""
        limit = request.output_limit
        return (self.config.limits.spill_output_tokens if limit is None else limit) * request.choices

    def cost_bound_usd(self, request: ApiRequest, target: Upstream) -> Decimal:
        """The most that a request can cost at a target."""
        if not target.priced:
            return Decimal(0)
        return cost_usd(prompt_bound(request), self.output_bound(request), *target.prices)

    def _context(self, request: ApiRequest, call: Call, tried: frozenset[str], failure: Failure | None) -> SpillContext:
        now_s = self.clock.monotonic()
        return SpillContext(
            now_s=now_s,
            prompt_tokens=self.revisions[0].prompt_tokens(len(request.raw)),
            ttft_slo_s=self.config.slo.ttft_p95_s,
            thresholds=self.thresholds(),
            revisions=tuple(self._revision_views(now_s)),
            targets=tuple(
                TargetView(target.name, target.available(now_s), self.cost_bound_usd(request, target), target.estimate)
                for target in self.targets
                if target.target is not None and takes(target.target, request.endpoint)
            ),
            budget_left_usd=self.budget.left_usd() if self.targets else None,
            elapsed_s=now_s - call.arrived_s,
            tried=tried,
            local_failure=failure,
        )

    def _revision_views(self, now_s: float) -> Iterator[RevisionView]:
        for upstream in self.revisions:
            waiting, tokens, running = upstream.ledger.counts(now_s)
            report = upstream.report
            if report is not None:
                report = report.aged(now_s - upstream.report_at_s)
            yield RevisionView(
                upstream.name,
                upstream.weight,
                upstream.available(now_s),
                waiting,
                tokens,
                running,
                report,
                upstream.estimate,
            )

    # Verdicts on upstreams

    def sent(self, upstream: Upstream) -> None:
        upstream.breaker = breakers.on_send(upstream.breaker, self.clock.monotonic())

    def succeeded(self, upstream: Upstream) -> None:
        if upstream.breaker != breakers.Breaker():
            if upstream.probing():
                self.log.info("upstream is back", target=upstream.name)
            upstream.breaker = breakers.on_success(upstream.breaker)

    def failed(self, upstream: Upstream) -> None:
        before = upstream.breaker
        upstream.breaker = after = breakers.on_failure(before, self.clock.monotonic())
        if after.mode is breakers.BreakerMode.OPEN and before.mode is breakers.BreakerMode.CLOSED:
            self.log.warning("upstream is down; requests go elsewhere until a probe succeeds", target=upstream.name)

    def abandoned(self, upstream: Upstream) -> None:
        upstream.breaker = breakers.on_abandoned(upstream.breaker, self.clock.monotonic())

    # Commands

    def apply_knobs(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self.telemetry.knobs_version(knobs.version)
        self.log.info("knobs applied", version=knobs.version, fallback=knobs.fallback.to_json())

    def apply_weights(self, weights: Weights) -> None:
        for upstream in self.revisions:
            upstream.weight = weights.percent.get(upstream.name, 0)
        self.weights_version = weights.version
        self.spill = SpillState((), self.spill.spilling, self.spill.arrivals, self.spill.spilled, self.spill.at_s)
        self.log.info("weights applied", version=weights.version, weights=self.weights())

    def weights(self) -> dict[str, int]:
        return {upstream.name: upstream.weight for upstream in self.revisions}

    def digest(self, window_s: float) -> GatewayDigest:
        return self.telemetry.digest(
            gateway=self.name,
            now_s=self.clock.monotonic(),
            at_s=self.clock.time(),
            window_s=window_s,
            version=0 if self.knobs is None else self.knobs.version,
            weights=self.weights(),
            in_flight=len(self.calls),
        )
