"""What one GPU of a layout reads and computes in a pass, from a model's shapes: bytes and operations, no seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from moe_planner import exchange, kv
from moe_planner.catalog import Accelerator, Form, KvGroup, ModelFacts, Precision
from moe_planner.weights import Layout, parts, ways

Number = Any
"""A float, or a numpy array of them: the arithmetic below is the same for one layout and for a whole catalog."""


Gemm = Literal["16", "8", "8 in blocks", "4", "dequantised"]
"""Bits of the operands; `in blocks`: with a scale for each block, which the GPU's matrix units do not apply themselves;
`dequantised`: weights of fewer bits, made 16 bits wide on the way."""
BLOCK = 128
"""Columns under one scale in FP8 checkpoints of DeepSeek-V3's form."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one GPU reads and computes. Bytes and operations; `stage`: of its pipeline stage."""

    tensor: Number
    data: Number
    pipeline: Number
    expert_ranks: Number  # ranks between which whole experts are dealt out; 1: every expert is sliced
    experts: Number
    missed: Number  # log of the chance that a token passes an expert by
    topk: Number
    kernels: Number  # launched for one pass of the stage
    linear_bytes: Number  # weights read in every pass, whatever the batch, without experts and head
    linear_flops: Number  # per token of the GPU's own data rank
    mlp_bytes: Number  # dense and shared feed-forward layers
    mlp_flops: Number
    head_bytes: Number
    head_flops: Number  # per token that is sampled
    expert_bytes: Number  # all experts that the GPU holds
    expert_flops: Number  # per token of all data ranks, were ranks loaded alike
    expert_width: Number  # of an expert's matrices, or of a rank's slice: harmonic mean of both sides
    cache_bytes: Number  # read for one sequence in a decode step
    decode_flops: Number  # scores and values of one sequence in a decode step
    prefill_flops: Number  # scores and values of one new prompt token, mean over the prompt
    send_bytes: Number  # per token of the data rank, inside an NVLink domain
    cross_bytes: Number  # and between domains
    calls: Number  # collectives in a pass


@lru_cache(maxsize=4096)
def context_work(model: ModelFacts, context: float, decode: bool) -> float:
    """Operations of scores and values for one query token over `context` earlier ones, all layers and heads.

    Decode with latent attention works on the latent itself (DeepSeek-V2 paper, section 2.1.2, absorbed matrices); a
    prompt is expanded to heads first.
    """
    return sum(group.layers * _entries(group, context) * _per_entry(model, group, decode) for group in model.kv_groups)


def _entries(group: KvGroup, context: float) -> float:
    kept = context if group.window is None else min(context, group.window)
    return kept / group.every if group.width else 0.0


def _per_entry(model: ModelFacts, group: KvGroup, decode: bool) -> float:
    m = model
    if m.index_dim and group.width == m.index_dim:
        return 2.0 * m.index_heads * m.index_dim
    if m.attention == "mla":
        if decode:
            return 2.0 * m.heads * (2 * m.kv_lora_rank + m.rope_dim)
        return 2.0 * m.heads * (m.head_dim + (m.v_head_dim or m.head_dim - m.rope_dim))
    return 4.0 * m.heads * m.head_dim


@lru_cache(maxsize=4096)
def sliced(layout: Layout) -> Layout:
    """The layout with experts sliced: a GPU holds as many bytes of them as when they are whole."""
    return Layout(layout.tensor, layout.data, 1, layout.pipeline)


@lru_cache(maxsize=8192)
def _weights(model: ModelFacts, precision: Precision, layout: Layout) -> tuple[float, ...]:
    """Bytes and operations per token on a GPU: of linear layers, dense and shared MLPs, the head, experts."""
    stage = math.ceil(model.layers / layout.pipeline) / model.layers
    linear_bytes = linear_flops = mlp_bytes = mlp_flops = head_bytes = head_flops = 0.0
    expert_bytes = expert_flops = 0.0
    for part in parts(model):
        share = part.params / ways(part, model, layout)
        size = share * precision.bits(part.form) / 8
        if part.name == "head" or (part.name == "embeddings" and model.tied_embeddings):
            head_bytes, head_flops = size, 2.0 * share
        elif part.name == "embeddings":
            continue  # only rows of it are read
        elif part.form == "experts":
            expert_bytes, expert_flops = stage * size, stage * 2.0 * share * model.topk / model.experts
        elif part.name in MLP:
            bits = precision.bits(mlp_form(precision))
            mlp_bytes += stage * share * bits / 8
            mlp_flops += stage * 2.0 * share
        else:
            linear_bytes += stage * size
            linear_flops += stage * 2.0 * share
    if model.linear_layers:
        # The recurrent state of a delta net: decayed, corrected, written and read for each token (Qwen3-Next).
        state = model.linear_layers * model.linear_value_heads * model.linear_head_dim**2
        linear_flops += stage * 8.0 * state / layout.tensor
    return linear_bytes, linear_flops, mlp_bytes, mlp_flops, head_bytes, head_flops, expert_bytes, expert_flops


def work(
    model: ModelFacts,
    precision: Precision,
    layout: Layout,
    *,
    fp8_cache: bool,
    context: float,
    prompt: float,
    new: float,
    domain: int,
) -> Work:
    """Work of a layout: decode at a mean `context`, and a prompt of `prompt` tokens of which `new` are computed."""
    held = _weights(model, precision, sliced(layout))
    stage = math.ceil(model.layers / layout.pipeline) / model.layers
    sent = exchange.traffic(model, layout, domain)
    before = prompt - new / 2.0
    return Work(
        tensor=layout.tensor,
        data=layout.data,
        pipeline=layout.pipeline,
        expert_ranks=layout.tensor * layout.data if layout.expert > 1 else 1,
        experts=model.experts,
        missed=math.log1p(-model.topk / model.experts) if model.topk < model.experts else -1e9,
        topk=model.topk,
        kernels=stage * kernels(model),
        linear_bytes=held[0],
        linear_flops=held[1],
        mlp_bytes=held[2],
        mlp_flops=held[3],
        head_bytes=held[4],
        head_flops=held[5],
        expert_bytes=held[6],
        expert_flops=held[7],
        expert_width=expert_width(model, layout),
        cache_bytes=read_bytes(model, prompt, 2.0 * context - prompt, layout, fp8_cache),
        decode_flops=stage * context_work(model, context, True) / layout.tensor,
        prefill_flops=stage * context_work(model, before, False) / layout.tensor,
        send_bytes=sent.inside,
        cross_bytes=sent.crossing,
        calls=sent.collectives,
    )


def expert_width(model: ModelFacts, layout: Layout) -> float:
    """Harmonic mean of the two sides of an expert's matrices on a rank: its slice where experts are sliced.

    An expert's first GEMM sums over the hidden state, its last over the intermediate width: both sides must be wide.
    """
    inner = model.moe_intermediate / (1 if layout.expert > 1 else layout.tensor * layout.data)
    return 2.0 * model.hidden * inner / (model.hidden + inner)


@lru_cache(maxsize=4096)
def read_bytes(model: ModelFacts, first: float, last: float, layout: Layout, fp8: bool) -> float:
    """Bytes of its cache that a sequence reads in a decode step: the mean from the `first` to the `last` position.

    Attention in chunks (Llama 4) begins anew at every multiple of its window: a position sees what its own chunk holds
    before it.
    """
    whole = sequence_bytes(model, max(1, round((first + last) / 2.0)), layout.tensor, layout.pipeline, fp8)
    stage = math.ceil(model.layers / layout.pipeline) / model.layers
    unseen = 0.0
    for group in model.kv_groups:
        if group.chunked and group.window:
            entry = math.ceil(group.heads / layout.tensor) * group.width * (1 if fp8 else 2)
            kept = min((first + last) / 2.0, float(group.window))
            seen = (_before(last, group.window) - _before(first, group.window)) / max(last - first, 1.0)
            unseen += stage * group.layers * entry * (kept - min(kept, seen))
    return whole - unseen


def _before(position: float, chunk: int) -> float:
    """Entries that all positions up to `position` see together."""
    chunks, rest = divmod(position, chunk)
    return (chunks * chunk**2 + rest**2) / 2.0


@lru_cache(maxsize=256)
def kernels(model: ModelFacts) -> float:
    """Operations that a pass launches one after another, counted from the forms of the layers.

    Attention: norm, projection, rotation, cache, scores with values, output; latent attention has two more projections
    down, one up, a norm and two absorbed ones; V4's compressors four, its window and grouped output three; a delta net
    convolution, gates and state. An indexer: queries, keys, weights, rotation, cache, scores, selection. Experts: norm,
    router, selection, order, gate and up, product, down, sum; shared ones three; dense layers four.
    """
    m = model
    attention = {"gqa": 6.0, "mla": 11.0, "csa": 17.0, "deltanet": 9.0}[m.attention]
    indexed = sum(group.layers for group in m.kv_groups if m.index_dim and group.width == m.index_dim)
    shared = 3.0 if m.shared_experts or m.shared_intermediate else 0.0
    return m.layers * attention + 7.0 * indexed + m.moe_layers * (8.0 + shared) + m.dense_layers * 4.0


@lru_cache(maxsize=8192)
def sequence_bytes(model: ModelFacts, tokens: int, tensor: int, pipeline: int, fp8: bool) -> float:
    """Bytes of a sequence's cache on a GPU: what data and expert ranks do not change."""
    return kv.sequence_bytes(model, tokens, Layout(tensor, pipeline=pipeline), fp8=fp8)


MLP = frozenset({"dense layers", "shared experts"})


def mlp_form(precision: Precision) -> Form:
    """Form of dense and shared feed-forward layers: NVFP4 checkpoints quantise them with the experts."""
    return "experts" if precision.name == "nvfp4" else "linear"


def in_blocks(precision: Precision) -> bool:
    """Whether FP8 weights have a scale for each block, not for each tensor."""
    return precision.name == "fp8" and precision.block == BLOCK


def gemm(precision: Precision, form: Form, accelerator: Accelerator) -> Gemm:
    """How a GEMM computes: by the widths of its weights and activations, where the GPU has units for them.

    Formats that quantise weights alone (AWQ, GPTQ, NF4) are made 16 bits wide on the way. MXFP4 weights meet FP8
    activations where the GPU has FP4 units, and 16 bits elsewhere. GPUs without FP4 units multiply FP8 without scales:
    where each block has its own, sums leave the matrix units for every block (DeepSeek-V3 paper, section 3.3.2).
    """
    bits = precision.bits(form)
    if bits > 12:
        return "16"
    fp4 = 0.5 in accelerator.flops
    if precision.name in ("fp8", "int8") or (precision.name == "mxfp4-fp8"):
        if 1.0 not in accelerator.flops:
            return "dequantised"
        return "8 in blocks" if in_blocks(precision) and not fp4 else "8"
    if precision.name == "nvfp4" and fp4:
        return "4"
    return "8" if precision.name == "mxfp4" and fp4 else "dequantised"
