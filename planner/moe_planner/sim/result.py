"""What a simulation came to: one record for each request, as arrays, and what can be read from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_planner.sim.workload import Floats, Workload
from moe_planner.sim.world import World


class Outcome(IntEnum):
    """How a request ended. Each has exactly one."""

    LOCAL = 0
    API = 1
    SHED = 2
    FAILED = 3
    """No upstream answered."""
    CUT = 4
    """Its replica died after the first token."""


@dataclass(frozen=True, eq=False)
class Result:
    """Records in order of arrival; NaN where there is none. Times are seconds, `usd` is API dollars."""

    workload: Workload
    world: World
    outcome: NDArray[np.int8]
    where: NDArray[np.int16]  # replica of a local request, place of its API in `world.apis`, else -1
    ttft_s: Floats
    itl_s: Floats  # mean of the request
    e2e_s: Floats
    usd: Floats
    p_miss: Floats  # P(TTFT > SLO) at the own replicas, as the policy saw it on arrival
    seconds: float  # until the last request ended
    busy_s: tuple[float, ...]  # by replica
    preemptions: int
    settings: tuple[tuple[float, str], ...] = ()  # (time in force, knobs), where a control moved them
    tier: NDArray[np.int8] | None = None  # place in `world.tiers`, where there are some
    unfinished: int = 0  # requests that had not ended when the run was stopped: those have no record here

    @property
    def attained(self) -> NDArray[np.bool_]:
        """Whether each request kept its SLO; shed, failed and cut ones did not. One token has no ITL."""
        answered = (self.outcome == Outcome.LOCAL) | (self.outcome == Outcome.API)
        slo, tiers = self.world.slo, self.world.tiers
        ttft_s: float | Floats = slo.ttft_s
        itl_s: float | Floats = slo.itl_s
        if self.tier is not None:
            ttft_s = np.array([tier.slo.ttft_s for tier in tiers])[self.tier]
            itl_s = np.array([tier.slo.itl_s for tier in tiers])[self.tier]
        itl = np.isnan(self.itl_s) | (self.itl_s <= itl_s)
        return np.asarray(answered & (self.ttft_s <= ttft_s) & itl)

    @property
    def attainment(self) -> float:
        return float(self.attained.mean()) if len(self.outcome) else math.nan

    @property
    def api_usd(self) -> float:
        return float(self.usd.sum())

    @property
    def rent_usd(self) -> float:
        return self.world.usd_per_hour * self.world.replicas * self.seconds / 3600.0

    @property
    def usd_per_m_tokens(self) -> float:
        """Rent and API dollars for a million tokens, input and output, of requests that were answered to the end."""
        answered = (self.outcome == Outcome.LOCAL) | (self.outcome == Outcome.API)
        tokens = int((self.workload.input_tokens + self.workload.output_tokens)[answered].sum())
        return (self.rent_usd + self.api_usd) * 1e6 / tokens if tokens else math.nan

    @property
    def utilisation(self) -> float:
        """Share of the replicas' time in which they computed."""
        total = self.seconds * len(self.busy_s)
        return sum(self.busy_s) / total if total else math.nan

    def count(self, outcome: Outcome) -> int:
        return int((self.outcome == outcome).sum())

    def quantile(self, name: str, q: float, outcome: Outcome | None = None) -> float:
        """Quantile of `ttft_s`, `itl_s` or `e2e_s` over the requests that have it."""
        values: Floats = getattr(self, name)
        if outcome is not None:
            values = values[self.outcome == outcome]
        values = values[~np.isnan(values)]
        return float(np.quantile(values, q)) if len(values) else math.nan

    def windows(self, every_s: float) -> list[dict[str, float]]:
        """Arrivals, attainment, shares, dollars and percentiles of the requests that arrived in each window."""
        if not every_s > 0:
            raise ValueError(f"every_s: {every_s}; it must be above 0")
        place = (self.workload.at_s // every_s).astype(np.int64)
        attained = self.attained
        rows = []
        for window in np.unique(place).tolist():
            of = place == window
            ttft = self.ttft_s[of][~np.isnan(self.ttft_s[of])]
            itl = self.itl_s[of][~np.isnan(self.itl_s[of])]
            rows.append(
                {
                    "from_s": window * every_s,
                    "arrivals": float(of.sum()),
                    "attainment": float(attained[of].mean()),
                    "spill_share": float((self.outcome[of] == Outcome.API).mean()),
                    "shed_share": float((self.outcome[of] == Outcome.SHED).mean()),
                    "usd": float(self.usd[of].sum()),
                    "ttft_p95_s": float(np.quantile(ttft, 0.95)) if len(ttft) else math.nan,
                    "itl_p95_s": float(np.quantile(itl, 0.95)) if len(itl) else math.nan,
                }
            )
        return rows

    def summary(self) -> dict[str, Any]:
        """The figures that a person asks for; NaN is None, so that it is JSON."""

        def known(value: float) -> float | None:
            return None if math.isnan(value) else round(value, 6)

        requests = len(self.outcome)
        return {
            "requests": requests,
            "seconds": round(self.seconds, 3),
            "attainment": known(self.attainment),
            "outcomes": {outcome.name.lower(): self.count(outcome) for outcome in Outcome},
            "spill_share": known(self.count(Outcome.API) / requests if requests else math.nan),
            **{
                f"{name}_p{int(q * 100)}_s": known(self.quantile(f"{name}_s", q))
                for name in ("ttft", "itl", "e2e")
                for q in (0.5, 0.95, 0.99)
            },
            "api_usd": round(self.api_usd, 6),
            "rent_usd": round(self.rent_usd, 6),
            "usd_per_m_tokens": known(self.usd_per_m_tokens),
            "utilisation": known(self.utilisation),
            "preemptions": self.preemptions,
            "input_tokens": int(self.workload.input_tokens.sum()),
            "output_tokens": int(self.workload.output_tokens.sum()),
            "settings": [{"at_s": round(at, 3), "knobs": knobs} for at, knobs in self.settings],
            **({} if self.tier is None else {"tiers": self._by_tier(self.tier)}),
            **({"partial": True, "unfinished": self.unfinished} if self.unfinished else {}),
        }

    def _by_tier(self, place: NDArray[np.int8]) -> dict[str, dict[str, Any]]:
        attained, rows = self.attained, {}
        for i, tier in enumerate(self.world.tiers):
            of = place == i
            rows[tier.name] = {
                "requests": int(of.sum()),
                "attainment": round(float(attained[of].mean()), 6) if of.any() else None,
                "spill_share": round(float((self.outcome[of] == Outcome.API).mean()), 6) if of.any() else None,
            }
        return rows
