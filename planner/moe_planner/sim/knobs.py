"""What acts on replicas and gateways from outside the requests: reports, drifting expert load, a control's knobs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_core.forecast import Thresholds
from moe_core.latency import Look
from moe_core.setting import Setting
from moe_planner.sim.engine import Engine
from moe_planner.sim.experts import Balance, ExpertLoad, Experts, load_over_time
from moe_planner.sim.policy import Control, ControlContext
from moe_planner.sim.replica import Replica
from moe_planner.sim.signals import observe
from moe_planner.sim.world import LOCAL

if TYPE_CHECKING:
    from moe_planner.sim.simulate import Run

EVEN = Balance(1.0, 1.0, 1.0, 0.0)


class Knobs:
    """Knobs in force, and the expert load that they meet."""

    def __init__(self, run: Run, seed: int) -> None:
        self._run = run
        world, policy = run.world, run.policy
        self.setting, self.thresholds = policy.setting, world.thresholds
        self.moved: list[tuple[float, str]] = []
        """(time in force, knobs) of every change."""
        self.balance = EVEN
        self._control_state = policy.control_state
        self._experts: ExpertLoad | None = None
        self._spell = 0
        self._looked: tuple[float, int, float, int] = (0.0, 0, 0.0, 0)
        if world.experts is not None and run.replicas:
            horizon = run.at[-1] + 1.0 if run.at else 1.0
            self._experts = load_over_time(world.experts, horizon, seed)
            for place, moment in enumerate(self._experts.from_s.tolist()):
                run.push(moment, self._drift, place)
        if not run.plain and run.replicas:
            run.push(0.0, self._report, None)
        if policy.control is not None:
            run.push(policy.control_every_s, self._tick, policy.control)
        self._apply(policy.setting)

    def _report(self, now: float, _: None) -> None:
        """The engines count what they hold; gateways hear it later."""
        run = self._run
        up = [replica for replica in run.replicas if replica.up]
        if up:
            running, waiting = sum(replica.running for replica in up), sum(len(replica.queue) for replica in up)
            usage, limit = max(replica.kv_usage for replica in up), sum(replica.active_limit for replica in up)
            run.push(
                now + run.world.report_lag_s,
                self._reported,
                (running, waiting, usage, limit, now, len(up), up[0].token_limit),
            )
        self._look(now, up)
        run.push(now + run.world.report_every_s, self._report, None)

    def _look(self, now: float, up: list[Replica]) -> None:
        """Gateways look at the tokens of the streams that run, and at the prompts that were done."""
        run = self._run
        made = sum(replica.made_by(now) for replica in run.replicas)
        done = sum(gate.prompts_done for gate in run.gates)
        decoding = sum(len(replica.joined) for replica in up)
        before, self._looked = self._looked, (now, made, done, decoding)
        if not up or now <= before[0]:
            return
        span_s, tokens = now - before[0], made - before[1]
        running = 0.5 * (decoding + before[3]) / len(up)
        if tokens <= 0 or running < 1.0:
            return
        itl_s = running * len(up) * span_s / tokens
        prompt_tokens = (done - before[2]) / len(up) / span_s * itl_s
        for gate in run.gates if run.policy.share_every_s is None else run.gates[:1]:
            gate.learn_at_once(LOCAL, Look(itl_s, running, prompt_tokens), now)

    def _reported(self, _: float, counts: tuple[int, int, float, int, float, int, int]) -> None:
        for gate in self._run.gates:
            gate.reported(*counts)

    def _tick(self, now: float, control: Control) -> None:
        run, policy = self._run, self._run.policy
        context = ControlContext(now, observe(run, now, policy.control_window_s), self.setting)
        setting, self._control_state = control(context, self._control_state)
        if setting is not None and setting != self.setting:
            run.push(now + policy.control_delay_s, self._move, setting)
        run.push(now + policy.control_every_s, self._tick, control)

    def _move(self, now: float, setting: Setting) -> None:
        self._apply(setting)
        self.moved.append((now, setting.text()))

    def _drift(self, _: float, spell: int) -> None:
        self._spell = spell
        self._slow_down()

    def _apply(self, setting: Setting) -> None:
        """Put knobs in force: limits at once, speeds from each replica's next step on."""
        self.setting = setting
        engine, given = self._run.world.engine, self._run.world.thresholds
        active = min(engine.max_active, setting.engine.max_active_seqs or engine.max_active)
        tokens = min(engine.max_batched_tokens, setting.engine.max_batched_tokens or engine.max_batched_tokens)
        for replica in self._run.replicas:
            replica.active_limit, replica.token_limit = active, max(tokens, engine.max_active)
        miss, cap = setting.fallback.miss_probability, setting.fallback.share_cap
        self.thresholds = Thresholds(
            given.miss_probability if miss is None else miss, given.share_cap if cap is None else cap
        )
        self._slow_down()

    def _slow_down(self) -> None:
        """Let expert load and capacity act on the speed of every replica."""
        run = self._run
        engine, experts = run.world.engine, self._experts
        prefill, decode = engine.prefill_token_s, engine.active_s
        if experts is not None:
            self.balance = experts.balance(self._spell, self.setting.experts)
            prefill, decode = slowed(engine, experts.of, self.balance)
        for index, replica in enumerate(run.replicas):
            replica.prefill_token_s, replica.active_s = prefill, decode
            if replica.end < math.inf:
                replica.cut(run.now)
                run.wakes[index] = replica.end


def slowed(engine: Engine, experts: Experts, balance: Balance) -> tuple[float, float]:
    """Seconds of a prompt token and of a decoding sequence in a step, with that much imbalance."""
    full = engine.decode_s + engine.max_active * engine.active_s
    decode = engine.active_s + experts.decode_share * full / engine.max_active * (balance.decode - 1.0)
    return engine.prefill_token_s * (1.0 + experts.prefill_share * (balance.prefill - 1.0)), max(0.0, decode)
