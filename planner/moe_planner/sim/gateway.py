"""One gateway as production's is built: a ledger, estimates, breakers and reports feed `moe_core.spill`.

It keeps for each upstream what `moe_gateway.state` and `moe_gateway.attempt` keep, and moves it at the same moments by
the same functions of moe_core: breakers on send, success and failure; estimates on first tokens and ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, overload

from moe_core import breaker as breakers
from moe_core.breaker import Breaker
from moe_core.forecast import EngineReport, Failure, RevisionView, SpillContext, TargetView, Thresholds, foreign_load
from moe_core.latency import Ended, First, LatencyEstimate, Look, learned
from moe_core.spill import Decision
from moe_planner.sim.policy import Decide, Policy
from moe_planner.sim.world import LOCAL, World

CLOSED = Breaker()
API_PRIOR = LatencyEstimate(base_prior_s=0.6, slope_prior_s=2e-5, itl_s=0.02)
"""What a gateway takes for granted of a closed API before its first answer."""
BYTES_PER_TOKEN = 4
"""The most that a request can cost counts every byte of its body as a token."""
_NO_HEAD = (math.inf, 0)
SMOOTH_REPORTS = 3
_MILLION = Decimal(1_000_000)


class Siblings:
    """What workers last told one another of their ledgers: all at the same moments, `every_s` apart.

    The first change or question after such a moment looks at all ledgers, which are then as they were at it.
    """

    def __init__(self, every_s: float) -> None:
        self.gates: list[Gateway] = []
        self._every_s, self._next_s = every_s, 0.0
        self.waiting = self.running = self.tokens = 0
        self.progress_s = 0.0
        self.unsaid: list[tuple[str, First | Ended, float]] = []

    def tell(self, now_s: float) -> None:
        if now_s < self._next_s:
            return
        self._next_s = now_s - now_s % self._every_s + self._every_s
        gates = self.gates
        for gate in gates:
            gate.told = (gate.waiting, gate.waiting_tokens, gate.running, gate.head())
        self.waiting = sum(gate.waiting for gate in gates)
        self.tokens = sum(gate.waiting_tokens for gate in gates)
        self.running = sum(gate.running for gate in gates)
        self.progress_s = max(gate.progress_s for gate in gates)
        for one in self.unsaid:
            gates[0].learn_at_once(*one)
        self.unsaid.clear()


class Gateway:
    """Live state of one gateway process."""

    def __init__(self, world: World, decide: Decide, state: Any, siblings: Siblings | None = None) -> None:
        self._siblings = siblings
        if siblings is not None:
            siblings.gates.append(self)
        self.told: tuple[int, int, int, tuple[float, int]] = (0, 0, 0, _NO_HEAD)
        self._queue: dict[int, tuple[float, int]] = {}
        self.progress_s = 0.0
        """When a prompt was done last."""
        self.prompts_done = 0.0
        self._foreign: list[tuple[int, int]] = []
        self._decide, self._state = decide, state
        self.names = (LOCAL, *(api.name for api in world.apis))
        self.estimates: dict[str, LatencyEstimate] = dict.fromkeys(self.names, API_PRIOR)
        self.estimates[LOCAL] = LatencyEstimate()
        if siblings is not None:  # what one sees, all learn from
            self.estimates = siblings.gates[0].estimates
        self.breakers: dict[str, Breaker] = dict.fromkeys(self.names, CLOSED)
        self.waiting = self.running = 0
        self.waiting_tokens = 0
        self._report: tuple[int, int, float, int, int, int, int, int] | None = None
        self._report_at_s = 0.0
        self._slo_s, self._itl_slo_s = world.slo.ttft_s, world.slo.itl_s
        self._prices = tuple(
            (
                api.name,
                Decimal(str(api.usd_per_m_input)) * BYTES_PER_TOKEN / _MILLION,
                Decimal(str(api.usd_per_m_output)) * world.output_bound / _MILLION,
                api.usd_per_m_input / 1e6,
                api.usd_per_m_output / 1e6,
            )
            for api in world.apis
        )

    def cost_bound_usd(self, name: str, input_tokens: int) -> Decimal:
        """The most that a request can cost at a target."""
        return next(fixed + input_tokens * each for target, each, fixed, *_ in self._prices if target == name)

    def reported(
        self,
        running: int,
        waiting: int,
        kv_usage: float,
        active_limit: int,
        at_s: float,
        replicas: int,
        step_tokens: int,
    ) -> None:
        """A report of the engines has come; it says how things were at `at_s`."""
        known_waiting, _, known_running, _ = self._known(at_s)
        foreign = foreign_load(running, waiting, known_running, known_waiting)
        self._foreign = [*self._foreign, foreign][-SMOOTH_REPORTS:]
        self._report = (running, waiting, kv_usage, active_limit, *min(self._foreign, key=sum), replicas, step_tokens)
        self._report_at_s = at_s

    def head(self) -> tuple[float, int]:
        """(when it was sent, its prompt tokens) of the request that waits longest."""
        return next(iter(self._queue.values()), _NO_HEAD)

    def _known(self, now_s: float) -> tuple[int, int, int, tuple[float, int]]:
        """(waiting, tokens, running, (since, tokens) of the prompt at work): own ledger, and what siblings told."""
        siblings = self._siblings
        since, tokens = self.head()
        if siblings is None:
            return self.waiting, self.waiting_tokens, self.running, (max(since, self.progress_s), tokens)
        siblings.tell(now_s)
        waiting, waiting_tokens, running, _ = self.told
        for gate in siblings.gates:
            if gate is not self and gate.told[3][0] < since:
                since, tokens = gate.told[3]
        return (
            self.waiting + siblings.waiting - waiting,
            self.waiting_tokens + siblings.tokens - waiting_tokens,
            self.running + siblings.running - running,
            (max(since, self.progress_s, siblings.progress_s), tokens),
        )

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
            running, waiting, kv_usage, limit, foreign_running, foreign_waiting, replicas, tokens = known
            age_s = now_s - self._report_at_s
            report = EngineReport(
                running, waiting, kv_usage, limit, age_s, foreign_running, foreign_waiting, replicas, tokens
            )
        allowed, estimates = self.breakers, self.estimates
        own_waiting, own_tokens, own_running, (since_s, head_tokens) = self._known(now_s)
        revision = RevisionView(
            LOCAL,
            100,
            breakers.allows(allowed[LOCAL], now_s),
            own_waiting,
            own_tokens,
            own_running,
            report,
            estimates[LOCAL],
            head_tokens,
            max(0.0, now_s - since_s) if head_tokens else 0.0,
        )
        targets = _Targets(self, now_s, input_tokens) if self._prices else ()
        context = SpillContext(
            now_s,
            input_tokens,
            self._slo_s,
            thresholds,
            (revision,),
            targets,
            budget_left_usd if self._prices else None,
            elapsed_s,
            tried,
            failure,
            self._itl_slo_s,
            may_hold=not tried,
        )
        decision, self._state = self._decide(context, self._state)
        return decision

    def targets(self, now_s: float, input_tokens: int) -> Iterator[TargetView]:
        """The closed APIs as they are now, for a request of this length."""
        estimates, allowed = self.estimates, self.breakers
        own = estimates[LOCAL]
        for name, each, fixed, input_usd, output_usd in self._prices:
            yield TargetView(
                name,
                breakers.allows(allowed[name], now_s),
                fixed + input_tokens * each,
                estimates[name],
                input_usd * input_tokens + output_usd * own.output_tokens,
                input_usd * own.prompt_tokens + output_usd * own.output_tokens,
            )

    # What becomes of requests

    def queued(self, request: int, now_s: float, tokens: int) -> None:
        """A request was sent to the own replicas."""
        self._tell(now_s)
        self.waiting += 1
        self.waiting_tokens += tokens
        self._queue[request] = (now_s, tokens)

    def left_queue(self, request: int, now_s: float) -> None:
        """Its prompt is done, or it is lost."""
        self._tell(now_s)
        self.waiting -= 1
        self.waiting_tokens -= self._queue.pop(request)[1]
        self.progress_s = now_s

    def decoding(self, more: int, now_s: float) -> None:
        self._tell(now_s)
        self.running += more

    def _tell(self, now_s: float) -> None:
        if self._siblings is not None:
            self._siblings.tell(now_s)

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

    def learn(self, name: str, seen: First | Ended, now_s: float) -> None:
        """A request's first token has come from an upstream, or its end."""
        if isinstance(seen, First):
            self.succeeded(name)
        if self._siblings is None:
            self.learn_at_once(name, seen, now_s)
        else:
            self._siblings.unsaid.append((name, seen, now_s))

    def learn_at_once(self, name: str, seen: First | Ended | Look, now_s: float) -> None:
        if name == LOCAL and isinstance(seen, First):
            self.prompts_done += seen.prompt_tokens
        self.estimates[name] = learned(self.estimates[name], seen, now_s, self._itl_slo_s)


class _Targets(Sequence[TargetView]):
    """The closed APIs, worked out when a decision first asks, as in the gateway: most never do."""

    __slots__ = ("_gate", "_input_tokens", "_made", "_now_s")

    def __init__(self, gate: Gateway, now_s: float, input_tokens: int) -> None:
        self._gate, self._now_s, self._input_tokens = gate, now_s, input_tokens
        self._made: tuple[TargetView, ...] | None = None

    def _all(self) -> tuple[TargetView, ...]:
        if self._made is None:
            self._made = tuple(self._gate.targets(self._now_s, self._input_tokens))
        return self._made

    def __iter__(self) -> Iterator[TargetView]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def __getitem__(self, index: int) -> TargetView: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TargetView, ...]: ...
    def __getitem__(self, index: int | slice) -> TargetView | tuple[TargetView, ...]:
        return self._all()[index]


def gateways(world: World, decide: Decide, policy: Policy) -> list[Gateway]:
    """Those of a world. Several tell one another their ledgers, unless the policy says that they do not."""
    every_s = policy.share_every_s
    siblings = Siblings(every_s) if every_s is not None and world.gateways > 1 else None
    return [Gateway(world, decide, policy.state, siblings) for _ in range(world.gateways)]
