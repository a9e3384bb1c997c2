"""Everything that changes in a gateway process, in one object: upstreams, ledger, spill state, knobs, weights, budget.

Several workers would share exactly this: each keeps its own `Gateway`, and the ledger, the spill state and the budget
are the three parts that a shared store would stand behind.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import aiohttp
import orjson

from moe_core import breaker as breakers
from moe_core import http
from moe_core.clock import Clock
from moe_core.config import GatewayConfig, SloConfig, config_hash
from moe_core.forecast import Failure, SpillContext, Thresholds
from moe_core.latency import Ended, First
from moe_core.log import get_log
from moe_core.passes import Door
from moe_core.prices import most_usd
from moe_core.signing import Verifier
from moe_core.spill import Decision, SpillState, decide
from moe_core.tiers import slo_of
from moe_core.wire import GatewayDigest, Knobs, Weights
from moe_gateway.access import Access
from moe_gateway.budget import Budget
from moe_gateway.call import Call, Phase, Stop
from moe_gateway.context import spill_context
from moe_gateway.egress import Asking, Audit
from moe_gateway.fleet import Fleet, renew
from moe_gateway.forecasts import Forecasts
from moe_gateway.held import Held
from moe_gateway.looks import Looks
from moe_gateway.money_stores import limits_of, store_of
from moe_gateway.openai_api import ApiRequest, prompt_bound
from moe_gateway.recorder import FLUSH_S, Recorder
from moe_gateway.retries import Retries
from moe_gateway.shadow import Shadow, own_alone
from moe_gateway.siblings import Siblings, View
from moe_gateway.telemetry import Telemetry
from moe_gateway.tracing import Tracing
from moe_gateway.upstream import Upstream
from moe_gateway.weights import in_force
from moe_gateway.wire import Wire


class Gateway:
    """The state of one gateway process and the few rules that bind its parts."""

    def __init__(self, config: GatewayConfig, clock: Clock, name: str = "gateway", config_hash: str = "") -> None:
        self.config = config
        self.config_hash = config_hash or hash_of(config)
        self.config_error: str | None = None
        self.clock = clock
        self.name = name
        self.log = get_log("gateway", deployment=config.deployment)
        self.fleet = renew(Fleet(), config, clock)
        self.upstreams = self.fleet.by_name
        self.verifier = Verifier(config.trusted_keys)
        self.door = Door(config.deployment, lambda: self.verifier, clock)
        self.access = Access(config.auth, clock)
        self.retries = Retries(clock)
        self.tracing = None if config.tracing is None else Tracing(config.tracing, config.deployment)
        self.telemetry = Telemetry(config.deployment, config.slo, self.fleet, self.log)
        self.telemetry.log_ok_share = config.log_ok_share
        folder = None if config.state_dir is None else Path(config.state_dir)
        self.budget = Budget(store_of(config), limits_of(config), clock, folder)
        self._tell_prices()
        self.audit = Audit(config.deployment, self.telemetry.registry, self.log)
        self.spill = SpillState()
        self.shadow = Shadow(config.deployment, self.telemetry.registry, clock)
        self.recorder = None if config.record is None else Recorder(config.record, clock, self.log)
        self.forecasts = Forecasts(config.deployment, self.telemetry.registry, clock)
        self.siblings = Siblings(config.deployment, clock, self.access.shares)
        self.looks = Looks()
        self.held = Held(clock)
        self.knobs: Knobs | None = None
        self.commanded_weights: Weights | None = None
        self.weights_version = -1
        self._follow_weights()
        self.calls: dict[int, Call] = {}
        self.draining = False
        self._ids = itertools.count(1)
        self._client: aiohttp.ClientSession | None = None
        self._wire: Wire | None = None

    @property
    def wire(self) -> Wire:
        """The way to upstreams for requests of clients. Made inside the event loop, at first use."""
        if self._wire is None:
            self._wire = Wire(connect_s=2.0)
        return self._wire

    @property
    def client(self) -> aiohttp.ClientSession:
        """The one session to boards and metrics. Made inside the event loop, at first use."""
        if self._client is None:
            self._client = http.session(connect_s=2.0, read_s=self.config.limits.response_s)
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        if self._wire is not None:
            self._wire.close()
        if self.tracing is not None:
            await self.tracing.close()
        await self.budget.close()
        if self.recorder is not None:
            await self.recorder.close()

    # Requests in flight

    def begin(self, request_id: str, task: asyncio.Task[object]) -> Call:
        now_s = self.clock.monotonic()
        call = Call(next(self._ids), request_id, now_s, task, since_s=now_s)
        self.calls[call.id] = call
        self.telemetry.arrived(now_s)
        return call

    def end(self, call: Call) -> None:
        del self.calls[call.id]
        self.held.release()
        self.access.leave(call)
        self.shadow.ended(call, self.upstreams)
        self.forecasts.ended(call)
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

    def decide(
        self,
        request: ApiRequest,
        call: Call,
        tried: frozenset[str],
        failure: Failure | None,
        *,
        may_hold: bool = False,
    ) -> Decision:
        """Decide where a request goes and remember it. In shadow mode as if there were no closed API."""
        may_hold = may_hold and not self.config.spill.shadow
        context, before = spill_context(self, request, call, tried, failure, may_hold=may_hold), self.spill
        if self.config.spill.shadow:
            context = self._shadowed(context, call)
        decision, self.spill = decide(context, before)
        if self.recorder is not None:
            self.recorder.note("live", context, before, decision, self.spill)
        return decision

    def foresee(self, request: ApiRequest, call: Call, tried: frozenset[str], failure: Failure | None) -> Decision:
        """What `decide` would say, leaving no trace."""
        return decide(self._possible(request, call, tried, failure), self.spill)[0]

    def _possible(
        self, request: ApiRequest, call: Call, tried: frozenset[str], failure: Failure | None
    ) -> SpillContext:
        """What may be done now: in shadow mode nothing can leave."""
        context = spill_context(self, request, call, tried, failure)
        return own_alone(context) if self.config.spill.shadow else context

    def _shadowed(self, context: SpillContext, call: Call) -> SpillContext:
        """Note what would have been done; the context in which nothing can leave."""
        left = self.shadow.left_usd(self.budget.left_usd(), context.budget_left_usd, call.tenant)
        context = replace(context, budget_left_usd=left)
        before, decision = self.shadow.judge(context, self.spill, call)
        if self.recorder is not None:
            self.recorder.note("shadow", context, before, decision, self.shadow.state)
        return own_alone(context)

    def successor(
        self, request: ApiRequest, call: Call, tried: frozenset[str], *, closed: bool
    ) -> tuple[Decision, SpillState]:
        """Who would go on with a stream that broke, an own revision or a closed API; and the state for when it does.
        Its first token has come, so its age says nothing: load, breakers, rights, money and the share cap do."""
        context = replace(self._possible(request, call, tried, Failure.FAILED), elapsed_s=0.0)
        if closed:
            context = replace(context, tried=tried | {revision.name for revision in context.revisions})
        else:
            context = replace(context, targets=())
        decision, after = decide(context, self.spill)
        if self.recorder is not None:
            self.recorder.note("successor", context, self.spill, decision, after)
        return decision, after

    def lacking(self, request: ApiRequest) -> dict[str, str]:
        """Targets that are passed over for a request, each with the first field that it lacks."""
        asked = ((to.name, None if to.adapter is None else to.adapter.lacks(request)) for to in self.fleet.targets)
        # The client's own words may be in it, and it goes into a header.
        return {name: re.sub(r"[^!-~]", "?", lacks.field) for name, lacks in asked if lacks is not None}

    def output_bound(self, request: ApiRequest) -> int:
        """Most output tokens that a request can be billed for at a priced target."""
        limit = request.output_limit
        return (self.config.limits.spill_output_tokens if limit is None else limit) * request.choices

    def cost_bound_usd(self, request: ApiRequest, target: Upstream) -> Decimal:
        """The most that a request can cost at a target."""
        if not target.priced:
            return Decimal(0)
        return most_usd(prompt_bound(request), self.output_bound(request), target.price)

    def slo(self, call: Call) -> SloConfig:
        """What is promised to a request: its tier's own SLO or the deployment's, as it was when first asked for."""
        if call.slo is None:
            call.slo = slo_of(self.config.tiers or (), call.tier, self.config.slo)
        return call.slo

    def own_itl_slo_s(self, call: Call) -> float | None:
        """The ITL promised to a request where it is not what the deployment promises."""
        itl_s = self.slo(call).itl_p95_s
        return None if itl_s == self.config.slo.itl_p95_s else itl_s

    def asking(self, call: Call) -> Asking:
        """For whom a request would leave, by the policy in force now."""
        return Asking(self.config.egress, call.tenant, call.tier, call.egress)

    def load(self, upstream: Upstream, now_s: float) -> View:
        """What all workers together have at an upstream, as far as they told."""
        ledger = upstream.ledger
        return self.siblings.view(upstream.name, ledger.counts(now_s), ledger.head(), ledger.progress_s)

    def learn(self, upstream: Upstream, seen: First | Ended) -> None:
        """Move an upstream's estimate by a measurement, and let the other workers know."""
        upstream.learn(seen, self.clock.monotonic(), self.config.slo.itl_p95_s)
        self.siblings.note(upstream.name, seen)

    # Verdicts on upstreams

    def may_retry(self, upstream: Upstream) -> bool:
        """Whether an attempt beyond a request's first may go to an upstream: now is the moment that counts it."""
        allowed = self.retries.left() and self.retries.left_at(upstream.name)
        self.telemetry.retried(upstream.name, allowed=allowed)
        return allowed

    def sent(self, upstream: Upstream, *, retry: bool = False) -> None:
        self.retries.sent(upstream.name, retry=retry)
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
        self.commanded_weights = weights
        self._follow_weights()

    def _follow_weights(self) -> None:
        """Put the newest weights of file and command in force."""
        before = (self.weights_version, self.weights())
        self.weights_version, percent = in_force(self.config, self.commanded_weights)
        for upstream in self.fleet.revisions:
            upstream.weight = percent.get(upstream.name, 0)
        weights = self.weights()
        if before == (self.weights_version, weights):
            return
        self.telemetry.weights_version(self.weights_version)
        # Credits are shares of the weights they were earned under.
        self.spill = replace(self.spill, credits=(), spilling=self.spill.spilling.intersection(weights))
        self.log.info("weights in force", version=self.weights_version, weights=weights)

    def weights(self) -> dict[str, int]:
        return {upstream.name: upstream.weight for upstream in self.fleet.revisions}

    def _tell_prices(self) -> None:
        """Whose word each target's books are kept by."""
        for target in self.fleet.targets:
            price = target.price
            rates = {"input": str(price.input_usd_per_m), "output": str(price.output_usd_per_m)}
            self.log.info("price", target=target.name, usd_per_m=rates, source=price.source, dated=price.dated or None)

    # Configuration

    async def reconfigure(self, config: GatewayConfig, config_hash: str) -> None:
        """Serve by another configuration from now on; requests in flight end where they are. Raises ConfigRefused for
        a key file that cannot be read, and has then changed nothing."""
        access = self.access.prepared(config.auth)
        self.fleet = renew(self.fleet, config, self.clock)
        self.access.take(access)
        self.upstreams = self.fleet.by_name
        self.verifier = Verifier(config.trusted_keys)
        self.config, self.config_hash = config, config_hash
        self.telemetry.follow(self.fleet, config.slo)
        self.telemetry.log_ok_share = config.log_ok_share
        await self._follow_tracing(config)
        await self._follow_record(config)
        self._follow_weights()
        self.log.info("configuration in force", hash=config_hash)
        self._tell_prices()
        await self.budget.limit(limits_of(config))

    async def _follow_tracing(self, config: GatewayConfig) -> None:
        """Make traces as configured. Requests in flight end their spans where they began."""
        before = self.tracing
        if config.tracing != (None if before is None else before.config):
            self.tracing = None if config.tracing is None else Tracing(config.tracing, config.deployment)
            if before is not None:
                await before.close()

    async def _follow_record(self, config: GatewayConfig) -> None:
        """Write decisions down as configured."""
        before = self.recorder
        if config.record != (None if before is None else before.config):
            self.recorder = None if config.record is None else Recorder(config.record, self.clock, self.log)
            if before is not None:
                await before.close()

    async def keep_record(self) -> None:
        """Write down what was decided, a few times a second, until cancelled."""
        while True:
            await self.clock.sleep(FLUSH_S)
            if self.recorder is not None:
                await self.recorder.flush()

    def config_refused(self, why: str | None) -> None:
        """Remember that the newest configuration file cannot be served, or with None that it is in force."""
        if why is not None and why != self.config_error:
            self.log.error("the new configuration is refused; the one before goes on", error=why)
        if why is None and self.config_error is not None:
            self.log.info("the configuration file is in order again", hash=self.config_hash)
        self.config_error = why
        self.telemetry.config_loaded(why is None)

    def settle_fleet(self) -> None:
        """Forget upstreams that have left the configuration and whose last request has ended."""
        settled = self.fleet.settled()
        if settled is not self.fleet:
            self.fleet = settled
            self.telemetry.follow(settled, self.config.slo)

    def digest(self, window_s: float) -> GatewayDigest:
        digest = GatewayDigest(
            gateway=self.name,
            at_s=self.clock.time(),
            window_s=window_s,
            knobs_version=0 if self.knobs is None else self.knobs.version,
            weights=self.weights(),
            weights_version=self.weights_version,
            config_hash=self.config_hash,
            config_error=self.config_error,
            in_flight=len(self.calls),
        )
        return self.telemetry.counted(digest, self.clock.monotonic())


def hash_of(config: GatewayConfig) -> str:
    """Stands for the hash of the file where the configuration came from none."""
    return config_hash(orjson.dumps(config.to_json()))
