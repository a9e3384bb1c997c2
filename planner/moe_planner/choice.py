"""Which layout, step size and context a replica gets: the first that fits, best first."""

from __future__ import annotations

from dataclasses import dataclass

from moe_api.spec import MoEDeploymentSpec
from moe_planner import layouts, memory
from moe_planner.catalog import EngineFacts
from moe_planner.layouts import Impossible
from moe_planner.memory import Ask, Memory
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


def choose(spec: MoEDeploymentSpec, ask: Ask, engine: EngineFacts, gpus: int) -> Choice | Impossible:
    """The best choice that fits; else the one of fewest stages that lacks least; or why the parallelism is impossible.

    The context is the asked one, else the model's own, else the longest that fits.
    """
    found = layouts.candidates(
        spec.parallelism, gpus, ask.accelerator.gpus_per_node, ask.model, ask.precision, ask.redundant
    )
    if isinstance(found, Impossible):
        return found
    context = spec.engine.max_model_len or ask.model.max_context
    steps = _steps(spec, ask, engine)
    tried = []
    for layout in found:
        for step in steps:
            room = memory.place(ask, layout, step, engine)
            need = memory.sequence_bytes(ask, layout, context, step)
            if room.cache >= need:
                return Choice(layout, step, context, room)
            tried.append(Choice(layout, step, context, room, missing=need - room.cache))
    if spec.engine.max_model_len is None:
        shorter = [_capped(ask, choice) for choice in tried]
        best = max(shorter, key=lambda choice: choice.context)
        if best.context >= min(engine.shortest_context, ask.model.max_context):
            return best
    return min(tried, key=lambda choice: (choice.layout.pipeline, choice.missing))


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
