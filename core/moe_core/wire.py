"""What our processes say to one another: knobs, acknowledgements, digests and weights.

Knobs travel tuner → board → replicas and tuner → gateway as one signed document with one monotonic version.
A replica or gateway answers with an `Ack`; replicas and gateways report a digest each second.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_serializer

from moe_api.base import Model
from moe_api.enums import Overflow as Overflow  # noqa: PLC0414 - exported from here

Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""A fraction of a whole: 0.05 is 5 %."""


def _none_or_whole(percent: dict[str, int]) -> dict[str, int]:
    total = sum(percent.values())
    if total not in (0, 100):
        raise ValueError(f"sums to {total}; it must be 100, or 0 where no revision is to take requests")
    return percent


Percent = Annotated[dict[str, Annotated[int, Field(ge=0, le=100)]], AfterValidator(_none_or_whole)]
"""Traffic share by revision, in percent. They sum to 100, or to 0: then no request goes to a local revision."""


class LayerFactors(Model):
    """Capacity factors of one layer. None leaves that phase uncapped there."""

    prefill: Decimal | None = Field(default=None, gt=0)
    decode: Decimal | None = Field(default=None, gt=0)

    @field_serializer("prefill", "decode", when_used="json-unless-none")
    def _decimal(self, value: Decimal) -> str:
        return format(value.normalize(), "f")


class ExpertKnobs(Model):
    """Expert capacity in force. A capacity factor of None leaves that phase uncapped."""

    overflow: Overflow = Overflow.UNLIMITED
    capacity_factor_prefill: Decimal | None = Field(default=None, gt=0)
    capacity_factor_decode: Decimal | None = Field(default=None, gt=0)
    capacity_factor_by_layer: (
        Annotated[dict[Annotated[int, Field(ge=0)], LayerFactors], Field(max_length=512)] | None
    ) = Field(
        default=None,
        description="layer of the model → its own factors, in place of the two above; None: no layer has its own",
    )
    per_token: dict[str, int] = Field(
        default_factory=dict, description="tier name → experts per token (k); a tier not named takes the model's own"
    )

    @field_serializer("capacity_factor_prefill", "capacity_factor_decode", when_used="json-unless-none")
    def _decimal(self, value: Decimal) -> str:
        return format(value.normalize(), "f")

    def factors(self, layer: int) -> LayerFactors:
        """Capacity factors of a layer, by its number in the model."""
        own = (self.capacity_factor_by_layer or {}).get(layer)
        return own or LayerFactors(prefill=self.capacity_factor_prefill, decode=self.capacity_factor_decode)


class EngineKnobs(Model):
    """Limits of the engine's scheduler, at most their launch-time ceilings. None keeps the ceiling."""

    max_active_seqs: int | None = Field(default=None, ge=1)
    max_batched_tokens: int | None = Field(default=None, ge=1)


class FallbackKnobs(Model):
    """Thresholds of the gateway's spill policy. None keeps the value of the resource."""

    miss_probability: Share | None = Field(default=None, description="spill above this P(TTFT > SLO)")
    share_cap: Share | None = Field(default=None, description="largest share of requests that may spill")


class Knobs(Model):
    """Every hot knob of one MoEDeployment, whole: a later version replaces an earlier one, never patches it."""

    deployment: str = Field(description="namespace/name")
    version: int = Field(ge=1, description="monotonic; a receiver refuses a lower one")
    experts: ExpertKnobs = ExpertKnobs()
    engine: EngineKnobs = EngineKnobs()
    fallback: FallbackKnobs = FallbackKnobs()


class Weights(Model):
    """Traffic share of each revision at a gateway; one that is not named has none."""

    deployment: str
    version: int = Field(ge=1, description="of these and of GatewayConfig.weightsVersion the higher one is in force")
    percent: Percent


class TuningOrders(Model):
    """What a person tells the tuner of one deployment, whole: a later version replaces an earlier one."""

    deployment: str = Field(description="namespace/name")
    version: int = Field(ge=1, description="monotonic; the tuner refuses a lower one")
    paused: bool = Field(default=False, description="hold every knob where it is, beside what the resource says")
    pins: dict[str, Decimal | None] = Field(
        default_factory=dict, description="knob → value to hold it at; null: where it is now"
    )


class ReadPass(Model):
    """Who shows it may read the state of one deployment's gateways and boards, until it ends."""

    deployment: str = Field(description="namespace/name")
    until_s: float = Field(description="Unix seconds")


class Signed(Model):
    """A command in an envelope: `payload` is the exact JSON text that was signed."""

    kind: Literal["Knobs", "Weights", "TuningOrders", "ReadPass"]
    payload: str = Field(max_length=65536)
    key_id: str = Field(max_length=64)
    signature: str = Field(max_length=128, description="Ed25519 over kind, a newline and payload; base64")


class Ack(Model):
    """One rank's word that a version of the knobs is in force there, or why it is not."""

    replica: str
    rank: int = Field(ge=0, description="EP rank; 0 for a gateway")
    version: int
    applied_at_s: float = Field(description="unix time at which the rank began to use it")
    step: int = Field(default=-1, description="forward passes that the rank had run by then; -1 where unknown")
    error: str | None = None
    unsupported: tuple[str, ...] | None = Field(
        default=None, description="knobs of that version that the engine behind lacks: they act nowhere"
    )


class LayerDigest(Model):
    """Expert load of one MoE layer on one replica.

    Windows cover the time since the digest before; counters run since the replica started and never go back.
    A slot is one (token, expert) assignment: a token has k of them.
    """

    layer: int
    hooked: bool = Field(description="False: this layer's routing bypasses the plugin and is not counted")
    slots_total: int = Field(ge=0, description="slots demanded, before capacity")
    dropped_total: int = Field(default=0, ge=0)
    rerouted_total: int = Field(default=0, ge=0)
    overflow_kept_total: int = Field(default=0, ge=0)
    lost_gate_mass_total: float = Field(default=0.0, ge=0, description="sum over tokens; divide by tokens_total")
    tokens_total: int = Field(default=0, ge=0)
    window_slots: int = Field(default=0, ge=0)
    expert_max_over_mean: float | None = Field(default=None, description="of demand in the window; None when idle")
    expert_cv: float | None = Field(default=None, description="coefficient of variation of demand over experts")
    rank_max_over_mean: float | None = Field(default=None, description="of assigned slots by EP rank in the window")
    rank_slots: tuple[int, ...] = Field(default=(), description="assigned slots by EP rank in the window")
    demand_rank_max_over_mean: float | None = Field(default=None, description="what it would be without capacity")
    hottest: tuple[tuple[int, int], ...] = Field(default=(), description="(expert, slots_total) of the hottest few")
    max_prefill_load: int = Field(default=0, description="most slots that one expert took in one prefill step")


class EngineDigest(Model):
    """State of one replica's engine."""

    running: int = 0
    waiting: int = 0
    kv_usage: Share = 0.0
    max_active_seqs: int
    max_batched_tokens: int
    ceiling_active_seqs: int
    ceiling_batched_tokens: int
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    busy_s_total: float = Field(default=0.0, description="seconds in forward passes, slowest rank")
    rank_moe_s_total: tuple[float, ...] = Field(default=(), description="seconds in expert kernels by EP rank")


class Utilisation(Model):
    """Use of the hardware by the work that was asked for. Rates are of the window, over time in forward passes.

    S-MBU and S-MFU are None where the hardware's peaks are not known (a CPU), and while nothing runs.
    """

    decode_steps_total: int = Field(default=0, ge=0, description="forward passes without a prefill token")
    decode_busy_s_total: float = Field(default=0.0, ge=0, description="seconds in them, slowest rank")
    decode_bytes_total: float = Field(default=0.0, ge=0, description="bytes of weights and KV cache that they read")
    flops_total: float = Field(default=0.0, ge=0, description="floating-point operations of all forward passes")
    experts_touched: float | None = Field(default=None, description="distinct experts a layer and decode step, mean")
    bytes_s: float | None = Field(default=None, description="decode_bytes over decode seconds")
    flops_s: float | None = None
    s_mbu: float | None = Field(default=None, description="bytes_s over peak bandwidth")
    s_mfu: float | None = Field(default=None, description="flops_s over peak arithmetic")


class ReplicaDigest(Model):
    """What a replica reports to the board each second."""

    replica: str
    revision: str = "local"
    started_at_s: float
    at_s: float
    seq: int = Field(ge=0)
    ranks: int = Field(ge=1)
    knobs_version: int = Field(default=0, description="lowest version in force on any rank; 0 is boot")
    knobs: ExpertKnobs = ExpertKnobs()
    engine: EngineDigest
    utilisation: Utilisation | None = Field(default=None, description="None: the shapes of the model are not known")
    layers: tuple[LayerDigest, ...] = ()


class LayerLoad(Model):
    """Slots of one MoE layer by expert and by EP rank: of `tokens` tokens, before and after capacity."""

    layer: int
    hooked: bool = Field(default=True, description="False: this layer's routing bypasses the plugin: nothing counted")
    tokens: int = Field(default=0, ge=0)
    demand: tuple[int, ...] = Field(default=(), description="slots that the router asked for, by expert")
    assigned: tuple[int, ...] = Field(default=(), description="slots that the expert computed, by expert")
    rank_demand: tuple[int, ...] = Field(default=(), description="the same by EP rank; one rank holds every expert")
    rank_assigned: tuple[int, ...] = ()
    dropped: int = Field(default=0, ge=0)
    rerouted: int = Field(default=0, ge=0)
    overflow_kept: int = Field(default=0, ge=0)


class ExpertMatrix(Model):
    """The full expert load of a replica since it started, on request: too much for Prometheus."""

    replica: str
    revision: str = "local"
    model: str = ""
    started_at_s: float = 0.0
    at_s: float
    ranks: int = Field(default=1, ge=1)
    knobs_version: int = 0
    knobs: ExpertKnobs = ExpertKnobs()
    layers: tuple[LayerLoad, ...] = ()


class TargetDigest(Model):
    """One upstream of a gateway over the last window. One that left the configuration stays until it is drained."""

    name: str
    local: bool
    requests: int = Field(default=0, description="attempts that ended; a request may have had others elsewhere")
    failures: int = Field(default=0, description="attempts that failed, of `requests`")
    met: int = Field(default=0, description="requests that ended here within the SLO of TTFT and ITL")
    missed: int = Field(default=0, description="requests that ended here outside the SLO, or were lost here")
    in_flight: int = Field(default=0, description="exact, now")
    usd: Decimal = Decimal(0)


class GatewayDigest(Model):
    """What a gateway reports on its admin port: the last `window_s` seconds."""

    gateway: str
    at_s: float
    window_s: float
    knobs_version: int = 0
    weights: dict[str, int] = Field(default_factory=dict, description="in force")
    weights_version: int = 0
    config_hash: str = Field(default="", description="`config_hash` of the configuration file in force")
    config_error: str | None = Field(default=None, description="why the newest configuration file is refused")
    arrivals: int = 0
    completed: int = 0
    failed: int = 0
    spilled: int = 0
    shed: int = 0
    held: int = 0
    in_flight: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    itl_p95_s: float | None = None
    slo_attained: Share | None = Field(default=None, description="share of finished requests within the SLO")
    targets: tuple[TargetDigest, ...] = ()
