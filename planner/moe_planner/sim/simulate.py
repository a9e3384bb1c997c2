"""The event loop: requests, engines, reports, failures and knobs in order of time, from one seed."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np

from moe_core.setting import Setting
from moe_core.spill import Action, Failure, Thresholds
from moe_planner.sim.books import Snapshot, books
from moe_planner.sim.experts import Balance, ExpertLoad, load_over_time
from moe_planner.sim.gateway import Gateway
from moe_planner.sim.policy import Control, ControlContext, Policy, always_local
from moe_planner.sim.replica import Replica
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.signals import observe
from moe_planner.sim.workload import Workload
from moe_planner.sim.world import BURST_SHARE, LOCAL, World

NAN = math.nan
EVEN = Balance(1.0, 1.0, 1.0, 0.0)
_NOTHING: frozenset[str] = frozenset()
_PROGRESS_EVERY = 2048


def simulate(
    workload: Workload,
    world: World,
    policy: Policy | None = None,
    *,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    probe: Callable[[Snapshot], None] | None = None,
) -> Result:
    """Run a workload through a world until its last request has ended. The same arguments give the same result.

    `progress` hears the share of arrivals that are done with; `probe` sees the books after every event (slow).
    """
    run = Run(workload, world, policy or Policy(), seed)
    run.loop(progress, probe)
    return run.result()


class Run:
    """Live state of one simulation."""

    def __init__(self, workload: Workload, world: World, policy: Policy, seed: int) -> None:
        self.workload, self.world, self.policy = workload, world, policy
        self.rng = random.Random(seed)
        count = len(workload)
        self.at: list[float] = workload.at_s.tolist()
        self.input: list[int] = workload.input_tokens.tolist()
        self.output: list[int] = workload.output_tokens.tolist()
        self.made = [0] * count
        self.outcome = [-1] * count
        self.where = [-1] * count
        self.sent_s = [0.0] * count
        self.first_s = [NAN] * count
        self.ttft = [NAN] * count
        self.itl = [NAN] * count
        self.e2e = [NAN] * count
        self.usd = [0.0] * count
        self.p_miss = [NAN] * count
        self.work = [0.0] * count
        self.slot_wait = [0.0] * count
        self.gate = [0] * count
        if world.gateways > 1:
            self.gate = [self.rng.randrange(world.gateways) for _ in range(count)]
        self.tried: dict[int, frozenset[str]] = {}
        self.replicas = [Replica(world.engine, self.input, self.output, self.made) for _ in range(world.replicas)]
        self.plain = policy.decide is always_local
        self.gates = [Gateway(world, policy.decide, policy.state) for _ in range(world.gateways)]
        self.arrived = self.ended = 0
        self.log: list[tuple[float, int]] = []
        """(time, request) of every end, for the signals of a control."""
        self.api_sends: list[deque[float]] = [deque() for _ in world.apis]
        self.api_left = self.api_made = self.lost = 0
        self.spent, self.reserved = Decimal(0), Decimal(0)
        self.bounds: dict[int, Decimal] = {}
        unlimited = math.isinf(world.budget_usd)
        self.budget = Decimal("Infinity") if unlimited else Decimal(str(world.budget_usd))
        self.setting, self.thresholds = policy.setting, world.thresholds
        self.control_state = policy.control_state
        self.settings: list[tuple[float, str]] = []
        self.experts: ExpertLoad | None = None
        self.spell, self.balance = 0, EVEN
        self.events: list[tuple[float, int, Callable[[float, Any], None], Any]] = []
        self.order = 0
        self.now = 0.0
        self.turn = 0
        self.preempted = (0, 0.0)
        """Preemptions until a moment: what the signals counted from last."""
        self.wakes = [math.inf] * max(1, len(self.replicas))
        self._schedule_world(seed)

    def _schedule_world(self, seed: int) -> None:
        world, policy = self.world, self.policy
        if world.experts is not None and self.replicas:
            horizon = self.at[-1] + 1.0 if self.at else 1.0
            self.experts = load_over_time(world.experts, horizon, seed)
            for place, moment in enumerate(self.experts.from_s.tolist()):
                self.push(moment, self.drift, place)
        for outage in world.outages:
            self.push(outage.from_s, self.fail, outage.replica)
            self.push(outage.until_s, self.recover, outage.replica)
        if not self.plain and self.replicas:
            self.push(0.0, self.report, None)
        if policy.control is not None:
            self.push(policy.control_every_s, self.tick, policy.control)
        self.apply(policy.setting)

    def push(self, at: float, what: Callable[[float, Any], None], payload: Any) -> None:
        self.order += 1
        heapq.heappush(self.events, (at, self.order, what, payload))

    # The loop

    def loop(self, progress: Callable[[float], None] | None, probe: Callable[[Snapshot], None] | None) -> None:
        at, events, wakes = self.at, self.events, self.wakes
        total, arrived = len(at), 0
        arrival = at[0] if total else math.inf
        while self.ended < total:
            wake = min(wakes)
            event = events[0][0] if events else math.inf
            # At one moment: what happens to the world, then arrivals, then steps: who comes together runs together.
            if wake < arrival and wake < event:
                self.now = wake
                self.step(wakes.index(wake), wake)
            elif event <= arrival:
                when, _, what, payload = heapq.heappop(events)
                self.now = when
                what(when, payload)
            else:
                self.now = arrival
                request = arrived
                arrived += 1
                self.arrived = arrived
                arrival = at[arrived] if arrived < total else math.inf
                self.place(request, self.now, _NOTHING, None)
                if progress is not None and not arrived % _PROGRESS_EVERY:
                    progress(arrived / total)
            if probe is not None:
                probe(books(self))

    def step(self, index: int, now: float) -> None:
        """A replica's jump has ended: note first tokens and ends, and begin the next."""
        replica = self.replicas[index]
        first, ended = replica.finish()
        plain = self.plain
        for request in first:
            if self.first_s[request] != self.first_s[request]:  # not after a preemption
                self.first_s[request] = now
                overhead = self.world.engine.overhead_s
                self.ttft[request] = now + overhead - self.at[request]
                if not plain:
                    gate = self.gates[self.gate[request]]
                    gate.waiting -= 1
                    gate.waiting_tokens -= self.input[request]
                    gate.running += 1
                    gate.first_token(
                        LOCAL,
                        now,
                        self.work[request],
                        self.input[request],
                        self.slot_wait[request],
                        now + overhead - self.sent_s[request],
                    )
        for request in ended:
            tokens, itl = self.output[request], None
            if tokens > 1:
                self.itl[request] = itl = (now - self.first_s[request]) / (tokens - 1)
            if not plain:
                gate = self.gates[self.gate[request]]
                gate.running -= 1
                gate.ended(LOCAL, itl, tokens)
            self.end(request, Outcome.LOCAL, now)
        replica.begin(now)
        self.wakes[index] = replica.end

    # Requests

    def place(self, request: int, now: float, tried: frozenset[str], failure: Failure | None) -> None:
        """Send a request where the policy says, and again elsewhere where that fails before the first token."""
        if self.plain:
            if not self.to_replica(request, now):
                self.end(request, Outcome.FAILED, now)
            return
        gate = self.gates[self.gate[request]]
        while True:
            elapsed = now - self.at[request]
            left = self.budget - self.spent - self.reserved
            decision = gate.decide(now, self.input[request], elapsed, self.thresholds, left, tried, failure)
            if decision.forecast is not None and not tried:
                self.p_miss[request] = decision.forecast.p_miss
            if decision.target is None:
                self.end(request, Outcome.FAILED if tried else Outcome.SHED, now)
                return
            name = decision.target
            gate.sent(name, now)
            self.sent_s[request] = now
            tried = tried | {name}
            if decision.action is Action.LOCAL:
                forecast = decision.forecast
                if forecast is not None:
                    self.work[request], self.slot_wait[request] = forecast.work_tokens, forecast.slot_wait_s
                if self.to_replica(request, now):
                    gate.waiting += 1
                    gate.waiting_tokens += self.input[request]
                    self.tried[request] = tried
                    return
                gate.failed(name, now)
                failure = Failure.FAILED
                continue
            place = gate.names.index(name) - 1
            if self.to_api(request, place, now, gate):
                return

    def to_replica(self, request: int, now: float) -> bool:
        """To the replica with the fewest requests, in turn among equals (HAProxy's leastconn, as Serve has it)."""
        best, least = -1, math.inf
        replicas = self.replicas
        if len(replicas) == 1:
            best = 0 if replicas[0].up else -1
        else:
            count = len(replicas)
            self.turn += 1
            for offset in range(count):
                index = (self.turn + offset) % count
                replica = replicas[index]
                if replica.up and replica.load < least:
                    best, least = index, replica.load
        if best < 0:
            return False
        replica = replicas[best]
        if not replica.fits(request):
            return False
        self.where[request] = best
        replica.add(request, now)
        self.wakes[best] = replica.end
        return True

    def to_api(self, request: int, place: int, now: float, gate: Gateway) -> bool:
        """Send to a closed API; False where it refuses."""
        api = self.world.apis[place]
        if api.down(now):
            gate.failed(api.name, now)
            return False
        sends = self.api_sends[place]
        while sends and sends[0] <= now - 60.0:
            sends.popleft()
        busy = len(sends) >= BURST_SHARE * api.requests_per_minute
        if len(sends) >= api.requests_per_minute or (busy and self.rng.random() < api.p_429_in_burst):
            gate.abandoned(api.name, now)
            return False
        sends.append(now)
        bound = gate.cost_bound_usd(api.name, self.input[request])
        self.bounds[request] = bound
        self.reserved += bound
        self.where[request] = place
        self.api_left += self.output[request]
        ttft = api.ttft_median_s * math.exp(api.sigma * self.rng.gauss(0.0, 1.0))
        self.push(now + ttft, self.api_first, request)
        return True

    def api_first(self, now: float, request: int) -> None:
        api = self.world.apis[self.where[request]]
        gate, inputs = self.gates[self.gate[request]], self.input[request]
        self.first_s[request] = now
        self.ttft[request] = now - self.at[request]
        gate.first_token(api.name, now, inputs, inputs, 0.0, now - self.sent_s[request])
        self.push(now + (self.output[request] - 1) * api.itl_s, self.api_end, request)

    def api_end(self, now: float, request: int) -> None:
        api = self.world.apis[self.where[request]]
        gate, tokens = self.gates[self.gate[request]], self.output[request]
        if tokens > 1:
            self.itl[request] = api.itl_s
        gate.ended(api.name, api.itl_s if tokens > 1 else None, tokens)
        self.usd[request] = usd = api.usd(self.input[request], tokens)
        self.spent += Decimal(f"{usd:.9f}")
        self.reserved -= self.bounds.pop(request)
        self.api_left -= tokens
        self.api_made += tokens
        self.end(request, Outcome.API, now)

    def end(self, request: int, outcome: Outcome, now: float) -> None:
        self.outcome[request] = outcome
        self.ended += 1
        if outcome is Outcome.LOCAL:
            self.e2e[request] = now + self.world.engine.overhead_s - self.at[request]
        elif outcome is Outcome.API:
            self.e2e[request] = now - self.at[request]
        else:
            self.lost += self.output[request] - self.made[request]
            if outcome is not Outcome.CUT:
                self.where[request] = -1
        if self.policy.control is not None:
            self.log.append((now, request))

    def recover(self, _: float, index: int) -> None:
        self.replicas[index].up = True

    def fail(self, now: float, index: int) -> None:
        """A replica dies. Requests with a first token are cut; the others are decided anew."""
        replica = self.replicas[index]
        lost = replica.fail(now)
        self.wakes[index] = math.inf
        again = []
        for request in lost:
            if not self.plain:
                gate = self.gates[self.gate[request]]
                if self.first_s[request] == self.first_s[request]:
                    gate.running -= 1
                else:
                    gate.waiting -= 1
                    gate.waiting_tokens -= self.input[request]
                gate.failed(LOCAL, now)
            if self.first_s[request] == self.first_s[request]:
                self.end(request, Outcome.CUT, now)
            else:
                again.append(request)
        for request in again:
            self.place(request, now, self.tried.get(request, _NOTHING), Failure.FAILED)

    # Reports and knobs

    def report(self, now: float, _: None) -> None:
        up = [replica for replica in self.replicas if replica.up]
        if up:
            running, waiting = sum(replica.running for replica in up), sum(len(replica.queue) for replica in up)
            usage, limit = max(replica.kv_usage for replica in up), sum(replica.active_limit for replica in up)
            self.push(now + self.world.report_lag_s, self.reported, (running, waiting, usage, limit, now))
        self.push(now + self.world.report_every_s, self.report, None)

    def reported(self, _: float, counts: tuple[int, int, float, int, float]) -> None:
        for gate in self.gates:
            gate.reported(*counts)

    def tick(self, now: float, control: Control) -> None:
        policy = self.policy
        context = ControlContext(now, observe(self, now, policy.control_window_s), self.setting)
        setting, self.control_state = control(context, self.control_state)
        if setting is not None and setting != self.setting:
            self.push(now + policy.control_delay_s, self.move, setting)
        self.push(now + policy.control_every_s, self.tick, control)

    def move(self, now: float, setting: Setting) -> None:
        self.apply(setting)
        self.settings.append((now, setting.text()))

    def drift(self, _: float, spell: int) -> None:
        self.spell = spell
        self.slow_down()

    def apply(self, setting: Setting) -> None:
        """Put knobs in force: limits at once, speeds from each replica's next step on."""
        self.setting = setting
        engine, given = self.world.engine, self.world.thresholds
        active = min(engine.max_active, setting.engine.max_active_seqs or engine.max_active)
        tokens = min(engine.max_batched_tokens, setting.engine.max_batched_tokens or engine.max_batched_tokens)
        for replica in self.replicas:
            replica.active_limit, replica.token_limit = active, max(tokens, engine.max_active)
        miss, cap = setting.fallback.miss_probability, setting.fallback.share_cap
        self.thresholds = Thresholds(
            given.miss_probability if miss is None else miss, given.share_cap if cap is None else cap
        )
        self.slow_down()

    def slow_down(self) -> None:
        """Let expert load and capacity act on the speed of every replica."""
        engine, experts = self.world.engine, self.experts
        prefill, decode = engine.prefill_token_s, engine.active_s
        if experts is not None:
            self.balance = experts.balance(self.spell, self.setting.experts)
            of = experts.of
            prefill *= 1.0 + of.prefill_share * (self.balance.prefill - 1.0)
            full = engine.decode_s + engine.max_active * engine.active_s
            decode += of.decode_share * full / engine.max_active * (self.balance.decode - 1.0)
        for index, replica in enumerate(self.replicas):
            replica.prefill_token_s, replica.active_s = prefill, max(0.0, decode)
            if replica.end < math.inf:
                replica.cut(self.now)
                self.wakes[index] = replica.end

    # The end

    def result(self) -> Result:
        return Result(
            self.workload,
            self.world,
            np.array(self.outcome, dtype=np.int8),
            np.array(self.where, dtype=np.int16),
            np.array(self.ttft),
            np.array(self.itl),
            np.array(self.e2e),
            np.array(self.usd),
            np.array(self.p_miss),
            self.now,
            tuple(replica.busy_s for replica in self.replicas),
            sum(replica.preemptions for replica in self.replicas),
            tuple(self.settings),
        )
