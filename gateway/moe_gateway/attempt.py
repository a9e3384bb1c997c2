"""One attempt at one upstream: send, hold until the first content token, pass on, count, bill.

Nothing reaches the client before the first content token, so that until then another upstream can take over. After it
the answer belongs to this upstream: a failure becomes one error event, the last of the stream, and [DONE] is not sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal

import orjson

from moe_core.latency import predict_ttft_s
from moe_core.prices import cost_usd
from moe_core.spill import Forecast
from moe_gateway.call import Call, Outcome, Phase, Stop
from moe_gateway.openai_api import ApiError, ApiRequest, Endpoint, Usage, read_usage
from moe_gateway.providers.base import Stream
from moe_gateway.responder import Responder
from moe_gateway.siblings import Ended, First
from moe_gateway.sse import MAX_EVENT_BYTES, SseScanner
from moe_gateway.state import Gateway
from moe_gateway.upstream import Fault, Rejected, Upstream, UpstreamFailed, send
from moe_gateway.wire import Response

MAX_ANSWER_BYTES = 64 << 20
PROBE_PROMISES = 2.0
"""A probe of an upstream that was down waits so many SLOs, not the whole patience of a request."""
_LOST = OSError
"""A connection that broke; a TimeoutError is one."""


class Attempt:
    """State of one attempt. Run it once."""

    def __init__(
        self,
        gateway: Gateway,
        call: Call,
        request: ApiRequest,
        *,
        upstream: Upstream,
        forecast: Forecast | None,
        out: Responder,
        elsewhere: Callable[[], bool],
    ) -> None:
        self._gateway = gateway
        self._clock = gateway.clock
        self._call = call
        self._request = request
        self._upstream = upstream
        self._out = out
        self._elsewhere = elsewhere
        self._prompt_tokens = upstream.prompt_tokens(len(request.raw))
        local_forecast = forecast if upstream.local else None
        self._work_tokens = self._prompt_tokens if local_forecast is None else local_forecast.work_tokens
        self._slot_wait_s = 0.0 if local_forecast is None else local_forecast.slot_wait_s
        self._running = 0.0 if local_forecast is None else local_forecast.running
        self._p_slow = 0.0 if local_forecast is None else local_forecast.p_slow
        self._adapter = upstream.adapter
        self._native = self._adapter is not None and self._adapter.native(request)
        self._scanner: Stream = SseScanner() if self._adapter is None else self._adapter.stream(request)
        self._usage: Usage | None = None
        self._response: Response | None = None
        self._billed = False
        self._probe = False
        self._sent_s = 0.0
        self._first_s: float | None = None
        self._last_s = 0.0
        self._unsent: Awaitable[None] | None = None

    async def run(self, reservation: str) -> None:
        """Answer the client from this upstream. Raises UpstreamFailed or Rejected while nothing has been answered."""
        gateway, call, upstream = self._gateway, self._call, self._upstream
        self._sent_s = self._clock.monotonic()
        self._probe = upstream.probing()
        gateway.sent(upstream, retry=call.attempts > 1)
        due_s = None
        if not self._request.stream:
            due_s = self._sent_s + predict_ttft_s(
                upstream.estimate, self._work_tokens, self._slot_wait_s, self._running
            )
        upstream.ledger.sent(call.id, self._prompt_tokens, due_s, self._sent_s)
        failed = True
        try:
            await (self._stream() if self._request.stream else self._whole())
            failed = call.outcome is Outcome.CUT
        except UpstreamFailed as error:
            self._billed = error.maybe_billed
            if error.fault in {Fault.OVERLOADED, Fault.FORBIDDEN}:
                gateway.abandoned(upstream)
            else:
                gateway.failed(upstream)
            raise
        except Rejected:
            failed = self._billed = False
            gateway.succeeded(upstream)
            raise
        except asyncio.CancelledError:
            failed = False
            gateway.abandoned(upstream)
            raise
        finally:
            upstream.ledger.ended(call.id)
            if self._response is not None:
                self._response.close()
            self._account(reservation, failed)

    async def _open(self) -> Response:
        """Send, and mark that from a 200 on the upstream may bill."""
        limits = self._gateway.config.limits
        self._call.enter(Phase.WAITING, self._clock.monotonic())
        asking = self._gateway.asking(self._call)
        if self._upstream.target is not None:
            self._gateway.audit.leaving(self._call, self._upstream.target, asking)
        self._billed = True  # if we are stopped while the request is out, nobody knows
        self._response = await send(
            self._gateway.wire,
            self._upstream,
            self._request,
            request_id=self._call.request_id,
            tier=self._call.tier,
            output_cap=limits.spill_output_tokens,
            asking=asking,
            traceparent=self._call.traceparent,
        )
        return self._response

    # An answer in one piece

    async def _whole(self) -> None:
        try:
            async with asyncio.timeout(self._whole_limit_s()):
                response = await self._open()
                body = await _read_all(response)
        except _LOST as error:
            fault = Fault.TIMEOUT if isinstance(error, TimeoutError) else Fault.RESET
            detail = f"the answer broke off: {type(error).__name__}"
            raise UpstreamFailed(fault, detail, maybe_billed=True) from None
        openai = body
        try:
            if self._adapter is not None:
                openai = self._adapter.answer(200, body)
            document = orjson.loads(openai)
        except ValueError:  # orjson's own error is one
            raise UpstreamFailed(Fault.MALFORMED, "the answer is not JSON", maybe_billed=True) from None
        if not isinstance(document, dict):
            raise UpstreamFailed(Fault.MALFORMED, "the answer is no JSON object", maybe_billed=True)
        if document.get("error") is not None:
            raise UpstreamFailed(Fault.IN_BAND, "the answer holds an error")
        self._usage = read_usage(document)
        call, upstream = self._call, self._upstream
        self._gateway.succeeded(upstream)
        call.status = 200
        call.output_tokens = 0 if self._usage is None else self._usage.output_tokens
        call.enter(Phase.SENDING, self._clock.monotonic())
        self._out.native = self._native
        await self._out.whole(200, _content_type(response, b"application/json"), body if self._native else openai)
        call.outcome = Outcome.OK
        if self._request.endpoint is not Endpoint.EMBEDDINGS:
            self._gateway.learn(upstream, Ended(None, call.output_tokens))

    def _whole_limit_s(self) -> float:
        """Longest wait for an answer in one piece. A probe gives way after a few promises, where it can."""
        limits, slo = self._gateway.config.limits, self._gateway.config.slo
        if not (self._probe and self._elsewhere()):
            return limits.response_s
        tokens = self._request.output_limit or limits.spill_output_tokens
        return min(limits.response_s, PROBE_PROMISES * (slo.ttft_p95_s + tokens * slo.itl_p95_s))

    # A stream

    async def _stream(self) -> None:
        call = self._call
        response, head = await self._first_token()
        self._gateway.succeeded(self._upstream)
        try:
            call.status, call.started = 200, True
            call.enter(Phase.SENDING, self._clock.monotonic())
            headers = [
                (b"content-type", _content_type(response, b"text/event-stream")),
                (b"cache-control", b"no-cache"),
            ]
            self._out.native = self._native
            await self._out.start(200, headers)
            await self._out.write(head)
            broken = await self._pass_on(response)
        except asyncio.CancelledError:
            if call.stop not in {Stop.DRAINING, Stop.UPSTREAM_STALLED}:
                raise
            call.task.uncancel()
            broken = "the gateway is stopping" if call.stop is Stop.DRAINING else "the model fell silent"
        if broken is None:
            call.outcome = Outcome.OK
            return
        call.outcome, call.error = Outcome.CUT, broken
        if call.stop is not Stop.DRAINING:
            self._gateway.failed(self._upstream)
        if self._scanner.error is None or not getattr(self._scanner, "keep_error", True):
            error = ApiError(502, f"the answer was cut: {broken}", kind="upstream_error", code="stream_cut")
            await self._break_off(error)
        else:
            await self._out.finish()  # the upstream's own error event has been passed on

    async def _first_token(self) -> tuple[Response, bytes]:
        """The bytes up to the first content token. After `first_token_s` the attempt gives way where another may be
        tried, and goes on waiting, up to `response_s`, where none may."""
        limits, loop = self._gateway.config.limits, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limits.response_s) as deadline:

                def give_way() -> None:
                    if self._elsewhere():
                        deadline.reschedule(loop.time())

                patience_s = limits.first_token_s
                if self._probe:
                    patience_s = min(patience_s, PROBE_PROMISES * self._gateway.config.slo.ttft_p95_s)
                timer = loop.call_later(patience_s, give_way)
                try:
                    response = await self._open()
                    head = await self._read_head(response)
                finally:
                    timer.cancel()
        except TimeoutError:
            raise UpstreamFailed(Fault.TIMEOUT, "no first token in time", maybe_billed=True) from None
        now_s = self._clock.monotonic()
        if self._scanner.content_events:
            self._call.ttft_s = now_s - self._call.arrived_s
            self._first_s = self._last_s = now_s
            first = First(
                self._work_tokens, self._prompt_tokens, self._slot_wait_s, now_s - self._sent_s, self._running
            )
            self._gateway.learn(self._upstream, first)
        self._upstream.ledger.first_token(self._call.id, now_s)
        return response, head

    async def _read_head(self, response: Response) -> bytes:
        scanner, head = self._scanner, b""
        if response.content_type != "text/event-stream":
            raise UpstreamFailed(Fault.MALFORMED, f"the answer is {response.content_type}, not a stream")
        while not scanner.content_events and not scanner.complete:
            try:
                chunk = await response.readany()
            except TimeoutError:
                raise
            except _LOST as error:
                detail = f"connection lost: {type(error).__name__}"
                raise UpstreamFailed(Fault.RESET, detail, maybe_billed=True) from None
            head += scanner.feed(chunk) if chunk else scanner.flush()
            if scanner.error is not None and not scanner.content_events:
                raise UpstreamFailed(Fault.IN_BAND, "the stream began with an error")
            if (scanner.malformed and not scanner.content_events) or len(head) > MAX_EVENT_BYTES:
                raise UpstreamFailed(Fault.MALFORMED, "the stream is not server-sent events", maybe_billed=True)
            if not chunk and not scanner.content_events and not scanner.complete:
                raise UpstreamFailed(Fault.RESET, "the stream ended before its first token", maybe_billed=True)
        return head

    async def _pass_on(self, response: Response) -> str | None:
        """Everything after the head. None for a whole stream, else what broke it."""
        scanner, call, clock = self._scanner, self._call, self._clock
        while not scanner.done and not scanner.broken:
            call.enter(Phase.READING, clock.monotonic())
            try:
                ended = await response.pump(self._take)
            except _LOST:
                if scanner.complete:
                    break
                return "the connection to the model was lost"
            if ended and (tail := scanner.flush()):
                self._unsent = self._out.write_soon(tail)
            if self._unsent is not None:
                call.enter(Phase.SENDING, clock.monotonic())
                await self._unsent
                self._unsent = None
            if ended:
                break
        if scanner.broken:
            return "the model sent an error" if scanner.error is not None else "the model sent a malformed event"
        if not scanner.complete:
            return "the connection to the model ended early"
        await self._out.finish()
        await _to_the_end(response)
        return None

    def _take(self, chunk: bytes) -> bool:
        """Pass on what has come. False where the client must read first, or nothing more is wanted."""
        scanner, now_s = self._scanner, self._clock.monotonic()
        seen = scanner.content_events
        data = scanner.feed(chunk)
        self._call.since_s = now_s
        if scanner.content_events > seen:
            self._last_s = now_s
        if data:
            self._unsent = self._out.write_soon(data)
        return self._unsent is None and not scanner.done and not scanner.broken

    async def _break_off(self, error: ApiError) -> None:
        try:
            async with asyncio.timeout(5.0):
                await self._out.error(error)
        except TimeoutError:
            self._call.error = f"{self._call.error}; the client did not read on"

    # Counting and money

    def _account(self, reservation: str, failed: bool) -> None:
        """Tokens and money of this attempt, whatever became of it."""
        gateway, call, upstream, scanner = self._gateway, self._call, self._upstream, self._scanner
        now_s = self._clock.monotonic()
        gateway.telemetry.attempted(now_s, upstream.name, failed)
        usage = scanner.usage or self._usage
        if usage is not None:
            upstream.learn_prompt(len(self._request.raw), usage.prompt_tokens)
        if self._request.stream:
            call.output_tokens = scanner.counted_tokens if usage is None else usage.output_tokens
        call.prompt_tokens = self._prompt_tokens if usage is None else usage.prompt_tokens
        tokens = usage.output_tokens if usage is not None and upstream.local else scanner.content_events
        if self._first_s is not None:
            per_choice = tokens / self._request.choices
            if per_choice > 1 and self._last_s > self._first_s:
                call.itl_s = (self._last_s - self._first_s) / (per_choice - 1)
            gateway.learn(upstream, Ended(call.itl_s, tokens, self._running, self._p_slow))
        if upstream.priced:
            usd = self._usd(usage)
            call.usd += usd
            gateway.budget.settle(reservation, usd)
            if usd:
                gateway.telemetry.spent(now_s, upstream.name, usd)

    def _usd(self, usage: Usage | None) -> Decimal:
        """What the attempt cost: by usage; by counted tokens where a stream broke off or told none; the whole
        reservation where an answer in one piece was lost on its way."""
        if usage is not None:
            return cost_usd(usage.prompt_tokens, usage.output_tokens, self._upstream.price, usage.cached_tokens)
        if not self._billed:
            return Decimal(0)
        if self._request.stream:
            prompt_tokens = self._scanner.prompt_tokens or self._prompt_tokens
            return cost_usd(prompt_tokens, self._scanner.counted_tokens, self._upstream.price)
        return self._gateway.cost_bound_usd(self._request, self._upstream)


async def _read_all(response: Response) -> bytes:
    parts, size = [], 0
    while chunk := await response.readany():
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise UpstreamFailed(Fault.MALFORMED, "the answer is too large", maybe_billed=True)
    return b"".join(parts)


async def _to_the_end(response: Response) -> None:
    """Read what follows [DONE], the end of the body, so that the connection can be used again."""
    try:
        async with asyncio.timeout(1.0):
            while await response.readany():
                pass
    except _LOST:
        return


def _content_type(response: Response, otherwise: bytes) -> bytes:
    value = response.headers.get("content-type")
    return otherwise if value is None else value.encode("latin-1", "replace")
