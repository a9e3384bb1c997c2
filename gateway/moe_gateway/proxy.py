"""A request's way: decide, attempt, and on a failure before the first token decide again, until answered or refused."""

from __future__ import annotations

from functools import partial

from moe_core.forecast import Failure
from moe_core.spill import Action, Blocked, Decision, Reason
from moe_gateway.attempt import Attempt
from moe_gateway.call import Call, Outcome
from moe_gateway.failover import kept, see_to_its_end
from moe_gateway.openai_api import ApiError, ApiRequest
from moe_gateway.responder import Responder
from moe_gateway.running import reserve, run
from moe_gateway.state import Gateway
from moe_gateway.upstream import Fault, Rejected, Upstream, UpstreamFailed

_NOT_THE_MODELS_WORD = frozenset({Fault.REFUSED, Fault.TIMEOUT, Fault.OVERLOADED})


async def route(gateway: Gateway, request: ApiRequest, call: Call, out: Responder, explain: bool) -> None:
    """Answer a request. Raises ApiError where nothing has answered it, Rejected for an upstream's client error."""
    tried: set[str] = set()
    failure: Failure | None = None
    faults: list[UpstreamFailed] = []
    rejected: Rejected | None = None
    if explain and (lacking := gateway.lacking(request)):
        out.add_header(b"x-moestack-refused", "; ".join(f"{name}: {field}" for name, field in lacking.items()))
    while True:
        decision = await _decided(gateway, request, call, frozenset(tried), failure)
        if decision.target is None:
            call.blocked = decision.blocked
            raise rejected or _refusal(call, decision, faults)
        upstream = gateway.upstreams[decision.target]
        tried.add(upstream.name)
        if call.attempts and not gateway.may_retry(upstream):
            if gateway.retries.left():
                continue  # this upstream may get no more; another one may
            call.blocked = decision.blocked
            raise rejected or _refusal(call, decision, faults, "too many requests needed a second attempt")
        reservation = f"{call.request_id}/{call.id}/{call.attempts}"
        if upstream.priced and not await reserve(gateway, request, upstream, reservation, call.tenant):
            call.blocked = Blocked.BUDGET
            continue
        _record(call, decision, upstream)
        if explain:
            out.add_header(b"x-moestack-target", upstream.name)
            out.add_header(b"x-moestack-reason", decision.reason.value)
        reached, then = frozenset(tried), Failure.FAILED if upstream.local else failure
        attempt = Attempt(
            gateway,
            call,
            request,
            upstream=upstream,
            forecast=decision.forecast,
            out=out,
            elsewhere=partial(_may_go_on, gateway, request, call, reached, then),
            transcript=kept(gateway, request),
        )
        try:
            await run(gateway, call, upstream, attempt, reservation)
            if attempt.broke is not None:
                await see_to_its_end(gateway, request, call, out, attempt)
            return
        except UpstreamFailed as error:
            faults.append(error)
            gateway.retries.failed(upstream.name)
            call.lost_at.append(upstream.name)
            if upstream.local:
                failure = Failure.OVERLOADED if error.fault is Fault.OVERLOADED else Failure.FAILED
            gateway.log.warning(
                "attempt failed",
                request_id=call.request_id,
                target=upstream.name,
                fault=error.fault.value,
                detail=str(error),
            )
        except Rejected as error:
            # A closed API may refuse what our own model takes (a sampling parameter, a length): not the client's fault.
            if upstream.local or gateway.foresee(request, call, frozenset(tried), failure).action is not Action.LOCAL:
                raise
            rejected = error


async def _decided(
    gateway: Gateway, request: ApiRequest, call: Call, tried: frozenset[str], failure: Failure | None
) -> Decision:
    """The policy's answer; a request that it holds waits here, in nobody's way, and is asked about again."""
    while True:
        decision = gateway.decide(request, call, tried, failure, may_hold=not gateway.draining)
        if decision.action is not Action.HOLD:
            return decision
        await gateway.held.wait(decision.until_s)


def _may_go_on(
    gateway: Gateway, request: ApiRequest, call: Call, tried: frozenset[str], failure: Failure | None
) -> bool:
    """Whether the request would find another upstream if this attempt gave up now."""
    return gateway.retries.left() and gateway.foresee(request, call, tried, failure).target is not None


def _record(call: Call, decision: Decision, upstream: Upstream) -> None:
    call.attempts += 1
    call.upstream, call.local = upstream.name, upstream.local
    call.reason, call.blocked = decision.reason, decision.blocked
    call.spilled = decision.action is Action.SPILL
    call.forecast = decision.forecast or call.forecast


def _refusal(call: Call, decision: Decision, faults: list[UpstreamFailed], why: str | None = None) -> ApiError:
    """The one honest error when nothing answered: 529 for overload, 502 where models answered badly, else 503."""
    said = [*(f"{fault.fault.value}: {fault}" for fault in faults), *([why] if why is not None else [])]
    call.error = "; ".join(said) or None
    wait_s = max(1, decision.retry_after_s)
    if decision.reason is Reason.OVERLOAD:
        call.outcome, call.reason = Outcome.SHED, decision.reason
        return ApiError(
            529,
            "the model is overloaded; try again later",
            kind="overloaded_error",
            code="overloaded",
            retry_after_s=wait_s,
        )
    if not faults:
        call.outcome, call.reason = Outcome.SHED, decision.reason
    else:
        call.outcome = Outcome.ERROR
        if all(fault.fault not in _NOT_THE_MODELS_WORD for fault in faults):
            return ApiError(502, "the model failed to answer", kind="upstream_error", code="bad_gateway")
    return ApiError(
        503,
        "the model is not available; try again later",
        kind="upstream_error",
        code="unavailable",
        retry_after_s=wait_s,
    )
