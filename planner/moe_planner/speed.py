"""Predicted speed of one replica under a load: prefill and decode apart, with what limits them and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from moe_planner import calibration, exchange, memory, roofline, work
from moe_planner.calibration import Factors
from moe_planner.catalog import Accelerator, Catalog, Precision
from moe_planner.memory import Ask
from moe_planner.roofline import Peaks, Routing
from moe_planner.weights import Layout
from moe_planner.work import Gemm, Work

YIELDED = 0.75
"""Share of its output that a sequence's room is counted with: half is there on average, and engines keep some back so
that sequences need not be evicted."""
MEASURED = 0.8
"""Share of the 16-bit peak that timed matrix products reach on the GPUs to which GEMM shares were fitted: 0.80 on H100
and H200, 0.85 on A100, 0.75 on B200 (docs/speed.md). A GPU that nobody has timed is taken to reach it too."""
VECTOR = 30.0
"""FP8 peak over the FP32 peak of the cores beside the matrix units where nobody published it, as on H100 and H200."""
ROOM = 0.15
"""Half-width, in ln, of what is known of another's room for sequences: where requests run in waves, a wave more or less
may be a third of the whole, so a burst is predicted as the mean over rooms this far apart."""
ROOMS = 7
_AWAY = tuple((2 * index + 1) / ROOMS - 1 for index in range(ROOMS))


class SpeedUnknown(Exception):
    """A figure that the prediction needs is not known, or there is no room at all. Names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica is asked to do, steadily. Tokens of a request; requests that are in it at once."""

    input_tokens: float
    output_tokens: float
    concurrency: int
    cached_share: float = 0.0
    skew: float = 0.0
    """Zipf exponent of expert popularity; 0: uniform."""
    gamma: float | None = None

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens", "concurrency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"load.{name}: {getattr(self, name)} must be above zero")
        if not 0.0 <= self.cached_share <= 1.0:
            raise ValueError(f"load.cached_share: {self.cached_share} must lie in 0 to 1")
        if self.skew < 0 or (self.gamma is not None and self.gamma < 1.0):
            raise ValueError("load.skew must not be negative, and load.gamma at least 1")

    @property
    def new_tokens(self) -> float:
        """Prompt tokens that are computed: all but the cached, the last one at least."""
        return max(1.0, self.input_tokens * (1.0 - self.cached_share))


@dataclass(frozen=True)
class Speed:
    """Predicted figures of one replica in steady state."""

    prefill_tokens_per_s: float  # were it to do nothing else
    output_tokens_per_s: float
    total_tokens_per_s: float  # prompt tokens, cached ones too, and output
    ttft_s: float
    itl_s: float
    step_s: float  # a decode step with no prompt beside it
    s_mbu: float
    s_mfu: float
    bound: str  # "memory", "compute", "exchange" or "launch"
    parts: Mapping[str, float]  # seconds of a decode step
    low: float  # of output_tokens_per_s, by the calibration's held-out error
    high: float
    running: float = 0.0  # requests that run at once; the others of the concurrency wait
    batched_tokens: int = 0  # of a step, as memory allows


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything of a prediction that no factor changes."""

    ask: Ask
    layout: Layout
    load: Load
    work: Work
    peaks: Peaks
    route: Routing
    batched_tokens: int
    running: float  # sequences of the replica that run at once
    room: float  # sequences that it would hold, were as many sent
    graphs: tuple[int, ...] = ()  # batches of CUDA graphs that decode steps are padded to


def predict(ask: Ask, layout: Layout, load: Load, catalog: Catalog, factors: Factors | None = None) -> Speed:
    """Speed of one replica in steady state. Raises SpeedUnknown."""
    return finish(prepare(ask, layout, load, catalog), factors or calibration.packaged())


def prepare(
    ask: Ask, layout: Layout, load: Load, catalog: Catalog, yielded: float = YIELDED, free_share: float | None = None
) -> Prepared:
    """What a layout does under a load.

    `yielded`: share of its output that a sequence is given room for. `free_share`: share of what weights and the rest
    leave that the cache takes; None: as the engine that is deployed counts it. Raises SpeedUnknown.
    """
    peaks = peaks_of(ask.accelerator, ask.precision, layout, ask.fp8_cache)
    chunk, cache = room(ask, layout, catalog, free_share)
    most = sequences(ask, layout, cache, load, yielded) * layout.data
    if most < 1.0:
        raise SpeedUnknown(
            f"{ask.model.key} in {ask.precision.name} on {layout.gpus} × {ask.accelerator.name} ({layout}): no room"
            f" for a sequence of {load.input_tokens + load.output_tokens:,.0f} tokens: take more GPUs or a smaller form"
        )
    route = roofline.routing(ask.model, layout, load.skew, load.gamma, ask.redundant)
    running = min(float(load.concurrency), most)
    return Prepared(
        ask, layout, load, work_of(ask, layout, load, ask.accelerator.domain_gpus), peaks, route, chunk, running, most
    )


def peaks_of(accelerator: Accelerator, precision: Precision, layout: Layout, fp8: bool = False) -> Peaks:
    """Peaks of one GPU for a form of weights and of cache. Raises SpeedUnknown where one is not known.

    Where the cache is FP8, GPUs with FP4 units attend in FP8 (TensorRT-LLM's and FlashInfer's kernels for Blackwell);
    others with 8-bit units do so for prompts (TensorRT-LLM's use_fp8_context_fmha, which trtllm-bench sets for FP8;
    FlashAttention 3 in vLLM).
    """
    if accelerator.bandwidth_bytes_s is None:
        raise _unknown(accelerator, "bandwidth_gb_s")
    if not accelerator.flops:
        raise _unknown(accelerator, "tflops_16bit")
    link = exchange.link(accelerator, layout.gpus)
    network = exchange.network(accelerator, layout.tensor * layout.data)
    if isinstance(link, str) or isinstance(network, str):
        raise _unknown(accelerator, link if isinstance(link, str) else str(network))
    linear, mlp, experts = (
        work.gemm(precision, form, accelerator) for form in ("linear", work.mlp_form(precision), "experts")
    )
    return Peaks(
        bandwidth=accelerator.bandwidth_bytes_s,
        link=link.bytes_s,
        network=network.bytes_s,
        linear=_peak(accelerator, linear),
        mlp=_peak(accelerator, mlp),
        wide=_peak(accelerator, "16"),
        experts=_peak(accelerator, experts),
        attention=_peak(accelerator, "8" if fp8 and 0.5 in accelerator.flops else "16")[0],
        prompts=_peak(accelerator, "8" if fp8 and 1.0 in accelerator.flops else "16")[0],
        vector=vector(accelerator),
        fp4=0.5 in accelerator.flops,
        nvidia=nvidia(accelerator),
        attained=attained(accelerator),
        host=accelerator.host_time_ratio,
    )


def attained(accelerator: Accelerator) -> float:
    """What is measured of the 16-bit peak over what is measured of others': more where little arithmetic goes with
    much bandwidth and power."""
    peak = accelerator.flops.get(2.0)
    if accelerator.measured_flops_16bit is None or peak is None:
        return 1.0
    return accelerator.measured_flops_16bit / peak / MEASURED


def vector(accelerator: Accelerator) -> float:
    """Peak in FP32 of the cores beside the matrix units, operations a second."""
    if accelerator.vector_flops is not None:
        return accelerator.vector_flops
    return accelerator.flops.get(1.0, max(accelerator.flops.values())) / VECTOR


def nvidia(accelerator: Accelerator) -> bool:
    """Whether it is one of the GPUs for which engines were tuned first, and nearly all published runs were made."""
    return accelerator.name.startswith("nvidia-")


def _peak(accelerator: Accelerator, kind: Gemm) -> tuple[float, Gemm]:
    """Operations a second. A 16-bit peak that is not known is half the 8-bit one."""
    width = {"4": 0.5, "8": 1.0, "8 in blocks": 1.0}.get(kind, 2.0)
    peak = accelerator.flops.get(width)
    if peak is None and width == 2.0 and 1.0 in accelerator.flops:
        peak = accelerator.flops[1.0] / 2.0
    if peak is None:
        raise _unknown(accelerator, {2.0: "tflops_16bit", 1.0: "tflops_8bit"}.get(width, "tflops_4bit"))
    return peak, kind


def _unknown(accelerator: Accelerator, figure: str) -> SpeedUnknown:
    return SpeedUnknown(f"accelerators.{accelerator.name}.{figure}: not known: add it to the catalog with its source")


def work_of(ask: Ask, layout: Layout, load: Load, domain: int) -> Work:
    """Work of a layout at the load's mean context; `domain`: GPUs that NVLink or its like joins."""
    context = load.input_tokens + load.output_tokens / 2.0
    return work.work(
        ask.model,
        ask.precision,
        layout,
        fp8_cache=ask.fp8_cache,
        context=context,
        prompt=load.input_tokens,
        new=load.new_tokens,
        domain=domain,
    )


def fixed_bytes(ask: Ask, layout: Layout, catalog: Catalog) -> list[float]:
    """Bytes of a GPU that are not cache, for each size of step that the engine takes.

    Where data ranks exchange tokens all to all, a rank receives what is routed to it, and not every rank's tokens as
    the fit check has it.
    """
    engine = catalog.engine
    placed = memory.place(ask, layout, engine.batched_tokens[0], engine)
    held = placed.fixed - placed.activations
    alone = _alone(layout) if layout.expert > 1 else layout
    seqs = ask.active_seqs or engine.active_seqs
    return [held + memory.activation_bytes(ask.model, alone, step, min(seqs, step)) for step in engine.batched_tokens]


@lru_cache(maxsize=4096)
def _alone(layout: Layout) -> Layout:
    return replace(layout, data=1)


def room(ask: Ask, layout: Layout, catalog: Catalog, free_share: float | None = None) -> tuple[int, float]:
    """Tokens of a step and bytes of cache a GPU: the largest step of the engine's that leaves most of the cache.

    A step twice as large is worth a tenth of the cache at most: decode batches live from it. A size of the cache that
    is set stands.
    """
    engine = catalog.engine
    placed = memory.place(ask, layout, engine.batched_tokens[0], engine)
    whole = placed.cache + placed.fixed
    total = float(placed.total)
    tried = [
        (step, whole - fixed if free_share is None else free_share * (total - fixed))
        for step, fixed in zip(engine.batched_tokens, fixed_bytes(ask, layout, catalog), strict=True)
    ]
    best = max(cache for _, cache in tried)
    step, cache = next((step, cache) for step, cache in tried if cache >= 0.9 * best or cache == best)
    return step, cache if ask.cache_bytes is None else min(cache, float(ask.cache_bytes))


def room_of_sequence(ask: Ask, layout: Layout, load: Load, yielded: float = 1.0) -> float:
    """Bytes of cache that a sequence is counted with; `yielded`: share of its output that it has room for."""
    tokens = math.ceil(load.input_tokens + load.output_tokens * yielded)
    return work.sequence_bytes(ask.model, tokens, layout.tensor, layout.pipeline, ask.fp8_cache)


def sequences(ask: Ask, layout: Layout, cache: float, load: Load, yielded: float = 1.0) -> float:
    """Sequences that the cache of a rank holds, and that the engine admits."""
    most = max(0.0, cache) / room_of_sequence(ask, layout, load, yielded)
    return most if ask.active_seqs is None else min(most, float(ask.active_seqs))


def finish(at: Prepared, factors: Factors) -> Speed:
    """The speed that factors give. Pure."""
    layout, load, w = at.layout, at.load, at.work
    turn = _cycle(at, factors.rates(at.peaks), at.running)
    output = turn.running * load.output_tokens / turn.total_s
    waiting = max(0.0, load.concurrency - turn.running)
    step = turn.step
    batch = max(turn.running / layout.data / layout.pipeline, 1.0 / layout.data)
    reading = step.linear + step.experts + step.core - step.computing
    limits = {"memory": reading, "compute": step.computing, "exchange": step.exchange, "launch": step.launch}
    return Speed(
        prefill_tokens_per_s=layout.data * load.new_tokens / turn.prompt_s,
        output_tokens_per_s=output,
        total_tokens_per_s=output * (load.input_tokens + load.output_tokens) / load.output_tokens,
        ttft_s=waiting * turn.total_s / turn.running + turn.prompt_s * layout.pipeline + turn.step_s,
        itl_s=(turn.total_s - turn.prompt_s) / load.output_tokens,
        step_s=turn.step_s,
        s_mbu=_read(w, batch, at.route) / (step.total * at.peaks.bandwidth),
        s_mfu=_done(w, load, turn.running / layout.data) / (turn.total_s * at.peaks.experts[0]),
        bound=max(limits, key=lambda name: limits[name]),
        parts={
            "linear": step.linear * layout.pipeline,
            "experts": step.experts * layout.pipeline,
            "attention": step.core * layout.pipeline,
            "exchange": step.exchange * layout.pipeline,
            "launch": step.launch * layout.pipeline,
        },
        low=output * math.exp(-factors.error),
        high=output * math.exp(factors.error),
        running=turn.running,
        batched_tokens=at.batched_tokens,
    )


def _read(w: Work, batch: float, route: Routing) -> float:
    """Bytes that a decode step must read on a GPU: MoE-CAP's S_active + S_KV."""
    return float(
        w.linear_bytes + w.head_bytes + route.share(w, batch * w.data) * w.expert_bytes + batch * w.cache_bytes
    )


def _done(w: Work, load: Load, sequences_of_rank: float) -> float:
    """Operations of a GPU in one cycle: MoE-CAP's F_attn + 2·N_router + 2k·N_expert for each token, and the head."""
    each = w.linear_flops + w.mlp_flops + w.expert_flops * w.data
    decoded = load.output_tokens * (each + w.head_flops + w.decode_flops)
    return float(sequences_of_rank * (decoded + load.new_tokens * (each + w.prefill_flops)))


def _cycle(at: Prepared, rates: roofline.Rates, sequences: float) -> roofline.Cycle:
    """Steady state of so many sequences at once."""
    load = at.load
    return roofline.cycle(
        at.work, rates, sequences, load.new_tokens, load.output_tokens, at.batched_tokens, at.route, graphs=at.graphs
    )


def burst_s(at: Prepared, factors: Factors, requests: float, *, spread: bool) -> float:
    """Seconds until the last of `requests` that are sent at once has ended.

    As many run as in steady state while others wait; then the batch drains. `spread`: output lengths are spread as in
    recorded conversations, taken as exponential, so that the batch shrinks as e^(−t/mean); else they are all alike
    and end together, in waves.
    """
    rates = factors.rates(at.peaks)

    def cycle(sequences: float) -> roofline.Cycle:
        return _cycle(at, rates, sequences)

    def in_waves(room: float) -> float:
        running = min(room, requests)
        waves = int(requests / running + 1e-9)
        left = requests - waves * running
        return float(waves * cycle(running).total_s + (cycle(left).total_s if left >= 1.0 else 0.0))

    if not spread:
        return sum(in_waves(at.room * math.exp(ROOM * away)) for away in _AWAY) / ROOMS
    running = min(at.running, requests)
    turn = cycle(running)
    waves_s = float(turn.total_s * requests / running)
    if running <= 1.0:
        return waves_s
    # ∫ step(n) dn/n from 1 to the batch: midpoints, evenly spaced in ln n.
    points = 16
    width = math.log(running) / points
    drain = 0.0
    for index in range(points):
        left = running * math.exp(-(index + 0.5) * width)
        batch = max(left / at.layout.data / at.layout.pipeline, 1.0 / at.layout.data)
        drain += float(roofline.decode(at.work, rates, batch, at.route).total) * at.layout.pipeline * width
    return waves_s + at.load.output_tokens * max(0.0, drain - float(turn.step_s))
