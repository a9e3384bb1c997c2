"""The configuration of each process of a local stack, from the resource. What one resource says, without any I/O."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from moe_api.v1alpha1 import FallbackSpec, FallbackTarget, MoEDeployment, Overflow
from moe_core.config import (
    GatewayConfig,
    GatewayLimits,
    KnobBounds,
    RevisionConfig,
    ServingConfig,
    SloConfig,
    SpillConfig,
    TargetConfig,
    TunerConfig,
)
from moe_core.wire import EngineKnobs, ExpertKnobs, FallbackKnobs, Knobs
from moe_core.wire import Overflow as WireOverflow

REVISION = "local"
DEFAULT_ACTIVE_SEQS = 64
DEFAULT_BATCHED_TOKENS = 2048
DAYS_IN_A_MONTH = 31
DRAIN_S = 5.0
"""How long Ctrl-C waits for streams that are open at the gateway."""


def slo(resource: MoEDeployment) -> SloConfig:
    spec = resource.spec.slo
    return SloConfig(ttft_p95_s=spec.ttft_p95.seconds, itl_p95_s=spec.itl_p95.seconds)


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


def serving_config(
    resource: MoEDeployment, *, ranks: int, source: str, max_model_len: int | None, trusted_keys: Sequence[str]
) -> ServingConfig:
    spec = resource.spec
    extra: dict[str, Any] = dict(spec.engine.typed_extra_args())
    parallel = spec.parallelism
    pipeline, data = parallel.pipeline or 1, parallel.data or 1
    tensor = parallel.tensor or max(1, ranks // (pipeline * data))
    return ServingConfig(
        deployment=resource.key,
        revision=REVISION,
        model=spec.model.id,
        source=source,
        accelerator=spec.hardware.accelerator if spec.hardware is not None else "cpu",
        tensor_parallel=tensor,
        data_parallel=data,
        pipeline_parallel=pipeline,
        expert_parallel=parallel.expert != 1,
        replicas_min=spec.replicas.min,
        replicas_max=spec.replicas.ceiling,
        max_model_len=max_model_len,
        max_active_seqs=spec.engine.max_active_seqs or DEFAULT_ACTIVE_SEQS,
        max_batched_tokens=spec.engine.max_batched_tokens or DEFAULT_BATCHED_TOKENS,
        dtype=extra.pop("dtype", "auto"),
        kv_cache_dtype=spec.engine.kv_cache_dtype.engine_name,
        quantization=spec.model.quantization.engine_name,
        enforce_eager=extra.pop("enforce_eager", False),
        prefix_caching=extra.pop("enable_prefix_caching", True),
        redundant_experts=spec.experts.redundant,
        engine_args=extra,
        trusted_keys=tuple(trusted_keys),
        boot_knobs=boot_knobs(resource),
    )


def usd_per_day(fallback: FallbackSpec) -> Decimal | None:
    """Dollars a day that keep the day's limit, and the month's in its longest form."""
    day, month = fallback.budget.usd_per_day, fallback.budget.usd_per_month
    limits = [limit for limit in (day, None if month is None else month / DAYS_IN_A_MONTH) if limit is not None]
    return min(limits).quantize(Decimal("0.000001")) if limits else None


def target_config(target: FallbackTarget, key_file: Path | None, fallback_url: str | None) -> TargetConfig:
    """One fallback target. With `fallback_url` it is that OpenAI-compatible server, whatever the file says."""
    price = target.price
    return TargetConfig(
        name=target.name,
        provider="openai-compatible" if fallback_url else target.provider.value,
        model=target.model,
        base_url=fallback_url or target.base_url,
        api_key_file=None if fallback_url or key_file is None else str(key_file),
        usd_per_m_input=price.input_usd_per_m_tokens or Decimal(0),
        usd_per_m_output=price.output_usd_per_m_tokens or Decimal(0),
    )


def gateway_config(
    resource: MoEDeployment,
    *,
    url: str,
    board_url: str,
    targets: Sequence[TargetConfig],
    trusted_keys: Sequence[str],
    port: int,
    state_dir: Path,
) -> GatewayConfig:
    spec = resource.spec
    trigger = spec.fallback.trigger
    return GatewayConfig(
        deployment=resource.key,
        model=spec.model.id,
        port=port,
        revisions=(RevisionConfig(name=REVISION, url=url, board_url=board_url),),
        weights={REVISION: 100},
        slo=slo(resource),
        targets=tuple(targets),
        spill=SpillConfig(
            miss_probability=float(trigger.miss_probability),
            share_cap=float(trigger.share_cap),
            usd_per_day=usd_per_day(spec.fallback),
        ),
        limits=GatewayLimits(drain_s=DRAIN_S),
        trusted_keys=tuple(trusted_keys),
        state_dir=str(state_dir),
    )


def tuner_config(
    resource: MoEDeployment,
    *,
    board_url: str,
    gateway_admin_url: str,
    prometheus_url: str,
    signing_key: Path,
    state_dir: Path,
) -> TunerConfig:
    spec, bounds = resource.spec, resource.spec.tuning.bounds
    overflow: Literal["Reroute", "Drop"] = "Reroute"
    if Overflow.REROUTE not in bounds.overflow and Overflow.DROP in bounds.overflow:
        overflow = "Drop"
    return TunerConfig(
        deployment=resource.key,
        mode=spec.tuning.mode.value,
        board_url=board_url,
        gateway_admin_urls=(gateway_admin_url,),
        prometheus_url=prometheus_url,
        signing_key_file=str(signing_key),
        storage_url=f"sqlite:///{state_dir / 'tuner.db'}",
        decision_log=str(state_dir / "decisions.jsonl"),
        slo=slo(resource),
        bounds=KnobBounds(
            capacity_factor_min=bounds.capacity_factor.min,
            capacity_factor_max=bounds.capacity_factor.max,
            active_seqs_min=bounds.max_active_seqs.min or 1,
            active_seqs_max=bounds.max_active_seqs.max or spec.engine.max_active_seqs or DEFAULT_ACTIVE_SEQS,
            overflow=overflow,
            # The whole range is no bound: the tuner's policy has a floor of its own.
            miss_probability_min=float(bounds.miss_probability.min) or None,
            miss_probability_max=float(bounds.miss_probability.max) if bounds.miss_probability.max < 1 else None,
            pinned=spec.tuning.pins.knobs(),
        ),
        max_lost_gate_mass=float(spec.quality.max_lost_gate_mass),
        changes_per_hour=spec.tuning.change_budget.changes_per_hour,
        paused=spec.tuning.paused,
    )


def prometheus_config(targets_file: Path) -> str:
    """Prometheus' own configuration (YAML): scrape each second what the targets file names."""
    return f"""global:
  scrape_interval: 1s
  scrape_timeout: 1s
  evaluation_interval: 1s
scrape_configs:
  - job_name: moestack
    file_sd_configs:
      - files: ['{targets_file}']
        refresh_interval: 2s
"""
