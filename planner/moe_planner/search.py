"""Which layout, batch, γ and redundancy serve a traffic under an SLO, at what cost: every one that works, the Pareto
front of them, the cheapest, and why the others were left. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moe_api.spec_model import ParallelismSpec
from moe_planner import layouts, memory, speed
from moe_planner.breakeven import Own
from moe_planner.calibration import Factors
from moe_planner.catalog import GIB, Accelerator, Catalog
from moe_planner.cost import MILLION, CostInvalid, at_least, share
from moe_planner.layouts import Impossible
from moe_planner.memory import Ask, Memory
from moe_planner.speed import Load, Speed, SpeedUnknown
from moe_planner.weights import Layout

Predict = Callable[[Ask, Layout, Load, Catalog, Factors | None], Speed]
Why = Literal["impossible", "memory", "unknown speed", "SLO"]

COUNTS = (1, 2, 4, 8, 16)
"""GPUs of a replica that are tried where nobody says how many."""
LADDER = tuple(4**n for n in range(7))
"""Requests in flight that are tried, and the most that fit; the border of the SLO is then searched between them."""
MOST_SEQS = 1024
"""Sequences of one data rank: vLLM's own ceiling on large GPUs (0.32, vllm/engine/arg_utils.py)."""
GAMMAS = (None, 1.25, 2.0)
"""Capacity factors to try where load is skewed and quality may be traded; without skew capacity changes nothing."""


@dataclass(frozen=True)
class Slo:
    """Seconds that must be kept; None: any. Predictions are of the mean, so leave room for a 95th percentile."""

    ttft_s: float | None = None
    itl_s: float | None = None


@dataclass(frozen=True)
class Traffic:
    """Mean requests. `tokens_per_s`: input and output that must be served, on the average; None: one full replica."""

    input_tokens: float
    output_tokens: float
    cached_share: float = 0.0
    skew: float = 0.0
    tokens_per_s: float | None = None
    utilisation: float = 1.0  # mean load over capacity that is allowed; the rest is headroom for peaks

    def __post_init__(self) -> None:
        at_least("input_tokens", self.input_tokens, 1)
        at_least("output_tokens", self.output_tokens, 1)
        share("cached_share", self.cached_share)
        at_least("skew", self.skew, 0.0)
        if self.tokens_per_s is not None and not self.tokens_per_s > 0:
            raise CostInvalid("tokens_per_s", f"{self.tokens_per_s:g}", "set a rate above 0, or leave it out")
        if not 0 < self.utilisation <= 1:
            raise CostInvalid("utilisation", f"{self.utilisation:g}", "set a share above 0, at most 1")

    @property
    def tokens(self) -> float:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class Place:
    """An accelerator, and how many of them one replica takes. `rent`: USD per GPU-hour in place of the catalog's."""

    accelerator: Accelerator
    gpus: int
    rent: float | None = None

    @property
    def usd_per_gpu_hour(self) -> float | None:
        return self.accelerator.rent_usd_per_hour if self.rent is None else self.rent


@dataclass(frozen=True)
class Option:
    """One way to serve the traffic. `concurrency`: requests in flight in one replica."""

    place: Place
    layout: Layout
    batched_tokens: int
    concurrency: int
    gamma: float | None
    redundant: int
    memory: Memory
    speed: Speed
    replicas: int
    usd_per_m: float | None  # None: the rent is not known
    request_s: float  # of a mean request, first token to last

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.place.gpus

    @property
    def per_gpu(self) -> float:
        """Input and output tokens a second of one GPU, full."""
        return self.speed.total_tokens_per_s / self.place.gpus

    @property
    def own(self) -> Own | None:
        """Its replicas as break-even takes them."""
        rent = self.place.usd_per_gpu_hour
        return None if rent is None else Own(self.place.gpus, rent, self.speed.total_tokens_per_s)

    @property
    def bounds(self) -> tuple[float, float, float]:
        """What the front weighs, each the less the better: cost, −throughput of a GPU, seconds of a request."""
        return (math.inf if self.usd_per_m is None else self.usd_per_m, -self.per_gpu, self.request_s)

    def over(self, slo: Slo) -> float:
        """By which factor the worse of TTFT and ITL exceeds the SLO; at most 1 where it is kept."""
        ratios = [
            got / wanted
            for got, wanted in ((self.speed.ttft_s, slo.ttft_s), (self.speed.itl_s, slo.itl_s))
            if wanted is not None
        ]
        return max(ratios, default=0.0)


@dataclass(frozen=True)
class Rejected:
    """What was tried and left. `layout` None: none could be tried."""

    place: Place
    layout: Layout | None
    why: Why
    text: str
    nearest: Option | None = None  # where only the SLO is missed


@dataclass(frozen=True)
class Found:
    """`options` keep the SLO; `front` are those that no other beats in cost, throughput and latency at once."""

    options: tuple[Option, ...]
    front: tuple[Option, ...]
    best: Option | None
    rejected: tuple[Rejected, ...]
    slo: Slo

    @property
    def nearest(self) -> Option | None:
        """Where nothing keeps the SLO: what misses it least."""
        missed = [row.nearest for row in self.rejected if row.nearest is not None]
        return min(missed, key=lambda option: option.over(self.slo), default=None)


def plan(
    ask: Ask,
    traffic: Traffic,
    slo: Slo,
    catalog: Catalog,
    places: Sequence[Place],
    *,
    parallelism: ParallelismSpec | None = None,
    context: int | None = None,
    gammas: tuple[float | None, ...] = GAMMAS,
    factors: Factors | None = None,
    predict: Predict | None = None,
) -> Found:
    """Every option of a model on those places.

    `ask` gives the model, its weights' form and its cache; its accelerator is each place's. `context`: the longest
    sequence that must fit; by default the mean request. Layouts that this version does not serve are left out, unless
    `parallelism` asks for them: pipeline stages, and data ranks with sliced experts.
    """
    search = _Search(ask, traffic, slo, catalog, parallelism or ParallelismSpec(), context, gammas, factors, predict)
    options: list[Option] = []
    rejected: list[Rejected] = []
    for place in places:
        for found in search.at(place):
            if isinstance(found, Option):
                options.append(found)
            else:
                rejected.append(found)
    best = min(options, key=preference, default=None)
    return Found(tuple(options), pareto(options), best, tuple(rejected), slo)


def places(catalog: Catalog, names: Sequence[str] = (), gpus: Sequence[int] = ()) -> tuple[Place, ...]:
    """Places to try: the accelerators named, or all; the counts named, or those from one GPU to sixteen."""
    chosen = [catalog.accelerators[name] for name in names] or list(catalog.accelerators.values())
    return tuple(Place(accelerator, count) for accelerator in chosen for count in (gpus or COUNTS))


def pareto(options: Sequence[Option]) -> tuple[Option, ...]:
    """The options that no other is at least as good as in all three and better in one; cheapest first."""
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (*o.bounds, o.gpus, o.gamma or 0.0, o.redundant)):
        if not any(all(a <= b for a, b in zip(kept.bounds, option.bounds, strict=True)) for kept in front):
            front.append(option)
    return tuple(front)


def preference(option: Option) -> tuple[float, ...]:
    """Cheapest; then fewest GPUs, no cap, no spare experts, and quickest."""
    cost, throughput, latency = option.bounds
    return (cost, option.gpus, float(option.gamma is not None), option.redundant, throughput, latency)


@dataclass(frozen=True)
class _Search:
    ask: Ask
    traffic: Traffic
    slo: Slo
    catalog: Catalog
    parallelism: ParallelismSpec
    context: int | None
    gammas: tuple[float | None, ...]
    factors: Factors | None
    predict: Predict | None

    def at(self, place: Place) -> Iterator[Option | Rejected]:
        """Options of one place, and what was rejected there."""
        ask = replace(self.ask, accelerator=place.accelerator)
        for redundant in self._redundancies(place.gpus):
            own = replace(ask, redundant=redundant)
            found = self._layouts(own, place)
            if isinstance(found, Impossible):
                if redundant == self.ask.redundant:
                    yield Rejected(place, None, "impossible", f"{found.why}.")
                continue
            for layout in found:
                yield from self._cut(own, place, layout)

    def _redundancies(self, gpus: int) -> tuple[int, ...]:
        """As asked; where load is skewed, also an eighth of the experts more, evenly by rank."""
        if self.ask.redundant or not self.traffic.skew or gpus == 1:
            return (self.ask.redundant,)
        experts = self.ask.model.experts
        return tuple(dict.fromkeys((0, math.ceil(experts * 9 / 8 / gpus) * gpus - experts)))

    def _layouts(self, ask: Ask, place: Place) -> tuple[Layout, ...] | Impossible:
        return layouts.candidates(
            self.parallelism, place.gpus, place.accelerator.gpus_per_node, ask.model, ask.precision, ask.redundant
        )

    def _cut(self, ask: Ask, place: Place, layout: Layout) -> Iterator[Option | Rejected]:
        gammas = self.gammas if self.traffic.skew and layout.expert > 1 else (None,)
        for gamma in gammas:
            try:
                kept, missed, lacks = self._batches(ask, place, layout, gamma)
            except SpeedUnknown as error:
                yield Rejected(place, layout, "unknown speed", str(error))
                return
            if lacks is not None:
                yield Rejected(place, layout, "memory", lacks)
                return
            yield from kept
            if not kept and missed is not None:
                yield Rejected(place, layout, "SLO", _slo_text(missed, self.slo), missed)

    def _batches(
        self, ask: Ask, place: Place, layout: Layout, gamma: float | None
    ) -> tuple[list[Option], Option | None, str | None]:
        """Options that keep the SLO, by requests in flight; the one that misses it least; what memory lacks."""
        step, _ = speed.room(ask, layout, self.catalog)
        room = memory.place(ask, layout, step, self.catalog.engine)
        most, lacks = self._most(ask, layout, step, room)
        if not most:
            return [], None, lacks
        kept: list[Option] = []
        good, bad = 0, most + 1
        missed: Option | None = None
        for concurrency in sorted({*(c for c in LADDER if c < most), most}):
            option = self._option(ask, place, layout, step, room, concurrency, gamma)
            if option.over(self.slo) <= 1:
                kept.append(option)
                good = concurrency
            else:
                bad = concurrency
                missed = missed or option
                break
        while kept and good + max(1, good // 16) < bad <= most:
            middle = (good + bad) // 2
            option = self._option(ask, place, layout, step, room, middle, gamma)
            if option.over(self.slo) <= 1:
                kept.append(option)
                good = middle
            else:
                bad = middle
        return kept, missed, None

    def _most(self, ask: Ask, layout: Layout, step: int, room: Memory) -> tuple[int, str]:
        """Most requests that a replica holds at once: 0 where not one does, and then what is lacking."""
        longest = self.context or math.ceil(self.traffic.tokens)
        need = memory.sequence_bytes(ask, layout, longest, step)
        if room.cache < need:
            lacking = (need - room.cache) / GIB
            return 0, f"{lacking:,.1f} GiB a GPU too little for one sequence of {longest:,} tokens"
        load = Load(self.traffic.input_tokens, self.traffic.output_tokens, 1, self.traffic.cached_share)
        rows = min(speed.sequences(ask, layout, room.cache, load), ask.active_seqs or MOST_SEQS, step)
        return int(rows) * layout.data, ""

    def _option(
        self, ask: Ask, place: Place, layout: Layout, step: int, room: Memory, concurrency: int, gamma: float | None
    ) -> Option:
        traffic = self.traffic
        load = Load(traffic.input_tokens, traffic.output_tokens, concurrency, traffic.cached_share, traffic.skew, gamma)
        found = (self.predict or speed.predict)(ask, layout, load, self.catalog, self.factors)
        capacity = found.total_tokens_per_s * traffic.utilisation
        replicas = 1 if traffic.tokens_per_s is None else max(1, math.ceil(traffic.tokens_per_s / capacity))
        served = capacity if traffic.tokens_per_s is None else traffic.tokens_per_s
        rent = place.usd_per_gpu_hour
        return Option(
            place=place,
            layout=layout,
            batched_tokens=step,
            concurrency=concurrency,
            gamma=gamma,
            redundant=ask.redundant,
            memory=room,
            speed=found,
            replicas=replicas,
            usd_per_m=None if rent is None else replicas * place.gpus * rent / 3600 / served * MILLION,
            request_s=found.ttft_s + max(0.0, traffic.output_tokens - 1) * found.itl_s,
        )


def _slo_text(option: Option, slo: Slo) -> str:
    parts = [
        f"{name} of {got * 1000:,.0f} ms against {wanted * 1000:,.0f}"
        for name, got, wanted in (
            ("TTFT", option.speed.ttft_s, slo.ttft_s),
            ("ITL", option.speed.itl_s, slo.itl_s),
        )
        if wanted is not None and got > wanted
    ]
    return f"{' and '.join(parts)} with {option.concurrency} in flight"
