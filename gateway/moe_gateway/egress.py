"""Which data may leave to whom: a pure rule, asked when targets are listed and again right before anything is sent.

The rules of deployment, tenant, tier and request all hold at once, so that none of them can widen another one. What is
not understood, and what is not known of a target, forbids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from moe_api.enums import Egress
from moe_core import metrics
from moe_core.config import EgressConfig, EgressRule, TargetConfig
from moe_core.log import Log

if TYPE_CHECKING:
    from moe_gateway.call import Call

HEADER = b"x-moestack-egress"
_NEVER = EgressRule(egress=Egress.NEVER)


@dataclass(frozen=True)
class Refusal:
    """Whose rule forbids a target, and why."""

    rule: str
    why: str

    def __str__(self) -> str:
        return f"the egress policy of the {self.rule} forbids it: {self.why}"


def permits(
    policy: EgressConfig, target: TargetConfig, tenant: str | None, tier: str, header: str | None
) -> Refusal | None:
    """Why a request may not go to a target, or None where it may."""
    for whose, rule in _rules(policy, tenant, tier, header):
        why = _forbids(rule, target)
        if why is not None:
            return Refusal(whose, why)
    return None


def read_header(header: str) -> EgressRule:
    """What a request asks for: `allowed`, `never`, `zero-retention`, or `region=NAME,NAME`. Anything else is never."""
    word, _, names = header.strip().lower().partition("=")
    regions = tuple(name.strip() for name in names.split(",") if name.strip())
    match word.strip():
        case "allowed" if not names:
            return EgressRule()
        case "zero-retention" if not names:
            return EgressRule(egress=Egress.ZERO_RETENTION_ONLY)
        case "region" if regions:
            return EgressRule(egress=Egress.REGION, regions=regions)
        case _:
            return _NEVER


def _rules(policy: EgressConfig, tenant: str | None, tier: str, header: str | None) -> Iterator[tuple[str, EgressRule]]:
    yield "deployment", policy.deployment
    if policy.tenants:
        # Who is not known may be any of them.
        of_tenant = list(policy.tenants.values()) if tenant is None else [policy.tenants.get(tenant, EgressRule())]
        for rule in of_tenant:
            yield "tenant", rule
    yield "tier", policy.tiers.get(tier, EgressRule())
    if header is not None:
        yield "request", read_header(header)


def _forbids(rule: EgressRule, target: TargetConfig) -> str | None:
    match rule.egress:
        case Egress.ALLOWED:
            return None
        case Egress.ZERO_RETENTION_ONLY:
            return None if target.zero_retention else "it may keep what it gets"
        case Egress.REGION:
            if target.region is None:
                return "its region is not known"
            return None if target.region in rule.regions else f"its region is {target.region}"
        case _:
            return "nothing may leave"


@dataclass(frozen=True)
class Asking:
    """For whom something is about to be sent, and the policy in force."""

    policy: EgressConfig
    tenant: str | None
    tier: str
    header: str | None

    def refusal(self, target: TargetConfig) -> Refusal | None:
        return permits(self.policy, target, self.tenant, self.tier, self.header)


class Audit:
    """One log line and one count for each request that leaves, or that was held back at the last moment. No prompt."""

    def __init__(self, deployment: str, registry: CollectorRegistry, log: Log) -> None:
        self._deployment = deployment
        self._log = log
        self._count = metrics.counter(metrics.GATEWAY_EGRESS, registry)

    def leaving(self, call: Call, target: TargetConfig, asking: Asking) -> None:
        refusal = asking.refusal(target)
        policy = asking.policy.deployment.egress.value
        region = target.region or "unknown"
        result = "sent" if refusal is None else "refused"
        self._count.labels(self._deployment, target.name, region, policy, result).inc()
        self._log.info(
            "egress",
            result=result,
            request_id=call.request_id,
            tenant=call.tenant,
            key_id=call.key_id,
            tier=call.tier,
            target=target.name,
            provider=target.provider,
            region=region,
            zero_retention=target.zero_retention,
            policy=policy,
            asked=None if asking.header is None else read_header(asking.header).egress.value,
            refused=None if refusal is None else str(refusal),
        )
