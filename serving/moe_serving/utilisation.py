"""S-MBU and S-MFU: how much of the hardware's bandwidth and arithmetic the work that was asked for could use.

Formulas of the MoE-CAP paper, with counts in place of expectations:
S-MBU = (S_active + S_KV) / (step time · B_peak), over steps that only decode; S_active is everything that such a step
reads: the weights outside of routed experts once, and each *distinct* expert that got a slot once.
S-MFU = FLOP/s / F_peak over all steps; FLOP = 2 · (parameters that a token passes), routed experts by slot computed.
Pure arithmetic on totals that only grow, so what is built on it never goes back either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_core.wire import Utilisation


@dataclass(frozen=True)
class Shapes:
    """The loaded model, over all ranks of an engine. By layer: bytes and parameters of one whole routed expert.

    `fixed_bytes` are read in every step (every rank reads its own copy of what is replicated): all weights but routed
    experts and the rows of the input embedding. `token_params` multiply every token, `head_params` a yielded one.
    `score_width` is Σ over attention layers of heads · (key width + value width).
    """

    fixed_bytes: int
    token_params: int
    head_params: int
    expert_bytes: tuple[float, ...]
    expert_params: tuple[float, ...]
    score_width: int
    weight_bytes: int = 2  # of one parameter of an expert: which arithmetic peak is meant


@dataclass(frozen=True)
class Peaks:
    """Of all devices of an engine together; None where nobody published it, as for a CPU."""

    bytes_s: float | None = None
    flops_s: float | None = None


UNKNOWN = Peaks()


@dataclass(frozen=True)
class Work:
    """Totals of an engine since its start. By layer: distinct experts of decode-only steps, slots computed."""

    touched: tuple[int, ...]
    slots: tuple[int, ...]
    tokens: int
    yielded: int
    pairs: int
    busy_s: float
    decode_steps: int
    decode_busy_s: float
    decode_kv_bytes: float

    @classmethod
    def of(cls, rank: Mapping[str, Any], kv_bytes: float, busy_s: float, decode_busy_s: float) -> Work:
        """From the answer of `moestack_read` of one rank: ranks of an engine run the same steps."""
        work = rank["work"]
        return cls(
            touched=tuple(layer["touched"] for layer in rank["layers"]),
            slots=tuple(sum(layer["assigned"]) for layer in rank["layers"]),
            tokens=work["tokens"],
            yielded=rank["generated_tokens"],
            pairs=work["pairs"],
            busy_s=busy_s,
            decode_steps=work["decode_steps"],
            decode_busy_s=decode_busy_s,
            decode_kv_bytes=kv_bytes,
        )


def combined(ranks: Sequence[Mapping[str, Any]]) -> Shapes | None:
    """Shapes of an engine from those of its ranks (`moestack_shapes`); None where a rank could not tell.

    With expert parallelism a rank holds whole experts, so one rank tells an expert's size; without it each holds a
    slice of every expert. The router is replicated: it is read by every rank and computed, in this count, once.
    """
    if not ranks or any(rank.get("fixed_bytes") is None for rank in ranks):
        return None
    layers = range(len(ranks[0]["experts"]))

    def whole(name: str, at: int) -> float:
        parts = [float(rank["experts"][at][name]) for rank in ranks]
        return max(parts) if ranks[0]["experts"][at]["whole"] else sum(parts)

    return Shapes(
        fixed_bytes=sum(int(rank["fixed_bytes"]) for rank in ranks),
        token_params=sum(int(rank["token_params"]) for rank in ranks) + int(ranks[0]["router_params"]),
        head_params=sum(int(rank["head_params"]) for rank in ranks),
        expert_bytes=tuple(whole("bytes", at) for at in layers),
        expert_params=tuple(whole("params", at) for at in layers),
        score_width=sum(int(rank["score_width"]) for rank in ranks),
        weight_bytes=int(ranks[0]["weight_bytes"]),
    )


def decode_bytes(shapes: Shapes, work: Work) -> float:
    """Bytes that decode-only steps had to read: (S_active + S_KV), summed over them."""
    experts = sum(n * size for n, size in zip(work.touched, shapes.expert_bytes, strict=True))
    return work.decode_steps * shapes.fixed_bytes + experts + work.decode_kv_bytes


def flops(shapes: Shapes, work: Work) -> float:
    """Floating-point operations of all steps: two for each parameter passed, two for each score and value product."""
    experts = sum(n * size for n, size in zip(work.slots, shapes.expert_params, strict=True))
    dense = work.tokens * shapes.token_params + work.yielded * shapes.head_params
    return 2.0 * (dense + experts + work.pairs * shapes.score_width)


def measure(shapes: Shapes, peaks: Peaks, now: Work, before: Work | None, *, reads_known: bool = True) -> Utilisation:
    """Totals, and rates since `before` (since the start where there is none).

    `reads_known` is False for one rank of data-parallel attention: which experts its devices read is decided by the
    tokens of all ranks, and it counts its own. Then no bytes are told, and no S-MBU.
    """
    done = flops(shapes, now)
    read = decode_bytes(shapes, now) if reads_known else 0.0
    was_read = 0.0 if before is None or not reads_known else decode_bytes(shapes, before)
    was_done = 0.0 if before is None else flops(shapes, before)
    busy_s = now.busy_s - (0.0 if before is None else before.busy_s)
    decode_s = now.decode_busy_s - (0.0 if before is None else before.decode_busy_s)
    steps = now.decode_steps - (0 if before is None else before.decode_steps)
    touched = sum(now.touched) - (0 if before is None else sum(before.touched))
    bytes_s = (read - was_read) / decode_s if decode_s > 0 and steps and reads_known else None
    flops_s = (done - was_done) / busy_s if busy_s > 0 else None
    return Utilisation(
        decode_steps_total=now.decode_steps,
        decode_busy_s_total=now.decode_busy_s,
        decode_bytes_total=read,
        flops_total=done,
        experts_touched=touched / (steps * len(now.touched)) if steps and now.touched else None,
        bytes_s=bytes_s,
        flops_s=flops_s,
        s_mbu=None if bytes_s is None or peaks.bytes_s is None else bytes_s / peaks.bytes_s,
        s_mfu=None if flops_s is None or peaks.flops_s is None else flops_s / peaks.flops_s,
    )
