"""What the operator and the tuner tell people: the status, 32 KiB at most, numbers as exact text."""

from __future__ import annotations

import json
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from moe_api.common import Count, Name, Natural
from moe_api.enums import Overflow
from moe_api.fields import ListOf, MapOf, SpecModel, told
from moe_api.scalars import NAME_PATTERN, Duration, Exact, Quantity

MAX_BYTES = 32 * 1024

Number = Annotated[Decimal, Exact("0", "999999999999", lenient=True)]
Time = Annotated[
    str,
    StringConstraints(
        strict=True,
        max_length=40,
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})$",
    ),
]
"""RFC 3339."""
Word = Annotated[str, StringConstraints(strict=True, max_length=128)]
Sentence = Annotated[str, StringConstraints(strict=True, max_length=1024)]
Generation = Annotated[int, Field(strict=True, ge=0, le=2**53)]


class ConditionType(StrEnum):
    """What is said about a MoEDeployment."""

    ACCEPTED = "Accepted"
    FITS = "Fits"
    CLUSTER_READY = "ClusterReady"
    SERVING_READY = "ServingReady"
    GATEWAY_READY = "GatewayReady"
    SLO_MET = "SLOMet"
    TUNING_ACTIVE = "TuningActive"
    DEGRADED = "Degraded"


class Condition(SpecModel):
    """One aspect of the state, with a reason that a person can act on."""

    type: ConditionType = told("Aspect.", ...)
    status: Literal["True", "False", "Unknown"] = told('"True", "False" or "Unknown".', ...)
    observed_generation: Generation = told("Generation of the spec that this speaks of.", 0)
    last_transition_time: Time = told("When status last changed.", ...)
    reason: Annotated[
        str,
        StringConstraints(strict=True, min_length=1, max_length=64, pattern=r"^[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9])?$"),
    ] = told("One word for machines.", ...)
    message: Sentence = told("What it means and what to do.", "")


class RevisionPhase(StrEnum):
    """Where a revision stands."""

    PENDING = "Pending"
    STARTING = "Starting"
    PROMOTING = "Promoting"
    SERVING = "Serving"
    DRAINING = "Draining"
    FAILED = "Failed"


class RevisionStatus(SpecModel):
    """One revision: one RayService."""

    name: Name = told("Name of its RayService.", ...)
    phase: RevisionPhase = told("Where it stands.", RevisionPhase.PENDING)
    weight: Annotated[int, Field(strict=True, ge=0, le=100)] = told(
        "Its share of the local traffic.", 0, unit="percent"
    )
    replicas: Natural = told("Replicas asked for.", 0)
    ready_replicas: Natural = told("Replicas that answer.", 0)
    image: Annotated[str, StringConstraints(strict=True, max_length=512)] | None = told("Image with its digest.")
    renderer_version: Word | None = told("Version of the renderer that wrote it.")
    created_at: Time | None = told("When it was made.")
    step_started_at: Time | None = told("When its weight was set.")
    slo_percent: Annotated[int, Field(strict=True, ge=0, le=100)] | None = told(
        "Requests within the SLO when the last step away from it began.", unit="percent"
    )
    unready_since: Time | None = told("Since when it takes traffic and does not answer.")
    drain_deadline: Time | None = told("When it is deleted whatever is in flight.")
    failed_generation: Generation | None = told("Generation of the spec for which it failed.")
    failed_for: Word | None = told(
        "Digest of the spec without its hot fields when it failed: while that stays, it is not tried again."
    )
    served: Annotated[bool, Field(strict=True)] | None = told(
        "Whether it has carried all the traffic: what a failed upgrade returns to."
    )
    message: Sentence | None = told("Why it stands there.")


class MemoryPart(SpecModel):
    """One row of the memory table, for the fullest GPU."""

    part: Literal["Weights", "KVCache", "Activations", "RedundantExperts", "Overhead", "Free"] = told(
        "What it holds.", ...
    )
    size: Quantity = told("Room it takes.", ..., unit="bytes")


class PlanStatus(SpecModel):
    """The plan in force."""

    tensor: Count = told("Tensor parallel size.", 1, unit="ranks")
    data: Count = told("Data parallel size.", 1, unit="ranks")
    expert: Count = told("Expert parallel size.", 1, unit="ranks")
    pipeline: Count = told("Pipeline parallel size.", 1, unit="ranks")
    max_model_len: Count | None = told("Longest context.", unit="tokens")
    max_active_seqs: Count | None = told("Launch-time ceiling.", unit="sequences")
    max_batched_tokens: Count | None = told("Launch-time ceiling.", unit="tokens")
    memory: Annotated[tuple[MemoryPart, ...], ListOf(8, key="part")] = told("Memory of the fullest GPU.", ())
    memory_per_gpu: Quantity | None = told("Memory that a GPU has.", unit="bytes")
    predicted_tokens_per_second: Number | None = told("Output tokens in a second of a replica.", unit="tokens/s")
    predicted_ttft_p95: Duration | None = told("Predicted time to first token.", unit="duration")
    predicted_itl_p95: Duration | None = told("Predicted time between output tokens.", unit="duration")
    catalog_version: Word | None = told("Version of the catalog that it was made from.")


class LiveStatus(SpecModel):
    """Totals, written by the operator at most every 30 s."""

    written_by: Word = told("Who wrote them.", "")
    at: Time = told("When.", ...)
    rps: Number | None = told("Requests offered, whoever answered them.", unit="requests/s")
    ttft_p95: Duration | None = told("Time to first token, 95th percentile.", unit="duration")
    itl_p95: Duration | None = told("Time between output tokens, 95th percentile.", unit="duration")
    imbalance: Number | None = told("Largest over mean rank load, after capacity.", unit="ratio")
    spill_share: Number | None = told("Share of requests that went to a closed API.", unit="share of requests")
    usd_per_m_tokens: Number | None = told("Cost of a million tokens, GPUs and closed APIs together.", unit="USD")
    spent_today_usd: Number | None = told("Spent on closed APIs today (UTC).", unit="USD")
    break_even_m_tokens_per_month: Number | None = told(
        "Volume above which this deployment is cheaper than the closed API.", unit="million tokens a month"
    )


class ExpertKnobsInForce(SpecModel):
    """Expert capacity in force."""

    overflow: Overflow = told("What happens above capacity.", Overflow.UNLIMITED)
    capacity_factor_prefill: Number | None = told("γ of prefill; absent is uncapped.", unit="ratio")
    capacity_factor_decode: Number | None = told("γ of decode; absent is uncapped.", unit="ratio")
    per_token: Annotated[dict[str, Count], MapOf(16, NAME_PATTERN, 63, "the name of a tier")] = told(
        "Experts per token (k) by tier.", {}, unit="experts"
    )


class EngineKnobsInForce(SpecModel):
    """Engine limits in force."""

    max_active_seqs: Count | None = told("Absent is the launch-time ceiling.", unit="sequences")
    max_batched_tokens: Count | None = told("Absent is the launch-time ceiling.", unit="tokens")


class FallbackKnobsInForce(SpecModel):
    """Spill thresholds in force."""

    miss_probability: Number | None = told(
        "Spill above this probability of missing the TTFT objective.", unit="probability"
    )
    share_cap: Number | None = told("Largest share of requests that may spill.", unit="share of requests")


class KnobsInForce(SpecModel):
    """Every hot knob, whole: the JSON form of the document that replicas and gateways get."""

    deployment: Annotated[str, StringConstraints(strict=True, max_length=320)] = told("namespace/name.", ...)
    version: Annotated[int, Field(strict=True, ge=1, le=2**53)] = told("Monotonic.", ...)
    experts: ExpertKnobsInForce = told("Expert capacity.", ExpertKnobsInForce())
    engine: EngineKnobsInForce = told("Engine limits.", EngineKnobsInForce())
    fallback: FallbackKnobsInForce = told("Spill thresholds.", FallbackKnobsInForce())


class TrafficContext(SpecModel):
    """The traffic that a setting was found for."""

    name: Word = told("Name of the context.", ...)
    rps: Number | None = told("Arrivals.", unit="requests/s")
    input_tokens: Number | None = told("Mean prompt length.", unit="tokens")
    output_tokens: Number | None = told("Mean output length.", unit="tokens")
    burstiness: Number | None = told("Squared coefficient of variation of the time between arrivals.", unit="ratio")
    expert_skew: Number | None = told("Largest over mean expert demand.", unit="ratio")


class Decision(SpecModel):
    """The last thing that the tuner decided."""

    at: Time = told("When.", ...)
    loop: Literal["Fast", "Slow"] = told("Which loop.", ...)
    action: Word = told("What was done.", ...)
    why: Sentence = told("Why, with the figures that it rests on.", ...)
    from_version: Natural | None = told("Knobs before.")
    to_version: Natural | None = told("Knobs after.")


class PinStatus(SpecModel):
    """A pinned knob."""

    knob: Word = told("The knob.", ...)
    value: Word = told("Its value.", ...)
    source: Literal["Spec", "Annotation"] = told("Who pinned it: the file, or a command.", ...)


class PauseStatus(SpecModel):
    """A pause in force."""

    source: Literal["Spec", "Annotation"] = told("Who paused: the file, or a command.", ...)
    until: Time | None = told("When it ends; absent is when it is lifted.")
    reason: Sentence | None = told("Why.")


class ReplicaBounds(SpecModel):
    """Bounds of Serve's autoscaling that the tuner asks for; the operator keeps them inside the spec's."""

    min: Natural | None = told("Fewest replicas.", unit="replicas")
    max: Natural | None = told("Most replicas.", unit="replicas")


class TuningStatus(SpecModel):
    """The durable record of the tuner; the tuner alone writes it."""

    written_by: Word = told("Which of the tuner's processes wrote this.", "")
    mode: Word = told("Mode in force.", "")
    knobs: KnobsInForce | None = told("Knobs in force.")
    on_trial: Annotated[bool, Field(strict=True)] = told("The knobs in force are a candidate: unproven.", False)
    safe: KnobsInForce | None = told("Knobs that stand while nothing presses: what a new start returns to.")
    crashed: Annotated[tuple[KnobsInForce, ...], ListOf(8)] = told("Knobs under which an engine died.", ())
    auto_since: Time | None = told("When mode Auto first began: trials run in the simulator alone for a day from then.")
    acknowledged: Natural = told("Lowest version in force on any rank.", 0)
    replicas: ReplicaBounds | None = told("Bounds of autoscaling asked for.")
    context: TrafficContext | None = told("Traffic now.")
    last_decision: Decision | None = told("The last decision.")
    pins: Annotated[tuple[PinStatus, ...], ListOf(16, key="knob")] = told("Pinned knobs.", ())
    pauses: Annotated[tuple[PauseStatus, ...], ListOf(2, key="source")] = told("Pauses in force.", ())
    exploring: Annotated[bool, Field(strict=True)] = told("Whether a trial may run.", False)
    not_exploring_because: Sentence | None = told("Why not.")


class MoEDeploymentStatus(SpecModel):
    """What is."""

    observed_generation: Generation = told("Generation of the spec that this speaks of.", 0)
    conditions: Annotated[tuple[Condition, ...], ListOf(16, key="type")] = told("Aspects of the state.", ())
    replicas: Natural = told("Replicas asked for.", 0, unit="replicas")
    ready_replicas: Natural = told("Replicas that answer.", 0, unit="replicas")
    revisions: Annotated[tuple[RevisionStatus, ...], ListOf(8, key="name")] = told("Revisions and their weights.", ())
    weights_version: Natural = told("Version of the weights that gateways are sent.", 0)
    plan: PlanStatus | None = told("The plan in force.")
    live: LiveStatus | None = told("Totals of the last half minute.")
    tuning: TuningStatus | None = told("The tuner's record.")

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of that type, if it is there."""
        return next((c for c in self.conditions if c.type == kind), None)


def size_bytes(status: MoEDeploymentStatus) -> int:
    """Bytes of the status as compact JSON in UTF-8."""
    return len(json.dumps(status.to_json(), separators=(",", ":"), ensure_ascii=False).encode())


def bounded(status: MoEDeploymentStatus) -> MoEDeploymentStatus:
    """The status in at most 32 KiB: messages are cut shorter and shorter, then drained revisions and plans go.

    Conditions, knobs and weights of serving revisions always stay.
    """
    for limit in (1024, 256, 64, 0):
        if size_bytes(status) <= MAX_BYTES:
            return status
        status = _with_messages_cut(status, limit)
    if size_bytes(status) > MAX_BYTES:
        kept = tuple(r for r in status.revisions if r.weight > 0 or r.phase == RevisionPhase.SERVING)
        status = status.model_copy(update={"revisions": kept, "plan": None})
    return status


def _cut(text: str | None, limit: int) -> str | None:
    return text if text is None or len(text) <= limit else (text[: limit - 1] + "…" if limit else "")


def _with_messages_cut(status: MoEDeploymentStatus, limit: int) -> MoEDeploymentStatus:
    tuning = status.tuning
    if tuning is not None:
        decision = tuning.last_decision
        tuning = tuning.model_copy(
            update={
                "last_decision": decision and decision.model_copy(update={"why": _cut(decision.why, limit)}),
                "pauses": tuple(p.model_copy(update={"reason": _cut(p.reason, limit)}) for p in tuning.pauses),
                "not_exploring_because": _cut(tuning.not_exploring_because, limit),
            }
        )
    return status.model_copy(
        update={
            "conditions": tuple(c.model_copy(update={"message": _cut(c.message, limit)}) for c in status.conditions),
            "revisions": tuple(r.model_copy(update={"message": _cut(r.message, limit)}) for r in status.revisions),
            "tuning": tuning,
        }
    )
