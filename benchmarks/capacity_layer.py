"""What expert capacity costs and wins in one MoE layer of real shape, through the code and kernel that serving uses.

A layer is router GEMM, top-k, our hook, and the local experts of a rank (gather, vLLM's fused kernel, sum back). The
ranks run one after another on one thread each, as a rank of a CPU deployment owns a core; each routes every token, as
under tensor parallelism, and computes its own half of the experts. A step takes as long as its slowest rank. Attention
is left out, so shares are of the MoE layer alone.

Times are CPU seconds of the process, not wall-clock: there is one thread, so they are the same on a quiet machine, and
on a shared one they leave out what others took. What others do to caches and memory bandwidth stays in.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_core import capacity as reference
from moe_core.wire import ExpertKnobs, Overflow

COUNTED_FROM = 1.3
"""Cases whose largest rank load falls by less than this say more of noise than of capacity, and are not counted."""
DECODE_GAMMA = Decimal("1.25")


@dataclass(frozen=True)
class Shape:
    """A layer, its batch and its ranks. Defaults but for `intermediate` are Qwen3-235B-A22B's."""

    tokens: int = 4096
    hidden: int = 4096
    intermediate: int = 1536
    experts: int = 128
    k: int = 8
    ranks: int = 2


SKEWS = ("zipf_0.8", "4:1")


def popularity(skew: str, experts: int) -> np.ndarray[Any, Any]:
    """Of experts by index. Ranks own neighbours, as vLLM's linear placement has it, so skew lands on rank 0."""
    if skew == "zipf_0.8":
        return 1.0 / np.arange(1, experts + 1) ** 0.8
    return np.repeat([4.0, 1.0], [experts // 2, experts - experts // 2])


@dataclass(frozen=True)
class Setting:
    """Capacity of one pass; `gamma` None is Unlimited, counting alone."""

    gamma: Decimal | None
    overflow: Overflow = Overflow.REROUTE

    @property
    def name(self) -> str:
        return "unlimited" if self.gamma is None else f"{self.overflow.value} {self.gamma}"

    def knobs(self) -> ExpertKnobs:
        if self.gamma is None:
            return ExpertKnobs()
        gammas = {"capacity_factor_prefill": self.gamma, "capacity_factor_decode": self.gamma}
        return ExpertKnobs(overflow=self.overflow, **gammas)


@dataclass
class Pass:
    """CPU seconds of one step: for each rank its parts; and what capacity left."""

    router_s: list[float] = field(default_factory=list)
    hook_s: list[float] = field(default_factory=list)
    experts_s: list[float] = field(default_factory=list)
    gemm_s: list[float] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)
    dropped_slots: int = 0

    def rank_s(self, rank: int, hooked: bool = True) -> float:
        return self.router_s[rank] + self.experts_s[rank] + (self.hook_s[rank] if hooked else 0.0)

    def slowest(self, hooked: bool = True) -> int:
        return max(range(len(self.router_s)), key=lambda rank: self.rank_s(rank, hooked))

    @property
    def step_s(self) -> float:
        return self.rank_s(self.slowest())

    @property
    def bare_s(self) -> float:
        """The step without our hook."""
        return self.rank_s(self.slowest(False), False)

    @property
    def hook_share(self) -> float:
        """Hook over the layer's time without it, on the rank that the step waits for."""
        return self.hook_s[self.slowest()] / self.bare_s


class Layer:
    """The layer on this machine. `run` is one step of it."""

    def __init__(self, shape: Shape, seed: int) -> None:
        import torch
        import vllm._custom_ops as ops
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
        from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

        from moe_serving.cpu_experts import hooked_apply
        from moe_serving.rank import Rank

        self.torch, self.shape, self.activation = torch, shape, MoEActivation.SILU
        torch.set_num_threads(1)
        self.random = torch.Generator().manual_seed(seed)
        self.isa = CPUUnquantizedExperts.isa
        self.owned = shape.experts // shape.ranks
        gate_up = self._normal(2 * shape.intermediate, shape.hidden, spread=shape.hidden**-0.5)
        down = self._normal(shape.hidden, shape.intermediate, spread=shape.intermediate**-0.5)
        # Each rank has weights of its own in life; here they take turns with one set, far larger than any cache.
        self.w13 = ops.cpu_prepack_moe_weight(gate_up.expand(self.owned, -1, -1).contiguous(), self.isa)
        self.w2 = ops.cpu_prepack_moe_weight(down.expand(self.owned, -1, -1).contiguous(), self.isa)
        self.gate = self._normal(shape.experts, shape.hidden, spread=shape.hidden**-0.5)
        self.kernel = SimpleNamespace(_use_zentorch=False, w1_bias=None, w2_bias=None, isa=self.isa)
        self.apply = hooked_apply(None)
        self.router = CPURouter(shape.k, shape.experts, renormalize=True)
        self.rank = Rank()
        self.number = self.rank.add_layer(self.router)
        self.version = 0
        self.gemm_s = 0.0
        original = ops.cpu_fused_moe

        def timed(*args: Any) -> None:
            began = time.process_time()
            original(*args)
            self.gemm_s += time.process_time() - began

        ops.cpu_fused_moe = timed

    def _normal(self, *size: int, spread: float = 1.0) -> Any:
        return (self.torch.randn(*size, generator=self.random) * spread).to(self.torch.bfloat16)

    def hidden(self, tokens: int) -> Any:
        return self._normal(tokens, self.shape.hidden)

    def logits(self, wanted: np.ndarray[Any, Any], tokens: int) -> Any:
        """Router logits whose top k are k draws without replacement, experts as popular as wanted (Gumbel's trick)."""
        torch = self.torch
        uniform = torch.rand(tokens, self.shape.experts, generator=self.random).clamp(1e-9, 1 - 1e-7)
        return torch.from_numpy(np.log(wanted)).float() - torch.log(-torch.log(uniform))

    def run(self, hidden: Any, logits: Any, setting: Setting, phase: int) -> Pass:
        torch, shape, seen = self.torch, self.shape, Pass()
        self.version += 1
        self.rank.apply(setting.knobs(), self.version)
        phases = np.full(hidden.shape[0], phase, dtype=np.uint8)
        clock = time.process_time
        for owner in range(shape.ranks):
            self.rank.begin_step(phases, 0)
            expert_map = torch.full((shape.experts,), -1, dtype=torch.int32)
            expert_map[owner * self.owned : (owner + 1) * self.owned] = torch.arange(self.owned, dtype=torch.int32)
            output = torch.empty_like(hidden)
            at = [clock()]
            torch.nn.functional.linear(hidden, self.gate)  # its own result would have no skew: ours is drawn
            weights, ids = self.router._compute_routing(hidden, logits, torch.int32)
            at.append(clock())
            weights, ids = self.rank.route(self.number, weights, ids, logits)
            at.append(clock())
            self.gemm_s = 0.0
            self.apply(
                self.kernel, output, hidden, self.w13, self.w2, weights, ids, self.activation, shape.experts,
                expert_map, None, None, None, None, None, False,
            )  # fmt: skip
            at.append(clock())
            seen.router_s.append(at[1] - at[0])
            seen.hook_s.append(at[2] - at[1])
            seen.experts_s.append(at[3] - at[2])
            seen.gemm_s.append(self.gemm_s)
            mine = ids[(ids >= owner * self.owned) & (ids < (owner + 1) * self.owned)]
            seen.touched.append(int(mine.unique().numel()))
        seen.dropped_slots = int((ids < 0).sum())
        if min(seen.gemm_s) == 0.0:
            raise RuntimeError("the experts did not pass through vllm._custom_ops.cpu_fused_moe: nothing was timed")
        return seen


def rank_loads(logits: Any, shape: Shape, setting: Setting) -> list[int]:
    """Slots on each rank, by the reference."""
    selection = logits.float().log_softmax(-1)
    tokens = reference.Tokens(selection.tolist(), selection.exp().tolist(), [shape.k] * selection.shape[0])
    overflow = Overflow.UNLIMITED if setting.gamma is None else setting.overflow
    load = reference.assign(tokens, overflow, setting.gamma).load(shape.experts)
    owned = shape.experts // shape.ranks
    return [sum(load[first : first + owned]) for first in range(0, shape.experts, owned)]


def measure(shape: Shape, gammas: tuple[Decimal, ...], rounds: int, decode_tokens: tuple[int, ...]) -> dict[str, Any]:
    """All settings in turn in each round, so that a slow minute hits each alike; medians over rounds."""
    from moe_serving.rank import DECODE, PREFILL

    layer = Layer(shape, seed=0)
    settings = [Setting(None), *(Setting(gamma) for gamma in gammas)]
    found: dict[str, Any] = {"prefill": {}, "decode": {}, "isa": layer.isa, "shape": vars(shape), "rounds": rounds}
    began = time.perf_counter(), time.process_time()
    for skew in SKEWS:
        hidden, logits = layer.hidden(shape.tokens), layer.logits(popularity(skew, shape.experts), shape.tokens)
        loads = {setting.name: rank_loads(logits, shape, setting) for setting in settings}
        say(f"{skew}: rank loads by the reference {loads}")
        layer.run(hidden[:64], logits[:64], settings[0], PREFILL)  # first touch of the weights
        passes: dict[str, list[Pass]] = {setting.name: [] for setting in settings}
        for number in range(rounds):
            for setting in settings if number % 2 == 0 else settings[::-1]:
                seen = layer.run(hidden, logits, setting, PREFILL)
                passes[setting.name].append(seen)
                say(f"{skew} round {number} {setting.name}: {seen.step_s:.3f} s, hook {1000 * seen.hook_s[0]:.1f} ms")
        found["prefill"][skew] = {name: prefill_row(name, passes, loads) for name in passes}
        for tokens in decode_tokens:
            decoding: dict[str, list[Pass]] = {"unlimited": [], Setting(DECODE_GAMMA).name: []}
            for _ in range(3 * rounds):
                for setting in (settings[0], Setting(DECODE_GAMMA)):
                    decoding[setting.name].append(layer.run(hidden[:tokens], logits[:tokens], setting, DECODE))
            found["decode"][f"{skew} T={tokens}"] = {name: decode_row(rows) for name, rows in decoding.items()}
            say(f"{skew} decode T={tokens}: {found['decode'][f'{skew} T={tokens}']}")
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    found["wall_over_cpu"] = round(wall / cpu, 3)
    return {**keys(found["prefill"]), **found}


def prefill_row(name: str, passes: Mapping[str, list[Pass]], loads: Mapping[str, list[int]]) -> dict[str, Any]:
    """One setting under one skew, beside Unlimited of the same rounds."""
    before, after = passes["unlimited"], passes[name]
    row = {
        "step_s": round(middle([seen.step_s for seen in after]), 4),
        "hook_share": round(middle([seen.hook_share for seen in after]), 5),
        "hook_ms": round(1000 * middle([seen.hook_s[seen.slowest()] for seen in after]), 2),
        "rank_loads": loads[name],
        "dropped_slots": after[0].dropped_slots,
    }
    if name == "unlimited":
        return row
    # The share that follows the load, of the step that is to be sped up: kernels alone, and with gather and sum.
    slowest = [seen.slowest() for seen in before]
    gemm = middle([seen.gemm_s[rank] / seen.step_s for seen, rank in zip(before, slowest, strict=True)])
    experts = middle([seen.experts_s[rank] / seen.step_s for seen, rank in zip(before, slowest, strict=True)])
    fall = max(loads["unlimited"]) / max(loads[name])
    speedup = middle([old.step_s / new.step_s for old, new in zip(before, after, strict=True)])
    over = {share: speedup * (1 - share + share / fall) for share in (gemm, experts)}
    return {
        **row,
        "gemm_share": round(gemm, 4),
        "load_before_over_after": round(fall, 4),
        "speedup": round(speedup, 4),
        "over_bound": round(over[gemm], 4),
        "over_bound_of_all_expert_work": round(over[experts], 4),
        "counted": fall >= COUNTED_FROM,
    }


def decode_row(passes: list[Pass]) -> dict[str, Any]:
    return {
        "step_ms": round(1000 * middle([seen.step_s for seen in passes]), 2),
        "hook_share": round(middle([seen.hook_share for seen in passes]), 5),
        "experts_touched": [
            int(middle([seen.touched[rank] for seen in passes])) for rank in range(len(passes[0].touched))
        ],
    }


def keys(prefill: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float | None]:
    """The figures of the benchmark: of each the worst over skews and capacity factors."""
    capped = [row for rows in prefill.values() for name, row in rows.items() if name != "unlimited"]
    counted = [row for row in capped if row["counted"]]
    return {
        "hook_overhead_count": max(rows["unlimited"]["hook_share"] for rows in prefill.values()),
        "hook_overhead_reroute": max(row["hook_share"] for row in capped),
        "layer_speedup_over_bound": min((row["over_bound"] for row in counted), default=None),
        "gemm_share": min(row["gemm_share"] for row in capped),
    }


def middle(values: list[float]) -> float:
    return float(statistics.median(values))


_BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - _BEGAN:7.1f} s  {text}", file=sys.stderr, flush=True)
