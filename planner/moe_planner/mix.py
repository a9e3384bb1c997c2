"""Own GPUs for the usual load and a closed API for its peaks: the cheapest mix for a trace. Pure.

A trace is cut into windows as long as a request may wait. In each, N replicas have N × window seconds; what does not
go in is sent to the API, those requests first that the API serves cheapest for the GPU time that they would take. That
is a fractional knapsack, so its greedy solution is the cheapest there is; a request on the edge is split, which a
gateway cannot do: at most one a window. Every number of replicas is tried, from none to what the highest peak needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_planner.cost import MILLION, CostInvalid, Tariff, at_least, check_tariff, input_usd_per_m, share

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """Requests: seconds from the start, and tokens."""

    at_s: Sequence[float]
    input_tokens: Sequence[float]
    output_tokens: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.at_s) == len(self.input_tokens) == len(self.output_tokens):
            raise CostInvalid("trace", "columns differ in length", "give each request a time and two token counts")
        if not len(self.at_s):
            raise CostInvalid("trace", "has no requests", "give a trace with at least one")


@dataclass(frozen=True)
class Replica:
    """One own replica: dollars an hour, and how fast it reads and writes when it is full."""

    usd_per_hour: float
    prefill_tokens_per_s: float
    output_tokens_per_s: float

    def __post_init__(self) -> None:
        at_least("rent", self.usd_per_hour, 0.0)
        for field in ("prefill_tokens_per_s", "output_tokens_per_s"):
            if not getattr(self, field) > 0:
                raise CostInvalid(field, f"{getattr(self, field):g}", "set a speed above 0")


@dataclass(frozen=True)
class Mix:
    """Dollars of the whole trace with so many own replicas, and the share of requests' tokens that the API serves."""

    replicas: int
    own_usd: float
    api_usd: float
    api_token_share: float
    busy_share: float  # of own GPU time

    @property
    def usd(self) -> float:
        return self.own_usd + self.api_usd


@dataclass(frozen=True)
class Mixes:
    """Every number of replicas from none (all API) to enough for the highest peak (all own)."""

    options: tuple[Mix, ...]
    window_s: float
    seconds: float  # that the trace lasts, in whole windows

    @property
    def best(self) -> Mix:
        """The cheapest; of equals, the one of fewest GPUs."""
        return min(self.options, key=lambda mix: (mix.usd, mix.replicas))

    @property
    def all_api(self) -> Mix:
        return self.options[0]

    @property
    def all_own(self) -> Mix:
        return self.options[-1]


def work_s(trace: Trace, replica: Replica, cached_share: float = 0.0) -> Floats:
    """Seconds of one full replica that each request takes: fresh input over prefill, and output over decode."""
    fresh = np.asarray(trace.input_tokens, dtype=np.float64) * (1 - share("cached_share", cached_share))
    output = np.asarray(trace.output_tokens, dtype=np.float64)
    work: Floats = fresh / replica.prefill_tokens_per_s + output / replica.output_tokens_per_s
    return work


def mixes(
    trace: Trace, replica: Replica, tariff: Tariff, *, window_s: float = 10.0, cached_share: float = 0.0
) -> Mixes:
    """What each number of replicas would have cost. `window_s`: how long work may wait for a GPU."""
    check_tariff(tariff)
    if not window_s > 0:
        raise CostInvalid("window", f"{window_s:g}", "set seconds above 0")
    at = np.asarray(trace.at_s, dtype=np.float64)
    window = np.floor((at - at.min()) / window_s).astype(np.int64)
    count = int(window.max()) + 1
    work = work_s(trace, replica, cached_share)
    usd = _usd(trace, tariff, cached_share)
    tokens = np.asarray(trace.input_tokens, dtype=np.float64) + np.asarray(trace.output_tokens, dtype=np.float64)
    # Dearest at the API for its GPU time first: those stay.
    worth = np.divide(usd, work, out=np.full_like(usd, np.inf), where=work > 0)
    order = np.lexsort((-worth, window))
    window, work, usd, tokens = window[order], work[order], usd[order], tokens[order]
    before = np.cumsum(work) - work
    first = np.searchsorted(window, np.arange(count))
    starts = before[np.minimum(first, len(before) - 1)]
    ahead = before - starts[window]
    peak = float(np.bincount(window, weights=work, minlength=count).max())
    most = max(1, math.ceil(peak / window_s - 1e-9))
    seconds = count * window_s
    found = []
    for replicas in range(most + 1):
        kept = np.clip(replicas * window_s - ahead, 0.0, work)
        if replicas == most:
            kept = work
        away = 1.0 - np.divide(kept, work, out=np.ones_like(work) * (replicas > 0), where=work > 0)
        own = replicas * replica.usd_per_hour * seconds / 3600
        total = float(tokens.sum())
        found.append(
            Mix(
                replicas=replicas,
                own_usd=own,
                api_usd=float((usd * away).sum()),
                api_token_share=float((tokens * away).sum()) / total if total else 0.0,
                busy_share=min(1.0, float(kept.sum()) / (replicas * seconds)) if replicas else 0.0,
            )
        )
    return Mixes(tuple(found), window_s, seconds)


def _usd(trace: Trace, tariff: Tariff, cached_share: float) -> Floats:
    """Dollars of each request at the API."""
    inputs, outputs = (np.asarray(c, dtype=np.float64) for c in (trace.input_tokens, trace.output_tokens))
    usd: Floats = (inputs * input_usd_per_m(tariff, cached_share) + outputs * tariff.output_usd_per_m) / MILLION
    return usd
