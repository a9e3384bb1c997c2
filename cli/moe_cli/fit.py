"""What of a resource this machine can serve: refusals by field or, with `--tiny`, substitutions, all told. Pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_api.load import ResourceInvalid, load_object
from moe_api.v1alpha1 import EngineKind, KvCacheDtype, MoEDeployment, Quantization
from moe_cli.checkpoint import CheckpointFacts
from moe_cli.documents import Change
from moe_cli.outcome import Exit, Problem
from moe_serving import tiny

TINY_REMEDY = "serve it on a machine that has it, or add --tiny to serve its family's tiny checkpoint here"
MEMORY_SHARE = 0.6
"""Of the machine's memory, for the weights: caches, activations and everything else need the rest."""
RANK_BYTES = 3 * 2**30
"""Memory that one CPU rank takes with tiny weights: interpreter, libraries, 1 GiB of KV cache."""
_GPU_ARGS = ("all2all-backend", "attention-backend", "cpu-offload-gb", "disable-custom-all-reduce", "enable-dbo")
GPU_ONLY = frozenset({*_GPU_ARGS, "gpu-memory-utilization", "moe-backend"})


@dataclass(frozen=True)
class Machine:
    """What this machine has, looked up before anything is decided."""

    cores: int
    memory_bytes: int
    python: str
    prometheus: str | None = None
    checkpoint: CheckpointFacts | Problem | None = None  # None: the model is not on this machine
    secrets: Mapping[tuple[str, str], Path] = field(default_factory=dict)  # (name, key) → file that holds it


@dataclass(frozen=True)
class Fit:
    """A resource as this machine serves it."""

    resource: MoEDeployment
    source: str  # checkpoint path, or a reference to what the checkpoint step announces
    family: str | None  # of the tiny checkpoint, where one stands in
    ranks: int
    top_k: int | None
    max_model_len: int | None
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Refused:
    """Why this machine does not serve a resource."""

    problems: tuple[Problem, ...]
    code: Exit = Exit.BAD_INPUT


def fit(resource: MoEDeployment, machine: Machine, with_tiny: bool) -> Fit | Refused:
    """The resource as it can be served here, or every reason why not."""
    spec = resource.spec
    problems: list[Problem] = []
    if spec.engine.kind is EngineKind.EXTERNAL or spec.hardware is None:
        message = "External: an engine that runs elsewhere is not started on this machine"
        return Refused((Problem(field="spec.engine.kind", message=message, remedy="apply it to a cluster"),))
    if spec.suspend:
        message = "true: there is nothing to serve"
        problems.append(Problem(field="spec.suspend", message=message, remedy="set it to false"))
    if isinstance(machine.checkpoint, Problem):
        # A path that this machine should have: never silently replaced, not even with --tiny.
        problems.append(machine.checkpoint)
    if problems:
        return Refused(tuple(problems))
    return _with_tiny(resource, machine) if with_tiny else _as_written(resource, machine)


def _as_written(resource: MoEDeployment, machine: Machine) -> Fit | Refused:
    spec = resource.spec
    if spec.hardware is None:
        raise ValueError("an engine that we run has hardware")
    problems: list[Problem] = []

    def refuse(where: str, message: str, remedy: str = TINY_REMEDY) -> None:
        problems.append(Problem(field=where, message=message, remedy=remedy))

    ranks = spec.hardware.gpus_per_replica
    if spec.hardware.accelerator != "cpu":
        refuse("spec.hardware.accelerator", f"{spec.hardware.accelerator}: this machine serves on cpu")
    elif ranks * max(1, spec.replicas.min) > machine.cores:
        total = f"{ranks} ranks × {max(1, spec.replicas.min)} replicas"
        refuse("spec.hardware.gpusPerReplica", f"{total} on {machine.cores} cores: more than this machine has")
    if spec.hardware.accelerator == "cpu" and spec.experts.redundant:
        refuse("spec.experts.redundant", f"{spec.experts.redundant}: redundant experts need GPUs", "set it to 0")
    found = machine.checkpoint
    facts = found if isinstance(found, CheckpointFacts) else None
    if facts is None:
        refuse(
            "spec.model.id",
            f"{resource.spec.model.id}: the checkpoint is not on this machine, and nothing downloads it",
        )
    elif facts.weight_bytes > MEMORY_SHARE * machine.memory_bytes:
        size, room = (f"{amount / 2**30:.1f} GiB" for amount in (facts.weight_bytes, machine.memory_bytes))
        refuse("spec.model.id", f"weights of {size} on a machine with {room} of memory")
    problems += _context_problems(resource, facts)
    problems += count_problems(resource, facts.top_k if facts else None)
    problems += gamma_problems(resource, facts.top_k if facts else None)
    if problems or facts is None:
        return Refused(tuple(problems))
    length = spec.engine.max_model_len or facts.max_model_len
    return Fit(resource, str(facts.path), None, ranks, facts.top_k, length, ())


def _with_tiny(resource: MoEDeployment, machine: Machine) -> Fit | Refused:
    spec = resource.spec
    local = machine.checkpoint if isinstance(machine.checkpoint, CheckpointFacts) else None
    if local is not None and local.weight_bytes > MEMORY_SHARE * machine.memory_bytes:
        local = None
    family = None
    try:
        if local is None:
            family = tiny.family_of(spec.model.id)
    except tiny.UnknownFamily as error:
        remedy = "name a model of one of these families, or one that is on this machine in spec.model.source"
        return Refused((Problem(field="spec.model.id", message=str(error), remedy=remedy),))
    shape = tiny.facts(family) if family is not None else None
    top_k = shape.top_k if shape else local.top_k if local else None
    length = shape.max_model_len if shape else local.max_model_len if local else None
    edit = _Edit(resource)
    edit.substitute(machine, family, top_k, length)
    try:
        served = load_object(edit.document)
    except ResourceInvalid as error:
        problems = (
            Problem(
                field=row.path,
                message=row.remedy,
                remedy="what --tiny puts in place breaks this rule: change the field",
            )
            for row in error.problems
        )
        return Refused(tuple(problems))
    problems_left = gamma_problems(served, top_k)
    if problems_left:
        return Refused(tuple(problems_left))
    source = "${checkpoint.path}" if local is None else str(local.path)
    return Fit(
        resource=served,
        source=source,
        family=family,
        ranks=edit.ranks,
        top_k=top_k,
        max_model_len=served.spec.engine.max_model_len or length,
        changes=tuple(edit.changes),
    )


class _Edit:
    """The resource as plain JSON while `--tiny` fits it to the machine, and the list of what it changed."""

    def __init__(self, resource: MoEDeployment) -> None:
        self.document: dict[str, Any] = copy.deepcopy(resource.to_json())
        self.document.pop("status", None)
        self.changes: list[Change] = []
        self.ranks = 1

    def substitute(self, machine: Machine, family: str | None, top_k: int | None, length: int | None) -> None:
        spec = self.document["spec"]
        model, engine, hardware = spec["model"], spec["engine"], spec["hardware"]
        if family is not None:
            where = "source" if model.get("source") else "id"
            self._tell(
                f"spec.model.{where}",
                model[where],
                f"tiny checkpoint of {family}",
                "the checkpoint is not for this machine",
            )
            self._set(model, "spec.model", "quantization", Quantization.AUTO.value, "tiny weights are plain")
        on_gpu = hardware["accelerator"] != "cpu"
        self._set(hardware, "spec.hardware", "accelerator", "cpu", "this machine serves on cpu")
        self._fit_ranks(spec, machine)
        if engine.get("image"):
            self._tell("spec.engine.image", engine.pop("image"), "none", "processes run here without a container")
        if on_gpu:
            why = "GPUs alone have it"
            self._set(engine, "spec.engine", "kvCacheDtype", KvCacheDtype.AUTO.value, why)
            self._set(spec["experts"], "spec.experts", "redundant", 0, why)
            for name in sorted(GPU_ONLY & engine.get("extraArgs", {}).keys()):
                self._tell(f"spec.engine.extraArgs.{name}", engine["extraArgs"].pop(name), "none", why)
        if length is not None and engine.get("maxModelLen", 0) > length:
            self._set(engine, "spec.engine", "maxModelLen", length, "longest context of the checkpoint")
        if top_k is not None:
            self._fit_top_k(spec, top_k)

    def _fit_ranks(self, spec: dict[str, Any], machine: Machine) -> None:
        asked: int = spec["hardware"]["gpusPerReplica"]
        room = max(1, min(machine.cores, machine.memory_bytes // RANK_BYTES))
        # A power of two divides the experts of every tiny checkpoint evenly.
        self.ranks = asked if asked <= room else 2 ** (room.bit_length() - 1)
        why = f"ranks on {machine.cores} cores"
        self._set(spec["hardware"], "spec.hardware", "gpusPerReplica", self.ranks, why)
        if self.ranks != asked:
            for name in ("tensor", "data", "pipeline", "expert"):
                if spec["parallelism"].get(name):
                    self._tell(f"spec.parallelism.{name}", spec["parallelism"].pop(name), "chosen to fit", why)
        replicas = spec["replicas"]
        most = max(1, room // self.ranks)
        if replicas["min"] == 0:
            self._set(replicas, "spec.replicas", "min", 1, "nothing here starts a replica when a request comes")
        for name in ("min", "max"):
            if replicas.get(name) is not None and replicas[name] > most:
                self._set(
                    replicas, "spec.replicas", name, most, f"replicas of {self.ranks} ranks on {machine.cores} cores"
                )

    def _fit_top_k(self, spec: dict[str, Any], top_k: int) -> None:
        why = f"the checkpoint has {top_k} experts per token"
        groups = [
            (spec["experts"], "spec.experts", "perToken"),
            (spec["quality"], "spec.quality", "minExpertsPerToken"),
        ]
        for index, tier in enumerate(spec.get("tiers", [])):
            groups.append((tier, f"spec.tiers[{index}]", "expertsPerToken"))
        for index, tier in enumerate(spec["quality"].get("tiers", [])):
            groups.append((tier, f"spec.quality.tiers[{index}]", "minExpertsPerToken"))
        for group, path, name in groups:
            if group.get(name) is not None and group[name] > top_k:
                self._set(group, path, name, top_k, why)

    def _set(self, group: dict[str, Any], path: str, name: str, value: str | int, why: str) -> None:
        if group.get(name) != value:
            self._tell(f"{path}.{name}", group.get(name, "default"), value, why)
            group[name] = value

    def _tell(self, where: str, asked: object, used: object, why: str) -> None:
        self.changes.append(Change(field=where, asked=str(asked), used=str(used), why=why))


def count_problems(resource: MoEDeployment, top_k: int | None) -> list[Problem]:
    """Experts per token at most the checkpoint's own k, in every tier. Types check that they are at least 1."""
    spec = resource.spec
    rows = {"spec.experts.perToken": spec.experts.per_token}
    rows |= {f"spec.tiers[{index}].expertsPerToken": tier.experts_per_token for index, tier in enumerate(spec.tiers)}
    return [
        Problem(
            field=where,
            message=f"{count}; the checkpoint routes each token to {top_k} experts",
            remedy=f"set it to at most {top_k}",
        )
        for where, count in rows.items()
        if count is not None and top_k is not None and count > top_k
    ]


def gamma_problems(resource: MoEDeployment, top_k: int | None) -> list[Problem]:
    """γ·k ≥ 1 with the checkpoint's own k, for every γ that may come into force. Types check the file's own k."""
    if top_k is None:
        return []
    spec = resource.spec
    own = min((*spec.experts_per_token().values(), top_k))
    rows = {
        "spec.experts.capacityFactor.prefill": spec.experts.capacity_factor.prefill,
        "spec.experts.capacityFactor.decode": spec.experts.capacity_factor.decode,
        "spec.tuning.bounds.capacityFactor.min": spec.tuning.bounds.capacity_factor.min,
    }
    return [
        Problem(
            field=where,
            message=f"{gamma} × {own} experts per token is below 1: a token could be left without an expert",
            remedy=f"set it to at least {1 / own:.3g}",
        )
        for where, gamma in rows.items()
        if gamma is not None and gamma * own < 1
    ]


def _context_problems(resource: MoEDeployment, facts: CheckpointFacts | None) -> list[Problem]:
    asked = resource.spec.engine.max_model_len
    if facts is None or facts.max_model_len is None or asked is None or asked <= facts.max_model_len:
        return []
    message = f"{asked} tokens; the checkpoint's context has {facts.max_model_len}"
    return [
        Problem(field="spec.engine.maxModelLen", message=message, remedy=f"set it to at most {facts.max_model_len}")
    ]
