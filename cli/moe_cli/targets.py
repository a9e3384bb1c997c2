"""Which fallback targets a local stack may use. Pure; fails closed where money or data could leave.

The local gateway knows one budget a day and no tiers. What a resource forbids and this gateway could not
keep apart is left out, and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_api.v1alpha1 import FallbackTarget, MoEDeployment
from moe_cli import plan_local
from moe_cli.documents import Change
from moe_cli.fit import Refused
from moe_cli.outcome import Problem
from moe_core import process_config
from moe_core.config import TargetConfig


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
        if why := process_config.forbidden(resource.spec, target):
            changes.append(Change(field=where, asked=target.name, used="left out", why=why))
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
    problem = process_config.unusable(target, where)
    return None if problem is None else Problem(field=problem.field, message=problem.message, remedy=problem.remedy)
