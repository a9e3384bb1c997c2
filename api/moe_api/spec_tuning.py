"""What the tuner may do: mode, bounds, pins, change budget."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import Field
from pydantic.alias_generators import to_snake

from moe_api.common import CapacityFactor, Count, Flag, Share
from moe_api.enums import Overflow, TuningMode
from moe_api.fields import ListOf, Rule, SpecModel, group, hot


def _ordered(low: str, high: str) -> Rule:
    """min ≤ max for a pair of optional integers."""
    return Rule(
        f"!has(self.{low}) || !has(self.{high}) || self.{low} <= self.{high}",
        f"must be at least {low}",
        f".{high}",
        lambda s: s.min is None or s.max is None or s.min <= s.max,
    )


def _ordered_decimals() -> Rule:
    return Rule(
        "!has(self.min) || !has(self.max) || double(self.min) <= double(self.max)",
        "must be at least min",
        ".max",
        lambda s: s.min is None or s.max is None or s.min <= s.max,
    )


class CapacityBounds(SpecModel):
    """Bounds of γ, for prefill and decode."""

    min: CapacityFactor = hot("Smallest γ.", Decimal(1), unit="ratio")
    max: CapacityFactor = hot("Largest γ.", Decimal(4), unit="ratio")

    RULES = (_ordered_decimals(),)


class CountBounds(SpecModel):
    """Bounds of a whole number."""

    min: Count | None = hot("Smallest value; by default 1.", None)
    max: Count | None = hot("Largest value; by default the launch-time ceiling.", None)

    RULES = (_ordered("min", "max"),)


class ShareBounds(SpecModel):
    """Bounds of a share."""

    min: Share = hot("Smallest value.", Decimal(0), unit="share")
    max: Share = hot("Largest value.", Decimal(1), unit="share")

    RULES = (_ordered_decimals(),)


class TuningBounds(SpecModel):
    """Where the tuner must stay."""

    capacity_factor: CapacityBounds = group("Bounds of γ.", CapacityBounds())
    overflow: Annotated[tuple[Overflow, ...], ListOf(4, unique=True)] = hot(
        "Overflow policies that it may choose.", (Overflow.UNLIMITED, Overflow.REROUTE)
    )
    max_active_seqs: CountBounds = group("Bounds of engine.maxActiveSeqs.", CountBounds())
    max_batched_tokens: CountBounds = group("Bounds of engine.maxBatchedTokens.", CountBounds())
    miss_probability: ShareBounds = group("Bounds of fallback.trigger.missProbability.", ShareBounds())
    share_cap: ShareBounds = group("Bounds of fallback.trigger.shareCap.", ShareBounds())

    RULES = (
        Rule(
            "size(self.overflow) > 0",
            "must name at least one policy; to keep the one in force, pin it",
            ".overflow",
            lambda s: len(s.overflow) > 0,
        ),
    )


PIN_KNOBS = {
    "capacity_factor_prefill": "experts.capacityFactor.prefill",
    "capacity_factor_decode": "experts.capacityFactor.decode",
    "overflow": "experts.overflow",
    "max_active_seqs": "engine.maxActiveSeqs",
    "max_batched_tokens": "engine.maxBatchedTokens",
    "miss_probability": "fallback.missProbability",
    "share_cap": "fallback.shareCap",
}
"""Field of TuningPins → name of the knob, as commands and decisions call it."""


class TuningPins(SpecModel):
    """Knobs held at a value. The tuner leaves them alone."""

    capacity_factor_prefill: CapacityFactor | None = hot(
        "experts.capacityFactor.prefill is held at this.", None, unit="ratio"
    )
    capacity_factor_decode: CapacityFactor | None = hot(
        "experts.capacityFactor.decode is held at this.", None, unit="ratio"
    )
    overflow: Overflow | None = hot("experts.overflow is held at this.", None)
    max_active_seqs: Count | None = hot("engine.maxActiveSeqs is held at this.", None, unit="sequences")
    max_batched_tokens: Count | None = hot("engine.maxBatchedTokens is held at this.", None, unit="tokens")
    miss_probability: Share | None = hot("fallback.trigger.missProbability is held at this.", None, unit="probability")
    share_cap: Share | None = hot("fallback.trigger.shareCap is held at this.", None, unit="share of requests")

    def knobs(self) -> tuple[str, ...]:
        """Names of the pinned knobs."""
        return tuple(knob for field, knob in PIN_KNOBS.items() if getattr(self, field) is not None)


class ChangeBudget(SpecModel):
    """How often the tuner may touch a running system."""

    changes_per_hour: Annotated[int, Field(strict=True, ge=0, le=3600)] = hot(
        "Knob changes in an hour, both loops together.", 60, unit="changes"
    )
    trials_per_day: Annotated[int, Field(strict=True, ge=0, le=10_000)] = hot(
        "Live trials of the slow loop in a day.", 96, unit="trials"
    )


def _pin_within(pin: str, bounds: str, *, exact: bool) -> Rule:
    """A pin lies inside its bounds. `exact`: they are decimals, and both bounds always have a value."""
    value = f"double(self.pins.{pin})" if exact else f"self.pins.{pin}"
    parts = []
    for end, sign in (("min", ">="), ("max", "<=")):
        path = f"self.bounds.{bounds}.{end}"
        parts.append(f"{value} {sign} double({path})" if exact else f"(!has({path}) || {value} {sign} {path})")

    of_pin, of_bounds = to_snake(pin), to_snake(bounds)

    def holds(spec: TuningSpec) -> bool:
        pinned, limits = getattr(spec.pins, of_pin), getattr(spec.bounds, of_bounds)
        if pinned is None:
            return True
        return bool((limits.min is None or pinned >= limits.min) and (limits.max is None or pinned <= limits.max))

    return Rule(
        f"!has(self.pins.{pin}) || ({' && '.join(parts)})",
        f"must lie within tuning.bounds.{bounds}",
        f".pins.{pin}",
        holds,
    )


class TuningSpec(SpecModel):
    """What the tuner may do."""

    mode: TuningMode = hot(
        '"Off", Recommend (decides and says so, changes nothing) or Auto. Quote "Off": YAML reads it as false.',
        TuningMode.RECOMMEND,
    )
    bounds: TuningBounds = group("Where the tuner must stay.", TuningBounds())
    pins: TuningPins = group("Knobs held at a value.", TuningPins())
    change_budget: ChangeBudget = group("How often the tuner may touch a running system.", ChangeBudget())
    paused: Flag = hot("Hold every knob where it is, for now.", False)

    RULES = (
        _pin_within("capacityFactorPrefill", "capacityFactor", exact=True),
        _pin_within("capacityFactorDecode", "capacityFactor", exact=True),
        _pin_within("maxActiveSeqs", "maxActiveSeqs", exact=False),
        _pin_within("maxBatchedTokens", "maxBatchedTokens", exact=False),
        _pin_within("missProbability", "missProbability", exact=True),
        _pin_within("shareCap", "shareCap", exact=True),
        Rule(
            "!has(self.pins.overflow) || self.pins.overflow in self.bounds.overflow",
            "must be one of tuning.bounds.overflow",
            ".pins.overflow",
            lambda s: s.pins.overflow is None or s.pins.overflow in s.bounds.overflow,
        ),
    )
