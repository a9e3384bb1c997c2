"""Seconds of a forward pass on the busiest GPU, from its work and rates: arithmetic alone, on numbers or arrays.

Each part of a pass reads (bytes over bandwidth) and computes (operations over peak). Attention takes the longer of the
two, the other parts their sum. Parts follow each other, so their seconds add up. GEMMs compute in tiles: a last one is
filled up with rows, and narrow experts leave large ones unfilled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_planner.catalog import ModelFacts
from moe_planner.experts import placement, touched
from moe_planner.weights import Layout
from moe_planner.work import Gemm, Number, Work


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
class Peaks:
    """A GPU's peaks, a second. Pairs: operations, and the kind of GEMM. `wide`: 16-bit, for the head.

    `attention`: of decode, `prompts`: of prompts' attention. `vector`: in FP32, beside the matrix units.
    `fp4`: whether its matrix units take FP4, and large tiles. `attained`: what is measured of the arithmetic peak over
    what is measured of other GPUs' peaks. `host`: time of work on its host's processor over that of an x86 server.
    """

    bandwidth: Number
    link: Number
    network: Number
    linear: tuple[Number, Gemm]
    mlp: tuple[Number, Gemm]
    wide: tuple[Number, Gemm]
    experts: tuple[Number, Gemm]
    attention: Number
    prompts: Number
    vector: Number
    fp4: bool = False
    nvidia: bool = True
    attained: Number = 1.0
    host: Number = 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """What the GPU attains, a second: peaks times efficiencies; and overheads in seconds.

    `spread`: coefficient of variation of the experts' popularity.
    `stagger`: of the prompts of data ranks, for each e-fold of ranks.
    `narrow`: width at which experts' GEMMs take twice as long as wide ones. `padding`: rows that fill up a last tile.
    """

    bandwidth: Number
    cache: Number
    linear_flops: Number
    mlp_flops: Number
    expert_flops: Number
    head_flops: Number
    core_flops: Number
    flash_flops: Number
    link: Number
    network: Number
    spread: Number
    stagger: Number
    narrow: Number
    padding: Number
    kernel_s: Number
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


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens spread over experts. `placed`: max/mean of ranks by popularity alone; `gamma`: capacity, if any."""

    placed: float | None = None  # None: by the popularity that the calibration found
    gamma: float | None = None
    touched: Callable[[float], float] | None = None  # share of experts that so many tokens touch; None: uniform

    def share(self, w: Work, tokens: Number, ops: Ops = SCALAR) -> Number:
        """Share of a layer's experts that `tokens` tokens of all data ranks touch."""
        return self.touched(tokens) if self.touched is not None else 1.0 - ops.exp(tokens * w.missed)


USUAL = Routing()


def routing(model: ModelFacts, layout: Layout, skew: float, gamma: float | None, redundant: int) -> Routing:
    """Routing with Zipf-distributed popularity of exponent `skew` under capacity γ; 0: as the calibration found it.

    Redundant experts are taken to balance ranks (DeepSeek's EPLB: 0.997 of even when fresh).
    """
    if redundant and layout.expert > 1:
        return Routing(placed=1.0, gamma=gamma)
    if not skew:
        return Routing(gamma=gamma)
    ranks = layout.tensor * layout.data if layout.expert > 1 else 1
    return Routing(
        placed=placement(model.experts, model.topk, ranks, skew),
        gamma=gamma,
        touched=lambda tokens: touched(model.experts, model.topk, tokens, skew) / model.experts,
    )


def straggler(placed: Number, mean: Number, ranks: Number, gamma: float | None = None, ops: Ops = SCALAR) -> Number:
    """Expected max/mean of slots by rank: placement, chance, and what capacity γ leaves of both.

    Chance: the largest of `ranks` loads that are near Poisson with mean μ lies about √(2 μ ln ranks) above it. One rank
    gets all at most. With C = γ·mean slots for each expert no rank has more than γ times the mean.
    """
    factor = ops.minimum(placed + _extreme(ranks, ops) / ops.sqrt(mean), 1.0 * ranks)
    return factor if gamma is None else ops.maximum(ops.minimum(factor, gamma), 1.0)


def _extreme(ranks: Number, ops: Ops) -> Number:
    """By how many deviations the largest of so many lies above the mean."""
    return ops.sqrt(2.0 * ops.log(ranks))


def captured(sequences: float, graphs: Sequence[int]) -> float:
    """Rows that a decode step of so many sequences computes, where it is padded to the next CUDA graph's batch.

    Steps above the largest graph, and engines that pad nothing (no graphs), run as they are.
    """
    return next((float(size) for size in graphs if size >= sequences), sequences)


def seconds(
    w: Work,
    r: Rates,
    tokens: Number,
    core: tuple[Number, Number],
    sampled: Number,
    route: Routing,
    ops: Ops,
    computed: Number | None = None,
) -> Parts:
    """Seconds of one pass of `tokens` tokens of each data rank; `core`: seconds of attention (reading, computing).

    `computed`: rows of matrix products, where a step is padded to more than its tokens.
    """
    wide = tokens if computed is None else computed
    group = tokens * w.data
    share = route.share(w, group, ops)
    mean = ops.maximum(group * w.topk / w.expert_ranks, 1e-9)
    placed = route.placed
    if placed is None:
        placed = 1.0 + r.spread * _extreme(w.expert_ranks, ops) * ops.sqrt(w.expert_ranks / w.experts)
    factor = straggler(placed, mean, w.expert_ranks, route.gamma, ops)
    linear_read = w.linear_bytes / r.bandwidth
    rows = wide + r.padding
    linear_work = rows * w.linear_flops / r.linear_flops
    head_read = w.head_bytes / r.bandwidth
    head_work = (sampled > 0) * rows * w.head_flops / r.head_flops
    mlp_read, mlp_work = w.mlp_bytes / r.bandwidth, rows * w.mlp_flops / r.mlp_flops
    # GEMMs of few rows hide their reading badly: the sum is nearer to what is measured than the longer of the two.
    linear = linear_read + linear_work + mlp_read + mlp_work + head_read + head_work
    expert_read = ops.minimum(share * factor, 1.0) * w.expert_bytes / r.bandwidth
    # Every expert that is touched fills up a tile of its own: that many rows in place of one token's k.
    slots = wide * w.data + r.padding * share * w.experts / w.topk
    expert_work = slots * factor * (1.0 + r.narrow / w.expert_width) * w.expert_flops / r.expert_flops
    experts = expert_read + expert_work
    core_read, core_work = core
    attention = ops.maximum(core_read, core_work)
    busy = linear + experts + attention
    # Between domains two halves of a batch take turns: one computes while the other is on its way.
    crossing = ops.maximum(tokens * w.cross_bytes / r.network - busy, 0.0)
    sent = tokens * w.send_bytes / r.link + w.calls * r.call_s + crossing
    launch = w.kernels * r.kernel_s + r.step_s + sampled * r.sequence_s
    computing = linear_work + mlp_work + head_work + expert_work + core_work * (core_work > core_read)
    return Parts(linear, experts, attention, sent, launch, computing)


def decode(
    w: Work, r: Rates, sequences: Number, route: Routing = USUAL, ops: Ops = SCALAR, graphs: Sequence[int] = ()
) -> Parts:
    """One decode step of a stage with `sequences` sequences on each data rank, padded to the next of `graphs`."""
    core = (sequences * w.cache_bytes / r.cache, sequences * w.decode_flops / r.core_flops)
    rows = captured(sequences, graphs) if graphs else None
    return seconds(w, r, sequences, core, sequences, route, ops, rows)


def prefill(w: Work, r: Rates, tokens: Number, route: Routing = USUAL, ops: Ops = SCALAR) -> Parts:
    """One pass of `tokens` prompt tokens on each data rank; of the cache only what it writes moves."""
    return seconds(w, r, tokens, (0.0, tokens * w.prefill_flops / r.flash_flops), 0.0, route, ops)


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
    route: Routing = USUAL,
    ops: Ops = SCALAR,
    graphs: Sequence[int] = (),
) -> Cycle:
    """Closed form: while a sequence yields `output` tokens, each of the rank's others ends and is replaced once.

    So a cycle holds `output` decode steps and as many prompts of `new` tokens as the rank runs sequences. Prompts are
    read in passes of up to `chunk` tokens. Pipeline stages work on a share of the sequences each.
    """
    own = running / w.data
    batch = ops.maximum(own / w.pipeline, 1.0 / w.data)
    step = decode(w, r, batch, route, ops, graphs)
    step_s = step.total * w.pipeline
    tokens = ops.maximum(ops.minimum(own * new, chunk), 1.0)
    prompt_s = new * prefill(w, r, tokens, route, ops).total / tokens
    # Where ranks are more than sequences, those that are busy have one each.
    # A data rank that reads a prompt holds up the others, who decode: their prompts do not all come in one pass.
    late = 1.0 + r.stagger * ops.log(w.data)
    return Cycle(running, step, step_s, prompt_s, ops.maximum(own, 1.0) * prompt_s * late + output * step_s)
