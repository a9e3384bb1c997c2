"""Goes on with a stream that broke: asks the decision, runs the second attempt, and ends what nobody goes on with."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from moe_api.enums import MidStream
from moe_core.spill import Decision, Reason, SpillState
from moe_gateway import joining, takeover
from moe_gateway.attempt import Attempt
from moe_gateway.call import Call, Outcome, Phase, Stop
from moe_gateway.joining import Seam, Transcript
from moe_gateway.openai_api import ApiError, ApiRequest, Endpoint
from moe_gateway.responder import Responder
from moe_gateway.running import reserve, run
from moe_gateway.state import Gateway
from moe_gateway.takeover import Broke, Broken, How, Sent, Verdict
from moe_gateway.upstream import Rejected, Upstream, UpstreamFailed

TELL_S = 5.0
"""Longest wait for a client to take the error that ends its stream."""
_JOINABLE = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})


def kept(gateway: Gateway, request: ApiRequest) -> Transcript | None:
    """What keeps the answer of a request, where it might be gone on with."""
    on = gateway.config.mid_stream.mode is not MidStream.OFF
    return Transcript() if on and request.stream and request.endpoint in _JOINABLE else None


async def see_to_its_end(gateway: Gateway, request: ApiRequest, call: Call, out: Responder, attempt: Attempt) -> None:
    """End a stream that `attempt` left broken: whole, by another upstream, or by one honest error."""
    left = gateway.config.mid_stream.takeovers
    while (broke := attempt.broke) is not None:
        after = await _Break(gateway, request, call, out, attempt, broke, left).go_on()
        if after is None:
            await _end(call, out, broke)
            return
        call.broke_at.append(attempt.upstream.name)
        attempt, left = after, left - 1


class _Break:
    """One break of one stream. Use it once."""

    def __init__(
        self,
        gateway: Gateway,
        request: ApiRequest,
        call: Call,
        out: Responder,
        attempt: Attempt,
        broke: Broke,
        left: int,
    ) -> None:
        self._gateway = gateway
        self._request = request
        self._call = call
        self._out = out
        self._at = attempt.upstream
        self._broke = broke
        self._left = left
        self._transcript = attempt.transcript
        tokens = call.carried_tokens + attempt.streamed_tokens
        self._sent = Sent("", tokens, "form") if self._transcript is None else self._transcript.sent(tokens)
        self._failed: set[str] = set()

    async def go_on(self) -> Attempt | None:
        """The attempt that went on with it, to its end or until it broke again; None where nobody did."""
        gateway, call = self._gateway, self._call
        while True:
            call.enter(Phase.DECIDING, gateway.clock.monotonic())
            verdict, decision = self._decide()
            if verdict.to is None:
                return None
            upstream = gateway.upstreams[verdict.to]
            self._failed.add(upstream.name)
            if not gateway.may_retry(upstream):
                continue
            asked = self._asked(verdict.how)
            reservation = f"{call.request_id}/{call.id}/{call.attempts}"
            if upstream.priced and not await reserve(gateway, asked, upstream, reservation, call.tenant):
                continue
            second = self._attempt(asked, verdict.how, upstream, decision)
            before = (call.upstream, call.local, call.reason, call.spilled, call.takeover, call.spilled_to)
            self._record(verdict.how, upstream)
            try:
                await run(gateway, call, upstream, second, reservation)
                return second
            except (UpstreamFailed, Rejected) as error:
                self._lost(upstream, error)
            except asyncio.CancelledError:
                if call.stop is not Stop.DRAINING:
                    raise
                call.task.uncancel()  # no successor: the gateway drains
            call.upstream, call.local, call.reason, call.spilled, call.takeover, call.spilled_to = before

    def _decide(self) -> tuple[Verdict, Decision | None]:
        """The verdict; and the decision of the spill policy that names the upstream, which counts from now on."""
        gateway, call, broke = self._gateway, self._call, self._broke
        config = gateway.config
        broken = Broken(
            mode=config.mid_stream.mode,
            why=broke.why,
            sent=self._sent,
            finished=broke.finished,
            at_revision=self._at.local,
            output_limit=self._request.output_limit,
            client_gone=call.client_gone,
            draining=gateway.draining or call.stop is Stop.DRAINING,
            takeovers_left=self._left,
            elapsed_s=gateway.clock.monotonic() - call.arrived_s,
            deadline_s=config.limits.response_s,
        )
        found: dict[How, tuple[Decision, SpillState]] = {}
        if broken.mode is not MidStream.OFF and self._sent.bar is None:
            broken, found = self._with_candidates(broken)
        verdict = takeover.decide(broken)
        decision = None
        if verdict.to is not None:
            decision, gateway.spill = found[verdict.how]
        gateway.telemetry.broke(self._at.name, verdict.how.value, (verdict.why or broke.why).value)
        if broken.mode is not MidStream.OFF:
            gateway.log.warning(
                "stream broke",
                request_id=call.request_id,
                target=self._at.name,
                broke=broke.why.value,
                sent_tokens=self._sent.tokens,
                takeover=verdict.how.value,
                to=verdict.to,
                why=verdict.why,
                field=verdict.detail,
            )
        return verdict, decision

    def _with_candidates(self, broken: Broken) -> tuple[Broken, dict[How, tuple[Decision, SpillState]]]:
        """Who could go on, by the spill policy; nothing of it counts yet."""
        found: dict[How, tuple[Decision, SpillState]] = {}
        bars = {how: joining.bar(self._request, how) for how in (How.CONTINUE, How.SPLICE)}
        if bars[How.CONTINUE] is None:
            found[How.CONTINUE] = self._revision()
        if bars[How.SPLICE] is None and broken.mode is MidStream.SPLICE:
            tried = frozenset(self._failed)
            asked = self._asked(How.SPLICE)
            found[How.SPLICE] = self._gateway.successor(asked, self._call, tried, closed=True)
        names = {how: decision.target for how, (decision, _) in found.items()}
        return (
            replace(
                broken,
                continue_bar=bars[How.CONTINUE],
                splice_bar=bars[How.SPLICE],
                revision=names.get(How.CONTINUE),
                target=names.get(How.SPLICE),
            ),
            found,
        )

    def _revision(self) -> tuple[Decision, SpillState]:
        """Another revision, or else the same one: the replica that died was perhaps one of many."""
        gateway, tried = self._gateway, set(self._failed)
        if self._request.endpoint is Endpoint.CHAT:  # engines that are not ours may not know how to continue a message
            tried |= {revision.name for revision in gateway.fleet.revisions if not revision.ours}
        asked = self._asked(How.CONTINUE)
        others = gateway.successor(asked, self._call, frozenset({*tried, self._at.name}), closed=False)
        if others[0].target is not None:
            return others
        return gateway.successor(asked, self._call, frozenset(tried), closed=False)

    def _asked(self, how: How) -> ApiRequest:
        make = joining.continued if how is How.CONTINUE else joining.spliced
        return make(self._request, self._sent)

    def _attempt(self, asked: ApiRequest, how: How, upstream: Upstream, decision: Decision | None) -> Attempt:
        head = {} if self._transcript is None else self._transcript.head
        return Attempt(
            self._gateway,
            self._call,
            asked,
            upstream=upstream,
            forecast=None if decision is None else decision.forecast,
            out=self._out,
            # It gives way after `limits.firstTokenS` whoever else there is: its client waits in mid-answer.
            elsewhere=lambda: True,
            transcript=self._transcript,
            seam=Seam(how, self._sent, head),
        )

    def _record(self, how: How, upstream: Upstream) -> None:
        call = self._call
        call.attempts += 1
        call.outcome = call.error = None
        call.takeover, call.carried_tokens = how.value, self._sent.kept_tokens(how)
        if how is How.SPLICE:
            call.reason, call.spilled = Reason.STREAM_BROKEN, True
        elif call.spilled and call.spilled_to is None:
            call.spilled_to = call.upstream
        call.upstream, call.local = upstream.name, upstream.local

    def _lost(self, upstream: Upstream, error: UpstreamFailed | Rejected) -> None:
        self._gateway.retries.failed(upstream.name)
        self._call.lost_at.append(upstream.name)
        self._gateway.log.warning(
            "attempt failed",
            request_id=self._call.request_id,
            target=upstream.name,
            fault=error.fault.value if isinstance(error, UpstreamFailed) else "rejected",
            detail=str(error),
        )


async def _end(call: Call, out: Responder, broke: Broke) -> None:
    """One error event, the last of the stream: the upstream's own where it said one."""
    call.outcome, call.error = Outcome.CUT, broke.detail
    try:
        async with asyncio.timeout(TELL_S):
            if broke.told:
                await out.finish()
            elif broke.error_event:
                await out.finish(broke.error_event)
            else:
                message = f"the answer was cut: {broke.detail}"
                await out.error(ApiError(502, message, kind="upstream_error", code="stream_cut"))
    except TimeoutError:
        call.error = f"{call.error}; the client did not read on"
