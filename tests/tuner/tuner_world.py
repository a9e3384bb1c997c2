"""Builders of signals and contexts, and a small queueing plant that answers to the knobs, for the tuner's tests."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from decimal import Decimal

from moe_core.config import KnobBounds, SloConfig
from moe_core.retune import decide
from moe_core.retune_state import Action, RetuneContext, RetuneDecision, RetuneState
from moe_core.setting import Setting, Signals
from moe_core.wire import EngineKnobs, ExpertKnobs, FallbackKnobs, Overflow
from moe_tuner.measure import Measurement

SLO = SloConfig(ttft_p95_s=0.8, itl_p95_s=0.05)
BOUNDS = KnobBounds(
    capacity_factor_min=Decimal(1), capacity_factor_max=Decimal(2), active_seqs_min=4, active_seqs_max=64
)


def setting(gamma: str | None = None, seqs: int | None = 16, miss: float | None = None) -> Setting:
    overflow = Overflow.UNLIMITED if gamma is None else Overflow.REROUTE
    return Setting(
        experts=ExpertKnobs(overflow=overflow, capacity_factor_prefill=None if gamma is None else Decimal(gamma)),
        engine=EngineKnobs(max_active_seqs=seqs),
        fallback=FallbackKnobs(miss_probability=miss),
    )


def signals(**changes: object) -> Signals:
    """A quiet, balanced deployment: 5 requests a second, far from its objectives."""
    quiet = Signals(
        replicas=1,
        running=6,
        waiting=0,
        active_limit=16,
        active_ceiling=64,
        kv_usage=0.3,
        preemptions_per_s=0.0,
        engine_tokens_per_s=2000.0,
        rank_demand=1.1,
        rank_assigned=1.1,
        lost_gate_mass=0.0,
        dropped_share=0.0,
        arrivals_per_s=5.0,
        completed_per_s=5.0,
        local_per_s=5.0,
        in_flight=6,
        prompt_tokens=300.0,
        output_tokens=60.0,
        ttft_p95_s=0.2,
        itl_p95_s=0.02,
        slo_attained=1.0,
        spill_share=0.0,
        shed_share=0.0,
        can_spill=True,
    )
    return quiet.model_copy(update=changes)


def measured(**changes: object) -> Measurement:
    """A window of steady traffic within every objective."""
    steady = Measurement(
        requests=200,
        requests_per_s=20,
        prompt_tokens=300,
        output_tokens=60,
        busy_s_per_ktoken=0.3,
        ttft_p95_s=0.4,
        itl_p95_s=0.03,
        failed_share=0.0,
        lost_gate_mass=0.0,
    )
    return steady.model_copy(update=changes)


def context(now_s: float, read: Signals, in_force: Setting, **changes: object) -> RetuneContext:
    base = RetuneContext(
        now_s=now_s,
        signals=read,
        setting=in_force,
        slo=SLO,
        bounds=BOUNDS,
        max_lost_gate_mass=0.02,
        changes_per_hour=60,
    )
    return base.model_copy(update=changes)


@dataclass
class Traffic:
    """What arrives in one second."""

    rate: float = 5.0
    prompt: float = 300.0
    output: float = 60.0
    skew: float = 1.1


@dataclass
class Plant:
    """One replica as a queue: capped experts shorten a skewed prefill and cost gate mass, a larger batch slows tokens.

    `prefill_tokens_per_s` holds for balanced ranks; a rank with `skew` times its share slows it by that factor.
    """

    setting: Setting
    prefill_tokens_per_s: float = 6000.0
    itl_base_s: float = 0.012
    itl_per_seq_s: float = 0.0008
    ceiling: int = 64
    seed: int = 1
    queue: float = 0.0
    running: float = 0.0
    recent: list[tuple[float, float, float]] = field(default_factory=list)  # arrivals, finished, TTFT

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def factor(self, skew: float) -> float:
        cap = self.setting.prefill_cap
        return skew if cap is None else min(skew, 1.0 + 0.5 * (float(cap) - 1.0))

    def lost(self, skew: float) -> float:
        cap = self.setting.prefill_cap
        return 0.0 if cap is None else max(0.0, 0.012 * (skew - 1.0) * (2.0 - float(cap)))

    def second(self, traffic: Traffic) -> Signals:
        """Advance by one second and report what the digests would say."""
        limit = self.setting.engine.max_active_seqs or self.ceiling
        arrivals = self._poisson(traffic.rate)
        itl = self.itl_base_s + self.itl_per_seq_s * max(self.running, 1.0)
        prefill_s = traffic.prompt / self.prefill_tokens_per_s * self.factor(traffic.skew)
        residence_s = prefill_s + traffic.output * itl
        served = min(1.0 / prefill_s, limit / residence_s)
        finished = min(self.queue + arrivals, served)
        self.queue = max(0.0, self.queue + arrivals - finished)
        self.running = min(float(limit), finished * residence_s)
        ttft = prefill_s * 1.5 + self.queue / served
        self.recent = [*self.recent, (float(arrivals), finished, ttft)][-10:]
        seconds = len(self.recent)
        return signals(
            running=round(self.running),
            waiting=int(self.queue),
            active_limit=limit,
            active_ceiling=self.ceiling,
            rank_demand=traffic.skew * self.random.uniform(0.98, 1.02),
            rank_assigned=self.factor(traffic.skew),
            lost_gate_mass=self.lost(traffic.skew),
            arrivals_per_s=sum(a for a, _, _ in self.recent) / seconds,
            completed_per_s=sum(f for _, f, _ in self.recent) / seconds,
            local_per_s=sum(f for _, f, _ in self.recent) / seconds,
            prompt_tokens=traffic.prompt * self.random.uniform(0.95, 1.05),
            output_tokens=traffic.output * self.random.uniform(0.95, 1.05),
            ttft_p95_s=max(t for _, _, t in self.recent),
            itl_p95_s=itl,
        )

    def _poisson(self, mean: float) -> int:
        count, left = 0, self.random.expovariate(1.0)
        while left < mean:
            count += 1
            left += self.random.expovariate(1.0)
        return count


@dataclass
class Trace:
    """What a run of the policy did, second by second."""

    decisions: list[tuple[int, RetuneDecision]] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    state: RetuneState = field(default_factory=RetuneState)

    def changes(self, action: Action | None = None) -> list[tuple[int, RetuneDecision]]:
        return [(at, d) for at, d in self.decisions if d.setting is not None and (action is None or d.action is action)]


def run(plant: Plant, traffic: list[Traffic], state: RetuneState | None = None, **changes: object) -> Trace:
    """Let the policy drive the plant; a decision is in force from the next second on."""
    trace = Trace(state=state or RetuneState())
    for now, load in enumerate(traffic):
        read = plant.second(load)
        decision, trace.state = decide(context(float(now), read, plant.setting, **changes), trace.state)
        trace.decisions.append((now, decision))
        if decision.setting is not None:
            plant.setting = decision.setting
        trace.settings.append(plant.setting)
    return trace
