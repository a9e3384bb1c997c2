"""Memory of the fullest GPU of a replica: what it holds, and how much is left for the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from moe_planner import kv
from moe_planner.catalog import Accelerator, EngineFacts, ModelFacts, Precision
from moe_planner.weights import Layout, gpu_bytes, redundant_bytes


@dataclass(frozen=True)
class Ask:
    """What is to be placed, apart from its layout and its context."""

    model: ModelFacts
    precision: Precision
    accelerator: Accelerator
    fp8_cache: bool
    redundant: int = 0
    active_seqs: int | None = None  # as set; None: the planner's choice
    utilization: float | None = None  # as set
    offload_bytes: int = 0  # weights that each GPU keeps in its host's memory
    cache_bytes: int | None = None  # as set, instead of all that is left


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU. `cache` is what the engine keeps for the KV cache; negative: there is no room."""

    weights: float
    redundant: float
    activations: float
    overhead: float
    cache: float
    usable: float
    total: int

    @property
    def fixed(self) -> float:
        """All but the cache."""
        return self.weights + self.redundant + self.activations + self.overhead


def place(ask: Ask, layout: Layout, batched_tokens: int, engine: EngineFacts) -> Memory:
    """The memory table for a layout and a step of `batched_tokens`."""
    total = ask.accelerator.memory_bytes
    usable = total * min(1.0, ask.utilization or engine.utilization)
    weights = max(0.0, gpu_bytes(ask.model, ask.precision, layout) - ask.offload_bytes)
    spare = redundant_bytes(ask.model, ask.precision, layout, ask.redundant)
    used = activation_bytes(
        ask.model, layout, batched_tokens, min(ask.active_seqs or engine.active_seqs, batched_tokens)
    )
    overhead = engine.runtime_bytes + (engine.collective_bytes if layout.gpus > 1 else 0)
    left = usable - weights - spare - used - overhead
    if ask.cache_bytes is not None:
        # The engine takes what it is told, whatever the utilization; only the GPU itself is a limit then.
        left = min(float(ask.cache_bytes), total - weights - spare - used - overhead)
    return Memory(weights, spare, used, overhead, left, usable, total)


def activation_bytes(model: ModelFacts, layout: Layout, batched_tokens: int, seqs: int) -> float:
    """Largest working memory of a step, as vLLM's profile run meets it.

    Its Triton experts keep two buffers of tokens × k × max(gate and up, hidden), and its default exchange between data
    parallel ranks gathers the tokens of all of them (vLLM 0.32, fused_moe/experts/triton_moe.py workspace_shapes).
    Attention and dense layers: residuals, queries and outputs of the rank's own tokens. Logits in float32, twice.
    """
    gathered = batched_tokens * layout.data
    sliced = 1 if layout.expert > 1 else layout.tensor * layout.data
    width = max(2 * model.moe_intermediate // sliced, model.hidden)
    experts = 2 * gathered * model.topk * width * 2 + gathered * model.hidden * 2
    dense = 2 * (model.dense_intermediate or model.shared_intermediate) // layout.tensor
    own = batched_tokens * (4 * model.hidden + 3 * model.heads * model.head_dim // layout.tensor + dense) * 2
    return experts + own + 2 * seqs * model.vocab * 4


def longest_context(ask: Ask, layout: Layout, memory: Memory, batched_tokens: int) -> int:
    """Tokens of the longest sequence that one rank's cache holds, the model's own context at most."""
    if memory.cache <= 0:
        return 0
    most = ask.model.max_context
    return kv.longest(ask.model, memory.cache, layout, fp8=ask.fp8_cache, in_flight=batched_tokens, most=most)


def sequence_bytes(ask: Ask, layout: Layout, tokens: int, batched_tokens: int) -> float:
    """Bytes of one sequence on the fullest GPU."""
    return kv.sequence_bytes(ask.model, tokens, layout, fp8=ask.fp8_cache, in_flight=batched_tokens)
