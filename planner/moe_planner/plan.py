"""The launch that a fit check chose, in the words of the resource's status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_api.scalars import Quantity
from moe_api.status import MemoryPart, PlanStatus
from moe_planner.memory import Memory
from moe_planner.weights import Layout


@dataclass(frozen=True)
class Plan:
    """How one replica is launched. None: not known, so the engine's own default stands."""

    tensor: int
    data: int
    expert: int
    pipeline: int
    nodes_per_replica: int
    gpus_per_node: int  # GPUs of one of its pods; on cpu, its ranks
    catalog_version: str
    shared_memory_bytes: int
    max_model_len: int | None = None
    max_active_seqs: int | None = None  # of one data parallel rank, as the engine counts; so the next
    max_batched_tokens: int | None = None
    memory: tuple[MemoryPart, ...] = ()
    memory_per_gpu: int | None = None  # bytes
    cache_tokens: int | None = None  # tokens in sequences of max_model_len that one replica's cache holds

    @property
    def layout(self) -> Layout:
        return Layout(self.tensor, self.data, self.expert, self.pipeline)

    def to_status(self) -> PlanStatus:
        """The plan as `status.plan` shows it."""
        return PlanStatus(
            tensor=self.tensor,
            data=self.data,
            expert=self.expert,
            pipeline=self.pipeline,
            max_model_len=self.max_model_len,
            max_active_seqs=self.max_active_seqs,
            max_batched_tokens=self.max_batched_tokens,
            memory=self.memory,
            memory_per_gpu=None if self.memory_per_gpu is None else Quantity(self.memory_per_gpu),
            catalog_version=self.catalog_version,
        )


def table(memory: Memory) -> tuple[MemoryPart, ...]:
    """Rows in whole bytes that add up to the GPU's memory."""
    rows = [
        ("Weights", memory.weights),
        ("RedundantExperts", memory.redundant),
        ("Activations", memory.activations),
        ("Overhead", memory.overhead),
        ("KVCache", memory.cache),
    ]
    whole = [(part, int(size)) for part, size in rows if size >= 1]
    free = memory.total - sum(size for _, size in whole)
    return tuple(MemoryPart(part=part, size=Quantity(size)) for part, size in [*whole, ("Free", free)])


def nodes(gpus: int, per_node: int, tensor: int) -> int:
    """Fewest nodes that share a replica's GPUs evenly, and keep each tensor group whole where that can be."""
    even = [count for count in range(-(-gpus // per_node), gpus + 1) if gpus % count == 0]
    whole: Sequence[int] = [count for count in even if (gpus // count) % tensor == 0]
    return (whole or even)[0]
