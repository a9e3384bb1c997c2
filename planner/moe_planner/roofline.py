"""Work of a forward pass on the busiest GPU, and the seconds it takes there: arithmetic alone, on numbers or arrays.

Every part of a pass takes the longer of its reading (bytes over bandwidth) and its computing (operations over peak):
the roofline. Parts follow each other, so their seconds add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moe_planner import exchange, kv
from moe_planner.catalog import Accelerator, KvGroup, ModelFacts, Precision
from moe_planner.experts import placement, touched
from moe_planner.weights import Layout, parts, ways

Number = Any
"""A float, or a numpy array of them: the arithmetic below is the same for one layout and for a whole catalog."""


@dataclass(frozen=True, slots=True)
class Ops:
    """The few functions that differ between numbers and arrays."""

    maximum: Callable[[Number, Number], Number]
    minimum: Callable[[Number, Number], Number]
    exp: Callable[[Number], Number]
    sqrt: Callable[[Number], Number]
    log: Callable[[Number], Number]


SCALAR = Ops(max, min, math.exp, math.sqrt, math.log)


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
    layers: Number  # of the stage
    linear_bytes: Number  # weights read in every pass, whatever the batch, without experts and head
    linear_flops: Number  # per token of the GPU's own data rank
    head_bytes: Number
    head_flops: Number  # per token that is sampled
    expert_bytes: Number  # all experts that the GPU holds
    expert_flops: Number  # per token of all data ranks, were ranks loaded alike
    cache_bytes: Number  # read for one sequence in a decode step
    decode_flops: Number  # scores and values of one sequence in a decode step
    prefill_flops: Number  # scores and values of one new prompt token, mean over the prompt
    send_bytes: Number  # per token of the data rank
    calls: Number  # collectives in a pass


@dataclass(frozen=True, slots=True)
class Rates:
    """What the GPU attains, a second: peaks times efficiencies; and overheads in seconds."""

    bandwidth: Number
    linear_flops: Number
    expert_flops: Number
    head_flops: Number
    core_flops: Number
    link: Number
    layer_s: Number
    step_s: Number
    sequence_s: Number
    call_s: Number


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of a pass by part."""

    linear: Number
    experts: Number
    core: Number
    exchange: Number
    launch: Number
    computing: Number  # seconds of those above in which arithmetic is the limit

    @property
    def total(self) -> Number:
        return self.linear + self.experts + self.core + self.exchange + self.launch


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


@lru_cache(maxsize=8192)
def _weights(
    model: ModelFacts, precision: Precision, layout: Layout
) -> tuple[float, float, float, float, float, float]:
    """Bytes and operations per token on a GPU: (linear, head, experts) × (bytes, operations)."""
    stage = math.ceil(model.layers / layout.pipeline) / model.layers
    linear_bytes = linear_flops = head_bytes = head_flops = expert_bytes = expert_flops = 0.0
    for part in parts(model):
        share = part.params / ways(part, model, layout)
        size = share * precision.bits(part.form) / 8
        if part.name == "head" or (part.name == "embeddings" and model.tied_embeddings):
            head_bytes, head_flops = size, 2.0 * share
        elif part.name == "embeddings":
            continue  # only rows of it are read
        elif part.form == "experts":
            expert_bytes, expert_flops = stage * size, stage * 2.0 * share * model.topk / model.experts
        else:
            linear_bytes += stage * size
            linear_flops += stage * 2.0 * share
    if model.linear_layers:
        # The recurrent state of a delta net: decayed, corrected, written and read for each token (Qwen3-Next).
        state = model.linear_layers * model.linear_value_heads * model.linear_head_dim**2
        linear_flops += stage * 8.0 * state / layout.tensor
    return linear_bytes, linear_flops, head_bytes, head_flops, expert_bytes, expert_flops


def work(
    model: ModelFacts,
    precision: Precision,
    layout: Layout,
    *,
    fp8_cache: bool,
    context: float,
    prompt: float,
    new: float,
) -> Work:
    """Work of a layout: decode at a mean `context`, and a prompt of `prompt` tokens of which `new` are computed."""
    linear_bytes, linear_flops, head_bytes, head_flops, expert_bytes, expert_flops = _weights(model, precision, layout)
    stage = math.ceil(model.layers / layout.pipeline) / model.layers
    sent = exchange.traffic(model, layout)
    before = prompt - new / 2.0
    return Work(
        tensor=layout.tensor,
        data=layout.data,
        pipeline=layout.pipeline,
        expert_ranks=layout.tensor * layout.data if layout.expert > 1 else 1,
        experts=model.experts,
        missed=math.log1p(-model.topk / model.experts) if model.topk < model.experts else -1e9,
        topk=model.topk,
        layers=math.ceil(model.layers / layout.pipeline),
        linear_bytes=linear_bytes,
        linear_flops=linear_flops,
        head_bytes=head_bytes,
        head_flops=head_flops,
        expert_bytes=expert_bytes,
        expert_flops=expert_flops,
        cache_bytes=kv.sequence_bytes(model, max(1, round(context)), layout, fp8=fp8_cache),
        decode_flops=stage * context_work(model, context, True) / layout.tensor,
        prefill_flops=stage * context_work(model, before, False) / layout.tensor,
        send_bytes=sent.total,
        calls=sent.collectives,
    )


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens spread over experts. `placed`: max/mean of ranks by popularity alone; `gamma`: capacity, if any."""

    placed: float = 1.0
    gamma: float | None = None
    touched: Callable[[float], float] | None = None  # share of experts that so many tokens touch; None: uniform


EVEN = Routing()


def routing(model: ModelFacts, layout: Layout, skew: float, gamma: float | None) -> Routing:
    """Routing with Zipf-distributed popularity of exponent `skew` under capacity γ."""
    if not skew:
        return Routing(gamma=gamma)
    ranks = layout.tensor * layout.data if layout.expert > 1 else 1
    return Routing(
        placed=placement(model.experts, model.topk, ranks, skew),
        gamma=gamma,
        touched=lambda tokens: touched(model.experts, model.topk, tokens, skew) / model.experts,
    )


def seconds(w: Work, r: Rates, tokens: Number, core: Number, sampled: Number, route: Routing, ops: Ops) -> Parts:
    """Seconds of one pass of `tokens` tokens of each data rank; `core`: (bytes, operations) of attention in it."""
    core_bytes, core_flops = core
    group = tokens * w.data
    share = route.touched(group) if route.touched is not None else 1.0 - ops.exp(group * w.missed)
    mean = ops.maximum(group * w.topk / w.expert_ranks, 1e-9)
    # The largest of several near-Poisson loads: experts.straggler, here for numbers and arrays alike.
    factor = ops.minimum(route.placed + ops.sqrt(2.0 * ops.log(w.expert_ranks) / mean), 1.0 * w.expert_ranks)
    if route.gamma is not None:
        factor = ops.maximum(ops.minimum(factor, route.gamma), 1.0)
    linear_read = w.linear_bytes / r.bandwidth
    linear_work = tokens * w.linear_flops / r.linear_flops
    head_read, head_work = w.head_bytes / r.bandwidth, sampled * w.head_flops / r.head_flops
    linear = ops.maximum(linear_read, linear_work) + ops.maximum(head_read, head_work)
    expert_read = ops.minimum(share * factor, 1.0) * w.expert_bytes / r.bandwidth
    expert_work = group * factor * w.expert_flops / r.expert_flops
    experts = ops.maximum(expert_read, expert_work)
    core_read, core_work = core_bytes / r.bandwidth, core_flops / r.core_flops
    attention = ops.maximum(core_read, core_work)
    sent = tokens * w.send_bytes / r.link + w.calls * r.call_s
    launch = w.layers * r.layer_s + r.step_s + sampled * r.sequence_s
    computing = (
        _won(linear_work, linear_read, ops) + _won(expert_work, expert_read, ops) + _won(core_work, core_read, ops)
    )
    return Parts(linear, experts, attention, sent, launch, computing)


def _won(work_s: Number, read_s: Number, ops: Ops) -> Number:
    """Seconds of a part whose arithmetic takes longer than its reading, else nothing."""
    return work_s * (work_s > read_s)


def decode(w: Work, r: Rates, sequences: Number, route: Routing = EVEN, ops: Ops = SCALAR) -> Parts:
    """One decode step of a stage with `sequences` sequences on each data rank."""
    core = (sequences * w.cache_bytes, sequences * w.decode_flops)
    return seconds(w, r, sequences, core, sequences, route, ops)


def prefill(w: Work, r: Rates, tokens: Number, route: Routing = EVEN, ops: Ops = SCALAR) -> Parts:
    """One pass of `tokens` prompt tokens on each data rank; of the cache only what it writes moves."""
    return seconds(w, r, tokens, (0.0, tokens * w.prefill_flops), 0.0, route, ops)


@dataclass(frozen=True, slots=True)
class Cycle:
    """The steady state in which every sequence that runs is replaced when it ends. Seconds."""

    running: Number  # sequences of the replica
    step: Parts  # one decode step of one stage
    step_s: Number  # of all stages
    prompt_s: Number  # of one rank for one prompt, no decode beside it
    total_s: Number  # from one sequence's start to its end


def cycle(
    w: Work,
    r: Rates,
    running: Number,
    new: Number,
    output: Number,
    chunk: Number,
    route: Routing = EVEN,
    ops: Ops = SCALAR,
) -> Cycle:
    """Closed form: while a sequence yields `output` tokens, each of the rank's others ends and is replaced once.

    So a cycle holds `output` decode steps and as many prompts of `new` tokens as the rank runs sequences. Prompts are
    read in passes of up to `chunk` tokens. Pipeline stages work on a share of the sequences each.
    """
    own = running / w.data
    batch = ops.maximum(own / w.pipeline, 1.0 / w.data)
    step = decode(w, r, batch, route, ops)
    step_s = step.total * w.pipeline
    tokens = ops.maximum(ops.minimum(own * new, chunk), 1.0)
    prompt_s = new * prefill(w, r, tokens, route, ops).total / tokens
    return Cycle(running, step, step_s, prompt_s, own * prompt_s + output * step_s)


def operand_bytes(precision: Precision, form: str, accelerator: Accelerator) -> float:
    """Bytes of an operand as the GEMM takes it: the widths of its weights and activations, where the GPU has them.

    Formats that quantise weights alone (AWQ, GPTQ, NF4) compute in 16 bits. MXFP4 weights meet FP8 activations where
    the GPU has FP4 units, and 16 bits elsewhere.
    """
    if form == "experts":
        fp4 = 0.5 in accelerator.flops
        wanted = {"nvfp4": 0.5, "mxfp4": 1.0 if fp4 else 2.0, "mxfp4-fp8": 1.0, "fp8": 1.0, "int8": 1.0}
        width = wanted.get(precision.name, 2.0)
    else:
        bits = precision.bits("linear")
        width = 1.0 if 7.5 < bits < 9 else 2.0
    return min((known for known in accelerator.flops if known >= width), default=width)
