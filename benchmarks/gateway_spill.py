"""The spill policy against the least that could be paid: attainment, dollars, what a queue threshold would have cost.

    python -m benchmarks.gateway_spill [--scenarios FILE] [--traces DIR] [--scenario NAME] [--seed N] [--quick]

Every scenario of a file runs through the simulator with the gateway's own policy, in two pods of four workers that
tell one another their ledgers. Rates are scaled by the file's rule: the smallest multiple of 0.25 at which the oracle
spills 5 % of tokens or more; above 20 % there, the scenario is refused; `steady` runs at scale 3. Output lengths are
hidden from the policy; shed, failed and cut requests are misses. The last line is one JSON object.

The oracle is the bound of `gateway_spill_oracle`: it pays for every request that the pool cannot attain, so that a
policy that misses some may pay less. `reached` is what a clairvoyant search found (`gateway_spill_reach`), starting
from the policy's own choice and from the oracle's: the least that can be paid lies between the two. The baseline spills
while the engines' waiting count, 3 s old, is above a threshold, the best of many in hindsight: the cheapest whose
attainment is no lower than the policy's, or, where none attains as much, the one that attains most. P(miss) is judged
against what would have become of every request on the own pool (`gateway_spill_twin`). The step's token budget is the
scenario loader's: 512 where a pool names none, because a full step of vLLM's default of 2,048 or 8,192 prompt tokens
alone takes 68 to 910 ms on these pools, above the promised ITL of 50.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gateway_spill_oracle import Bound, bound
from benchmarks.gateway_spill_reach import reach
from benchmarks.gateway_spill_twin import judged
from moe_core.forecast import SpillContext, Thresholds
from moe_core.spill import Action, Decision, Reason
from moe_planner.sim.policy import Policy
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.scenarios import PACKAGED, Scenario, load, names
from moe_planner.sim.simulate import simulate
from moe_planner.sim.world import LOCAL, World

GATEWAYS = 8
THRESHOLDS = Thresholds(0.25, 1.0)
"""A request goes to an API when it is likelier than this to miss: one value for every scenario."""
STEP = 0.25
SCALES_MOST = 40
SPILL_LEAST, SPILL_MOST = 0.05, 0.20
STEADY_SCALE = 3.0
QUEUE_AGE_S = 3.0
QUEUE_THRESHOLDS = (0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)
BOOTSTRAPS = 1000
BLOCK_S = 60.0
QUICK_S = 600.0
MONEY_LEAST = 0.01
MOSTLY_LOCAL = 0.9
"""Requests that the oracle's program serves less of are where a search begins."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """A scenario at its rate, and what the oracle pays there."""

    scenario: Scenario
    scale: float
    oracle: Bound


def scaled(path: Path, name: str, traces: Path | None, seed: int | None, seconds: float) -> Scaled | str:
    """Find the rate by the rule of the file; a text says why there is none."""

    def at(scale: float) -> Scaled:
        scenario = load(path, name, traces=traces, scale=scale, seed=seed)
        scenario = replace(scenario, workload=scenario.workload.until(seconds))
        return Scaled(scenario, scale, bound(scenario.world, scenario.workload, scenario.seed))

    if name == "steady":
        return at(STEADY_SCALE)
    below, above = 0, 1
    tried: dict[int, Scaled] = {}
    # The oracle's share grows with the rate: double until it is enough, then halve the gap.
    while above <= SCALES_MOST:
        tried[above] = at(above * STEP)
        if tried[above].oracle.spilled_tokens_share >= SPILL_LEAST:
            break
        below, above = above, above * 2
    else:
        return f"the oracle spills less than 5 % of tokens up to scale {below * STEP:g}"
    while above - below > 1:
        middle = (above + below) // 2
        tried[middle] = at(middle * STEP)
        if tried[middle].oracle.spilled_tokens_share >= SPILL_LEAST:
            above = middle
        else:
            below = middle
    found = tried[above]
    if found.oracle.spilled_tokens_share > SPILL_MOST:
        return (
            f"at scale {found.scale:g} the oracle spills {found.oracle.spilled_tokens_share:.0%} of tokens, over 20 %"
        )
    return found


def queue_threshold(threshold: int) -> Policy:
    """Spill while the engines, as of 3 s ago, had more requests waiting than this."""

    def decide(context: SpillContext, state: Any) -> tuple[Decision, Any]:
        report = context.revisions[0].report
        spill = report is not None and report.waiting > threshold
        for target in context.targets if spill or LOCAL in context.tried else ():
            if target.available and target.name not in context.tried:
                return Decision(Action.SPILL, Reason.SLO_PREDICTED, target.name), state
        if LOCAL in context.tried:
            return Decision(Action.SHED, Reason.UNAVAILABLE), state
        return Decision(Action.LOCAL, Reason.WITHIN_SLO, LOCAL), state

    return Policy(decide=decide, state=None)


def baseline(world: World, scenario: Scenario, attainment: float) -> tuple[int, Result]:
    """The best queue threshold in hindsight."""
    late = replace(world, report_lag_s=QUEUE_AGE_S)
    runs = [
        (threshold, simulate(scenario.workload, late, queue_threshold(threshold), seed=scenario.seed))
        for threshold in QUEUE_THRESHOLDS
    ]
    good = [run for run in runs if run[1].attainment >= attainment]
    return min(good, key=lambda r: r[1].api_usd) if good else max(runs, key=lambda r: r[1].attainment)


def interval(at_s: NDArray[np.float64], difference: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of a sum by a bootstrap over minutes, so that bursts stay whole."""
    block = (at_s // BLOCK_S).astype(np.int64)
    sums = np.bincount(block, weights=difference)
    drawn = np.random.default_rng(0).integers(0, len(sums), (BOOTSTRAPS, len(sums)))
    low, high = np.quantile(sums[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def skill(told: NDArray[np.float64], missed: NDArray[np.bool_], weight: NDArray[np.float64]) -> tuple[float, list[Any]]:
    """(1 − Brier / that of the base rate, reliability as [told, seen, requests] by tenths)."""
    base = float(np.average(missed, weights=weight))
    brier = float(np.average((told - missed) ** 2, weights=weight))
    bins = []
    place = np.minimum((told * 10).astype(np.int64), 9)
    for tenth in range(10):
        of = place == tenth
        if of.any():
            seen = [float(np.average(values[of], weights=weight[of])) for values in (told, missed)]
            bins.append([round(seen[0], 3), round(seen[1], 3), round(float(weight[of].sum()))])
    return (1.0 - brier / (base * (1.0 - base)) if 0 < base < 1 else math.nan), bins


def run(found: Scaled, gateways: int = GATEWAYS, policy: Policy | None = None) -> dict[str, Any]:
    """All figures of one scenario."""
    scenario, oracle = found.scenario, found.oracle
    world = replace(scenario.world, gateways=gateways, thresholds=THRESHOLDS)
    result, told, missed, weight = judged(scenario.workload, world, policy or Policy(), scenario.seed)
    brier_skill, bins = skill(told, missed, weight)
    threshold, best = baseline(world, scenario, result.attainment)
    low, high = interval(scenario.workload.at_s, best.usd - result.usd)
    tokens = scenario.workload.input_tokens + scenario.workload.output_tokens
    ratio = result.api_usd / oracle.usd if oracle.usd > MONEY_LEAST else math.nan
    starts = ((result.outcome == Outcome.API) | ~result.attained, oracle.local < MOSTLY_LOCAL)
    found_sets = [reach(scenario.workload, scenario.world, scenario.seed, start) for start in starts]
    reached = min(found_sets, key=lambda one: (one.attainment < result.attainment, one.usd))
    return {
        "scale": found.scale,
        "requests": len(scenario.workload),
        "slo_attainment": _figure(result.attainment),
        "api_usd": _figure(result.api_usd),
        "oracle_usd": _figure(oracle.usd),
        "spend_over_oracle": _figure(ratio),
        "reached_usd": _figure(reached.usd),
        "reached_attainment": _figure(reached.attainment),
        "spend_over_reached": _figure(result.api_usd / reached.usd if reached.usd > MONEY_LEAST else math.nan),
        "oracle_spilled_tokens": _figure(oracle.spilled_tokens_share),
        "spilled_tokens": _figure(float(tokens[result.outcome == 1].sum() / tokens.sum())),
        "queue_threshold": threshold,
        "queue_threshold_usd": _figure(best.api_usd),
        "queue_threshold_attainment": _figure(best.attainment),
        "saved_over_queue_threshold": _figure(best.api_usd - result.api_usd),
        "saved_interval": [_figure(low), _figure(high)],
        "brier_skill": _figure(brier_skill),
        "base_rate": _figure(float(np.average(missed, weights=weight))),
        "reliability": bins,
        "local_misses": int((~result.attained & (result.outcome == 0)).sum()),
        "api_misses": int((~result.attained & (result.outcome == 1)).sum()),
        "shed_failed_cut": [result.count(outcome) for outcome in (Outcome.SHED, Outcome.FAILED, Outcome.CUT)],
        "preemptions": result.preemptions,
    }


def worst(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The keys of the goal over all scenarios that have them: the worst of each."""
    each = list(rows)

    def of(key: str) -> list[float]:
        return [row[key] for row in each if row.get(key) is not None]

    return {
        "slo_attainment": min(of("slo_attainment"), default=None),
        "spend_over_oracle": max(of("spend_over_oracle"), default=None),
        "saved_over_queue_threshold": min(of("saved_over_queue_threshold"), default=None),
        "brier_skill": min(of("brier_skill"), default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=Path, default=PACKAGED)
    parser.add_argument("--traces", type=Path, default=None)
    parser.add_argument("--scenario", action="append", help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=None, help="in place of the file's")
    parser.add_argument("--scale", type=float, default=None, help="in place of the rule's")
    parser.add_argument("--gateways", type=int, default=GATEWAYS)
    parser.add_argument("--alone", action="store_true", help="workers do not tell one another their ledgers")
    parser.add_argument("--quick", action="store_true", help="the first ten minutes of each")
    args = parser.parse_args()
    seconds = QUICK_S if args.quick else math.inf
    policy = Policy(share_every_s=None) if args.alone else None
    rows: dict[str, dict[str, Any]] = {}
    for name in args.scenario or names(args.scenarios):
        if args.scale is not None:
            one = load(args.scenarios, name, traces=args.traces, scale=args.scale, seed=args.seed)
            one = replace(one, workload=one.workload.until(seconds))
            found: Scaled | str = Scaled(one, args.scale, bound(one.world, one.workload, one.seed))
        else:
            found = scaled(args.scenarios, name, args.traces, args.seed, seconds)
        rows[name] = {"refused": found} if isinstance(found, str) else run(found, args.gateways, policy)
        print(json.dumps({"scenario": name, **rows[name]}), flush=True)
    print(json.dumps({"bench": "gateway_spill", **worst(rows.values()), "scenarios": rows}))


def _figure(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


if __name__ == "__main__":
    main()
