"""What the hook of one MoE layer costs on a device: counting alone and each overflow, eager and in a captured graph.

No engine and no experts kernel: router output of a skewed batch goes through `Rank.route` as a layer of
`MOESTACK_GPU=count` or `capacity` has it. A step pays this once for each MoE layer. On a CPU only the eager form runs,
with fixed shapes and without the early end that a CPU has in serving, so its times say nothing but that it works.
"""

from __future__ import annotations

import statistics
import time
from decimal import Decimal
from typing import Any

import numpy as np

from moe_core.wire import ExpertKnobs, Overflow

GAMMA = Decimal("1.25")
ROWS: tuple[tuple[str, Overflow | None], ...] = (
    ("count", None),
    ("Unlimited", Overflow.UNLIMITED),
    ("Reroute", Overflow.REROUTE),
    ("Drop", Overflow.DROP),
    ("ExpertChoice", Overflow.EXPERT_CHOICE),
)
"""(name, overflow); "count" is a layer whose scores are left alone."""


def measure(device: str, tokens: tuple[int, ...], rounds: int, experts: int = 128, k: int = 8) -> dict[str, Any]:
    """Median microseconds of one layer's hook by setting and batch, `eager_us` and (on a device) `graph_us`."""
    import torch

    rows = []
    for count in tokens:
        for name, overflow in ROWS:
            once = _layer(device, name, overflow, count, experts, k)
            row = {"setting": name, "tokens": count, "eager_us": _time(once, device, rounds)}
            if device == "cuda":
                row["graph_us"] = _time(_captured(once), device, rounds)
            rows.append(row)
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": kind, "experts": experts, "k": k, "hook": rows}


def _layer(device: str, name: str, overflow: Overflow | None, tokens: int, experts: int, k: int) -> Any:
    import torch

    from moe_serving.capacity import PREFILL
    from moe_serving.rank import Rank
    from moe_serving.route import Layer, route
    from moe_serving.scores import Routing

    routing = None if name == "count" else Routing("softmax", True)
    rank = Rank(layers=[Layer(0, "moe.0", experts, k, routing)])
    rank.reserve(tokens, torch.device(device))
    if overflow not in {None, Overflow.UNLIMITED}:
        rank.apply(ExpertKnobs(overflow=overflow, capacity_factor_prefill=GAMMA), 1)
    rank.begin_step(np.full(tokens, PREFILL, np.uint8), 0)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=random) + torch.linspace(2, 0, experts)
    weights, ids = torch.topk(torch.softmax(logits, 1), k)
    given = weights.to(device), ids.to(device, torch.int32), logits.to(device)

    def once() -> None:
        route(rank.layers[0], rank.phase[:tokens], rank.token_k[:tokens], rank.overflow, *given)

    return once


def _captured(once: Any) -> Any:
    """The same as a graph's replay."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made on first use is made before the capture
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay


def _time(once: Any, device: str, rounds: int) -> float:
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    once()
    seen = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        once()
        wait()
        seen.append((time.perf_counter() - began) * 1e6)
    return round(statistics.median(seen), 1)
