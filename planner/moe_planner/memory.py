"""Memory of the fullest GPU of a replica: what it holds, and how much is left for the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    runtime: float  # context of the driver and kernels
    collectives: float
    graphs: float
    fragmentation: float
    cache: float
    usable: float
    total: int

    @property
    def overhead(self) -> float:
        """What the engine takes whatever the model."""
        return self.runtime + self.collectives + self.graphs + self.fragmentation

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
    found = Memory(
        weights=weights,
        redundant=spare,
        activations=used,
        runtime=engine.runtime_bytes,
        collectives=engine.collective_bytes if layout.gpus > 1 else 0,
        graphs=engine.graph_bytes,
        fragmentation=engine.fragmentation_bytes,
        cache=0.0,
        usable=usable,
        total=total,
    )
    left = usable - found.fixed
    if ask.cache_bytes is not None:
        # The engine takes what it is told, whatever the utilization; only the GPU itself is a limit then.
        left = min(float(ask.cache_bytes), total - found.fixed)
    return replace(found, cache=left)


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


CONTEXTS = tuple(2**power for power in range(15, 21))
"""32K to 1M tokens."""


@dataclass(frozen=True)
class ContextRow:
    """Whether sequences of `context` tokens fit, and how many at once in one replica. `missing`: bytes that the fullest
    GPU lacks for one; 0 where it fits."""

    context: int
    beyond_model: bool  # longer than the model's own context: never offered
    sequence_bytes: float
    sequences: int
    tokens: int
    missing: float

    @property
    def fits(self) -> bool:
        return self.sequences > 0


def contexts(ask: Ask, layout: Layout, batched_tokens: int, engine: EngineFacts) -> tuple[ContextRow, ...]:
    """The cache at 32K to 1M tokens: bytes of a sequence on the fullest GPU, and how many fit in the replica."""
    room = place(ask, layout, batched_tokens, engine)
    rows = []
    for context in CONTEXTS:
        one = sequence_bytes(ask, layout, context, batched_tokens)
        beyond = context > ask.model.max_context
        count = 0 if beyond or room.cache < one else int(room.cache // one) * layout.data
        missing = 0.0 if beyond else max(0.0, one - room.cache)
        rows.append(ContextRow(context, beyond, one, count, count * context, missing))
    return tuple(rows)


def most_tokens(ask: Ask, layout: Layout, memory: Memory, batched_tokens: int) -> int:
    """Tokens of the longest sequence that fits, times how many of it fit at once in the replica: the most that one
    replica keeps at full length."""
    longest = longest_context(ask, layout, memory, batched_tokens)
    if not longest:
        return 0
    one = sequence_bytes(ask, layout, longest, batched_tokens)
    return int(memory.cache // one) * longest * layout.data


def sequence_bytes(ask: Ask, layout: Layout, tokens: int, batched_tokens: int) -> float:
    """Bytes of one sequence on the fullest GPU."""
    return kv.sequence_bytes(ask.model, tokens, layout, fp8=ask.fp8_cache, in_flight=batched_tokens)
