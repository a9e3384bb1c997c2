"""A local stack as data: which processes, in which order, with which files. Pure; the supervisor carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_api.v1alpha1 import MoEDeployment
from moe_cli import console, plan_local
from moe_cli.documents import TARGETS, Part, StackPlan
from moe_cli.fit import Fit, Machine, Refused, fit
from moe_cli.outcome import Exit, Problem
from moe_cli.targets import targets as find_targets
from moe_core.config import TargetConfig
from moe_core.prices import FREE_PROVIDER

PROGRAMS: dict[str, tuple[str, ...]] = {
    "checkpoint": ("-m", "moe_cli.tiny_step"),
    "serving": ("-m", "moe_serving.run"),
    "gateway": ("-m", "moe_gateway"),
    "tuner": ("-m", "moe_tuner"),
}
"""Part → arguments of the Python that runs it. Tests put small fakes here."""

SERVING_START_S = 1200.0
SERVING_STOP_S = 45.0

SERVING_URL, BOARD_URL = "${serving.url}", "${serving.boardUrl}"
GATEWAY_ADMIN_URL = "http://127.0.0.1:${gateway.adminPort}"
TUNER_URL = "http://127.0.0.1:${tuner.port}"
PROMETHEUS_URL = "http://127.0.0.1:${prometheus.port}"


@dataclass(frozen=True)
class Options:
    """What the command line adds to the resource."""

    state_dir: Path
    stack_id: str
    public_key: str  # PEM; signs changes of knobs
    tiny: bool = False
    port: int = 0
    prometheus_port: int = 0
    fallback_url: str | None = None


def plan(resource: MoEDeployment, machine: Machine, options: Options) -> StackPlan | Refused:
    """Everything that `moectl up` starts for a resource on a machine, or every reason why it starts nothing."""
    fitted = fit(resource, machine, options.tiny)
    if isinstance(fitted, Refused):
        return fitted
    targets = find_targets(fitted.resource, machine.secrets, tiny=options.tiny, fallback_url=options.fallback_url)
    if isinstance(targets, Refused):
        return targets
    if machine.prometheus is None:
        message = "prometheus is not installed"
        return Refused((Problem(message=message, remedy="run tools/system-packages"),), Exit.COULD_NOT_START)
    parts = [
        _prometheus(machine.prometheus, options),
        *([_checkpoint(machine, fitted.family)] if fitted.family is not None else []),
        _serving(fitted, machine, options),
        _gateway(fitted, machine, options, targets.configs),
        _tuner(fitted, machine, options),
    ]
    return StackPlan(
        stack_id=options.stack_id,
        deployment=resource.key,
        model=resource.spec.model.id,
        ranks=fitted.ranks,
        context=fitted.max_model_len,
        parts=tuple(parts),
        scrape={"moestack-board": BOARD_URL, "moestack-gateway": GATEWAY_ADMIN_URL, "moestack-tuner": TUNER_URL},
        changes=(*fitted.changes, *targets.changes),
        notes=_notes(fitted.resource, targets.configs),
    )


def _notes(resource: MoEDeployment, targets: Sequence[TargetConfig]) -> tuple[str, ...]:
    spec = resource.spec
    notes = []
    if spec.gateway.auth.mode.value != "None":
        notes.append("spec.gateway.auth: the local gateway listens on 127.0.0.1 alone and asks nobody for a key")
    notes += [
        f"spec.fallback.targets ({target.name}): no price is known: its requests count as $0; set price"
        for target in targets
        if target.provider == FREE_PROVIDER and not target.usd_per_m_input and not target.usd_per_m_output
    ]
    return tuple(notes)


def _prometheus(program: str, options: Options) -> Part:
    folder = options.state_dir
    return Part(
        name="prometheus",
        title="Prometheus",
        command=(
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{options.prometheus_port}",
            "--storage.tsdb.retention.time=6h",
            "--storage.tsdb.retention.size=256MB",
            "--log.level=warn",
        ),
        documents={
            "prometheus.yml": plan_local.prometheus_config(folder / TARGETS),
            TARGETS: [],
        },
        probe="/-/ready",
        start_s=30,
    )


def _checkpoint(machine: Machine, family: str) -> Part:
    command = (machine.python, *PROGRAMS["checkpoint"], family)
    return Part(name="checkpoint", title="tiny checkpoint", command=command, once=True, start_s=300)


def _serving(fitted: Fit, machine: Machine, options: Options) -> Part:
    config = plan_local.serving_config(
        fitted.resource,
        ranks=fitted.ranks,
        source=fitted.source,
        max_model_len=fitted.max_model_len,
        trusted_keys=(options.public_key,),
    )
    return Part(
        name="serving",
        title="Ray Serve + vLLM",
        command=(machine.python, *PROGRAMS["serving"], "--config", str(options.state_dir / "serving.json")),
        documents={"serving.json": config.to_json()},
        needs=("checkpoint",) if fitted.family is not None else (),
        start_s=SERVING_START_S,
        stop_s=SERVING_STOP_S,
    )


def _gateway(fitted: Fit, machine: Machine, options: Options, targets: Sequence[TargetConfig]) -> Part:
    config = plan_local.gateway_config(
        fitted.resource,
        url=SERVING_URL,
        board_url=BOARD_URL,
        targets=targets,
        trusted_keys=(options.public_key,),
        port=options.port,
        state_dir=options.state_dir,
    )
    return Part(
        name="gateway",
        title="gateway",
        command=(machine.python, *PROGRAMS["gateway"], "--config", str(options.state_dir / "gateway.json")),
        documents={"gateway.json": config.to_json()},
        needs=("serving",),
        stop_s=15,
    )


def _tuner(fitted: Fit, machine: Machine, options: Options) -> Part:
    config = plan_local.tuner_config(
        fitted.resource,
        board_url=BOARD_URL,
        gateway_admin_url=GATEWAY_ADMIN_URL,
        prometheus_url=PROMETHEUS_URL,
        signing_key=options.state_dir / "signing.pem",
        state_dir=options.state_dir,
        console=console.config(options.state_dir, fitted.resource, fitted),
    )
    return Part(
        name="tuner",
        title="tuner",
        command=(machine.python, *PROGRAMS["tuner"], "--config", str(options.state_dir / "tuner.json")),
        documents={"tuner.json": config.to_json()},
        needs=("prometheus", "gateway"),
    )
