"""What `moectl plan` says about one question, as values: memory, options, cost, break-even, traffic. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_planner import exchange, speed
from moe_planner.breakeven import BreakEven, Own, Sensitivity, break_even, sensitivities
from moe_planner.calibration import Factors
from moe_planner.catalog import Catalog
from moe_planner.cost import OwnCost, Tariff, Workload, own_cost
from moe_planner.memory import Ask
from moe_planner.mix import Mix, Mixes
from moe_planner.search import Found, Option
from moe_planner.speed import Load

PERFORMANCE = ("cost", "throughput", "latency", "bandwidth used", "arithmetic used", "accuracy")


@dataclass(frozen=True)
class WorkloadCost:
    """One workload on the chosen option: what own GPUs cost when full, and each API's break-even."""

    workload: Workload
    tokens_per_s: float
    own: OwnCost
    apis: tuple[BreakEven, ...]


@dataclass(frozen=True)
class Wire:
    """What one GPU sends to others. Bytes of one token of its data rank, and a second when the replica is full."""

    bytes_per_token: float
    bytes_per_s: float
    link: str
    link_bytes_s: float | None
    pcie_bytes_s: float | None

    @property
    def link_share(self) -> float | None:
        return None if not self.link_bytes_s else self.bytes_per_s / self.link_bytes_s

    @property
    def pcie_share(self) -> float | None:
        """Of what PCIe could carry, were there nothing better; above 1: it could not."""
        return None if not self.pcie_bytes_s else self.bytes_per_s / self.pcie_bytes_s


def wire(ask: Ask, option: Option, fresh_share: float) -> Wire:
    """Traffic between the GPUs of one replica. `fresh_share`: of all tokens, those that are computed, not cached."""
    layout, accelerator = option.layout, option.place.accelerator
    group = layout.tensor * layout.data
    each = exchange.traffic(ask.model, layout, accelerator.domain_gpus).total
    wide = group > accelerator.domain_gpus
    found = exchange.network(accelerator, group) if wide else exchange.link(accelerator, group)
    known = found if isinstance(found, exchange.Link) else None
    return Wire(
        bytes_per_token=each,
        bytes_per_s=each * option.speed.total_tokens_per_s * fresh_share / layout.data,
        link="unknown" if known is None else known.name,
        link_bytes_s=known.bytes_s if known is not None and math.isfinite(known.bytes_s) else None,
        pcie_bytes_s=accelerator.pcie_bytes_s,
    )


def workload_costs(
    ask: Ask,
    option: Option,
    workloads: Sequence[Workload],
    apis: Sequence[Tariff],
    catalog: Catalog,
    *,
    skew: float,
    utilisation: float,
    factors: Factors | None = None,
) -> tuple[WorkloadCost, ...]:
    """Each workload at the option's layout and concurrency. Empty where the rent is not known."""
    rent = option.place.usd_per_gpu_hour
    if rent is None:
        return ()
    own_ask = replace(ask, accelerator=option.place.accelerator, redundant=option.redundant)
    rows = []
    for workload in workloads:
        load = Load(
            max(1.0, workload.input_tokens),
            max(1.0, workload.output_tokens),
            option.concurrency,
            workload.cached_share,
            skew,
            option.gamma,
        )
        found = speed.predict(own_ask, option.layout, load, catalog, factors)
        own = Own(option.place.gpus, rent, found.total_tokens_per_s, utilisation)
        rows.append(
            WorkloadCost(
                workload=workload,
                tokens_per_s=found.total_tokens_per_s,
                own=own_cost(
                    option.place.gpus * rent,
                    found.prefill_tokens_per_s,
                    found.total_tokens_per_s,
                    workload,
                    utilisation,
                ),
                apis=tuple(break_even(own, tariff, workload) for tariff in apis),
            )
        )
    return tuple(rows)


def moves(cost: WorkloadCost, tariff: Tariff) -> tuple[Sensitivity, ...]:
    """How the break-even against one API moves."""
    found = next(row for row in cost.apis if row.api == tariff.name)
    return sensitivities(found.own, tariff, cost.workload)


def radar(option: Option, found: Found, accuracy: float | None) -> Mapping[str, float | None]:
    """Cost, accuracy and performance on axes from 0 to 1, 1 the best (after MoE-CAP's radar).

    Cost, throughput and latency are shares of the best option of this question; use of bandwidth and arithmetic are
    S-MBU and S-MFU; accuracy is what a person measured, None where nobody did: the planner cannot know it.
    """
    options = found.options or (option,)
    costs = [o.usd_per_m for o in options if o.usd_per_m]
    values: list[float | None] = [
        min(costs) / option.usd_per_m if option.usd_per_m and costs else None,
        option.per_gpu / max(o.per_gpu for o in options),
        min(o.request_s for o in options) / option.request_s,
        min(1.0, option.speed.s_mbu),
        min(1.0, option.speed.s_mfu),
        accuracy,
    ]
    return dict(zip(PERFORMANCE, values, strict=True))


def option_json(option: Option) -> dict[str, Any]:
    """An option as JSON: seconds, tokens and dollars."""
    s, layout = option.speed, option.layout
    return {
        "accelerator": option.place.accelerator.name,
        "gpusPerReplica": option.place.gpus,
        "replicas": option.replicas,
        "parallelism": _layout(option),
        "concurrency": option.concurrency,
        "activeSeqsPerDataRank": active_seqs(option),
        "maxBatchedTokens": option.batched_tokens,
        "capacityFactor": option.gamma,
        "redundantExperts": option.redundant,
        "usdPerMTokens": option.usd_per_m,
        "tokensPerSecond": s.total_tokens_per_s,
        "tokensPerSecondPerGpu": option.per_gpu,
        "outputTokensPerSecond": s.output_tokens_per_s,
        "outputTokensPerSecondInterval": [s.low, s.high],
        "prefillTokensPerSecond": s.prefill_tokens_per_s,
        "ttftSeconds": s.ttft_s,
        "itlSeconds": s.itl_s,
        "requestSeconds": option.request_s,
        "sMbu": s.s_mbu,
        "sMfu": s.s_mfu,
        "bound": s.bound,
        "stepSeconds": dict(s.parts),
        "ranks": layout.tensor * layout.data,
    }


def active_seqs(option: Option) -> int:
    """Sequences of one data rank, as spec.engine.maxActiveSeqs counts them."""
    return math.ceil(option.concurrency / option.layout.data)


def cost_json(row: WorkloadCost) -> dict[str, Any]:
    """A workload's cost as JSON; a break-even of null is never reached."""
    return {
        "workload": row.workload.name,
        "inputTokens": row.workload.input_tokens,
        "outputTokens": row.workload.output_tokens,
        "cachedShare": row.workload.cached_share,
        "tokensPerSecond": row.tokens_per_s,
        "ownUsdPerMTokens": {
            "mean": row.own.mean_usd_per_m,
            "input": row.own.input_usd_per_m,
            "cached": row.own.cached_usd_per_m,
            "output": row.own.output_usd_per_m,
        },
        "apis": [
            {
                "api": b.api,
                "usdPerMTokens": b.api_usd_per_m,
                "breakEvenTokensPerMonth": b.tokens_per_month,
                "replicaTokensPerMonth": b.own.tokens_per_month,
            }
            for b in row.apis
        ],
    }


def sensitivity_json(row: Sensitivity) -> dict[str, Any]:
    """One input moved both ways."""
    return {
        "input": row.input,
        "now": row.now,
        "low": {"value": row.low[0], "tokensPerMonth": row.low[1]},
        "high": {"value": row.high[0], "tokensPerMonth": row.high[1]},
    }


def mix_json(mixes: Mixes) -> dict[str, Any]:
    """The cheapest mix of own replicas and API, beside all of either."""

    def one(mix: Mix) -> dict[str, Any]:
        return {
            "replicas": mix.replicas,
            "usd": mix.usd,
            "ownUsd": mix.own_usd,
            "apiUsd": mix.api_usd,
            "apiTokenShare": mix.api_token_share,
            "busyShare": mix.busy_share,
        }

    return {
        "seconds": mixes.seconds,
        "windowSeconds": mixes.window_s,
        "best": one(mixes.best),
        "allApi": one(mixes.all_api),
        "allOwn": one(mixes.all_own),
        "options": [one(mix) for mix in mixes.options],
    }


def wire_json(found: Wire) -> dict[str, Any]:
    """Traffic between GPUs."""
    return {
        "bytesPerToken": found.bytes_per_token,
        "bytesPerSecond": found.bytes_per_s,
        "link": found.link,
        "linkShare": found.link_share,
        "pcieShare": found.pcie_share,
    }


def _layout(option: Option) -> dict[str, int]:
    at = option.layout
    return {"tensor": at.tensor, "data": at.data, "expert": at.expert, "pipeline": at.pipeline}
