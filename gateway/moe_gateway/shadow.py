"""Shadow mode: what the policy would have sent away, counted and priced, while nothing leaves and nothing is held.

Each request is judged with the queue that is really there, which no spill has made shorter, so that an active gateway
would mostly send away less. The dollars are those of the tokens that the own model took and gave (of a request that got
no answer: its prompt by length, and as many as answers have had of late), at the target's price. They end at the budget
of the day, by this process's own count.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from decimal import Decimal

from prometheus_client import CollectorRegistry

from moe_core import metrics
from moe_core.clock import Clock
from moe_core.forecast import SpillContext
from moe_core.prices import cost_usd
from moe_core.spill import Action, Decision, SpillState, decide
from moe_gateway.call import Call, Would
from moe_gateway.upstream import Upstream

TENANTS_MAX = 10_000
HTTP_OK = 200
DAY_S = 86400


def own_alone(context: SpillContext) -> SpillContext:
    """The context without any closed API."""
    return replace(context, targets=(), budget_left_usd=None)


class Shadow:
    """What one process would have done so far."""

    def __init__(self, deployment: str, registry: CollectorRegistry, clock: Clock) -> None:
        self._deployment, self._clock = deployment, clock
        self.state = SpillState()
        self.requests, self.usd = 0, Decimal(0)
        self._day = 0
        self._spent: defaultdict[str | None, Decimal] = defaultdict(Decimal)
        """Of this day, by tenant; of all of them under None."""
        self._spilled = metrics.counter(metrics.GATEWAY_SHADOW_SPILLED, registry)
        self._spend = metrics.counter(metrics.GATEWAY_SHADOW_SPEND, registry)

    def left_usd(self, whole: Decimal | None, tenants: Decimal | None, tenant: str | None) -> Decimal | None:
        """The budget as it would stand now, by what is really left of the deployment's and of the tenant's."""
        if whole is None or tenants is None:
            return None
        self._turn()
        own = self._spent.get(tenant, Decimal(0)) if tenant is not None else Decimal(0)
        return min(whole - self._spent[None], tenants - own)

    def judge(self, context: SpillContext, live: SpillState, call: Call) -> tuple[SpillState, Decision]:
        """Decide as if it counted: the state from which it was decided, and the decision. The revision weighed is the
        one whose turn it really is."""
        before = replace(self.state, credits=live.credits)
        decision, self.state = decide(context, before)
        if decision.action is Action.SPILL and decision.target is not None and call.would is None:
            most = next(target.cost_usd for target in context.targets if target.name == decision.target)
            answer = max(revision.estimate.output_tokens for revision in context.revisions)
            call.would = Would(decision.target, decision.reason, most, round(context.prompt_tokens), round(answer))
            self._add(call.tenant, most)
        return before, decision

    def ended(self, call: Call, targets: dict[str, Upstream]) -> None:
        """Count a request that would have been spilled, by the tokens that it came to."""
        would = call.would
        if would is None:
            return
        target = targets.get(would.target)
        answered = call.status == HTTP_OK
        prompt_tokens = call.prompt_tokens if answered else would.prompt_tokens
        output_tokens = call.output_tokens if answered else would.output_tokens
        usd = Decimal(0) if target is None else cost_usd(prompt_tokens, output_tokens, target.price)
        self._add(call.tenant, usd - would.usd)
        would.usd = usd
        self.requests += 1
        self.usd += usd
        self._spilled.labels(self._deployment, would.target, would.reason.value).inc()
        self._spend.labels(self._deployment, would.target).inc(float(usd))

    def _add(self, tenant: str | None, usd: Decimal) -> None:
        self._turn()
        for scope in {None, tenant}:
            if scope in self._spent or len(self._spent) < TENANTS_MAX:
                self._spent[scope] = max(Decimal(0), self._spent[scope] + usd)

    def _turn(self) -> None:
        day = int(self._clock.time() // DAY_S)
        if day != self._day:
            self._day = day
            self._spent.clear()
            self._spent[None] = Decimal(0)
