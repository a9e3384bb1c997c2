"""Predicted speed of one replica under a load: prefill and decode apart, with what limits them and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_planner import calibration, exchange, memory, roofline
from moe_planner.calibration import Factors
from moe_planner.catalog import Accelerator, Catalog, Precision
from moe_planner.memory import Ask
from moe_planner.roofline import Cycle, Rates, Work
from moe_planner.weights import Layout


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


def predict(ask: Ask, layout: Layout, load: Load, catalog: Catalog, factors: Factors | None = None) -> Speed:
    """Speed of one replica. Raises SpeedUnknown."""
    known = factors or calibration.packaged()
    rates = rates_of(ask.accelerator, ask.precision, layout, known)
    w = work_of(ask, layout, load)
    chunk, cache = room(ask, layout, catalog)
    most = sequences(ask, layout, cache, load) * layout.data
    if most < 1.0:
        raise SpeedUnknown(
            f"{ask.model.key} in {ask.precision.name} on {layout.gpus} × {ask.accelerator.name} ({layout}): no room"
            f" for a sequence of {load.input_tokens + load.output_tokens:,.0f} tokens: take more GPUs or a smaller form"
        )
    running = min(float(load.concurrency), most)
    route = roofline.routing(ask.model, layout, load.skew, load.gamma)
    turn = roofline.cycle(w, rates, running, load.new_tokens, load.output_tokens, chunk, route)
    return _speed(ask, layout, load, turn, w, known.error, chunk)


def rates_of(accelerator: Accelerator, precision: Precision, layout: Layout, factors: Factors) -> Rates:
    """What one GPU attains. Raises SpeedUnknown where a peak is not known."""
    if accelerator.bandwidth_bytes_s is None:
        raise _unknown(accelerator, "bandwidth_gb_s")
    if not accelerator.flops:
        raise _unknown(accelerator, "tflops_16bit")
    peaks = []
    for form in ("linear", "head", "experts", "core"):
        width = 2.0 if form in ("head", "core") else roofline.operand_bytes(precision, form, accelerator)
        peak = accelerator.flops.get(width)
        if peak is None:
            raise _unknown(accelerator, "tflops_16bit" if width >= 2 else "tflops_8bit")
        peaks.append((peak, width))
    found = exchange.link(accelerator, layout.tensor * layout.data)
    if isinstance(found, str):
        raise _unknown(accelerator, found)
    linear, head, experts, core = peaks
    return factors.rates(accelerator.bandwidth_bytes_s, found.bytes_s, linear, head, experts, core)


def _unknown(accelerator: Accelerator, figure: str) -> SpeedUnknown:
    return SpeedUnknown(f"accelerators.{accelerator.name}.{figure}: not known: add it to the catalog with its source")


def work_of(ask: Ask, layout: Layout, load: Load) -> Work:
    """Work of a layout at the load's mean context."""
    context = load.input_tokens + load.output_tokens / 2.0
    return roofline.work(
        ask.model,
        ask.precision,
        layout,
        fp8_cache=ask.fp8_cache,
        context=context,
        prompt=load.input_tokens,
        new=load.new_tokens,
    )


def room(ask: Ask, layout: Layout, catalog: Catalog) -> tuple[int, float]:
    """Tokens of a step and bytes of cache a GPU: the largest step of the engine's that leaves most of the cache.

    A step twice as large is worth a tenth of the cache at most: decode batches live from it.
    """
    engine = catalog.engine
    tried = [(step, memory.place(ask, layout, step, engine).cache) for step in engine.batched_tokens]
    best = max(cache for _, cache in tried)
    return next((step, cache) for step, cache in tried if cache >= 0.9 * best or cache == best)


def sequences(ask: Ask, layout: Layout, cache: float, load: Load) -> float:
    """Sequences that the cache of a rank holds, each with all that it will yield, and that the engine admits."""
    tokens = math.ceil(load.input_tokens + load.output_tokens)
    most = max(0.0, cache) / memory.sequence_bytes(ask, layout, tokens, 0)
    return most if ask.active_seqs is None else min(most, float(ask.active_seqs))


def _speed(ask: Ask, layout: Layout, load: Load, turn: Cycle, w: Work, error: float, chunk: int) -> Speed:
    output = turn.running * load.output_tokens / turn.total_s
    waiting = max(0.0, load.concurrency - turn.running)
    queued_s = waiting * turn.total_s / turn.running
    accelerator, step = ask.accelerator, turn.step
    batch = max(turn.running / layout.data / layout.pipeline, 1.0 / layout.data)
    tokens = batch * layout.data
    share = 1.0 - math.exp(tokens * w.missed)
    read = w.linear_bytes + w.head_bytes + share * w.expert_bytes + batch * w.cache_bytes
    each = w.linear_flops + w.expert_flops * layout.data
    done = (turn.running / layout.data) * (
        load.output_tokens * (each + w.head_flops + w.decode_flops) + load.new_tokens * (each + w.prefill_flops)
    )
    width = roofline.operand_bytes(ask.precision, "experts", accelerator)
    reading = step.linear + step.experts + step.core - step.computing
    limits = {"memory": reading, "compute": step.computing, "exchange": step.exchange, "launch": step.launch}
    return Speed(
        prefill_tokens_per_s=layout.data * load.new_tokens / turn.prompt_s,
        output_tokens_per_s=output,
        total_tokens_per_s=output * (load.input_tokens + load.output_tokens) / load.output_tokens,
        ttft_s=queued_s + turn.prompt_s * layout.pipeline + turn.step_s,
        itl_s=(turn.total_s - turn.prompt_s) / load.output_tokens,
        step_s=turn.step_s,
        s_mbu=read / (step.total * (accelerator.bandwidth_bytes_s or math.inf)),
        s_mfu=done / (turn.total_s * accelerator.flops[width]),
        bound=max(limits, key=lambda name: limits[name]),
        parts={
            "linear": step.linear * layout.pipeline,
            "experts": step.experts * layout.pipeline,
            "attention": step.core * layout.pipeline,
            "exchange": step.exchange * layout.pipeline,
            "launch": step.launch * layout.pipeline,
        },
        low=output * math.exp(-error),
        high=output * math.exp(error),
        running=turn.running,
        batched_tokens=chunk,
    )
