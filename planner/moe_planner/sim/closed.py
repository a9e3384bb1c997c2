"""Closed APIs of a running simulation: limits, refusals, answers, and a budget reserved before, settled after."""

from __future__ import annotations

import math
from collections import deque
from decimal import Decimal
from typing import TYPE_CHECKING

from moe_core.latency import Ended, First
from moe_planner.sim.gateway import Gateway
from moe_planner.sim.result import Outcome
from moe_planner.sim.world import BURST_SHARE

if TYPE_CHECKING:
    from moe_planner.sim.simulate import Run


class ClosedApis:
    """Live state of every API of a world. `left` and `made` are output tokens, `spent` and `reserved` dollars."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._apis = run.world.apis
        self._sends: list[deque[float]] = [deque() for _ in self._apis]
        self._bounds: dict[int, Decimal] = {}
        self._spent, self._reserved = Decimal(0), Decimal(0)
        unlimited = math.isinf(run.world.budget_usd)
        self._budget = Decimal("Infinity") if unlimited else Decimal(str(run.world.budget_usd))
        self.left = self.made = 0

    @property
    def budget_left(self) -> Decimal:
        return self._budget - self._spent - self._reserved

    def send(self, request: int, place: int, now: float, gate: Gateway) -> bool:
        """Send a request to the API at a place; False where it refuses."""
        run, api = self._run, self._apis[place]
        if api.down(now):
            gate.failed(api.name, now)
            return False
        sends = self._sends[place]
        while sends and sends[0] <= now - 60.0:
            sends.popleft()
        busy = len(sends) >= BURST_SHARE * api.requests_per_minute
        if len(sends) >= api.requests_per_minute or (busy and run.rng.random() < api.p_429_in_burst):
            gate.abandoned(api.name, now)
            return False
        sends.append(now)
        bound = gate.cost_bound_usd(api.name, run.input[request])
        self._bounds[request] = bound
        self._reserved += bound
        run.where[request] = place
        self.left += run.output[request]
        ttft = api.ttft_median_s * math.exp(api.sigma * run.rng.gauss(0.0, 1.0))
        run.push(now + ttft, self._first, request)
        return True

    def _first(self, now: float, request: int) -> None:
        run = self._run
        api = self._apis[run.where[request]]
        gate, inputs = run.gates[run.gate[request]], run.input[request]
        run.first_s[request] = now
        run.ttft[request] = now - run.at[request]
        gate.learn(api.name, First(inputs, inputs, 0.0, now - run.sent_s[request]), now)
        run.push(now + (run.output[request] - 1) * api.itl_s, self._end, request)

    def _end(self, now: float, request: int) -> None:
        run = self._run
        api = self._apis[run.where[request]]
        gate, tokens = run.gates[run.gate[request]], run.output[request]
        if tokens > 1:
            run.itl[request] = api.itl_s
        gate.learn(api.name, Ended(api.itl_s if tokens > 1 else None, tokens), now)
        run.usd[request] = usd = api.usd(run.input[request], tokens)
        self._spent += Decimal(f"{usd:.9f}")
        self._reserved -= self._bounds.pop(request)
        self.left -= tokens
        self.made += tokens
        run.end(request, Outcome.API, now)
