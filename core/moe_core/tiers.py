"""What a tier means for a request: which one it gets, how many experts its tokens take, whose cached blocks it shares.

Gateway, engine core and worker read a request's tier by the one name below, so that none can see another tier than the
others. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from moe_api.enums import FallbackRight
from moe_api.spec import DEFAULT_TIER
from moe_core.config import SloConfig, TierConfig
from moe_core.wire import ExpertKnobs, Overflow

TIER_ARGUMENT = "moestack_tier"
"""Key of a request's `vllm_xargs`, and so of its SamplingParams.extra_args, that holds its tier; absent: `default`."""
RESERVED_ARGUMENTS = "moestack_"
"""Beginning of the keys of `vllm_xargs` that no client may set."""
OWN_K = 0
"""Stands for the model's own number of experts per token."""
SALT_PREFIX = "moestack-"
"""Beginning of salts made here: a client's own that begins so is hashed like any other, so it can name none of them."""


class TierRefused(ValueError):
    """A tier that the request may not have; the message names the header and the remedy."""


def tier_of(tiers: Sequence[TierConfig], tenant: str | None, claim: str | None) -> str:
    """The tier of a request by its tenant, or the tier that it asks for where it may have that one.

    Anyone may ask for a tier that names no tenants; one that names tenants is theirs alone, and `default` is theirs
    whom no tier names. Raises TierRefused.
    """
    own = next((tier.name for tier in tiers if tenant is not None and tenant in tier.tenants), DEFAULT_TIER)
    if claim is None or claim == own:
        return own
    open_ = [tier.name for tier in tiers if not tier.tenants and tier.name != DEFAULT_TIER]
    if claim not in open_:
        allowed = ", ".join(dict.fromkeys([own, *open_]))
        raise TierRefused(f"x-moestack-tier: this request may not be of tier {claim[:63]!r}; it may be of {allowed}")
    return claim


def may_spill(tiers: Sequence[TierConfig], tier: str) -> bool:
    """Whether a request of this tier may go to a closed API. A tier that is there no more may not: nobody knows what
    it was allowed."""
    named = next((each for each in tiers if each.name == tier), None)
    return tier == DEFAULT_TIER if named is None else named.fallback is not FallbackRight.NEVER


def slo_of(tiers: Sequence[TierConfig], tier: str, common: SloConfig) -> SloConfig:
    """What is promised to a request of this tier: its tier's own SLO where it has one, else the deployment's."""
    for each in tiers:
        if each.name == tier and each.slo is not None:
            return each.slo
    return common


def experts_of(per_token: Mapping[str, int], tier: str | None) -> int:
    """Experts per token (k) of a request; `OWN_K` where its tier sets none."""
    return per_token.get(DEFAULT_TIER if tier is None else tier, OWN_K)


def cache_salt(client: str | None, tier: str | None, knobs: ExpertKnobs) -> str | None:
    """The salt under which a request's blocks are cached: equal for requests whose blocks are interchangeable.

    It names the client's own salt, the tier, its k, overflow and capacity, and nothing that counts: blocks are found
    again when a setting returns. A request of tier `default` with the model's own k keeps the client's salt while
    nothing is capped. SHA-256, so a client's salt cannot be read from it; at most 73 characters, of those that vLLM
    allows.
    """
    tier = None if tier == DEFAULT_TIER else tier
    k = experts_of(knobs.per_token, tier)
    capacity = _capacity(knobs)
    own = client is None or not client.startswith(SALT_PREFIX)
    if own and tier is None and k == OWN_K and capacity is None:
        return client
    text = json.dumps([client, tier, k, capacity], separators=(",", ":"), sort_keys=True)
    return SALT_PREFIX + hashlib.sha256(text.encode()).hexdigest()


def _capacity(knobs: ExpertKnobs) -> dict[str, object] | None:
    """The knobs that bind every tier alike; None where they bind nothing."""
    bound = knobs.model_copy(update={"overflow": Overflow.UNLIMITED, "per_token": {}})
    if knobs.overflow is Overflow.UNLIMITED or bound == ExpertKnobs():
        return None
    # All of them but k by tier, so that a knob added later keeps blocks apart too.
    return knobs.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"per_token"})
