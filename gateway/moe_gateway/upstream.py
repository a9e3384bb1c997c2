"""One upstream: how to send to it, how its failures are told apart, and what is known of it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from moe_core import breaker as breakers
from moe_core.breaker import Breaker, BreakerMode
from moe_core.config import TargetConfig
from moe_core.forecast import EngineReport
from moe_core.latency import SLOW_PRIOR, Ended, First, LatencyEstimate, Look, learned
from moe_core.log import redact
from moe_core.prices import FREE, Price
from moe_core.wire import ReplicaDigest
from moe_gateway.egress import Asking
from moe_gateway.ledger import Ledger
from moe_gateway.openai_api import ApiRequest
from moe_gateway.providers.base import Adapter
from moe_gateway.settings import KeyFile
from moe_gateway.tiers import engine_body
from moe_gateway.wire import ConnectFailed, Response, Wire

OVERLOAD_STATUSES = frozenset({429, 503, 529})
RETRY_STATUSES = frozenset({408, *OVERLOAD_STATUSES})
# From a closed API these mean that our own key, account or model name is wrong: the client's request is not to blame.
CREDENTIAL_STATUSES = frozenset({401, 402, 403, 404})
TOKENS_PER_BYTE_PRIOR = 0.25
PROMISES_MAX = 16
"""ITL promises that are told apart at an upstream: twice the tiers of a resource, for those of before."""
_KEEP_HEADERS = ("content-type", "retry-after")


class Fault(StrEnum):
    """How an attempt failed before its first token reached the client."""

    REFUSED = "refused"
    RESET = "reset"
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"
    STATUS = "status"
    CREDENTIALS = "credentials"
    MALFORMED = "malformed"
    IN_BAND = "in_band"
    FORBIDDEN = "forbidden"


class UpstreamFailed(Exception):
    """An attempt that failed before its first token. `maybe_billed`: the upstream may have done the work."""

    def __init__(self, fault: Fault, detail: str, *, status: int = 0, maybe_billed: bool = False) -> None:
        super().__init__(detail)
        self.fault = fault
        self.status = status
        self.maybe_billed = maybe_billed


class Rejected(Exception):
    """A client error: the answer goes back as it came and nothing else is tried."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.body = body
        self.headers = headers


@dataclass
class Upstream:
    """Live state of one revision or target."""

    name: str
    base_url: str
    target: TargetConfig | None = None
    key: KeyFile | None = None
    adapter: Adapter | None = None
    """How to speak with a target; a revision speaks OpenAI's form."""
    price: Price = FREE
    """Of a closed API; local tokens have no price here."""
    weight: int = 0
    breaker: Breaker = field(default_factory=Breaker)
    ledger: Ledger = field(default_factory=Ledger)
    estimate: LatencyEstimate = field(default_factory=LatencyEstimate)
    report: EngineReport | None = None
    report_at_s: float = 0.0
    replicas: tuple[ReplicaDigest, ...] = ()
    """What its board said last."""
    odds: dict[float, tuple[float, float]] = field(default_factory=dict)
    """By ITL SLO of tiers that have their own: told and seen probability of missing it, as `estimate` has them for the
    deployment's."""
    prompts_done: float = 0.0
    """Prompt tokens of all requests whose first token was seen, here or by another worker."""
    tokens_per_byte: float = TOKENS_PER_BYTE_PRIOR
    ours: bool = False
    """Whether it is an engine of this project, which has a board and knows tiers."""

    @property
    def local(self) -> bool:
        return self.target is None

    @property
    def priced(self) -> bool:
        return not self.price.free

    def available(self, now_s: float) -> bool:
        return breakers.allows(self.breaker, now_s)

    def probing(self) -> bool:
        return self.breaker.mode is not BreakerMode.CLOSED

    def estimate_for(self, itl_slo_s: float | None) -> LatencyEstimate:
        """The estimate by which a promise is weighed; None: the deployment's own. Latency is one, how sure a forecast
        of missing the promise has proved is each promise's own."""
        if itl_slo_s is None:
            return self.estimate
        told, seen = self.odds.get(itl_slo_s, (SLOW_PRIOR, SLOW_PRIOR))
        return replace(self.estimate, slow_told=told, slow_seen=seen)

    def learn(self, seen: First | Ended | Look, now_s: float, itl_slo_s: float) -> None:
        """Move the estimate by a measurement. `itl_slo_s`: the deployment's promise."""
        own_s = seen.itl_slo_s if isinstance(seen, Ended) else None
        if isinstance(seen, First):
            self.prompts_done += seen.prompt_tokens
        after = learned(self.estimate_for(own_s), seen, now_s, itl_slo_s)
        if own_s is not None:
            self.odds.pop(own_s, None)
            self.odds[own_s] = (after.slow_told, after.slow_seen)
            if len(self.odds) > PROMISES_MAX:
                del self.odds[next(iter(self.odds))]
            after = replace(after, slow_told=self.estimate.slow_told, slow_seen=self.estimate.slow_seen)
        self.estimate = after

    def prompt_tokens(self, body_bytes: int) -> int:
        """Prompt tokens that a body of so many bytes has here, from the usage of earlier answers."""
        return max(1, round(body_bytes * self.tokens_per_byte))

    def learn_prompt(self, body_bytes: int, prompt_tokens: int) -> None:
        if body_bytes > 0 and prompt_tokens > 0:
            seen = min(1.0, max(1 / 64, prompt_tokens / body_bytes))
            self.tokens_per_byte += 0.2 * (seen - self.tokens_per_byte)


async def send(
    wire: Wire,
    upstream: Upstream,
    request: ApiRequest,
    *,
    request_id: str,
    tier: str,
    output_cap: int,
    asking: Asking,
    traceparent: str | None = None,
) -> Response:
    """Send a request and wait for the answer's status and headers.

    Raises UpstreamFailed where another upstream may be tried, Rejected for a client error. Nothing is sent to a target
    that the egress policy forbids, whoever chose it.
    """
    if upstream.target is not None and (refusal := asking.refusal(upstream.target)) is not None:
        raise UpstreamFailed(Fault.FORBIDDEN, str(refusal))
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "X-Request-Id": request_id}
    body = engine_body(request, tier) if upstream.ours else request.raw
    path = request.endpoint.value
    if upstream.adapter is not None:
        body = upstream.adapter.body(request, output_cap if upstream.priced else None)
        path = upstream.adapter.path(request)
        headers |= upstream.adapter.headers(None if upstream.key is None else upstream.key.value())
    if traceparent is not None and upstream.local:
        headers["traceparent"] = traceparent
    try:
        response = await wire.post(upstream.base_url + path, body, headers)
    except ConnectFailed as error:
        raise UpstreamFailed(Fault.REFUSED, f"no connection: {error}") from None
    except TimeoutError:
        raise UpstreamFailed(Fault.TIMEOUT, "no answer in time", maybe_billed=True) from None
    except OSError as error:
        raise UpstreamFailed(Fault.RESET, f"connection lost: {error}", maybe_billed=True) from None
    if response.status == 200:
        return response
    await _refuse(upstream, response)
    raise AssertionError("unreachable")


async def _refuse(upstream: Upstream, response: Response) -> None:
    """Turn an answer that is no 200 into the exception that it means."""
    status = response.status
    try:
        async with asyncio.timeout(10.0):
            body = await response.read(65536)
    except OSError:  # a TimeoutError is one
        body = b""
    response.close()
    if upstream.adapter is not None:
        status = upstream.adapter.status(status, body)
    if status in RETRY_STATUSES:
        fault = Fault.OVERLOADED if status in OVERLOAD_STATUSES else Fault.TIMEOUT
        raise UpstreamFailed(fault, f"HTTP {status}", status=status)
    if not upstream.local and status in CREDENTIAL_STATUSES:
        raise UpstreamFailed(Fault.CREDENTIALS, f"HTTP {status}: check its key and model name", status=status)
    if not 400 <= status < 500:
        raise UpstreamFailed(Fault.STATUS, f"HTTP {status}", status=status)
    headers = {name: response.headers[name] for name in _KEEP_HEADERS if name in response.headers}
    if upstream.adapter is not None:
        with contextlib.suppress(ValueError):
            body = upstream.adapter.answer(status, body)
        body = _without_key(body, upstream)
    raise Rejected(status, body, headers)


def _without_key(body: bytes, upstream: Upstream) -> bytes:
    """A provider's words without our key, whole or by the look of it."""
    text = body.decode("utf-8", "replace")
    if upstream.key is not None:
        text = text.replace(upstream.key.value(), "[redacted]")
    return re.sub(r"sk-[^\s\"']*\*+[^\s\"']*", "[redacted]", str(redact(text))).encode()
