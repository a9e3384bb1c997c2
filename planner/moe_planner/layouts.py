"""Parallelism: the layouts that a model and its GPUs admit, best first, and why one is impossible."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from moe_api.spec_model import ParallelismSpec
from moe_planner.catalog import ModelFacts, Precision
from moe_planner.weights import Layout


@dataclass(frozen=True)
class Impossible:
    """Why no layout works: the field and the remedy."""

    why: str


@cache
def divisors(number: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, number + 1) if number % size == 0)


def candidates(
    asked: ParallelismSpec,
    gpus: int,
    per_node: int,
    model: ModelFacts | None,
    precision: Precision | None = None,
    redundant: int = 0,
) -> tuple[Layout, ...] | Impossible:
    """Layouts that honour what is asked, in the order in which they are taken where nothing else decides.

    First the fewest pipeline stages, a tensor group inside one node, then the widest tensor group: it shares out
    attention and cache, where data parallelism repeats attention. Whole experts on ranks come before slices. What this
    version does not serve is left out unless it is asked for: `served`.
    """
    found: list[Layout] = []
    for pipeline in [asked.pipeline] if asked.pipeline else divisors(gpus):
        for tensor in [asked.tensor] if asked.tensor else divisors(gpus):
            data, over = divmod(gpus, pipeline * tensor)
            if over or not data or asked.data not in (None, data):
                continue
            ranks = tensor * data
            experts = [asked.expert] if asked.expert else sorted({ranks, 1})
            found.extend(Layout(tensor, data, expert, pipeline) for expert in experts)
    node = min(gpus, per_node)
    found.sort(key=lambda at: (at.pipeline, at.tensor > node, -at.tensor, -at.expert))
    problems = [(at, problem(at, model, precision, redundant)) for at in found]
    sound = [at for at, why in problems if why is None]
    good = tuple(at for at in sound if served(at, asked))
    if good:
        return good
    if sound or (problems and asked == ParallelismSpec() and not redundant):
        return Impossible(_unserved(asked, gpus, model))
    if not problems:
        return Impossible(
            f"spec.parallelism: tensor × data × pipeline cannot be {gpus} GPUs with the sizes that are set: "
            "leave one of them out, or change hardware.gpusPerReplica"
        )
    return Impossible(problems[0][1] or "")


def served(at: Layout, asked: ParallelismSpec) -> bool:
    """Whether this version serves a layout, or the size that it does not serve is asked for by name: the engine's own
    check refuses that (docs/parallel.md)."""
    return (at.pipeline == 1 or asked.pipeline is not None) and (
        at.data == 1 or at.expert > 1 or asked.expert is not None
    )


def _unserved(asked: ParallelismSpec, gpus: int, model: ModelFacts | None) -> str:
    whose = "" if model is None else f" ({model.heads} attention heads and {model.experts} experts of {model.key})"
    free = asked == ParallelismSpec()
    field, remedy = (
        ("spec.hardware.gpusPerReplica", "set a number that heads or experts divide by, such as a power of two")
        if free
        else ("spec.parallelism", "change hardware.gpusPerReplica, or leave sizes out")
    )
    return (
        f"{field}: {gpus} GPUs would need pipeline stages, or sliced experts on data ranks{whose}, which are not served"
        f" yet: {remedy}"
    )


def problem(at: Layout, model: ModelFacts | None, precision: Precision | None, redundant: int) -> str | None:
    """Why the engine could not run this layout; None where it can."""
    ranks = at.tensor * at.data
    if at.expert not in (1, ranks):
        return f"spec.parallelism.expert: {at.expert} must be tensor × data, here {ranks}, or 1"
    if model is None:
        return None
    if model.heads % at.tensor:
        return _indivisible("tensor", at.tensor, model.heads, "attention heads", model)
    if model.kv_heads > 1 and model.kv_heads % at.tensor and at.tensor % model.kv_heads:
        return _indivisible("tensor", at.tensor, model.kv_heads, "key-value heads", model)
    if at.pipeline > model.layers:
        return f"spec.parallelism.pipeline: {at.pipeline} stages for {model.layers} layers: set at most {model.layers}"
    if at.expert > 1 and (model.experts + redundant) % at.expert:
        spare = f" and {redundant} redundant ones" if redundant else ""
        return (
            f"spec.parallelism.expert: {model.experts} experts{spare} of {model.key} do not divide by {at.expert}: "
            "choose a divisor, or change experts.redundant"
        )
    block = precision.block if precision is not None else 1
    if at.expert == 1 and ranks > 1 and (model.moe_intermediate % (ranks * block)):
        blocks = f" in blocks of {block}" if block > 1 else ""
        return (
            f"spec.parallelism.expert: slices of experts {model.moe_intermediate} wide do not divide by {ranks}"
            f"{blocks}: set expert to {ranks}, so that ranks hold whole experts"
        )
    if at.expert == 1 and redundant:
        return "spec.experts.redundant: spare experts need expert parallelism: set it to 0, or parallelism.expert"
    return None


def _indivisible(field: str, size: int, count: int, what: str, model: ModelFacts) -> str:
    good = ", ".join(str(d) for d in divisors(count) if d <= 64)
    return f"spec.parallelism.{field}: {count} {what} of {model.key} do not divide by {size}: choose one of {good}"
