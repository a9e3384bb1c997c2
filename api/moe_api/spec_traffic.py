"""What is promised to whom, and where requests go when the promise would break: SLO, tiers, fallback."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import StringConstraints

from moe_api.common import Count, ExpertsPerToken, Flag, Latency, Name, SecretKeyRef, Share, Text, Url, Usd
from moe_api.enums import Egress, FallbackMode, FallbackRight, MidStream, Provider
from moe_api.fields import Disruption, ListOf, Rule, SpecModel, group, hot
from moe_api.scalars import Duration

Tenant = Annotated[
    str, StringConstraints(strict=True, min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.@]*$")
]
Region = Annotated[
    str, StringConstraints(strict=True, min_length=2, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
]
MAX_TIERS = 8


class SloSpec(SpecModel):
    """Latency that 95 of 100 requests must keep."""

    ttft_p95: Latency = hot("Time to first token, 95th percentile.", Duration("2s"), unit="duration")
    itl_p95: Latency = hot("Time between output tokens, 95th percentile.", Duration("100ms"), unit="duration")


class TierSlo(SpecModel):
    """SLO of one tier; what is left out is taken from spec.slo."""

    ttft_p95: Latency | None = hot("Time to first token, 95th percentile.", None, unit="duration")
    itl_p95: Latency | None = hot("Time between output tokens, 95th percentile.", None, unit="duration")


class TierSpec(SpecModel):
    """A class of tenants. The tier named `default` holds every tenant that no tier names."""

    name: Name = hot("Name of the tier.", allowed="lower-case letters, digits and '-'")
    tenants: Annotated[tuple[Tenant, ...], ListOf(64, unique=True)] = hot(
        "Tenants as the gateway's authentication names them.", ()
    )
    slo: TierSlo = group("SLO of this tier.", TierSlo())
    experts_per_token: ExpertsPerToken | None = hot(
        "Experts per token (k); by default experts.perToken.", None, unit="experts"
    )
    fallback: FallbackRight = hot("Whether this tier's requests may spill to a closed API.", FallbackRight.ALLOWED)


class TargetPrice(SpecModel):
    """Price of a target; by default the catalog's."""

    input_usd_per_m_tokens: Usd | None = hot("Price of a million prompt tokens.", None, unit="USD")
    cached_input_usd_per_m_tokens: Usd | None = hot(
        "Price of a million prompt tokens read from the provider's cache.", None, unit="USD"
    )
    output_usd_per_m_tokens: Usd | None = hot("Price of a million output tokens.", None, unit="USD")


class TargetLimits(SpecModel):
    """What the provider's contract allows."""

    requests_per_minute: Count | None = hot("Requests in a minute.", None, unit="requests")
    tokens_per_minute: Count | None = hot("Prompt and output tokens in a minute.", None, unit="tokens")
    concurrency: Count | None = hot("Requests in flight.", None, unit="requests")


class FallbackTarget(SpecModel):
    """A closed API, or any OpenAI-compatible server, that requests may spill to."""

    name: Name = hot("Name of the target.", allowed="lower-case letters, digits and '-'")
    provider: Provider = hot("Whose API it speaks.")
    model: Text = hot("The provider's name of the model.")
    base_url: Url | None = hot(
        "Base of the API; needed for openai-compatible and azure-openai.",
        None,
        allowed="an http or https address without credentials",
    )
    secret_ref: SecretKeyRef | None = group(
        "Secret with the API key; needed but for openai-compatible.", None, disruption=Disruption.HOT
    )
    region: Region | None = hot(
        "Where the provider processes data.", None, allowed="lower-case letters, digits and '-', such as eu-west-1"
    )
    zero_retention: Flag = hot("The provider has agreed to keep nothing.", False)
    price: TargetPrice = group("Price; by default the catalog's.", TargetPrice())
    limits: TargetLimits = group("Limits of the contract; by default none.", TargetLimits())

    RULES = (
        Rule(
            "!(self.provider in ['openai-compatible', 'azure-openai']) || has(self.baseUrl)",
            "is needed for openai-compatible and azure-openai: the base of the API, such as https://host/v1",
            ".baseUrl",
            lambda s: s.provider not in (Provider.OPENAI_COMPATIBLE, Provider.AZURE_OPENAI) or s.base_url is not None,
        ),
        Rule(
            "self.provider == 'openai-compatible' || has(self.secretRef)",
            "is needed: name and key of the Secret with the API key",
            ".secretRef",
            lambda s: s.provider == Provider.OPENAI_COMPATIBLE or s.secret_ref is not None,
        ),
    )


class FallbackTrigger(SpecModel):
    """When a request spills: where the tuner starts."""

    miss_probability: Share = hot(
        "Spill above this probability of missing the TTFT objective.", Decimal("0.5"), unit="probability"
    )
    share_cap: Share = hot("Largest share of requests that may spill.", Decimal(1), unit="share of requests")


class TenantBudget(SpecModel):
    """What one tenant may spend of the budget."""

    name: Tenant = hot("The tenant, as the gateway's authentication names it.")
    usd_per_day: Usd = hot("Dollars a day (UTC).", unit="USD")


class FallbackBudget(SpecModel):
    """What spilling may cost. Never passed, on any gateway."""

    usd_per_day: Usd | None = hot("Dollars a day (UTC).", None, unit="USD")
    usd_per_month: Usd | None = hot(
        "Dollars a calendar month (UTC); by default no bound but the day's.", None, unit="USD"
    )
    tenant_usd_per_day: Usd | None = hot(
        "Dollars a day (UTC) of each tenant that `tenants` does not name; by default no bound but the deployment's.",
        None,
        unit="USD",
    )
    tenants: Annotated[tuple[TenantBudget, ...], ListOf(64, key="name")] | None = group(
        "Tenants with a bound of their own.", None
    )

    RULES = (
        Rule(
            "!has(self.usdPerDay) || !has(self.usdPerMonth) || double(self.usdPerMonth) >= double(self.usdPerDay)",
            "must be at least usdPerDay",
            ".usdPerMonth",
            lambda s: None in (s.usd_per_day, s.usd_per_month) or s.usd_per_month >= s.usd_per_day,
        ),
    )


class DataPolicy(SpecModel):
    """Which data may leave."""

    egress: Egress = hot(
        "Allowed, ZeroRetentionOnly (targets that keep nothing), Region (targets in `regions`) or Never.",
        Egress.ALLOWED,
    )
    regions: Annotated[tuple[Region, ...], ListOf(16, unique=True)] = hot(
        "Regions that data may go to, for egress Region.", ()
    )

    RULES = (
        Rule(
            "self.egress != 'Region' || size(self.regions) > 0",
            "is needed with egress Region: name at least one region",
            ".regions",
            lambda s: s.egress != Egress.REGION or len(s.regions) > 0,
        ),
    )


def _usable(fallback: FallbackSpec) -> bool:
    match fallback.data_policy.egress:
        case Egress.ZERO_RETENTION_ONLY:
            return any(target.zero_retention for target in fallback.targets)
        case Egress.REGION:
            return any(target.region in fallback.data_policy.regions for target in fallback.targets)
        case _:
            return True


class FallbackSpec(SpecModel):
    """Closed APIs that take what the SLO cannot wait for."""

    mode: FallbackMode = hot(
        "Active, or Shadow: what would be spilled, and at what cost, is counted and logged; nothing leaves or is held.",
        FallbackMode.ACTIVE,
    )
    targets: Annotated[tuple[FallbackTarget, ...], ListOf(8, key="name")] = group(
        "Targets; the cheapest that may be used is taken.", ()
    )
    trigger: FallbackTrigger = group("When a request spills.", FallbackTrigger())
    budget: FallbackBudget = group("What spilling may cost.", FallbackBudget())
    data_policy: DataPolicy = group("Which data may leave.", DataPolicy())
    mid_stream: MidStream = hot(
        "A stream that breaks after its first token ends with an error (Off), is continued by an own revision"
        " (Continue), or by a target where no revision can (Splice).",
        MidStream.OFF,
    )

    RULES = (
        Rule(
            "size(self.targets) == 0 || has(self.budget.usdPerDay)",
            'is needed where there are targets: set a bound on what they may cost, such as "200"',
            ".budget.usdPerDay",
            lambda s: not s.targets or s.budget.usd_per_day is not None,
        ),
        Rule(
            "size(self.targets) == 0 || self.dataPolicy.egress != 'ZeroRetentionOnly'"
            " || self.targets.exists(t, t.zeroRetention)",
            "ZeroRetentionOnly leaves no target: set zeroRetention on one that keeps nothing, or remove the targets",
            ".dataPolicy.egress",
            lambda s: not s.targets or s.data_policy.egress != Egress.ZERO_RETENTION_ONLY or _usable(s),
        ),
        Rule(
            "size(self.targets) == 0 || self.dataPolicy.egress != 'Region'"
            " || self.targets.exists(t, has(t.region) && t.region in self.dataPolicy.regions)",
            "leaves no target: give one a region that is listed here, or remove the targets",
            ".dataPolicy.regions",
            lambda s: not s.targets or s.data_policy.egress != Egress.REGION or _usable(s),
        ),
    )
