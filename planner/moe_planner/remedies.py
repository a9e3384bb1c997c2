"""What would fit instead: the nearest changes of a refused spec, each tried before it is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moe_api.spec import MoEDeploymentSpec
from moe_api.spec_model import ParallelismSpec
from moe_planner import kv, memory
from moe_planner.catalog import Catalog, ModelFacts
from moe_planner.choice import ROUND_CONTEXT, Choice, choose, first
from moe_planner.memory import Ask
from moe_planner.weights import total_bytes

MOST = 4
"""Remedies that one message names."""
MOST_GPUS = 128
FEW = 16
"""GPUs up to which every smaller number is tried."""


def fp8_cache(model: ModelFacts, spec: MoEDeploymentSpec) -> bool:
    """Whether the spec's cache is kept in FP8."""
    return kv.is_fp8(model, spec.engine.kv_cache_dtype)


def what_would(spec: MoEDeploymentSpec, ask: Ask, catalog: Catalog, refused: Choice) -> list[str]:
    """Up to four changes, nearest first, any one of which makes it fit."""
    found = []
    for remedy in _remedies(spec, ask, catalog, refused):
        found.append(remedy)
        if len(found) == MOST:
            break
    return found


def _remedies(spec: MoEDeploymentSpec, ask: Ask, catalog: Catalog, refused: Choice) -> Iterator[str]:
    gpus = refused.layout.gpus
    longest = memory.longest_context(ask, refused.layout, refused.memory, refused.batched_tokens)
    if (capped := longest // ROUND_CONTEXT * ROUND_CONTEXT) and spec.engine.max_model_len:
        yield f"spec.engine.maxModelLen of at most {capped}"
    if ask.redundant and _fits(spec, replace(ask, redundant=0), catalog, gpus):
        yield "no redundant experts"
    free = spec.model_copy(update={"parallelism": ParallelismSpec()})
    if spec.parallelism != ParallelismSpec():
        chosen = choose(free, ask, catalog, gpus)
        if isinstance(chosen, Choice) and chosen.missing == 0:
            yield f"spec.parallelism left to the planner ({chosen.layout})"
    native = catalog.precisions[ask.model.native]
    forms = [native, catalog.precisions["fp8"]]
    for form in dict.fromkeys(forms):
        if total_bytes(ask.model, form) >= total_bytes(ask.model, ask.precision):
            continue
        better = _fits(free, replace(ask, precision=form), catalog, gpus)
        if better is not None:
            cap = f" with a context of {better.context:,} tokens" if better.capped else ""
            own = f"its own checkpoint ({form.name})" if form is native else f"weights in {form.name}"
            yield f"{own}{cap}"
    yield from counts(spec, ask, catalog, gpus)
    larger = sorted(
        (other for other in catalog.accelerators.values() if other.memory_bytes > ask.accelerator.memory_bytes),
        key=lambda other: other.memory_bytes,
    )
    for other in larger:
        better = _fits(free, replace(ask, accelerator=other), catalog, gpus)
        if better is not None and not better.capped:
            yield f"{gpus} × {other.name}"
            break


def counts(spec: MoEDeploymentSpec, ask: Ask, catalog: Catalog, gpus: int) -> Iterator[str]:
    """The nearest numbers of the same GPUs that hold it: fewer, which more never lose, and more."""
    free = spec.model_copy(update={"parallelism": ParallelismSpec()})
    node = ask.accelerator.gpus_per_node
    for tried in (_fewer(gpus, node), _more(gpus, node)):
        for count in tried:
            better = _fits(free, ask, catalog, count)
            if better is not None and not better.capped:
                yield f"{count} × {ask.accelerator.name}"
                break


def _fits(spec: MoEDeploymentSpec, ask: Ask, catalog: Catalog, gpus: int) -> Choice | None:
    found = first(spec, ask, catalog.engine, gpus)
    return found if isinstance(found, Choice) and found.missing == 0 else None


def _fewer(gpus: int, per_node: int) -> Iterator[int]:
    """Smaller counts, nearest first: all up to `FEW`, above it whole nodes."""
    for count in range(gpus - 1, 0, -1):
        if count <= FEW or count % per_node == 0:
            yield count


def _more(gpus: int, per_node: int) -> Iterator[int]:
    """Larger counts: powers of two within a node, then whole nodes."""
    count = gpus
    while count < MOST_GPUS:
        count = min(per_node, 1 << count.bit_length()) if count < per_node else (count // per_node + 1) * per_node
        yield count
