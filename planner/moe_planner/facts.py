"""What is known, as types: figures with their sources, models, accelerators, forms of weights, the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

UNSOURCED = "unsourced"

Attention = Literal["gqa", "mla", "csa", "deltanet"]
"""Grouped-query (or multi-head); multi-head latent; DeepSeek V4's compressed; gated delta net beside full attention."""

QkNorm = Literal["none", "head", "full"]
"""Norms of queries and keys: none, one for all heads alike, or one over all heads."""

Bias = Literal["none", "qkv", "all"]
"""Biases of attention: none, of the three projections into it, or of the one out of it too."""

Form = Literal["experts", "linear", "rest"]
"""Routed experts; the other linear layers; embeddings, head, router and norms."""


class CatalogInvalid(Exception):
    """A catalog file is wrong. Names the file, the entry, the figure and the remedy."""

    def __init__(self, where: str, remedy: str) -> None:
        self.where, self.remedy = where, remedy
        super().__init__(f"{where}: {remedy}")


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure as it was published."""

    value: Any
    source: str
    date: str | None  # day of reading; None where nobody published it

    @property
    def sourced(self) -> bool:
        return self.source != UNSOURCED


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers with one form of cache: an entry of `width` elements by head, for `every` tokens of the last `window`."""

    layers: int
    width: int = 0
    heads: int = 1
    every: int = 1
    window: int | None = None
    chunked: bool = False  # the window begins anew at each of its multiples, and does not slide
    fp8_bytes: int | None = None  # of an entry, where an FP8 cache needs more than its elements
    state: int = 0  # elements that a sequence keeps whatever its length


Cut = Literal["expert", "tensor", "kv", "none"]
"""What divides a part between ranks: the expert parallel group, the tensor parallel group, that group as far as there
are key-value heads, or nothing."""


@dataclass(frozen=True, slots=True)
class Other:
    """Parameters of all layers together that the shapes below do not tell: recurrent layers, gates, further norms."""

    name: str
    params: int
    form: Form = "linear"
    cut: Cut = "tensor"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelFacts:
    """A model's published configuration. Parameters in thousand millions, contexts in tokens. Equal only to itself."""

    key: str
    attention: Attention
    total_params_b: float
    active_params_b: float
    layers: int
    dense_layers: int
    hidden: int
    heads: int
    head_dim: int
    experts: int
    topk: int
    moe_intermediate: int
    vocab: int
    max_context: int
    native: str
    kv_heads: int = 1
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    rope_dim: int = 0
    v_head_dim: int = 0
    o_groups: int = 0
    o_lora_rank: int = 0
    index_heads: int = 0
    index_dim: int = 0
    linear_layers: int = 0  # without attention of the shapes above: a recurrent state, or what `others` counts
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_head_dim: int = 0
    linear_conv: int = 0
    shared_experts: int = 0
    shared_intermediate: int = 0
    dense_intermediate: int = 0
    expert_matrices: int = 3  # gate, up and down; 2 without a gate
    layer_norms: int = 2  # of a layer, as wide as the model
    tied_embeddings: bool = False
    qk_norm: QkNorm = "none"
    attention_bias: Bias = "none"
    attention_sinks: bool = False
    expert_bias: bool = False  # on gate, up and down of each expert, and on the router
    score_bias: bool = False  # a correction for each expert, by which a router selects
    shared_gate: bool = False  # a gate on what the shared experts give
    checkpoint_gb: float | None = None
    kv_dtype: str = "bfloat16"
    kv: tuple[KvGroup, ...] = ()
    others: tuple[Other, ...] = ()
    figures: Mapping[str, Figure] = field(repr=False)

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """Forms of cache: the entry's own, or one for all layers."""
        if self.kv:
            return self.kv
        if self.attention == "mla":
            return (KvGroup(self.layers, width=self.kv_lora_rank + self.rope_dim),)
        return (KvGroup(self.layers, width=2 * self.head_dim, heads=self.kv_heads),)


@dataclass(frozen=True)
class Accelerator:
    """A GPU or its like. `memory_bytes` is all that the driver reports. Peaks are None where no source was found.

    `flops` is dense arithmetic a second by bytes of an operand: 2 (BF16, FP16), 1 (FP8, INT8) or 0.5 (FP4).
    """

    name: str
    memory_bytes: int
    gpus_per_node: int
    figures: Mapping[str, Figure] = field(repr=False, compare=False)
    bandwidth_bytes_s: float | None = None
    flops: Mapping[float, float] = field(default_factory=dict, repr=False, compare=False)
    nvlink_bytes_s: float | None = None  # or xGMI, or a TPU's links: one GPU, one direction; so the next two
    pcie_bytes_s: float | None = None
    nic_bytes_s: float | None = None
    rent_usd_per_hour: float | None = None  # one GPU, on demand
    domain_gpus: int = 8  # GPUs that NVLink or its like joins
    vector_flops: float | None = None  # in FP32, of the cores beside the matrix units (CUDA cores)
    measured_flops_16bit: float | None = None  # of large matrices, as others timed them; None: nobody's is known
    host_time_ratio: float = 1.0  # time of work on its host's processor over that of an x86 server
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Precision:
    """A form of weights: bits of a weight by part, scales included. Equal only to itself."""

    name: str
    experts: float
    linear: float
    rest: float
    block: int  # columns under one scale; a rank's slice is a multiple of it
    suffixes: tuple[str, ...]
    field: str | None  # value of spec.model.quantization
    figure: Figure

    def bits(self, form: Form) -> float:
        """Bits of a weight in a part of that form."""
        return {"experts": self.experts, "linear": self.linear, "rest": self.rest}[form]


@dataclass(frozen=True)
class EngineFacts:
    """What the engine takes beside weights and cache, and its defaults."""

    utilization: float
    batched_tokens: tuple[int, ...]
    active_seqs: int
    large_gpu_bytes: int
    runtime_bytes: int
    collective_bytes: int
    graph_bytes: int
    fragmentation_bytes: int
    usual_sequence_tokens: int
    shortest_context: int
    shared_memory_bytes_per_gpu: int
    shared_memory_bytes: int
    figures: Mapping[str, Figure] = field(repr=False, compare=False)
