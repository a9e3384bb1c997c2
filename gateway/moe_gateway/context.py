"""What is known at the moment of a decision, frozen: the live state of a gateway as the spill policy's context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_core.forecast import Failure, RevisionView, SpillContext, TargetView
from moe_core.prices import cost_usd
from moe_core.tiers import may_spill
from moe_gateway.call import Call
from moe_gateway.lazily import Lazily
from moe_gateway.openai_api import ApiRequest

if TYPE_CHECKING:
    from moe_gateway.state import Gateway
    from moe_gateway.upstream import Upstream


def spill_context(
    gateway: Gateway,
    request: ApiRequest,
    call: Call,
    tried: frozenset[str],
    failure: Failure | None,
    *,
    may_hold: bool = False,
) -> SpillContext:
    """Everything that a decision about a request may look at now."""
    now_s = gateway.clock.monotonic()
    slo = gateway.slo(call)
    return SpillContext(
        now_s=now_s,
        prompt_tokens=gateway.fleet.prompt_tokens(len(request.raw)),
        ttft_slo_s=slo.ttft_p95_s,
        thresholds=gateway.thresholds(),
        revisions=tuple(_revisions(gateway, now_s, gateway.own_itl_slo_s(call))),
        targets=Lazily(lambda: _targets(gateway, request, call, now_s)) if gateway.fleet.targets else (),
        budget_left_usd=gateway.budget.left_usd(call.tenant) if gateway.fleet.targets else None,
        elapsed_s=now_s - call.arrived_s,
        tried=tried,
        local_failure=failure,
        itl_slo_s=slo.itl_p95_s,
        session=call.session,
        may_hold=may_hold,
    )


def _targets(gateway: Gateway, request: ApiRequest, call: Call, now_s: float) -> Iterator[TargetView]:
    asking = gateway.asking(call)
    for target in gateway.fleet.targets if may_spill(gateway.config.tiers or (), call.tier) else ():
        if (
            target.target is not None
            and asking.refusal(target.target) is None
            and target.adapter is not None
            and target.adapter.lacks(request) is None
        ):
            usd = gateway.cost_bound_usd(request, target)
            expected, typical = _likely_usd(gateway, request, target)
            yield TargetView(target.name, target.available(now_s), usd, target.estimate, expected, typical)


def _likely_usd(gateway: Gateway, request: ApiRequest, target: Upstream) -> tuple[float, float]:
    """What a request likely costs at a target, and what one of mean length does, by what the revisions answered."""
    if not target.priced or not gateway.fleet.revisions:
        return 0.0, 0.0
    usual = max(gateway.fleet.revisions, key=lambda revision: revision.weight).estimate
    output = min(round(usual.output_tokens), gateway.output_bound(request))
    prompt = gateway.fleet.prompt_tokens(len(request.raw))
    own, mean = cost_usd(prompt, output, target.price), cost_usd(round(usual.prompt_tokens), output, target.price)
    return float(own), float(mean)


def _revisions(gateway: Gateway, now_s: float, itl_slo_s: float | None) -> Iterator[RevisionView]:
    for upstream in gateway.fleet.revisions:
        load = gateway.load(upstream, now_s)
        report = upstream.report
        if report is not None:
            report = report.aged(now_s - upstream.report_at_s)
        yield RevisionView(
            upstream.name,
            upstream.weight,
            upstream.available(now_s),
            load.waiting,
            load.tokens,
            load.running,
            report,
            upstream.estimate_for(itl_slo_s),
            load.head_tokens,
            load.head_s,
        )
