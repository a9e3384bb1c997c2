"""Configurations of a local stack's processes: what the resource says, and where things lie on this machine. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_api.v1alpha1 import FallbackTarget, MoEDeployment
from moe_core import process_config
from moe_core.config import (
    ConsoleConfig,
    GatewayConfig,
    GatewayLimits,
    RevisionConfig,
    ServingConfig,
    TargetConfig,
    TunerConfig,
)

REVISION = "local"
DRAIN_S = 5.0
"""How long Ctrl-C waits for streams that are open at the gateway."""


def serving_config(
    resource: MoEDeployment, *, ranks: int, source: str, max_model_len: int | None, trusted_keys: Sequence[str]
) -> ServingConfig:
    spec = resource.spec
    pipeline, data = spec.parallelism.pipeline or 1, spec.parallelism.data or 1
    return process_config.serving_config(
        resource,
        revision=REVISION,
        source=source,
        tensor=spec.parallelism.tensor or max(1, ranks // (pipeline * data)),
        data=data,
        pipeline=pipeline,
        expert_parallel=spec.parallelism.expert != 1,
        max_model_len=max_model_len,
        max_active_seqs=spec.engine.max_active_seqs,
        max_batched_tokens=spec.engine.max_batched_tokens,
        trusted_keys=tuple(trusted_keys),
    )


def target_config(target: FallbackTarget, key_file: Path | None, fallback_url: str | None) -> TargetConfig:
    """One fallback target. With `fallback_url` it is that OpenAI-compatible server, whatever the file says."""
    config = process_config.target_config(target, None if key_file is None else str(key_file))
    if fallback_url is None:
        return config
    return config.model_copy(update={"provider": "openai-compatible", "base_url": fallback_url, "api_key_file": None})


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
    return GatewayConfig(
        deployment=resource.key,
        model=resource.spec.model.id,
        port=port,
        revisions=(RevisionConfig(name=REVISION, url=url, board_url=board_url),),
        weights={REVISION: 100},
        slo=process_config.slo(resource),
        tiers=process_config.tiers(resource.spec),
        targets=tuple(targets),
        spill=process_config.spill(resource.spec.fallback),
        tenant_budgets=process_config.tenant_budgets(resource.spec.fallback),
        egress=process_config.egress(resource.spec),
        mid_stream=process_config.mid_stream(resource.spec),
        limits=GatewayLimits(drain_s=DRAIN_S),
        trusted_keys=tuple(trusted_keys),
        state_dir=str(state_dir),
        workers=resource.spec.gateway.workers,
        sessions=resource.spec.gateway.sessions.by,
        record=process_config.record(resource.spec.gateway, str(state_dir)),
    )


def tuner_config(
    resource: MoEDeployment,
    *,
    board_url: str,
    gateway_admin_url: str,
    prometheus_url: str,
    signing_key: Path,
    state_dir: Path,
    console: ConsoleConfig,
) -> TunerConfig:
    return TunerConfig(
        **process_config.tuning(resource),
        board_url=board_url,
        gateway_admin_urls=(gateway_admin_url,),
        prometheus_url=prometheus_url,
        signing_key_file=str(signing_key),
        storage_url=f"sqlite:///{state_dir / 'tuner.db'}",
        decision_log=str(state_dir / "decisions.jsonl"),
        console=console,
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
