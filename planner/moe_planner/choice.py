"""Which layout, step size and context a replica gets: of those that fit, the first in order or the one preferred."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_api.spec import MoEDeploymentSpec
from moe_planner import layouts, memory, prefer
from moe_planner.catalog import Catalog, EngineFacts
from moe_planner.layouts import Impossible
from moe_planner.memory import Ask, Memory
from moe_planner.prefer import Room
from moe_planner.search import Slo
from moe_planner.weights import Layout

ROUND_CONTEXT = 1024
"""A context that was capped is a multiple of this."""


@dataclass(frozen=True)
class Choice:
    """A layout with its step and context. `missing`: bytes that the fullest GPU lacks; 0 where it fits."""

    layout: Layout
    batched_tokens: int
    context: int
    memory: Memory
    missing: float = 0.0
    capped: bool = False  # the context is shorter than the model's own, and nobody asked for that
    why: str = ""  # why this layout and no other that fits


def choose(spec: MoEDeploymentSpec, ask: Ask, catalog: Catalog, gpus: int) -> Choice | Impossible:
    """The layout that is launched: the preferred one of those that fit; else as `first` says.

    Slices of experts never take the place of whole ones, whose load this project balances: they are a person's choice.
    """
    found = first(spec, ask, catalog.engine, gpus)
    others = _layouts(spec, ask, gpus)
    if isinstance(found, Impossible) or isinstance(others, Impossible) or found.missing > 0 or found.capped:
        return found
    fitting = [found]
    for layout in others:
        if layout == found.layout or (layout.expert == 1 and found.layout.expert > 1):
            continue
        if (one := _whole(spec, ask, layout, catalog.engine)) is not None:
            fitting.append(one)
    rooms = [Room(one.layout, one.batched_tokens, one.memory.cache) for one in fitting]
    slo = Slo(spec.slo.ttft_p95.seconds, spec.slo.itl_p95.seconds)
    preferred = prefer.prefer(ask, rooms, slo, found.context, catalog)
    return replace(fitting[preferred.index], why=preferred.why)


def first(spec: MoEDeploymentSpec, ask: Ask, engine: EngineFacts, gpus: int) -> Choice | Impossible:
    """The first in order that fits; else the one of fewest stages that lacks least; or why there is no layout.

    The context is the asked one, else the model's own, else the longest that fits.
    """
    found = _layouts(spec, ask, gpus)
    if isinstance(found, Impossible):
        return found
    for layout in found:
        if (one := _whole(spec, ask, layout, engine)) is not None:
            return one
    context = _context(spec, ask)
    tried = []
    for layout in found:
        for step in _steps(spec, ask, engine):
            room = memory.place(ask, layout, step, engine)
            need = memory.sequence_bytes(ask, layout, context, step)
            tried.append(Choice(layout, step, context, room, missing=need - room.cache))
    if spec.engine.max_model_len is None:
        shorter = [_capped(ask, choice) for choice in tried]
        best = max(shorter, key=lambda choice: choice.context)
        if best.context >= min(engine.shortest_context, ask.model.max_context):
            return best
    return min(tried, key=lambda choice: (choice.layout.pipeline, choice.missing))


def _layouts(spec: MoEDeploymentSpec, ask: Ask, gpus: int) -> tuple[Layout, ...] | Impossible:
    return layouts.candidates(
        spec.parallelism, gpus, ask.accelerator.gpus_per_node, ask.model, ask.precision, ask.redundant
    )


def _context(spec: MoEDeploymentSpec, ask: Ask) -> int:
    return spec.engine.max_model_len or ask.model.max_context


def _whole(spec: MoEDeploymentSpec, ask: Ask, layout: Layout, engine: EngineFacts) -> Choice | None:
    """The layout with the largest step that leaves room for a sequence of the whole context; None where none does."""
    context = _context(spec, ask)
    for step in _steps(spec, ask, engine):
        room = memory.place(ask, layout, step, engine)
        if room.cache >= memory.sequence_bytes(ask, layout, context, step):
            return Choice(layout, step, context, room)
    return None


def _steps(spec: MoEDeploymentSpec, ask: Ask, engine: EngineFacts) -> tuple[int, ...]:
    """Ceilings of tokens in a step to try, as set or largest first; each sequence needs a token of it."""
    if spec.engine.max_batched_tokens is not None:
        return (spec.engine.max_batched_tokens,)
    steps = engine.batched_tokens
    if ask.accelerator.memory_bytes < engine.large_gpu_bytes:
        steps = steps[-1:]
    least = ask.active_seqs or 1
    return tuple(dict.fromkeys(max(step, least) for step in steps))


def _capped(ask: Ask, choice: Choice) -> Choice:
    longest = memory.longest_context(ask, choice.layout, choice.memory, choice.batched_tokens)
    context = longest // ROUND_CONTEXT * ROUND_CONTEXT
    return Choice(choice.layout, choice.batched_tokens, context, choice.memory, capped=True)
