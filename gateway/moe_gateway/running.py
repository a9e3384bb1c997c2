"""What every attempt has around it: its money set aside before, its span while it runs."""

from __future__ import annotations

from moe_gateway.attempt import Attempt
from moe_gateway.budget import BudgetUnavailable
from moe_gateway.call import Call, Outcome
from moe_gateway.openai_api import ApiRequest
from moe_gateway.state import Gateway
from moe_gateway.tracing import provider_of
from moe_gateway.upstream import Rejected, Upstream, UpstreamFailed


async def run(gateway: Gateway, call: Call, upstream: Upstream, attempt: Attempt, reservation: str) -> None:
    """Run an attempt, in a span of its own where traces are made."""
    tracing, trace = gateway.tracing, call.trace
    if tracing is None or trace is None:
        await attempt.run(reservation)
        return
    call.provider = provider_of(upstream.target)
    span = tracing.attempt(trace, call, upstream.name, upstream.target)
    call.traceparent = tracing.traceparent(span)
    error: str | None = "cancelled"
    try:
        await attempt.run(reservation)
        error = call.error if call.outcome is Outcome.CUT else None
    except UpstreamFailed as failed:
        error = failed.fault.value
        raise
    except Rejected as rejected:
        error = str(rejected.status)
        raise
    finally:
        tracing.attempt_ended(span, error)


async def reserve(
    gateway: Gateway, request: ApiRequest, upstream: Upstream, reservation: str, tenant: str | None
) -> bool:
    """Set the money aside; fail closed."""
    granted = False
    try:
        most = gateway.cost_bound_usd(request, upstream)
        granted = await gateway.budget.reserve(reservation, upstream.name, most, tenant)
    except BudgetUnavailable as error:
        gateway.log.error("the budget store cannot be used; nothing is spent", error=str(error))
    except BaseException:
        gateway.budget.release(reservation)
        raise
    return granted
