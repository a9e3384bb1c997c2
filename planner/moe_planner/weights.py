"""Weights: how many parameters a model has in each part, and how many bytes of them one GPU holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from moe_planner.catalog import Form, ModelFacts, Precision
from moe_planner.facts import Cut


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters that are stored and divided alike. `layered`: pipeline stages share them out."""

    name: str
    params: float
    form: Form
    cut: Cut
    layered: bool = True


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of one replica's parallelism; tensor × data × pipeline are its GPUs."""

    tensor: int
    data: int = 1
    expert: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.data * self.pipeline

    def __str__(self) -> str:
        return f"tensor {self.tensor} × data {self.data} × pipeline {self.pipeline}, expert {self.expert}"


@lru_cache(maxsize=1024)
def parts(model: ModelFacts) -> tuple[Part, ...]:
    """Parameters by part, of the main model: layers that only speculate are left out.

    Exact to the parameter for the families that transformers has; of DeepSeek V4 the hyper-connections and norms of
    compressors are left out (below 0.1 %).
    """
    m, h = model, model.hidden
    shared = m.shared_intermediate or m.shared_experts * m.moe_intermediate
    embedding = m.vocab * h
    found = [
        Part("experts", m.moe_layers * m.experts * m.expert_matrices * h * m.moe_intermediate, "experts", "expert"),
        Part("shared experts", m.moe_layers * m.expert_matrices * h * shared, "linear", "tensor"),
        Part("dense layers", m.dense_layers * m.expert_matrices * h * m.dense_intermediate, "linear", "tensor"),
        Part("router", m.moe_layers * _router(m), "rest", "none"),
        Part("norms", (m.layer_norms * m.layers + 1) * h + _attention_norms(m), "rest", "none"),
        Part("embeddings", embedding, "rest", "tensor", layered=False),
        *_attention(m),
        *(Part(other.name, other.params, other.form, other.cut) for other in m.others),
    ]
    if m.expert_bias:
        biases = m.moe_layers * m.experts * (2 * m.moe_intermediate + h)
        found.append(Part("expert biases", biases, "rest", "expert"))
    if not m.tied_embeddings:
        found.append(Part("head", embedding, "rest", "tensor", layered=False))
    return tuple(part for part in found if part.params)


def _router(m: ModelFacts) -> int:
    biases = m.experts * (m.expert_bias + m.score_bias)
    return m.hidden * (m.experts + m.shared_gate) + biases


def _attention_norms(m: ModelFacts) -> int:
    """Norms, biases and sinks of all attention layers: too small to be worth dividing."""
    layers = m.layers - m.linear_layers
    if m.attention == "mla":
        index = 2 * m.index_dim if m.index_heads else 0  # of a layer norm, which has a bias
        each = m.q_lora_rank + m.kv_lora_rank + index
    elif m.attention == "csa":
        each = m.q_lora_rank + m.head_dim
    else:
        each = {"none": 0, "head": 2 * m.head_dim, "full": (m.heads + m.kv_heads) * m.head_dim}[m.qk_norm]
    qkv = (m.heads + 2 * m.kv_heads) * m.head_dim
    each += {"none": 0, "qkv": qkv, "all": qkv + m.hidden}[m.attention_bias]
    # Of a delta net: decay, its step, and the norm of the output.
    delta = 2 * m.linear_value_heads + m.linear_head_dim if m.attention == "deltanet" else 0
    return layers * (each + m.heads * m.attention_sinks) + m.linear_layers * delta


def _attention(m: ModelFacts) -> list[Part]:
    match m.attention:
        case "mla":
            return _latent(m)
        case "csa":
            return _compressed(m)
        case "deltanet":
            return _delta_net(m)
        case "gqa":
            return _grouped(m, m.layers - m.linear_layers)


def _grouped(m: ModelFacts, layers: int, gates: int = 1) -> list[Part]:
    """Grouped-query attention; `gates` 2 doubles the query projection for an output gate."""
    return [
        Part("attention", layers * m.hidden * m.heads * m.head_dim * (1 + gates), "linear", "tensor"),
        Part("keys and values", layers * 2 * m.hidden * m.kv_heads * m.head_dim, "linear", "kv"),
    ]


def _latent(m: ModelFacts) -> list[Part]:
    """Multi-head latent attention (DeepSeek-V2 paper, section 2.1); head_dim is nope + rope."""
    layers = m.layers - m.linear_layers
    nope = m.head_dim - m.rope_dim
    value = m.v_head_dim or nope
    if m.q_lora_rank:
        down, up = m.hidden * m.q_lora_rank, m.q_lora_rank * m.heads * m.head_dim
    else:
        down, up = 0, m.hidden * m.heads * m.head_dim
    heads = up + m.kv_lora_rank * m.heads * (nope + value) + m.heads * value * m.hidden
    latent = down + m.hidden * (m.kv_lora_rank + m.rope_dim)
    indexer = m.q_lora_rank * m.index_heads * m.index_dim + m.hidden * (m.index_heads + m.index_dim)
    return [
        Part("attention", layers * heads, "linear", "tensor"),
        Part("latent projections", layers * latent, "linear", "none"),
        Part("indexer", layers * indexer if m.index_heads else 0, "linear", "none"),
    ]


def _compressed(m: ModelFacts) -> list[Part]:
    """DeepSeek V4: low-rank queries, one shared key-value head, grouped output, compressors and an indexer."""
    width = m.heads * m.head_dim
    heads = m.q_lora_rank * width + width * m.o_lora_rank + m.o_groups * m.o_lora_rank * m.hidden
    latent = m.hidden * (m.q_lora_rank + m.head_dim)
    main = [group for group in m.kv_groups if group.every > 1 and group.width == m.head_dim]
    # Values and gates, twice as wide where the windows overlap (ratio 4).
    compressors = sum(g.layers * m.hidden * 2 * g.width * (2 if g.every == 4 else 1) for g in main)
    indexed = sum(g.layers for g in m.kv_groups if g.width == m.index_dim)
    own_compressor = m.hidden * 2 * 2 * m.index_dim
    indexer = m.q_lora_rank * m.index_heads * m.index_dim + m.hidden * m.index_heads + own_compressor
    return [
        Part("attention", m.layers * heads, "linear", "tensor"),
        Part("latent projections", m.layers * latent, "linear", "none"),
        Part("compressors", compressors, "rest", "none"),
        Part("indexer", indexed * indexer, "linear", "none"),
    ]


def _delta_net(m: ModelFacts) -> list[Part]:
    """Gated delta net in most layers, gated full attention in the others (Qwen3-Next)."""
    keys, values = m.linear_key_heads * m.linear_head_dim, m.linear_value_heads * m.linear_head_dim
    mixed = 2 * keys + values
    own = m.hidden * (mixed + values) + m.hidden * 2 * m.linear_value_heads + values * m.hidden
    convolution = mixed * m.linear_conv
    delta = Part("delta net", m.linear_layers * (own + convolution), "linear", "tensor")
    return [delta, *_grouped(m, m.layers - m.linear_layers, gates=2)]


def total_params(model: ModelFacts) -> float:
    """Parameters of the main model, without layers that only speculate."""
    return sum(part.params for part in parts(model))


def active_params(model: ModelFacts) -> float:
    """Parameters that one token meets: all parts, and of the experts the share that is routed to."""
    share = model.topk / model.experts
    return sum(part.params * (share if part.cut == "expert" else 1.0) for part in parts(model))


def total_bytes(model: ModelFacts, precision: Precision) -> float:
    """Bytes of all weights, held once."""
    return sum(part.params * precision.bits(part.form) / 8 for part in parts(model))


@lru_cache(maxsize=4096)
def gpu_bytes(model: ModelFacts, precision: Precision, layout: Layout) -> float:
    """Bytes of weights on the fullest GPU, without redundant experts."""
    stage = ceil(model.layers / layout.pipeline) / model.layers
    held = 0.0
    for part in parts(model):
        share = 1.0 / ways(part, model, layout)
        if part.layered:
            share *= stage
        elif part.name == "head" and layout.pipeline > 1:
            continue  # first and last stage hold one of the two each
        held += share * part.params * precision.bits(part.form) / 8
    return held


def redundant_bytes(model: ModelFacts, precision: Precision, layout: Layout, redundant: int) -> float:
    """Bytes on the fullest GPU of `redundant` spare experts a layer."""
    if not redundant or layout.expert == 1:
        return 0.0
    one = next(part for part in parts(model) if part.name == "experts").params / model.experts * precision.experts / 8
    stage = ceil(model.layers / layout.pipeline) / model.layers
    return one * stage * ceil(redundant / layout.expert)


def ways(part: Part, model: ModelFacts, layout: Layout) -> int:
    match part.cut:
        case "expert":
            # Without expert parallelism every expert is sliced over the same ranks.
            return layout.tensor * layout.data
        case "tensor":
            return layout.tensor
        case "kv":
            return min(layout.tensor, model.kv_heads)
        case "none":
            return 1
