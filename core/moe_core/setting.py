"""What the retune policies speak about: a setting (knobs without a version), the signals of a tick, names of knobs."""

from __future__ import annotations

from decimal import Decimal

from pydantic import Field

from moe_api.base import Model
from moe_core.config import KnobBounds
from moe_core.wire import EngineKnobs, ExpertKnobs, FallbackKnobs, Knobs, Overflow

CAPACITY = "experts.capacityFactor.prefill"
DECODE_CAPACITY = "experts.capacityFactor.decode"
OVERFLOW = "experts.overflow"
ACTIVE_SEQS = "engine.maxActiveSeqs"
BATCHED_TOKENS = "engine.maxBatchedTokens"
SPILL = "fallback.missProbability"
SHARE_CAP = "fallback.shareCap"
KNOBS = (
    *(CAPACITY, DECODE_CAPACITY, OVERFLOW, "experts.perToken", "experts.redundant"),
    *(ACTIVE_SEQS, BATCHED_TOKENS, SPILL, SHARE_CAP, "replicas"),
)
"""Every knob that a pin may name; a pin may also name a group of them (`experts`, `experts.capacityFactor`)."""

GRAIN = Decimal("0.05")
"""Capacity factors are multiples of this (or a bound): finer steps drown in noise."""


class Setting(Model):
    """The hot knobs as one value, comparable: what `Knobs` carries, without deployment and version."""

    experts: ExpertKnobs = ExpertKnobs()
    engine: EngineKnobs = EngineKnobs()
    fallback: FallbackKnobs = FallbackKnobs()

    @classmethod
    def of(cls, knobs: Knobs) -> Setting:
        return cls(experts=knobs.experts, engine=knobs.engine, fallback=knobs.fallback)

    def knobs(self, deployment: str, version: int) -> Knobs:
        return Knobs(
            deployment=deployment, version=version, experts=self.experts, engine=self.engine, fallback=self.fallback
        )

    @property
    def prefill_cap(self) -> Decimal | None:
        """γ of prefill where it has an effect; None while prefill is uncapped."""
        return None if self.experts.overflow is Overflow.UNLIMITED else self.experts.capacity_factor_prefill

    def capped(self, factor: Decimal | None, overflow: Overflow) -> Setting:
        experts = self.experts.model_copy(update={"capacity_factor_prefill": factor, "overflow": overflow})
        return self.model_copy(update={"experts": experts})

    def with_capacity(self, other: Setting) -> Setting:
        """This setting with the expert capacity of another."""
        return self.model_copy(update={"experts": other.experts})

    def with_active_seqs(self, limit: int | None) -> Setting:
        return self.model_copy(update={"engine": self.engine.model_copy(update={"max_active_seqs": limit})})

    def with_miss_probability(self, share: float | None) -> Setting:
        return self.model_copy(update={"fallback": self.fallback.model_copy(update={"miss_probability": share})})

    def keeping_pins(self, other: Setting, bounds: KnobBounds) -> Setting:
        """This setting, with every pinned knob as it is in the other one."""
        kept = self
        if pinned(CAPACITY, bounds):
            kept = kept.with_capacity(other)
        elif pinned(OVERFLOW, bounds):
            kept = kept.capped(kept.experts.capacity_factor_prefill, other.experts.overflow)
        if pinned(ACTIVE_SEQS, bounds):
            kept = kept.with_active_seqs(other.engine.max_active_seqs)
        if pinned(SPILL, bounds):
            kept = kept.with_miss_probability(other.fallback.miss_probability)
        return kept

    def differences(self, other: Setting) -> tuple[str, ...]:
        """Names of the knobs in which two settings differ."""
        return tuple(
            name
            for name, differs in (
                (CAPACITY, self.prefill_cap != other.prefill_cap),
                (OVERFLOW, self.experts.overflow != other.experts.overflow),
                (ACTIVE_SEQS, self.engine.max_active_seqs != other.engine.max_active_seqs),
                (SPILL, self.fallback.miss_probability != other.fallback.miss_probability),
            )
            if differs
        )

    def text(self) -> str:
        """For a person: `γ 1.25 Reroute, maxActiveSeqs 32, missProbability 0.5`."""
        cap = self.prefill_cap
        gamma = "γ uncapped" if cap is None else f"γ {cap.normalize():f} {self.experts.overflow.value}"
        seqs, miss = self.engine.max_active_seqs, self.fallback.miss_probability
        return (
            f"{gamma}, maxActiveSeqs {'at its ceiling' if seqs is None else seqs}, "
            f"missProbability {'of the resource' if miss is None else format(miss, 'g')}"
        )


class Signals(Model):
    """What one tick knows of a deployment, all replicas and gateways together. None is unknown, never zero."""

    lag_s: float = Field(default=5.0, description="age of what the slowest of these signals still remembers")
    window_s: float = Field(default=10.0, description="window of the gateway's counts")
    # From the board.
    replicas: int | None = None
    running: int | None = None
    waiting: int | None = None
    active_limit: int | None = Field(default=None, description="lowest maxActiveSeqs in force on a replica")
    active_ceiling: int | None = Field(default=None, description="lowest launch-time ceiling of it")
    kv_usage: float | None = Field(default=None, description="of the fullest replica")
    preemptions_per_s: float | None = None
    engine_tokens_per_s: float | None = Field(default=None, description="prompt and output tokens of all replicas")
    rank_demand: float | None = Field(default=None, description="max/mean by EP rank before capacity, slot-weighted")
    rank_assigned: float | None = Field(default=None, description="the same after capacity")
    expert_cv: float | None = Field(default=None, description="coefficient of variation of demand over experts")
    lost_gate_mass: float | None = Field(default=None, description="per token")
    dropped_share: float | None = Field(default=None, description="of demanded slots")
    # From the gateways.
    arrivals_per_s: float | None = None
    completed_per_s: float | None = Field(default=None, description="wherever they were answered")
    local_per_s: float | None = Field(default=None, description="requests that the own replicas answered")
    in_flight: int | None = None
    prompt_tokens: float | None = Field(default=None, description="per finished request")
    output_tokens: float | None = Field(default=None, description="per finished request")
    ttft_p95_s: float | None = None
    itl_p95_s: float | None = None
    slo_attained: float | None = None
    spill_share: float | None = Field(default=None, description="of arrivals")
    shed_share: float | None = Field(default=None, description="of arrivals")
    can_spill: bool = Field(default=False, description="a closed API is configured")
    api_failing: bool = Field(default=False, description="a closed API answers with errors")
    missing: tuple[str, ...] = Field(default=(), description="sources that gave no answer, with the reason")


def pinned(name: str, bounds: KnobBounds) -> bool:
    """Whether a pin names this knob, or a group that it is in."""
    return any(_covers(pin, name) for pin in bounds.pinned)


def unknown_pins(bounds: KnobBounds) -> tuple[str, ...]:
    """Pins that name nothing: they would protect nothing, so a caller refuses them."""
    return tuple(pin for pin in bounds.pinned if not any(_covers(pin, name) for name in KNOBS))


def _covers(pin: str, name: str) -> bool:
    return name == pin or name.startswith(f"{pin}.")


def on_grain(factor: Decimal, bounds: KnobBounds) -> Decimal:
    """The nearest capacity factor on the grain and inside the bounds."""
    rounded = (factor / GRAIN).to_integral_value() * GRAIN
    return min(bounds.capacity_factor_max, max(bounds.capacity_factor_min, rounded))
