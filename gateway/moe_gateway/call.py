"""One request in flight: who may stop it and why, and what was learned of it for the metrics and the log."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any

from moe_core.config import SloConfig
from moe_core.forecast import Forecast
from moe_core.spill import Blocked, Reason


class Outcome(StrEnum):
    """How a request ended; the label of moestack_gateway_requests_total."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    ERROR = "error"
    CUT = "cut"
    CANCELLED = "cancelled"
    SHED = "shed"


class Phase(StrEnum):
    """What a request waits for, so that a stall can be told from work."""

    RECEIVING = "receiving"
    DECIDING = "deciding"
    WAITING = "waiting"
    READING = "reading"
    SENDING = "sending"


class Stop(StrEnum):
    """Why a request is stopped from outside."""

    CLIENT_GONE = "client_gone"
    CLIENT_STALLED = "client_stalled"
    UPSTREAM_STALLED = "upstream_stalled"
    DRAINING = "draining"


@dataclass(slots=True)
class Would:
    """Where a request would have been spilled to, and why; `usd` is the most it could cost until it has ended."""

    target: str
    reason: Reason
    usd: Decimal
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Call:
    """A request from arrival to its end. Times are monotonic seconds."""

    id: int
    request_id: str
    arrived_s: float
    task: asyncio.Task[object]
    endpoint: str = ""
    model: str = ""
    provider: str | None = None
    """Who answers: gen_ai.provider.name."""
    prompt: object = None
    """What was asked, only where the configuration wants prompts in the log."""
    trace: Any = None
    """Its span, where traces are made."""
    traceparent: str | None = None
    """What names the trace to our own engine."""
    stream: bool = False
    phase: Phase = Phase.RECEIVING
    since_s: float = 0.0
    stop: Stop | None = None
    tier: str = "default"
    slo: SloConfig | None = None
    """What was promised to it when it was first decided about."""
    egress: str | None = None
    """What the request itself says of where it may go (header x-moestack-egress)."""
    tenant: str | None = None
    """Who asks, by authentication; by the header x-moestack-tenant only where there is none."""
    key_id: str | None = None
    """Which key or token it came with: a name that tells nothing of the key itself."""
    # The decision that counted, and what came of it.
    upstream: str | None = None
    local: bool = True
    reason: Reason | None = None
    spilled: bool = False
    blocked: Blocked | None = None
    session: str | None = None
    """Key of its session, where the configuration says what tells one."""
    would: Would | None = None
    """Where it would have gone, in shadow mode."""
    forecast: Forecast | None = None
    attempts: int = 0
    lost_at: list[str] = field(default_factory=list)
    """Upstreams that failed before its first token, so that another one was tried."""
    started: bool = False
    status: int = 0
    outcome: Outcome | None = None
    error: str | None = None
    ttft_s: float | None = None
    itl_s: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    usd: Decimal = field(default_factory=Decimal)
    # Of a stream that broke and was gone on with.
    client_gone: bool = False
    first_s: float | None = None
    """When its first content token came."""
    takeover: str | None = None
    """How it went on last: continue or splice."""
    broke_at: list[str] = field(default_factory=list)
    """Upstreams at which it broke, and was gone on with elsewhere."""
    carried_tokens: int = 0
    """Output tokens of the attempts before the last."""
    spilled_to: str | None = None
    """The closed API that had it, where an own revision went on with it."""

    def enter(self, phase: Phase, now_s: float) -> None:
        self.phase = phase
        self.since_s = now_s

    def cancel(self, stop: Stop) -> None:
        """Stop the request. The first reason stays."""
        self.client_gone = self.client_gone or stop is Stop.CLIENT_GONE
        if self.stop is None:
            self.stop = stop
            self.task.cancel()
