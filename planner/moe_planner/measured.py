"""Break-evens of what was measured: own GPUs against each priced API, at the mean request of the last minutes. Pure."""

from __future__ import annotations

from moe_core.costs import CostReport
from moe_core.wire import GatewayDigest
from moe_planner.breakeven import BreakEven, Own, Tariffed, break_even
from moe_planner.cost import Workload


def break_evens(
    report: CostReport, digest: GatewayDigest | None, gpus: int, usd_per_gpu_hour: float | None
) -> tuple[BreakEven, ...]:
    """Where own GPUs cost what each priced target does, at the mean request of the last minutes."""
    if digest is None or not digest.completed or not gpus or not usd_per_gpu_hour:
        return ()
    mean = Workload("measured", digest.prompt_tokens / digest.completed, digest.output_tokens / digest.completed)
    own = Own(gpus, usd_per_gpu_hour)
    tariffs = [
        Tariffed(
            price.target,
            float(price.input_usd_per_m),
            float(price.output_usd_per_m),
            None if price.cached_input_usd_per_m is None else float(price.cached_input_usd_per_m),
        )
        for price in report.prices
        if price.input_usd_per_m or price.output_usd_per_m
    ]
    return tuple(break_even(own, tariff, mean) for tariff in tariffs)
