"""Expert capacity, and how far quality may fall for it."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import Field

from moe_api.common import CapacityFactor, ExpertsPerToken, Name, Share
from moe_api.enums import Overflow
from moe_api.fields import ListOf, Rule, SpecModel, group, hot, rolling


class CapacityFactors(SpecModel):
    """γ by phase: slots of an expert in a step over the mean demand. Left out, that phase is uncapped."""

    prefill: CapacityFactor | None = hot("γ for prefill tokens; by default uncapped.", None, unit="ratio")
    decode: CapacityFactor | None = hot(
        "γ for decode tokens; by default uncapped, since rerouting slows a memory-bound step.", None, unit="ratio"
    )


class ExpertsSpec(SpecModel):
    """Capacity of experts and what happens above it: where the tuner starts."""

    capacity_factor: CapacityFactors = group("γ by phase.", CapacityFactors())
    overflow: Overflow = hot("What happens to a (token, expert) slot above capacity.", Overflow.UNLIMITED)
    per_token: ExpertsPerToken | None = hot(
        "Experts per token (k) of every tier that sets none of its own; by default the model's.", None, unit="experts"
    )
    redundant: Annotated[int, Field(strict=True, ge=0, le=1024)] = rolling(
        "Redundant experts: spare copies for the hottest.", 0, unit="experts"
    )

    RULES = (
        Rule(
            "self.overflow != 'Unlimited' || (!has(self.capacityFactor.prefill) && !has(self.capacityFactor.decode))",
            "Unlimited has no capacity to hold: set Reroute, Drop or ExpertChoice, or remove capacityFactor",
            ".overflow",
            lambda s: s.overflow != Overflow.UNLIMITED or s.capacity_factor == CapacityFactors(),
        ),
    )


class TierQuality(SpecModel):
    """Limits of one tier; what is left out is taken from `quality`."""

    name: Name = hot("A tier of spec.tiers.", allowed="the name of a tier in spec.tiers")
    max_lost_gate_mass: Share | None = hot(
        "Largest mean share of gate mass that capacity may lose.", None, unit="share of gate mass"
    )
    min_experts_per_token: ExpertsPerToken | None = hot("Fewest experts per token (k).", None, unit="experts")


class QualitySpec(SpecModel):
    """What Auto must not go below."""

    max_lost_gate_mass: Share = hot(
        "Largest mean share of gate mass that capacity may lose.", Decimal("0.02"), unit="share of gate mass"
    )
    min_experts_per_token: ExpertsPerToken | None = hot(
        "Fewest experts per token (k); by default k is never lowered.", None, unit="experts"
    )
    tiers: Annotated[tuple[TierQuality, ...], ListOf(8, key="name")] = group("Limits of single tiers.", ())
