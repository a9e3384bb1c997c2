"""What one resource says to each process: the one way from a MoEDeployment to configurations, in a cluster and on one
machine. Pure.

It also knows what this version's engine and gateway cannot do, by field, so that a person hears it before GPUs are
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from typing import Any, Literal

from moe_api.enums import AuthMode, FallbackMode, MetricsDialect, Toggle
from moe_api.spec_engine import EngineSpec
from moe_api.spec_gateway import GatewaySpec
from moe_api.spec_traffic import SloSpec, TargetLimits, TierSlo
from moe_api.spec_tuning import PIN_KNOBS
from moe_api.v1alpha1 import (
    Egress,
    EngineKind,
    FallbackRight,
    FallbackSpec,
    FallbackTarget,
    ModelSpec,
    MoEDeployment,
    MoEDeploymentSpec,
    Overflow,
    Provider,
)
from moe_core import prices
from moe_core.config import (
    AuthConfig,
    EgressConfig,
    EgressRule,
    ForeignMetrics,
    KnobBounds,
    MidStreamConfig,
    RecordConfig,
    ServingConfig,
    SloConfig,
    SpillConfig,
    TargetConfig,
    TenantBudgets,
    TierConfig,
)
from moe_core.wire import EngineKnobs, ExpertKnobs, FallbackKnobs, Knobs
from moe_core.wire import Overflow as WireOverflow

APPLICATION = "moestack"
"""Name of the Serve application."""
ENGINE_DEPLOYMENT = "MoEServer"
"""Name of its one Serve deployment: bounds of autoscaling in serveConfigV2 find it by this name."""
BUILDER = "moe_serving.builder:build_app"
"""Import path of the application's builder."""
ENGINE_ENV = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of every process of Ray and vLLM."""
DEFAULT_ACTIVE_SEQS = 64
RECORD_BYTES, RECORD_FILES = 32 * 2**20, 8
DEFAULT_BATCHED_TOKENS = 2048
DAYS_IN_A_MONTH = 31
"""Closed APIs that the gateway speaks."""
EXTERNAL = "external"
"""Name at the gateway of an engine that runs elsewhere."""
TAKEN_NAMES = ("none", EXTERNAL)
SPOKEN_AUTH = tuple(AuthMode)
"""Ways to know tenants that the gateway has."""


@dataclass(frozen=True)
class Problem:
    """Something asked for that cannot be done, and the remedy."""

    field: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}; {self.remedy}"


def slo(resource: MoEDeployment) -> SloConfig:
    spec = resource.spec.slo
    return SloConfig(ttft_p95_s=spec.ttft_p95.seconds, itl_p95_s=spec.itl_p95.seconds)


def auth(resource: MoEDeployment, keys_dir: str) -> AuthConfig:
    """How the gateway knows its tenants. `keys_dir`: where the Secret of keys is mounted."""
    asked = resource.spec.gateway.auth
    if asked.mode is AuthMode.API_KEYS:
        return AuthConfig(mode=asked.mode, keys_dir=keys_dir)
    if asked.mode is AuthMode.OIDC:
        return AuthConfig(
            mode=asked.mode, issuer=asked.issuer, audience=asked.audience, tenant_claim=asked.tenant_claim
        )
    return AuthConfig()


def tiers(spec: MoEDeploymentSpec) -> tuple[TierConfig, ...] | None:
    """What the gateway is told of tiers; None where there are none."""
    return (
        tuple(
            TierConfig(
                name=tier.name,
                tenants=tier.tenants,
                fallback=FallbackRight.NEVER if tier.fallback is FallbackRight.NEVER else None,
                slo=tier_slo(spec.slo, tier.slo),
            )
            for tier in spec.tiers
        )
        or None
    )


def tier_slo(common: SloSpec, own: TierSlo) -> SloConfig | None:
    """A tier's own promise, what it leaves out taken from spec.slo; None where it leaves out all."""
    if own == TierSlo():
        return None
    ttft, itl = own.ttft_p95 or common.ttft_p95, own.itl_p95 or common.itl_p95
    return SloConfig(ttft_p95_s=ttft.seconds, itl_p95_s=itl.seconds)


def boot_knobs(resource: MoEDeployment) -> Knobs:
    """What replicas boot with: the spec's own values, and pins where there are any."""
    spec, pins = resource.spec, resource.spec.tuning.pins
    return Knobs(
        deployment=resource.key,
        version=1,
        experts=ExpertKnobs(
            overflow=WireOverflow((pins.overflow or spec.experts.overflow).value),
            capacity_factor_prefill=pins.capacity_factor_prefill or spec.experts.capacity_factor.prefill,
            capacity_factor_decode=pins.capacity_factor_decode or spec.experts.capacity_factor.decode,
            per_token=spec.experts_per_token(),
        ),
        engine=EngineKnobs(max_active_seqs=pins.max_active_seqs, max_batched_tokens=pins.max_batched_tokens),
        fallback=FallbackKnobs(
            miss_probability=None if pins.miss_probability is None else float(pins.miss_probability),
            share_cap=None if pins.share_cap is None else float(pins.share_cap),
        ),
    )


ROLLING_ARGUMENTS = ("dtype", "enforce_eager", "prefix_caching", "redundant_experts", "engine_args")
"""Fields of a ServingConfig whose change replaces replicas and keeps the cluster."""


def rolling_arguments(spec: MoEDeploymentSpec) -> dict[str, Any]:
    """The part of a ServingConfig whose change replaces replicas and keeps the cluster: further engine arguments and
    redundant experts."""
    extra = dict(spec.engine.typed_extra_args())
    return {
        "dtype": extra.pop("dtype", "auto"),
        "enforce_eager": extra.pop("enforce_eager", False),
        "prefix_caching": extra.pop("enable_prefix_caching", True),
        "redundant_experts": spec.experts.redundant,
        "engine_args": extra,
    }


def serving_config(
    resource: MoEDeployment,
    *,
    revision: str,
    source: str,
    tensor: int,
    data: int,
    pipeline: int,
    expert_parallel: bool,
    max_model_len: int | None,
    max_active_seqs: int | None,
    max_batched_tokens: int | None,
    trusted_keys: tuple[str, ...],
) -> ServingConfig:
    """Arguments of the Serve application for a revision cut into these ranks; ceilings of None are the defaults."""
    spec = resource.spec
    return ServingConfig(
        deployment=resource.key,
        revision=revision,
        model=spec.model.id,
        source=source,
        source_revision=spec.model.revision,
        accelerator=spec.hardware.accelerator if spec.hardware is not None else "cpu",
        tensor_parallel=tensor,
        data_parallel=data,
        pipeline_parallel=pipeline,
        expert_parallel=expert_parallel,
        replicas_min=spec.replicas.min,
        replicas_max=spec.replicas.ceiling,
        max_model_len=max_model_len,
        max_active_seqs=max_active_seqs or DEFAULT_ACTIVE_SEQS,
        max_batched_tokens=max_batched_tokens or DEFAULT_BATCHED_TOKENS,
        kv_cache_dtype=spec.engine.kv_cache_dtype.engine_name,
        quantization=spec.model.quantization.engine_name,
        trusted_keys=trusted_keys,
        boot_knobs=boot_knobs(resource),
        **rolling_arguments(spec),
    )


def autoscaling(replicas_min: int, replicas_max: int, active_seqs: int) -> dict[str, Any]:
    """Serve's autoscaling of the engine, whole: what serveConfigV2 says replaces what the builder said, key by key or
    not at all. A replica is full at the engine's own ceiling of sequences, not at Serve's default of 2 requests."""
    return {"min_replicas": replicas_min, "max_replicas": replicas_max, "target_ongoing_requests": active_seqs}


def checkpoint_source(model: ModelSpec, claims: str) -> str:
    """Where the engine finds the checkpoint: a path, a repository, or an address that it reads by itself. `claims`:
    the folder in which volume claims are mounted by name."""
    source = model.source or model.id
    scheme, mark, rest = source.partition("://")
    if not mark:
        return source
    return {"hf": rest, "file": rest if rest.startswith("/") else f"/{rest}", "pvc": f"{claims}/{rest}"}.get(
        scheme, source
    )


def unserved(config: ServingConfig) -> tuple[Problem, ...]:
    """What the engine cannot run yet. The builder refuses the same."""
    found = []
    if config.data_parallel > 1 and not config.expert_parallel:
        message = "experts in slices are not served with data-parallel attention yet"
        remedy = f"set it to {config.tensor_parallel * config.data_parallel}, or leave it out"
        found.append(Problem("spec.parallelism.expert", message, remedy))
    if config.pipeline_parallel > 1:
        message = "pipeline stages are not served yet"
        found.append(Problem("spec.parallelism.pipeline", message, "use tensor or data parallelism"))
    if config.engine_args.get("enable_dbo"):
        message = "routers would see halves of a batch, which the plugin cannot tell apart yet"
        found.append(Problem("spec.engine.extraArgs.enable-dbo", message, "leave it out"))
    if config.source.startswith("az://"):
        message = "the engine reads no az:// address yet"
        found.append(Problem("spec.model.source", message, "use s3://, gs://, pvc://, or a repository"))
    return tuple(found)


def unsupported(resource: MoEDeployment) -> tuple[Problem, ...]:
    """What cannot be had in a cluster, whatever the engine: nobody may take it for done."""
    spec = resource.spec
    found = []
    if not resource.metadata.name[0].isalpha():
        message = "begins with a digit, and names of Services must begin with a letter"
        found.append(Problem("metadata.name", message, "choose a name that begins with a letter"))
    if spec.gateway.auth.mode not in SPOKEN_AUTH:
        message = f"{spec.gateway.auth.mode.value}: the gateway does not check who asks yet"
        remedy = "set it to None with exposure ClusterIP, and check at the cluster's own edge"
        found.append(Problem("spec.gateway.auth.mode", message, remedy))
    if spec.engine.kind is EngineKind.EXTERNAL and spec.engine.api_key_secret_ref is not None:
        message = "the gateway sends no key to an external engine yet"
        found.append(Problem("spec.engine.apiKeySecretRef", message, "let the engine trust the gateway's pods"))
    return tuple(found)


def unheeded(spec: MoEDeploymentSpec) -> tuple[tuple[str, str], ...]:
    """(field, why) of what is set and has no effect in this version: allowed, and said, as it guards nothing."""
    monitoring = spec.monitoring
    found = []
    if spec.quality.tiers:
        found.append(("spec.quality.tiers", "the tuner keeps spec.quality for every tier"))
    for index, target in enumerate(spec.fallback.targets):
        place = f"spec.fallback.targets[{index}]"
        if target.limits != TargetLimits():
            found.append((f"{place}.limits", "the gateway counts no requests of a provider's contract yet"))
    if monitoring.dashboards is Toggle.ENABLED:
        why = "dashboards come with the chart, for every MoEDeployment: its dashboards.enabled makes them"
        found.append(("spec.monitoring.dashboards", why))
    return tuple(found)


def foreign_metrics(engine: EngineSpec) -> ForeignMetrics:
    """Where an external engine's load is read: what the resource names, or the usual place beside its API."""
    dialect = engine.metrics.dialect
    base = (engine.url or "").rstrip("/").removesuffix("/v1")
    path = "/prometheus/metrics" if dialect is MetricsDialect.TENSORRT_LLM else "/metrics"
    names = {row.signal: row.metric for row in engine.metrics.names} if dialect is MetricsDialect.CUSTOM else {}
    return ForeignMetrics(url=engine.metrics.url or base + path, dialect=dialect, names=names)


def usd_per_day(fallback: FallbackSpec) -> Decimal | None:
    """Dollars of a day that spends evenly within the day's limit and the month's; rounded down."""
    day, month = fallback.budget.usd_per_day, fallback.budget.usd_per_month
    limits = [limit for limit in (day, None if month is None else month / DAYS_IN_A_MONTH) if limit is not None]
    return min(limits).quantize(Decimal("0.000001"), rounding=ROUND_DOWN) if limits else None


def record(gateway: GatewaySpec, state_dir: str) -> RecordConfig | None:
    """Where decisions are written down, below the folder of a process's state. Its workers share the room."""
    if not gateway.record_decisions:
        return None
    files = RECORD_FILES * gateway.workers
    return RecordConfig(dir=f"{state_dir}/decisions", file_bytes=RECORD_BYTES // files, files=files)


def egress(spec: MoEDeploymentSpec) -> EgressConfig:
    """Which data may leave, as the gateway enforces it request by request."""
    policy = spec.fallback.data_policy
    return EgressConfig(deployment=EgressRule(egress=policy.egress, regions=policy.regions))


def forbidden(spec: MoEDeploymentSpec, target: FallbackTarget) -> str | None:
    """Why nothing may be sent to a target, or None."""
    policy = spec.fallback.data_policy
    if policy.egress == Egress.NEVER:
        return "spec.fallback.dataPolicy.egress is Never"
    if policy.egress == Egress.ZERO_RETENTION_ONLY and not target.zero_retention:
        return "spec.fallback.dataPolicy.egress is ZeroRetentionOnly, and this target may keep what it gets"
    if policy.egress == Egress.REGION and target.region not in policy.regions:
        return "spec.fallback.dataPolicy.regions does not hold its region"
    return None


def unusable(target: FallbackTarget, where: str) -> Problem | None:
    """What keeps the gateway from using a target, or None."""
    if target.name in TAKEN_NAMES:
        return Problem(f"{where}.name", f"{target.name!r} has a meaning of its own in metrics", "choose another name")
    if target.provider == Provider.BEDROCK and target.base_url is None and target.region is None:
        return Problem(f"{where}.region", "the address of bedrock is its region's", "set it, or baseUrl")
    own = (target.price.input_usd_per_m_tokens, target.price.output_usd_per_m_tokens)
    if target.provider == Provider.OPENAI_COMPATIBLE or (None not in own and any(own)):
        return None
    if any(own) or not prices.in_catalog(target.provider.value, target.model):
        return Problem(
            f"{where}.price",
            f"no price of target {target.name} is known, so no budget could hold",
            "set inputUsdPerMTokens and outputUsdPerMTokens",
        )
    return None


def base_url(target: FallbackTarget) -> str | None:
    """Base of a target's API; None where its provider has one address."""
    if target.provider == Provider.BEDROCK and target.base_url is None:
        return f"https://bedrock-runtime.{target.region}.amazonaws.com/openai/v1"
    return target.base_url


def target_config(target: FallbackTarget, key_file: str | None) -> TargetConfig:
    """One fallback target."""
    price = target.price
    return TargetConfig(
        name=target.name,
        provider=target.provider.value,
        model=target.model,
        base_url=base_url(target),
        api_key_file=key_file,
        usd_per_m_input=price.input_usd_per_m_tokens or Decimal(0),
        usd_per_m_output=price.output_usd_per_m_tokens or Decimal(0),
        cached_input_usd_per_m=price.cached_input_usd_per_m_tokens,
        zero_retention=target.zero_retention,
        region=target.region,
    )


def tenant_budgets(fallback: FallbackSpec) -> TenantBudgets:
    """What tenants may spend, each, of the budget of all."""
    budget = fallback.budget
    return TenantBudgets(
        usd_per_day=budget.tenant_usd_per_day,
        tenants={tenant.name: tenant.usd_per_day for tenant in budget.tenants or ()},
    )


def spill(fallback: FallbackSpec) -> SpillConfig:
    """Where spilling starts, and its budget for all gateways together."""
    day, month = fallback.budget.usd_per_day, fallback.budget.usd_per_month
    return SpillConfig(
        miss_probability=float(fallback.trigger.miss_probability),
        share_cap=float(fallback.trigger.share_cap),
        usd_per_day=month if day is None else day,
        usd_per_month=month,
        mode=None if fallback.mode is FallbackMode.ACTIVE else fallback.mode,
    )


def mid_stream(spec: MoEDeploymentSpec) -> MidStreamConfig:
    """What becomes of a stream that breaks."""
    return MidStreamConfig(mode=spec.fallback.mid_stream)


def knob_bounds(spec: MoEDeploymentSpec) -> KnobBounds:
    """What the tuner may do."""
    bounds = spec.tuning.bounds
    overflow: Literal["Reroute", "Drop"] = "Reroute"
    if Overflow.REROUTE not in bounds.overflow and Overflow.DROP in bounds.overflow:
        overflow = "Drop"
    return KnobBounds(
        capacity_factor_min=bounds.capacity_factor.min,
        capacity_factor_max=bounds.capacity_factor.max,
        active_seqs_min=bounds.max_active_seqs.min or 1,
        active_seqs_max=bounds.max_active_seqs.max or spec.engine.max_active_seqs or DEFAULT_ACTIVE_SEQS,
        overflow=overflow,
        # The whole range is no bound: the tuner's policy has a floor of its own.
        miss_probability_min=float(bounds.miss_probability.min) or None,
        miss_probability_max=float(bounds.miss_probability.max) if bounds.miss_probability.max < 1 else None,
        pinned=spec.tuning.pins.knobs(),
    )


def tuning(resource: MoEDeployment) -> dict[str, Any]:
    """The fields of a TunerConfig that the resource decides."""
    spec = resource.spec
    pins = {knob: getattr(spec.tuning.pins, field) for field, knob in PIN_KNOBS.items()}
    return {
        "deployment": resource.key,
        "mode": spec.tuning.mode.value,
        "slo": slo(resource),
        "bounds": knob_bounds(spec),
        "max_lost_gate_mass": float(spec.quality.max_lost_gate_mass),
        "changes_per_hour": spec.tuning.change_budget.changes_per_hour,
        "trials_per_day": spec.tuning.change_budget.trials_per_day,
        "paused": spec.tuning.paused,
        "pins": {knob: value for knob, value in pins.items() if value is not None},
    }
