"""The plant of the tuner's benchmark: many deployments at once as fluids in steps of half a second.

The discrete-event simulator is exact and does 20,000 requests a second; the benchmark needs some 10^9. Here each lane
(one seed under one policy) is a row of arrays. What a step of DT_S does, by lane:

* Gateway: the arrivals of the step are decided in up to CHUNKS parts, each by `moe_core.spill.decide` on a ledger that
  has the parts before it. Where P(miss) is surely below any threshold, it is not asked.
* Engine: with n sequences a replica, a decode step takes s = decode + n·active', one with a full chunk of B − n prompt
  tokens s + (B − n)·token'. So at most (B − n)·DT_S/(s + (B − n)·token') prompt tokens are done, in order of arrival,
  within the places that are free (limit − n + ends) and within the KV cache; the rest of the step decodes.
  token' = token·(1 + prefill_share·(max/mean − 1)), active' likewise (`moe_planner.sim.knobs.slowed`).
* Decode: n·m tokens in m steps; a share m/(mean output) of the sequences ends (outputs as if exponential).
* TTFT is the age of the work that is done, with its own prefill and one step; ITL is DT_S/m, smoothed over a
  sequence's life. A request attains the SLO by both, its ITL spread by ITL_SIGMA around the smoothed one.
* Closed APIs: log-normal TTFT; a limit a minute; refusals near it; outages. What one refuses goes to the next, then
  home.

Hidden effects, which no model of the tuner has: drift and stalls of speed; prompts done again where KV is full; RELIEF
and HOOK: capacity relieves less than it should and costs something itself; the price of a moved slot differs by topic;
closed APIs answer slower in a spike. `tuner_replay_validate` holds the plant to the simulator without them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

import numpy as np

from benchmarks.tuner_replay_days import DT_S, UNCAPPED, WINDOW_S, Day, Floats, Ints, Truth
from moe_core.forecast import EngineReport, RevisionView, SpillContext, TargetView, Thresholds
from moe_core.latency import SHIFT_S, Ended, First, LatencyEstimate, Look, learned
from moe_core.spill import Action, SpillState, decide
from moe_core.steps import RATE_S, predict_itl_s
from moe_planner.sim.gateway import API_PRIOR
from moe_planner.sim.world import BURST_SHARE, World

BINS = 12
"""Steps of age that the queue tells apart; what is older has missed."""
CHUNKS, CHUNK_S = 6, 0.2
CERTAIN = 2.3
"""Standard deviations: beyond them P(miss) of TTFT and of ITL is 1 % each: below any threshold."""
ITL_SIGMA = 0.12
RELIEF, HOOK = 0.93, 0.005
KV_FULL, KV_WASTE = 0.95, 0.8
SLOW_IN_SPIKE = 1.5
WARM_TTFT = 12
SLOW_NEAR, LEARN_MOST = 0.7, 6
TTFT_EDGES: Floats = np.geomspace(0.02, 20.0, 64)
_SQRT2 = math.sqrt(2.0)


@dataclass(frozen=True, eq=False)
class Lanes:
    """Which day and truth each lane has."""

    day: Ints
    days: tuple[Day, ...]
    truths: tuple[Truth, ...]

    def __len__(self) -> int:
        return len(self.day)


class Gate:
    """The gateway of one lane: what it has learned, and its policy's state."""

    __slots__ = ("base", "estimate", "foreseen_s", "p_slow", "seen_s", "slope", "state", "sure_itl_s", "widen")

    def __init__(self) -> None:
        self.estimate, self.state = LatencyEstimate(), SpillState()
        self.seen_s, self.p_slow, self.foreseen_s = -math.inf, 0.0, 0.0
        self.base, self.slope, self.widen, self.sure_itl_s = math.inf, 1.0, 1.0, math.inf

    def learned(self, estimate: LatencyEstimate, running: float, rate: float, now_s: float) -> None:
        """`running`, `rate`: sequences and prompt tokens a second, of a replica."""
        self.estimate, self.seen_s = estimate, now_s
        base, slope = estimate.line
        self.base, self.slope = base, slope + estimate.crowd_s * running / 100.0
        self.widen = math.exp(CERTAIN * estimate.sigma)
        steps = estimate.steps
        foreseen = predict_itl_s(steps, 1.1 * running, 1.5 * rate) if steps.weight > 0 else 0.0
        self.sure_itl_s = foreseen * math.exp(CERTAIN * steps.sigma)


class Plant:
    """State of all lanes. `gamma` is an index into GAMMAS (UNCAPPED: none), `limit` sequences a replica, `miss` the
    spill threshold."""

    def __init__(self, world: World, lanes: Lanes, *, clairvoyant: bool = False) -> None:
        self.world, self.lanes, self.clairvoyant = world, lanes, clairvoyant
        size = len(lanes)
        engine, day = world.engine, lanes.day
        truths = lanes.truths

        def of(name: str) -> Floats:
            return np.array([getattr(truths[d], name) for d in day.tolist()])

        self.token_s = engine.prefill_token_s * of("prefill")
        self.decode_s = (engine.launch_s + engine.decode_s) * of("decode")
        self.active_s = engine.active_s * of("active")
        self.full_s = self.decode_s + engine.max_active * self.active_s
        self.kv = engine.kv_tokens * of("kv") * world.replicas
        experts = world.experts
        self.prefill_share = of("prefill_share") * (experts.prefill_share if experts else 0.0)
        self.decode_share = of("decode_share") * (experts.decode_share if experts else 0.0)
        self.api_ttft = of("api_ttft")
        self.hidden = np.array([truths[d].hidden for d in day.tolist()])
        days = lanes.days
        self.count = np.stack([d.count for d in days])[day].T.copy()
        self.prompt = np.stack([d.prompt for d in days])[day].T.copy()
        self.output = np.stack([d.output for d in days])[day].T.copy()
        self.up = np.stack([d.up for d in days])[day].T.copy()
        self.speed = np.stack([d.speed for d in days])[day].T.copy()
        self.api_up = np.stack([d.api_up for d in days])[day]
        self.spike = np.stack([d.spike for d in days])[day]
        api = world.apis[0] if world.apis else None
        self.usd_in = api.usd_per_m_input / 1e6 if api else 5e-6
        self.usd_out = api.usd_per_m_output / 1e6 if api else 3e-5
        self.gamma = np.full(size, UNCAPPED)
        self.limit = np.full(size, float(engine.max_active))
        self.miss = np.full(size, world.thresholds.miss_probability)
        self.gates = [Gate() for _ in range(size)]
        self.step_at = 0
        # The queue, by age in steps: tokens, requests, their outputs, dollars they are worth, and what was forecast.
        self.tokens, self.waiting, self.outs = (np.zeros((size, BINS)) for _ in range(3))
        self.worth, self.work_at, self.run_at, self.slot_at = (np.zeros((size, BINS)) for _ in range(4))
        self.n, self.n_out, self.n_in = np.zeros(size), np.zeros(size), np.zeros(size)
        self.itl, self.itl_life, self.mixed_tokens = self.decode_s.copy(), self.decode_s.copy(), np.zeros(size)
        self.sent = np.zeros((len(world.apis), size))  # requests of the last minute, decayed
        self.usd = np.zeros(size)
        self.busy_s, self.rate, self.prompt_rate = np.zeros(size), np.zeros(size), np.zeros(size)
        self.windows = {
            name: np.zeros((size, self.spike.shape[1]))
            for name in (
                "arrivals",
                "attained",
                "missed_usd",
                "usd",
                "spilled",
                "shed",
                "lost",
                "ttft",
                "itl",
                "asked_usd",
            )
        }
        self.second = {
            name: np.zeros(size) for name in ("arrivals", "first", "ended", "spilled", "shed", "prompt", "output")
        }
        self.ttft_seen = np.zeros((size, len(TTFT_EDGES) + 1))
        self._load()

    def _load(self) -> None:
        """Speeds by lane under the knobs and the expert load of this second."""
        second = min(int(self.step_at * DT_S), int(len(self.count) * DT_S) - 1)
        days, day = self.lanes.days, self.lanes.day
        spell = np.array([d.spell[second] for d in days])
        demand = np.array([d.demand[s] for d, s in zip(days, spell, strict=True)])[day]
        table = np.stack([d.assigned[s] for d, s in zip(days, spell, strict=True)])
        lost = np.stack([d.lost[s] for d, s in zip(days, spell, strict=True)])
        self.demand, self.cv = demand, np.array([d.cv[s] for d, s in zip(days, spell, strict=True)])[day]
        capped = self.gamma < UNCAPPED
        assigned = table[day, self.gamma]
        self.assigned = np.where(capped & self.hidden, demand - RELIEF * (demand - assigned), assigned)
        self.lost = lost[day, self.gamma]
        hook = np.where(capped & self.hidden, 1.0 + HOOK, 1.0)
        self.token_now = self.token_s * hook * (1.0 + self.prefill_share * (self.assigned - 1.0))
        most = self.world.engine.max_active
        self.active_now = self.active_s + self.decode_share * self.full_s / most * (demand - 1.0)

    def copied(self, rows: Ints) -> Plant:
        """The lanes `rows` (with repeats) as a plant of its own, from now on."""
        twin = copy.copy(self)
        size = len(self.lanes)
        twin.lanes = Lanes(self.lanes.day[rows], self.lanes.days, self.lanes.truths)
        for name, value in vars(self).items():
            if not isinstance(value, np.ndarray):
                continue
            if name in ("count", "prompt", "output", "up", "speed"):
                setattr(twin, name, value[:, rows])
            elif name == "sent":
                twin.sent = value[:, rows].copy()
            elif value.shape[:1] == (size,):
                setattr(twin, name, value[rows].copy())
        twin.windows = {name: value[rows].copy() for name, value in self.windows.items()}
        twin.second = {name: value[rows].copy() for name, value in self.second.items()}
        twin.gates = []
        for row in rows.tolist():
            gate, old = Gate(), self.gates[row]
            for slot in Gate.__slots__:
                setattr(gate, slot, getattr(old, slot))
            twin.gates.append(gate)
        return twin

    @property
    def now_s(self) -> float:
        return self.step_at * DT_S

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            if self.step_at * DT_S % 1.0 == 0.0:
                self._load()
            self._step()

    def _step(self) -> None:  # noqa: PLR0915 - one step of physics, read from top to bottom
        at = self.step_at
        count, prompt, output = self.count[at], self.prompt[at], self.output[at]
        replicas = self.up[at] * self.world.replicas
        window = int(at * DT_S / WINDOW_S)
        self._age()
        worth = prompt * self.usd_in + output * self.usd_out
        # What the engine can do in this step, before what arrives in it.
        budget = self.world.engine.max_batched_tokens
        alive = replicas > 0.01
        r = np.maximum(replicas, 0.01)
        n = self.n / r
        factor = self.speed[at]
        moving = alive & np.isfinite(factor)
        f = np.where(np.isfinite(factor), factor, 1.0)
        pure = (self.decode_s + n * self.active_now) * f
        chunk = np.maximum(budget - n, 32.0)
        mixed = pure + chunk * self.token_now * f
        per_s = np.where(alive, chunk / mixed * r, 1e-6)  # prompt tokens a second, all replicas
        limit = self.limit * r
        local = self._decided(at, count, prompt, output, worth, per_s, limit, window)
        # The queue takes what stays.
        self.tokens[:, 0] += local * prompt
        self.waiting[:, 0] += local * count
        self.outs[:, 0] += local * output
        self.worth[:, 0] += local * worth
        done = np.minimum(per_s * DT_S, self.tokens.sum(axis=1))
        done *= moving
        mean_out = np.maximum(1.0, self.n_out / np.maximum(self.n, 1e-9))
        ends = np.where(self.n > 0, np.minimum(self.n, self.n * DT_S / pure / mean_out), 0.0) * moving
        used = self.n_in + 0.7 * self.n_out
        each = np.maximum(1.0, used / np.maximum(self.n, 1e-9))
        room = np.minimum(limit - self.n + ends, np.maximum(0.0, 0.98 * self.kv * self.up[at] - used) / each + ends)
        room = np.maximum(room, 0.0)
        full = self.hidden & (used > KV_FULL * self.kv * self.up[at])
        done = np.where(full, KV_WASTE * done, done)
        share = self._served(done, room)
        first = share * self.waiting
        took_tokens = (share * self.tokens).sum(axis=1)
        took, took_out = first.sum(axis=1), (share * self.outs).sum(axis=1)
        # Time of the step: with prompts, then without.
        mixing = np.minimum(DT_S, took_tokens / r / chunk * mixed)
        steps = mixing / mixed + np.where(self.n > 0, (DT_S - mixing) / pure, 0.0)
        self.itl = np.where(moving & (self.n > 0.05), DT_S / np.maximum(steps, 1e-9), self.itl)
        self.itl = np.where(moving | (self.n <= 0.05), self.itl, np.minimum(2.0, self.itl + DT_S))
        self.busy_s += np.where(self.n + took > 0.05, DT_S, 0.0)
        life = np.maximum(1.0, mean_out * self.itl)
        self.itl_life += np.minimum(1.0, DT_S / life) * (self.itl - self.itl_life)
        ends = np.where(moving, np.minimum(self.n, self.n * steps / mean_out), 0.0)
        gone = np.where(alive, 0.0, self.n)  # the last replica died: what decoded is cut
        kept = 1.0 - (ends + gone) / np.maximum(self.n, 1e-9)
        ended_out = ends * mean_out
        self.n, self.n_out, self.n_in = (
            self.n * kept + took,
            self.n_out * kept + took_out,
            self.n_in * kept + took_tokens,
        )
        self._count(window, first, share, took_tokens, took, mixed, chunk)
        self.tokens *= 1.0 - share
        self.waiting *= 1.0 - share
        self.outs *= 1.0 - share
        self.worth *= 1.0 - share
        self.rate += 0.05 * (took / DT_S - self.rate)
        self.prompt_rate = self.prompt_rate * math.exp(-DT_S / RATE_S) + took_tokens / RATE_S
        self.mixed_tokens = took_tokens / r / DT_S * self.itl
        self.second["first"] += took
        self.second["ended"] += ends
        self.second["prompt"] += took_tokens
        self.second["output"] += ended_out
        self._learn(at, share, first)
        self.windows["lost"][:, window] += self.lost * DT_S / WINDOW_S
        self.windows["itl"][:, window] = np.maximum(self.windows["itl"][:, window], self.itl_life)
        self.step_at = at + 1

    def _age(self) -> None:
        for name in ("tokens", "waiting", "outs", "worth"):
            queue = getattr(self, name)
            queue[:, -1] += queue[:, -2]
            queue[:, 1:-1] = queue[:, :-2].copy()
            queue[:, 0] = 0.0
        for name in ("work_at", "run_at", "slot_at"):
            queue = getattr(self, name)
            queue[:, 1:] = queue[:, :-1].copy()

    def _served(self, done: Floats, room: Floats) -> Floats:
        """Share of each age that is done now: oldest first, within tokens and places."""
        shares = []
        for queue, most in ((self.tokens, done), (self.waiting, room)):
            upto = np.cumsum(queue[:, ::-1], axis=1)[:, ::-1]
            after = upto - queue
            shares.append(np.clip((most[:, None] - after) / np.maximum(queue, 1e-9), 0.0, 1.0))
        share: Floats = np.where(self.waiting > 1e-9, np.minimum(shares[0], shares[1]), 0.0)
        return share

    def _count(
        self, window: int, first: Floats, share: Floats, tokens: Floats, took: Floats, mixed: Floats, chunk: Floats
    ) -> None:
        slo = self.world.slo
        own = tokens / np.maximum(took, 1e-9) / chunk * mixed
        age = np.arange(BINS) * DT_S
        ttft = age[None, :] + (own + 0.7 * mixed + self.world.engine.overhead_s)[:, None]
        intime = np.clip((slo.ttft_s - ttft) / DT_S + 0.5, 0.0, 1.0)
        z = np.log(slo.itl_s / np.maximum(self.itl_life, 1e-6)) / ITL_SIGMA
        smooth = 1.0 / (1.0 + np.exp(-1.702 * np.clip(z, -8, 8)))
        good = (first * intime).sum(axis=1) * smooth
        # Requests that a window has from before it began count where they arrived.
        width = int(WINDOW_S / DT_S)
        inside = self.step_at % width
        rows = self.windows
        now = first * intime * smooth[:, None]
        if inside + 1 < BINS and window:
            early = now[:, inside + 1 :].sum(axis=1)
            rows["attained"][:, window - 1] += early
            good = good - early
        rows["attained"][:, window] += good
        lost_usd = share * self.worth * (1.0 - intime * smooth[:, None])
        rows["missed_usd"][:, window] += lost_usd.sum(axis=1)
        index = np.searchsorted(TTFT_EDGES, ttft)
        size = len(ttft)
        flat = (np.arange(size)[:, None] * (len(TTFT_EDGES) + 1) + index).ravel()
        self.ttft_seen += np.bincount(flat, weights=first.ravel(), minlength=self.ttft_seen.size).reshape(size, -1)

    # The gateway

    def _decided(
        self,
        at: int,
        count: Floats,
        prompt: Floats,
        output: Floats,
        worth: Floats,
        per_s: Floats,
        limit: Floats,
        window: int,
    ) -> Floats:
        """Share of the arrivals that each lane serves itself; books the rest."""
        waiting_tokens, waiting = self.tokens.sum(axis=1), self.waiting.sum(axis=1)
        local = np.ones(len(count))
        shed = np.zeros(len(count))
        self.windows["arrivals"][:, window] += count
        self.windows["asked_usd"][:, window] += worth
        self.second["arrivals"] += count
        alive = np.maximum(1.0, np.round(self.up[at] * self.world.replicas))
        self.work_at[:, 0] = (waiting_tokens + prompt) / alive
        self.run_at[:, 0] = self.n / alive
        self.slot_at[:, 0] = 0.0
        if self.clairvoyant:
            slo = self.world.slo
            keep = np.maximum(0.0, (slo.ttft_s - 1.5 * DT_S - 0.05) * per_s - waiting_tokens)
            places = np.maximum(
                0.0, limit - self.n - waiting + (slo.ttft_s / 2) * self.n / np.maximum(1e-3, self._life())
            )
            local = np.minimum(1.0, np.minimum(keep / np.maximum(prompt, 1e-9), places / np.maximum(count, 1e-9)))
            local = np.where(self.itl > 0.97 * slo.itl_s, np.minimum(local, 0.7), local)
        else:
            base = np.array([gate.base for gate in self.gates])
            slope = np.array([gate.slope for gate in self.gates])
            widen = np.array([gate.widen for gate in self.gates])
            sure_itl = np.array([gate.sure_itl_s for gate in self.gates])
            slo = self.world.slo
            sure = (
                ((base + slope * self.work_at[:, 0] + SHIFT_S) * widen < slo.ttft_s + SHIFT_S)
                & (sure_itl < slo.itl_s)
                & (self.n + waiting + count < 0.95 * limit)
                & (self.up[at] > 0.01)
            )
            for lane in np.flatnonzero((count > 0) & ~sure).tolist():
                local[lane], shed[lane] = self._ask(
                    lane, at, count, prompt, waiting_tokens[lane], waiting[lane], per_s[lane]
                )
            for lane in np.flatnonzero(sure).tolist():
                gate = self.gates[lane]
                if gate.state.spilling:
                    gate.state = SpillState(gate.state.credits, frozenset(), 0.0, 0.0, self.now_s)
        away = np.maximum(0.0, 1.0 - local - shed)
        if away.any():
            local = local + self._closed(at, away, count, prompt, output, worth, window)
        rows = self.windows
        rows["shed"][:, window] += shed * count
        rows["missed_usd"][:, window] += shed * worth
        self.second["shed"] += shed * count
        return local

    def _life(self) -> Floats:
        life: Floats = np.maximum(1e-3, self.n_out / np.maximum(self.n, 1e-9) * self.itl)
        return life

    def _ask(
        self, lane: int, at: int, count: Floats, prompt: Floats, tokens: float, waiting: float, per_s: float
    ) -> tuple[float, float]:
        """(share served here, share refused) by production's own `spill.decide`, in parts."""
        world, gate, now = self.world, self.gates[lane], self.now_s
        arriving, work = float(count[lane]), float(prompt[lane])
        parts = int(min(CHUNKS, max(1.0, min(arriving, math.ceil(work / max(1e-6, per_s) / CHUNK_S)))))
        available = [bool(self.api_up[lane, i, max(0, at - 2)]) for i in range(len(world.apis))]
        targets = tuple(
            TargetView(api.name, up, Decimal(0), API_PRIOR) for api, up in zip(world.apis, available, strict=True)
        )
        thresholds = Thresholds(float(self.miss[lane]), 1.0)
        running, each = float(self.n[lane]), work / arriving
        replicas = max(1, round(float(self.up[at, lane]) * world.replicas))
        # A report is a second old; the queue beyond the ledger is nobody's.
        kv = min(1.0, float((self.n_in[lane] + 0.7 * self.n_out[lane]) / max(1.0, self.kv[lane] * self.up[at, lane])))
        limit = int(self.limit[lane] * replicas)
        report = EngineReport(
            int(running), int(waiting), kv, limit, 1.0, 0, 0, replicas, world.engine.max_batched_tokens
        )
        here = refused = 0.0
        for _ in range(parts):
            view = RevisionView(
                "local",
                100,
                self.up[at, lane] > 0.01,
                int(waiting + here * arriving),
                tokens + here * work,
                int(running),
                report,
                gate.estimate,
            )
            context = SpillContext(
                now, each, world.slo.ttft_s, thresholds, (view,), targets, Decimal(10**6), itl_slo_s=world.slo.itl_s
            )
            decision, gate.state = decide(context, gate.state)
            if decision.action is Action.SHED:
                refused += 1.0 / parts
            elif decision.action is not Action.SPILL:
                here += 1.0 / parts
                if decision.forecast is not None:
                    gate.p_slow, gate.foreseen_s = decision.forecast.p_slow, decision.forecast.itl_s
                    self.work_at[lane, 0] = decision.forecast.work_tokens
                    self.slot_at[lane, 0] = decision.forecast.slot_wait_s
        return here, refused

    def _closed(
        self,
        at: int,
        away: Floats,
        count: Floats,
        prompt: Floats,
        output: Floats,
        worth: Floats,
        window: int,
    ) -> Floats:
        """Send a share to closed APIs; answers the share that none took, which is served at home."""
        left = away.copy()
        self.sent *= math.exp(-DT_S / 60.0)
        slo, rows = self.world.slo, self.windows
        burst = np.where(self.hidden & self.spike[:, window], SLOW_IN_SPIKE, 1.0)
        for index, api in enumerate(self.world.apis):
            taken = left * self.api_up[:, index, at]
            busy = self.sent[index] >= BURST_SHARE * api.requests_per_minute
            taken = np.where(busy, taken * (1.0 - api.p_429_in_burst), taken)
            free = np.maximum(0.0, api.requests_per_minute - self.sent[index])
            taken = np.minimum(taken, free / np.maximum(count, 1e-9))
            self.sent[index] += taken * count
            cost = taken * (prompt * api.usd_per_m_input + output * api.usd_per_m_output) / 1e6
            z = (math.log(slo.ttft_s) - np.log(api.ttft_median_s * self.api_ttft * burst)) / max(api.sigma, 1e-3)
            p = 1.0 / (1.0 + np.exp(-1.702 * z))
            rows["usd"][:, window] += cost
            rows["spilled"][:, window] += taken * count
            rows["attained"][:, window] += taken * count * p
            rows["missed_usd"][:, window] += taken * worth * (1.0 - p)
            self.second["spilled"] += taken * count
            self.second["output"] += taken * output
            self.second["prompt"] += taken * prompt
            left = left - taken
        return left

    def _learn(self, at: int, share: Floats, first: Floats) -> None:
        """Let each gate learn from one request: each step where there is a queue, else every few seconds."""
        if self.clairvoyant:
            return
        now = self.now_s + DT_S
        queued = self.waiting[:, 1] > 0.5
        for lane in np.flatnonzero(first.sum(axis=1) > 0.05).tolist():
            gate = self.gates[lane]
            if now - gate.seen_s < (0.5 if gate.estimate.weight < WARM_TTFT or queued[lane] else 3.0):
                continue
            whole = np.flatnonzero((first[lane] > 0.02) & (share[lane] > 0.99))
            if not len(whole):
                continue
            place = int(whole[0])
            n = float(self.n[lane])
            r = max(0.01, float(self.up[at, lane]) * self.world.replicas)
            per = n / r
            f = float(self.speed[at, lane])
            f = f if math.isfinite(f) else 1.0
            pure = (float(self.decode_s[lane]) + per * float(self.active_now[lane])) * f
            chunk = max(32.0, self.world.engine.max_batched_tokens - per)
            mixed = pure + chunk * float(self.token_now[lane]) * f
            mean = float(self.prompt[max(0, at - place), lane] / max(1.0, self.count[max(0, at - place), lane]))
            running = float(self.run_at[lane, place])
            work = float(self.work_at[lane, place]) or mean
            ttft = place * DT_S + mean / chunk * mixed + 0.7 * mixed
            if place in (0, BINS - 1):  # the queue does not tell ages within a step, or beyond its last bin
                ttft = max(BINS * DT_S if place else 0.0, work / chunk * mixed + 0.7 * mixed)
            seen = First(work, mean, float(self.slot_at[lane, place]), ttft, running)
            rate = float(self.prompt_rate[lane])
            # One of many first tokens is shown; the rate is what all of them together would have told.
            estimate = replace(learned(gate.estimate, seen, now, self.world.slo.itl_s), prompt_rate=rate)
            if per >= 1.0:
                look = Look(float(self.itl[lane]), per, float(self.mixed_tokens[lane]))
                estimate = learned(estimate, look, now, self.world.slo.itl_s)
            if self.n[lane] > 0.5:
                itl = float(self.itl_life[lane])
                mean_out = int(max(2.0, self.n_out[lane] / self.n[lane]))
                ended = Ended(itl, mean_out, gate.foreseen_s, gate.p_slow)
                # Production learns from every end. Where it matters, so do we, up to a bound.
                times = (
                    round(self.rate[lane] * min(1.0, now - gate.seen_s))
                    if itl > SLOW_NEAR * self.world.slo.itl_s
                    else 1
                )
                for _ in range(max(1, min(LEARN_MOST, times))):
                    estimate = learned(estimate, ended, now, self.world.slo.itl_s)
            gate.learned(estimate, per, rate / r, now)

    # What is counted

    def reset_second(self) -> None:
        for value in self.second.values():
            value[:] = 0.0
        self.ttft_seen[:] = 0.0


def percentile(histogram: Sequence[float] | Floats, q: float) -> float | None:
    """Of a TTFT histogram over TTFT_EDGES, in seconds; None where it is empty."""
    counts = np.asarray(histogram)
    total = counts.sum()
    if total <= 0:
        return None
    place = int(np.searchsorted(np.cumsum(counts), q * total))
    edges = np.concatenate([[TTFT_EDGES[0] / 2], TTFT_EDGES, [2 * TTFT_EDGES[-1]]])
    return float(math.sqrt(edges[min(place, len(edges) - 2)] * edges[min(place + 1, len(edges) - 1)]))
