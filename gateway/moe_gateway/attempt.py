"""One attempt at one upstream: send, hold until the first content token, pass on, count, bill.

Nothing reaches the client before the first content token, so that until then another upstream can take over. A stream
that breaks after it is left open, with `broke` saying why: whoever ran the attempt goes on with it or ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal

import orjson

from moe_core.forecast import Forecast
from moe_core.latency import Ended, First, predict_ttft_s
from moe_core.prices import cost_usd
from moe_gateway.answers import LOST, content_type, read_all, to_the_end
from moe_gateway.call import Call, Outcome, Phase, Stop
from moe_gateway.joining import Joiner, Seam, Transcript
from moe_gateway.openai_api import ApiRequest, Endpoint, Usage, read_usage
from moe_gateway.responder import Responder
from moe_gateway.sse import MAX_EVENT_BYTES, SseScanner, StreamReader, without_last
from moe_gateway.state import Gateway
from moe_gateway.takeover import Break, Broke, about_request
from moe_gateway.upstream import Fault, Rejected, Upstream, UpstreamFailed, send
from moe_gateway.wire import Response

PROBE_PROMISES = 2.0
"""A probe of an upstream that was down waits so many SLOs, not the whole patience of a request."""


class Attempt:
    """State of one attempt. Run it once. With a `seam` its answer is the rest of a stream that has begun."""

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
        transcript: Transcript | None = None,
        seam: Seam | None = None,
    ) -> None:
        self._gateway = gateway
        self._clock = gateway.clock
        self._call = call
        self._request = request
        self.upstream = self._upstream = upstream
        self._out = out
        self._elsewhere = elsewhere
        self._prompt_tokens = upstream.prompt_tokens(len(request.raw))
        local_forecast = forecast if upstream.local else None
        self._work_tokens = self._prompt_tokens if local_forecast is None else local_forecast.work_tokens
        self._slot_wait_s = 0.0 if local_forecast is None else local_forecast.slot_wait_s
        self._running = 0.0 if local_forecast is None else local_forecast.running
        self._p_slow = 0.0 if local_forecast is None else local_forecast.p_slow
        self._foreseen_s = 0.0 if local_forecast is None else local_forecast.itl_s
        self._adapter = upstream.adapter
        self._native = self._adapter is not None and self._adapter.native(request)
        self._scanner: StreamReader = SseScanner() if self._adapter is None else self._adapter.stream(request)
        self._usage: Usage | None = None
        self._response: Response | None = None
        self._billed = False
        self._probe = False
        self._sent_s = 0.0
        self._first_s: float | None = None
        self._last_s = 0.0
        self._unsent: Awaitable[None] | None = None
        self._transcript = None if self._native else transcript
        self._seam = seam
        self._joiner = None if seam is None else Joiner(seam)
        self._error_event = b""
        self.broke: Broke | None = None

    @property
    def transcript(self) -> Transcript | None:
        """What went to the client, where it is kept."""
        return self._transcript

    @property
    def streamed_tokens(self) -> int:
        """Output tokens that this attempt gave, as far as it can be told before its usage."""
        return self._scanner.counted_tokens

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
            with self._gateway.wire.deadlines.within(self._whole_limit_s()):
                response = await self._open()
                body = await read_all(response)
        except LOST as error:
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
        await self._out.whole(200, content_type(response, b"application/json"), body if self._native else openai)
        call.outcome = Outcome.OK
        if self._request.endpoint is not Endpoint.EMBEDDINGS:
            self._gateway.learn(upstream, Ended(None, call.output_tokens))

    def _whole_limit_s(self) -> float:
        """Longest wait for an answer in one piece. A probe gives way after a few promises, where it can."""
        limits, slo = self._gateway.config.limits, self._gateway.slo(self._call)
        if not (self._probe and self._elsewhere()):
            return limits.response_s
        tokens = self._request.output_limit or limits.spill_output_tokens
        return min(limits.response_s, PROBE_PROMISES * (slo.ttft_p95_s + tokens * slo.itl_p95_s))

    # A stream

    async def _stream(self) -> None:
        call, scanner = self._call, self._scanner
        response, head = await self._first_token()
        self._gateway.succeeded(self._upstream)
        try:
            call.status, call.started = 200, True
            call.enter(Phase.SENDING, self._clock.monotonic())
            if self._seam is None:
                headers = [
                    (b"content-type", content_type(response, b"text/event-stream")),
                    (b"cache-control", b"no-cache"),
                ]
                self._out.native = self._native
                await self._out.start(200, headers)
            if head := self._outgoing(head):
                await self._out.write(head)
            broken = await self._pass_on(response)
        except asyncio.CancelledError:
            if call.stop is Stop.DRAINING:
                broken = Break.STOPPING, "the gateway is stopping"
            elif call.stop is Stop.UPSTREAM_STALLED:
                broken = Break.SILENT, "the model fell silent"
                call.stop = None  # what stops the request from now on is another matter
            else:
                raise
            call.task.uncancel()
        if broken is None:
            call.outcome = Outcome.OK
            return
        why, detail = broken
        call.outcome, call.error = Outcome.CUT, detail
        if why is not Break.STOPPING and self._fits():
            self._gateway.failed(self._upstream)
        told = scanner.error is not None and scanner.keep_error and not self._error_event
        self.broke = Broke(why, detail, scanner.finished, told, self._error_event)

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
                    patience_s = min(patience_s, PROBE_PROMISES * self._gateway.slo(self._call).ttft_p95_s)
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
            if self._seam is None:
                self._call.ttft_s, self._call.first_s = now_s - self._call.arrived_s, now_s
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
            except LOST as error:
                detail = f"connection lost: {type(error).__name__}"
                raise UpstreamFailed(Fault.RESET, detail, maybe_billed=True) from None
            head += scanner.feed(chunk) if chunk else scanner.flush()
            if scanner.error is not None and not scanner.content_events:
                raise UpstreamFailed(Fault.IN_BAND, "the stream began with an error")
            if (scanner.malformed and not scanner.content_events) or len(head) > MAX_EVENT_BYTES:
                raise UpstreamFailed(Fault.MALFORMED, "the stream is not server-sent events", maybe_billed=True)
            if not chunk and not scanner.content_events and not scanner.complete:
                raise UpstreamFailed(Fault.RESET, "the stream ended before its first token", maybe_billed=True)
        if self._seam is not None and not scanner.content_events and not scanner.finished:
            raise UpstreamFailed(Fault.MALFORMED, "nothing came to go on with", maybe_billed=True)
        return head

    def _outgoing(self, events: bytes) -> bytes:
        """What of the upstream's events goes to the client, remembered where the stream may be gone on with."""
        if self._joiner is not None:
            events = self._joiner.feed(events)
        if self._transcript is not None and events:
            if self._scanner.error is not None and self._scanner.keep_error:
                # The error is the last event; it is not the client's before nobody is found to go on.
                events, self._error_event = without_last(events)
            self._transcript.add(events)
        return events

    async def _pass_on(self, response: Response) -> tuple[Break, str] | None:
        """Everything after the head. None for a whole stream, else what broke it."""
        scanner, call, clock = self._scanner, self._call, self._clock
        while not scanner.done and not scanner.broken and self._fits():
            call.enter(Phase.READING, clock.monotonic())
            try:
                ended = await response.pump(self._take)
            except LOST:
                if scanner.complete:
                    break
                return Break.LOST, "the connection to the model was lost"
            if ended and (tail := self._outgoing(scanner.flush())):
                self._unsent = self._out.write_soon(tail)
            if self._unsent is not None:
                call.enter(Phase.SENDING, clock.monotonic())
                await self._unsent
                self._unsent = None
            if ended:
                break
        if scanner.error is not None:
            return (Break.REFUSED if about_request(scanner.error) else Break.ERROR), "the model sent an error"
        if scanner.malformed:
            return Break.MALFORMED, "the model sent a malformed event"
        if not self._fits():
            return Break.MALFORMED, "what came next does not follow what was sent"
        if not scanner.complete:
            return Break.ENDED_EARLY, "the connection to the model ended early"
        await self._out.finish()
        await to_the_end(response)
        return None

    def _take(self, chunk: bytes) -> bool:
        """Pass on what has come. False where the client must read first, or nothing more is wanted."""
        scanner, now_s = self._scanner, self._clock.monotonic()
        seen = scanner.content_events
        data = scanner.feed(chunk)
        if self._transcript is not None or self._joiner is not None:
            data = self._outgoing(data)
        self._call.since_s = now_s
        if scanner.content_events > seen:
            self._last_s = now_s
            self._upstream.ledger.gaps += scanner.content_events - seen
        if data:
            self._unsent = self._out.write_soon(data)
        return self._unsent is None and not scanner.done and not scanner.broken and self._fits()

    def _fits(self) -> bool:
        """Whether what comes can follow what was sent."""
        return self._joiner is None or self._joiner.refused is None

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
        if self._seam is None:
            call.prompt_tokens = self._prompt_tokens if usage is None else usage.prompt_tokens
        else:
            call.output_tokens += call.carried_tokens
        tokens = usage.output_tokens if usage is not None and upstream.local else scanner.content_events
        if self._first_s is not None:
            per_choice = tokens / self._request.choices
            itl_s = None
            if per_choice > 1 and self._last_s > self._first_s:
                itl_s = (self._last_s - self._first_s) / (per_choice - 1)
            own_s = gateway.own_itl_slo_s(call)
            gateway.learn(upstream, Ended(itl_s, tokens, self._foreseen_s, self._p_slow, own_s))
            if self._seam is not None and call.first_s is not None:  # the client's own: over both attempts and the gap
                itl_s = (self._last_s - call.first_s) / max(1, call.carried_tokens + tokens - 1)
            call.itl_s = itl_s
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
