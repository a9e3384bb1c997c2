"""Whether a MoEDeployment fits its GPUs: the verdict with its numbers, and the plan that it leads to. Pure."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from moe_api.enums import EngineKind, Quantization
from moe_api.spec import MoEDeploymentSpec
from moe_api.spec_model import HardwareSpec, ParallelismSpec
from moe_planner import layouts, memory, remedies
from moe_planner.catalog import GIB, Catalog, ModelFacts, Precision, packaged
from moe_planner.choice import Choice, choose
from moe_planner.layouts import Impossible
from moe_planner.memory import Ask
from moe_planner.plan import Plan, nodes, table
from moe_planner.weights import Layout

CPU = "cpu"
MAX_MESSAGE = 1024
ROUND_SEQS = 8


@dataclass(frozen=True)
class FitVerdict:
    """Whether it fits; None where the catalog cannot tell. `plan` is None where it is refused."""

    fits: bool | None
    reason: str  # one word, as a condition takes it
    message: str
    plan: Plan | None = None


def check(spec: MoEDeploymentSpec, catalog: Catalog | None = None) -> FitVerdict:
    """Judge one replica of a spec against its GPUs."""
    verdict = _check(spec, catalog or packaged())
    if len(verdict.message) <= MAX_MESSAGE:
        return verdict
    return replace(verdict, message=verdict.message[: MAX_MESSAGE - 1] + "…")


def asked(spec: MoEDeploymentSpec, catalog: Catalog) -> Ask | FitVerdict:
    """What a spec asks to be placed, or the verdict where the catalog cannot tell or there is nothing to place."""
    hardware = spec.hardware
    if spec.engine.kind is EngineKind.EXTERNAL or hardware is None:
        return FitVerdict(True, "ExternalEngine", "The engine runs elsewhere: no GPU is taken here.")
    known = catalog.model(spec.model.source or spec.model.id) or catalog.model(spec.model.id)
    if known is None or hardware.accelerator == CPU or hardware.accelerator not in catalog.accelerators:
        return _unknown(spec, hardware, catalog, None if known is None else known[0])
    model, named = known
    precision = _precision(spec, catalog, named)
    if precision is None:
        return FitVerdict(
            None,
            "UnknownPrecision",
            f"{spec.model.quantization} does not say how many bits a weight of {spec.model.id} has, so memory was not"
            " checked: leave spec.model.quantization at Auto, or name a checkpoint whose name says its form.",
            _bare_plan(spec.parallelism, hardware, catalog, model),
        )
    longest = spec.engine.max_model_len
    if longest is not None and longest > model.max_context:
        return FitVerdict(
            False,
            "ContextTooLong",
            f"spec.engine.maxModelLen: {longest} tokens, but {model.key} has {model.max_context}: set at most that.",
        )
    return _ask(spec, hardware, catalog, model, precision)


def _check(spec: MoEDeploymentSpec, catalog: Catalog) -> FitVerdict:
    ask = asked(spec, catalog)
    if isinstance(ask, FitVerdict):
        return ask
    gpus = spec.hardware.gpus_per_replica if spec.hardware is not None else 1
    found = choose(spec, ask, catalog, gpus)
    if isinstance(found, Impossible):
        free = spec.parallelism == ParallelismSpec()
        would = " or ".join(remedies.counts(spec, ask, catalog, gpus)) if free else ""
        text = f"{found.why}. Would do: {would}." if would else f"{found.why}."
        return FitVerdict(False, "ParallelismImpossible", text)
    if found.missing > 0:
        return FitVerdict(False, "DoesNotFit", _refusal(spec, ask, found, catalog))
    plan = _plan(ask, found, catalog)
    return FitVerdict(True, "FitsShorterContext" if found.capped else "Fits", _agreed(ask, found, plan), plan)


def _precision(spec: MoEDeploymentSpec, catalog: Catalog, named: Precision) -> Precision | None:
    if spec.model.quantization is Quantization.AUTO:
        return named
    if spec.model.quantization is Quantization.COMPRESSED_TENSORS:
        return None if named.name == "bf16" else named
    return catalog.precision_of(spec.model.quantization.value)


def _ask(
    spec: MoEDeploymentSpec, hardware: HardwareSpec, catalog: Catalog, model: ModelFacts, precision: Precision
) -> Ask:
    extra = spec.engine.typed_extra_args()
    cache = extra.get("kv_cache_memory_bytes")
    return Ask(
        model=model,
        precision=precision,
        accelerator=catalog.accelerators[hardware.accelerator],
        fp8_cache=remedies.fp8_cache(model, spec),
        redundant=spec.experts.redundant,
        active_seqs=spec.engine.max_active_seqs,
        utilization=float(extra["gpu_memory_utilization"]) if "gpu_memory_utilization" in extra else None,
        offload_bytes=int(float(extra.get("cpu_offload_gb", 0)) * GIB),
        cache_bytes=int(cache) if cache else None,
    )


def _plan(ask: Ask, found: Choice, catalog: Catalog) -> Plan:
    layout, room, engine = found.layout, found.memory, catalog.engine
    one = memory.sequence_bytes(ask, layout, found.context, found.batched_tokens)
    usual = min(found.context, engine.usual_sequence_tokens)
    each = memory.sequence_bytes(ask, layout, usual, 0)
    seqs = min(engine.active_seqs, found.batched_tokens, int(room.cache // each))
    seqs = ask.active_seqs or max(1, seqs if seqs < ROUND_SEQS else seqs // ROUND_SEQS * ROUND_SEQS)
    count = nodes(layout.gpus, ask.accelerator.gpus_per_node, layout.tensor)
    return Plan(
        tensor=layout.tensor,
        data=layout.data,
        expert=layout.expert,
        pipeline=layout.pipeline,
        nodes_per_replica=count,
        gpus_per_node=layout.gpus // count,
        catalog_version=catalog.version,
        shared_memory_bytes=_shared_memory(catalog, layout.gpus // count),
        max_model_len=found.context,
        max_active_seqs=seqs,
        max_batched_tokens=found.batched_tokens,
        memory=table(room),
        memory_per_gpu=room.total,
        cache_tokens=int(room.cache / one * found.context) * layout.data,
    )


def _shared_memory(catalog: Catalog, gpus: int) -> int:
    return catalog.engine.shared_memory_bytes + gpus * catalog.engine.shared_memory_bytes_per_gpu


def _bare_plan(
    asked: ParallelismSpec, hardware: HardwareSpec, catalog: Catalog, model: ModelFacts | None
) -> Plan | None:
    """Parallelism alone, where memory is not known. None: there is none that works."""
    gpus = hardware.gpus_per_replica
    accelerator = catalog.accelerators.get(hardware.accelerator)
    # Ranks on cpu lie in one pod: tensor parallel, unless the spec cuts them otherwise.
    per_node = gpus if hardware.accelerator == CPU else accelerator.gpus_per_node if accelerator else 8
    found = layouts.candidates(asked, gpus, per_node, model)
    if isinstance(found, Impossible):
        return None
    at: Layout = found[0]
    count = nodes(gpus, per_node, at.tensor)
    return Plan(
        tensor=at.tensor,
        data=at.data,
        expert=at.expert,
        pipeline=at.pipeline,
        nodes_per_replica=count,
        gpus_per_node=gpus // count,
        catalog_version=catalog.version,
        shared_memory_bytes=_shared_memory(catalog, gpus // count),
    )


def _unknown(spec: MoEDeploymentSpec, hardware: HardwareSpec, catalog: Catalog, model: ModelFacts | None) -> FitVerdict:
    found = layouts.candidates(spec.parallelism, hardware.gpus_per_replica, 1024, model)
    if isinstance(found, Impossible):
        return FitVerdict(False, "ParallelismImpossible", f"{found.why}.")
    plan = _bare_plan(spec.parallelism, hardware, catalog, model)
    if hardware.accelerator == CPU:
        ranks = hardware.gpus_per_replica
        what, placed = ("rank", "is") if ranks == 1 else ("ranks", "are")
        return FitVerdict(
            None,
            "MemoryUnknown",
            f"Memory was not checked: on cpu it is the nodes', which is not known here. {ranks} {what} of"
            f" {spec.model.id} {placed} placed as asked.",
            plan,
        )
    if model is None:
        near = _near(spec.model.id.rpartition("/")[2].lower(), list(catalog.names))
        return FitVerdict(
            None,
            "UnknownModel",
            f"Memory was not checked: spec.model.id {spec.model.id} is not in catalog {catalog.version}{near}. Use the"
            " name of its original repository, or add its published configuration to the catalog.",
            plan,
        )
    near = _near(hardware.accelerator, list(catalog.accelerators))
    return FitVerdict(
        None,
        "UnknownAccelerator",
        f"Memory was not checked: spec.hardware.accelerator {hardware.accelerator} is not in catalog"
        f" {catalog.version}{near}. Use a catalog name, or add an entry with its memory.",
        plan,
    )


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (near it: {', '.join(close)})" if close else ""


def _agreed(ask: Ask, found: Choice, plan: Plan) -> str:
    room = found.memory
    text = (
        f"{ask.model.key} in {ask.precision.name} on {plan.layout.gpus} × {ask.accelerator.name} ({plan.layout}): each"
        f" GPU has {_gib(room.total)}, {_gib(room.weights + room.redundant)} for weights,"
        f" {_gib(room.activations + room.overhead)} of working memory, {_gib(room.cache)} for KV cache:"
        f" {plan.cache_tokens:,} tokens in sequences of {plan.max_model_len:,}."
    )
    if found.why:
        text += f" This layout: {found.why}."
    if found.capped:
        text += (
            f" The model's own context of {ask.model.max_context:,} tokens does not fit, so it is capped at"
            f" {plan.max_model_len:,}: set spec.engine.maxModelLen to choose it."
        )
    return text


def _refusal(spec: MoEDeploymentSpec, ask: Ask, found: Choice, catalog: Catalog) -> str:
    layout, room = found.layout, found.memory
    gpus = layout.gpus
    one = memory.sequence_bytes(ask, layout, found.context, found.batched_tokens)
    held = "weights" + (f" with {ask.redundant} redundant experts" if ask.redundant else "")
    text = (
        f"{ask.model.key} in {ask.precision.name} needs {_gib((room.weights + room.redundant) * gpus)} for {held},"
        f" {_gib((room.activations + room.overhead) * gpus)} of working memory and {_gib(one * gpus)} for the KV cache"
        f" of one sequence of {found.context:,} tokens{' on each data rank' if layout.data > 1 else ''}; {gpus} ×"
        f" {ask.accelerator.name} have {_gib(room.total * gpus)}, {_gib(room.usable * gpus)} of it usable:"
        f" {_gib(found.missing)} a GPU too little ({layout})."
    )
    would = remedies.what_would(spec, ask, catalog, found)
    return f"{text} Would do: {'; '.join(would)}." if would else f"{text} Nothing in the catalog would do."


def _gib(size: float) -> str:
    amount = size / GIB
    return f"{amount:,.0f} GiB" if amount >= 100 else f"{amount:,.1f} GiB"
