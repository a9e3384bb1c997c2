"""Which fallback targets a local stack may use. Pure; fails closed where money or data could leave.

The local gateway knows one budget a day, OpenAI's API and no tiers. What a resource forbids and this gateway could not
keep apart is left out, and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_api.v1alpha1 import Egress, FallbackRight, FallbackTarget, MoEDeployment, Provider
from moe_cli import plan_local
from moe_cli.documents import Change
from moe_cli.fit import Refused
from moe_cli.outcome import Problem
from moe_core.config import TargetConfig

SPEAKS = (Provider.OPENAI,)


@dataclass(frozen=True)
class Targets:
    """Targets of the gateway, and what differs from the resource."""

    configs: tuple[TargetConfig, ...]
    changes: tuple[Change, ...]


def targets(
    resource: MoEDeployment, secrets: Mapping[tuple[str, str], Path], *, tiny: bool, fallback_url: str | None
) -> Targets | Refused:
    """Fallback targets with their keys. One that cannot be used is left out with --tiny, and refused without.

    `fallback_url` stands for every target and needs no key and no price; the data policy holds for it too.
    """
    configs: list[TargetConfig] = []
    changes: list[Change] = []
    problems: list[Problem] = []
    for index, target in enumerate(resource.spec.fallback.targets):
        where = f"spec.fallback.targets[{index}]"
        if forbidden := _forbidden(resource, target):
            changes.append(Change(field=where, asked=target.name, used="left out", why=forbidden))
            continue
        reference = target.secret_ref
        key_file = secrets.get((reference.name, reference.key)) if reference is not None else None
        problem = None if fallback_url is not None else _unusable(where, target, key_file)
        if problem is not None and tiny:
            changes.append(Change(field=where, asked=target.name, used="left out", why=problem.message))
            continue
        if problem is not None:
            problems.append(problem)
            continue
        if fallback_url is not None:
            changes.append(Change(field=where, asked=target.name, used=fallback_url, why="--fallback-url"))
        configs.append(plan_local.target_config(target, key_file, fallback_url))
    return Refused(tuple(problems)) if problems else Targets(tuple(configs), tuple(changes))


def env_name(secret: str, key: str) -> str:
    """Environment variable that may hold a secret: openai/apiKey → MOESTACK_SECRET_OPENAI_APIKEY."""
    return "MOESTACK_SECRET_" + "".join(c if c.isalnum() else "_" for c in f"{secret}_{key}").upper()


def _forbidden(resource: MoEDeployment, target: FallbackTarget) -> str | None:
    """Why nothing may be sent to a target, or None."""
    policy = resource.spec.fallback.data_policy
    if policy.egress == Egress.NEVER:
        return "spec.fallback.dataPolicy.egress is Never"
    if policy.egress == Egress.ZERO_RETENTION_ONLY and not target.zero_retention:
        return "spec.fallback.dataPolicy.egress is ZeroRetentionOnly, and this target may keep what it gets"
    if policy.egress == Egress.REGION and target.region not in policy.regions:
        return "spec.fallback.dataPolicy.regions does not hold its region"
    barred = [tier.name for tier in resource.spec.tiers if tier.fallback == FallbackRight.NEVER]
    if barred:
        return f"tier {barred[0]} may not spill, and the local gateway does not tell tiers apart"
    return None


def _unusable(where: str, target: FallbackTarget, key_file: Path | None) -> Problem | None:
    """What is missing for a target, or None."""
    reference = target.secret_ref
    if reference is not None and key_file is None:
        name = f"{reference.name}/{reference.key}"
        return Problem(
            field=f"{where}.secretRef",
            message=f"no secret {name} here, for target {target.name}",
            remedy=f"give it with --secret {name}=FILE, or set {env_name(reference.name, reference.key)}",
        )
    compatible = target.provider == Provider.OPENAI_COMPATIBLE
    if not compatible and target.provider not in SPEAKS:
        return Problem(
            field=f"{where}.provider",
            message=f"the gateway does not speak {target.provider.value} yet",
            remedy="use openai or openai-compatible",
        )
    price = target.price
    if not compatible and None in (price.input_usd_per_m_tokens, price.output_usd_per_m_tokens):
        return Problem(
            field=f"{where}.price",
            message=f"no price of target {target.name} is known, so no budget could hold",
            remedy="set inputUsdPerMTokens and outputUsdPerMTokens",
        )
    return None
