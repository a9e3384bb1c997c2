"""Who moves the knobs in the tuner's benchmark: production's fast loop, and what it is held against.

Every learner has the same budget: two days of trials, as many changes as production's limit allows an hour. A trial is
judged by what it cost live; nobody is shown the plant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from benchmarks.tuner_replay_days import DT_S, GAMMAS, UNCAPPED, WINDOW_S, Ints
from benchmarks.tuner_replay_plant import Plant, percentile
from moe_core.config import KnobBounds, SloConfig
from moe_core.retune import decide
from moe_core.retune_state import Action, RetuneContext, RetuneState
from moe_core.setting import Setting, Signals
from moe_core.wire import EngineKnobs, ExpertKnobs, FallbackKnobs, Overflow
from moe_planner.sim.world import World

CHANGES_PER_HOUR = 60
TRIAL_S = 120.0
"""Of a black-box trial: 60 changes an hour would allow one a minute; two make it twice as sure."""
ACTUATION_S = 2
REPORT_S = 1
"""Digests are this old when they are read."""
GAP_PER_S, GAP_S = 0.004, (2, 9)
WINDOW = 10
MISS_WORTH = 3.0
"""A missed request costs this many times what the closed API would have taken for it."""


@dataclass(frozen=True)
class Knobs:
    """One setting as the plant has it: γ as an index (UNCAPPED: none), sequences a replica, spill threshold."""

    gamma: int
    limit: float
    miss: float


def put(plant: Plant, lane: int, knobs: Knobs) -> None:
    plant.gamma[lane], plant.limit[lane], plant.miss[lane] = knobs.gamma, knobs.limit, knobs.miss


def default_of(world: World) -> Knobs:
    """The static default: uncapped, the launch-time ceiling, the resource's own threshold."""
    return Knobs(UNCAPPED, float(world.engine.max_active), world.thresholds.miss_probability)


def cost(plant: Plant, lanes: Ints, first: int, last: int, max_lost: float) -> tuple[Any, Any]:
    """(dollars to closed APIs and for misses, dollars that all requests would cost there) in windows [first, last).

    In a window that loses more gate mass than quality allows, every request that the pool served is a miss.
    """
    part = {name: value[lanes, first:last] for name, value in plant.windows.items()}
    broken = part["lost"] > max_lost
    missed = np.where(broken, np.maximum(part["missed_usd"], part["asked_usd"] - part["usd"]), part["missed_usd"])
    return (part["usd"] + MISS_WORTH * missed).sum(axis=1), part["asked_usd"].sum(axis=1)


# Production's fast loop.


@dataclass
class Fast:
    """The fast loop over some lanes: what it reads (late, noisy, with gaps), and what it has in force."""

    world: World
    lanes: list[int]
    seeds: list[int]
    max_lost: float
    states: list[RetuneState] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    changes: list[list[tuple[float, str, str]]] = field(default_factory=list)
    clock_s: float = 0.0

    def __post_init__(self) -> None:
        engine, count = self.world.engine, len(self.lanes)
        self.home = Setting(
            experts=ExpertKnobs(overflow=Overflow.UNLIMITED),
            engine=EngineKnobs(),
            fallback=FallbackKnobs(miss_probability=self.world.thresholds.miss_probability),
        )
        self.slo = SloConfig(ttft_p95_s=self.world.slo.ttft_s, itl_p95_s=self.world.slo.itl_s)
        self.bounds = KnobBounds(
            capacity_factor_min=Decimal(1),
            capacity_factor_max=Decimal(4),
            active_seqs_min=max(1, engine.max_active // 8),
            active_seqs_max=engine.max_active,
        )
        self.states = self.states or [RetuneState() for _ in range(count)]
        self.settings = [self.home] * count
        self.changes = [[] for _ in range(count)]
        self.rngs = [np.random.default_rng([seed, 23]) for seed in self.seeds]
        self.new_day()

    def new_day(self) -> None:
        count = len(self.lanes)
        self._rows: list[list[dict[str, float]]] = [[] for _ in range(count)]
        self._ttft: list[list[Any]] = [[] for _ in range(count)]
        self._read: list[list[Signals]] = [[] for _ in range(count)]
        self._pending: list[tuple[int, Knobs] | None] = [None] * count
        self._gap = [[0, 0] for _ in range(count)]

    def second(self, plant: Plant, now: int) -> None:
        """One tick, after the plant has run this second."""
        for place, lane in enumerate(self.lanes):
            pending = self._pending[place]
            if pending is not None and now >= pending[0]:
                put(plant, lane, pending[1])
                self._pending[place] = None
            self._read[place].append(self._signals(plant, place, lane))
            if len(self._read[place]) <= REPORT_S:
                continue
            signals = self._read[place].pop(0)
            context = RetuneContext.model_construct(
                now_s=self.clock_s + now,
                signals=signals,
                setting=self.settings[place],
                slo=self.slo,
                bounds=self.bounds,
                max_lost_gate_mass=self.max_lost,
                changes_per_hour=CHANGES_PER_HOUR,
                mode="Auto",
                paused=False,
                trial=False,
            )
            decision, self.states[place] = decide(context, self.states[place])
            if decision.setting is not None:
                self.settings[place] = decision.setting
                self._pending[place] = (now + ACTUATION_S, self._knobs(decision.setting))
                self.changes[place].append((self.clock_s + now, decision.action.value, decision.reason))

    def _knobs(self, setting: Setting) -> Knobs:
        cap, miss = setting.prefill_cap, setting.fallback.miss_probability
        gamma = UNCAPPED if cap is None else min(UNCAPPED - 1, max(0, round((float(cap) - GAMMAS[0]) / 0.05)))
        limit = setting.engine.max_active_seqs or self.world.engine.max_active
        own = self.world.thresholds.miss_probability
        return Knobs(gamma, float(limit), own if miss is None else miss)

    def _signals(self, plant: Plant, place: int, lane: int) -> Signals:
        rng, rows = self.rngs[place], self._rows[place]
        rows.append(
            {name: float(value[lane]) for name, value in plant.second.items()} | {"itl": float(plant.itl[lane])}
        )
        self._ttft[place].append(plant.ttft_seen[lane].copy())
        del rows[:-WINDOW], self._ttft[place][:-WINDOW]
        seconds = float(len(rows))

        def total(name: str) -> float:
            return sum(row[name] for row in rows)

        step = plant.step_at - 1
        replicas = round(float(plant.up[step, lane]) * self.world.replicas)
        done = total("first") + total("spilled")
        noise = rng.standard_normal(4)
        board, gateway = self._gaps(place)
        values: dict[str, Any] = {"lag_s": 6.0, "window_s": seconds, "can_spill": bool(self.world.apis)}
        missing: list[str] = []
        if board:
            missing.append("board")
        else:
            demand = 1.0 + (float(plant.demand[lane]) - 1.0) * float(np.exp(0.1 * noise[0]))
            used = float(plant.n_in[lane] + 0.7 * plant.n_out[lane])
            values |= {
                "replicas": replicas,
                "running": round(float(plant.n[lane])),
                "waiting": round(float(plant.waiting[lane].sum())),
                "active_limit": int(plant.limit[lane]),
                "active_ceiling": self.world.engine.max_active,
                "kv_usage": min(1.0, used / max(1.0, float(plant.kv[lane] * plant.up[step, lane]))),
                "preemptions_per_s": 0.0,
                "rank_demand": demand if self.world.experts else None,
                "rank_assigned": float(plant.assigned[lane]),
                "expert_cv": float(plant.cv[lane]) * float(np.exp(0.05 * noise[1])) if self.world.experts else None,
                "lost_gate_mass": float(plant.lost[lane]) * float(np.exp(0.1 * noise[2])),
            }
        if gateway:
            missing.append("gateway")
        else:
            itls = sorted(row["itl"] for row in rows)
            arrivals = total("arrivals")
            values |= {
                "arrivals_per_s": arrivals / seconds,
                "completed_per_s": (total("ended") + total("spilled")) / seconds,
                "local_per_s": total("ended") / seconds,
                "prompt_tokens": total("prompt") / done if done > 1 else None,
                "output_tokens": total("output") / done if done > 1 else None,
                "ttft_p95_s": percentile(sum(self._ttft[place]), 0.95),
                "itl_p95_s": itls[int(0.95 * (len(itls) - 1))] * float(np.exp(0.03 * noise[3])),
                "spill_share": min(1.0, total("spilled") / arrivals) if arrivals else None,
                "shed_share": min(1.0, total("shed") / arrivals) if arrivals else None,
                "api_failing": bool(self.world.apis) and not bool(plant.api_up[lane, :, step].any()),
            }
        return Signals.model_construct(**values, missing=tuple(missing))

    def _gaps(self, place: int) -> tuple[bool, bool]:
        gaps, rng = self._gap[place], self.rngs[place]
        for source in (0, 1):
            if gaps[source] > 0:
                gaps[source] -= 1
            elif rng.random() < GAP_PER_S:
                gaps[source] = int(rng.integers(*GAP_S))
        return gaps[0] > 0, gaps[1] > 0


def undone(changes: list[tuple[float, str, str]]) -> int:
    return sum(1 for _, action, _ in changes if action == Action.UNDO.value)


# Black-box learners.

Propose = Callable[[], Knobs]


class Blackbox:
    """A learner of one lane: proposes a setting for each trial, is told its cost, and has a best one at the end."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, np.random.default_rng([seed, 29])
        self.best, self.best_cost = default_of(world), np.inf
        self.asked: Knobs = self.best

    def random(self) -> Knobs:
        top = self.world.engine.max_active
        gamma = UNCAPPED if self.rng.random() < 0.25 else int(self.rng.integers(UNCAPPED))
        return Knobs(gamma, float(self.rng.integers(top // 8, top + 1)), float(self.rng.uniform(0.05, 0.95)))

    def ask(self) -> Knobs:
        self.asked = self.random()
        return self.asked

    def tell(self, value: float) -> None:
        if value < self.best_cost:
            self.best, self.best_cost = self.asked, value


class HillClimb(Blackbox):
    """Steps from the best setting so far; its own cost is measured anew now and then, or a lucky one would stay."""

    def ask(self) -> Knobs:
        top, best = self.world.engine.max_active, self.best
        if self.best_cost == np.inf or self.rng.random() < 0.2:
            self.asked = best
            return best
        gamma, limit, miss = best.gamma, best.limit, best.miss
        match int(self.rng.integers(3)):
            case 0:
                gamma = int(np.clip(gamma + self.rng.choice([-8, -4, 4, 8]), 0, UNCAPPED))
            case 1:
                limit = float(np.clip(round(limit * self.rng.choice([0.8, 1.25])), top // 8, top))
            case _:
                miss = float(np.clip(miss + self.rng.choice([-0.15, 0.15]), 0.05, 0.95))
        self.asked = Knobs(gamma, limit, miss)
        return self.asked

    def tell(self, value: float) -> None:
        if self.asked == self.best:
            known = self.best_cost
            self.best_cost = value if known == np.inf else 0.5 * (known + value)
        else:
            super().tell(value)


class Tpe(Blackbox):
    """Optuna's default sampler, unguarded: it tries what it likes, live."""

    def __init__(self, world: World, seed: int) -> None:
        super().__init__(world, seed)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self.trial: Any = None

    def ask(self) -> Knobs:
        top = self.world.engine.max_active
        self.trial = self.study.ask()
        self.asked = Knobs(
            self.trial.suggest_int("gamma", 0, UNCAPPED),
            float(self.trial.suggest_int("limit", top // 8, top)),
            self.trial.suggest_float("miss", 0.05, 0.95),
        )
        return self.asked

    def tell(self, value: float) -> None:
        self.study.tell(self.trial, value)
        super().tell(value)


def trial_cost(plant: Plant, lane: int, until_step: int, max_lost: float) -> float | None:
    """Cost share of the trial that ends now, its first window left out; None without traffic."""
    last = int(until_step * DT_S / WINDOW_S)
    paid, asked = cost(plant, np.array([lane]), last - int(TRIAL_S / WINDOW_S) + 1, last, max_lost)
    return float(paid[0] / asked[0]) if asked[0] > 0 else None
