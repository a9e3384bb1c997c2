"""What `moectl plan` found, as one value and as one JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from moe_api.v1alpha1 import MoEDeployment
from moe_planner import report
from moe_planner.cost import HOURS_PER_MONTH, SECONDS_PER_MONTH, Tariff, allocation, allocation_set
from moe_planner.fit import FitVerdict
from moe_planner.memory import Ask
from moe_planner.mix import Mixes
from moe_planner.report import Wire, WorkloadCost
from moe_planner.search import Found, Option, Slo, Traffic

_SKIPPED = ("model", "worker_extension_cls", "trust_remote_code")
"""Arguments that `vllm serve` has elsewhere, or that only the plugin's own replica takes."""


@dataclass(frozen=True)
class Launch:
    """How the chosen option is launched. `spec`: fields to write; `arguments` None: the engine cannot, and `why`."""

    verdict: FitVerdict
    spec: Mapping[str, Any]
    arguments: Mapping[str, Any] | None
    why: str = ""

    def command(self) -> list[str]:
        """The same as a command line of vLLM's own server."""
        if self.arguments is None:
            return []
        words = ["vllm", "serve", str(self.arguments["model"])]
        for name, value in self.arguments.items():
            flag = "--" + name.replace("_", "-")
            if name in _SKIPPED or value is None or value is False or value == "auto":
                continue
            words += [flag] if value is True else [flag, str(value)]
        return words


@dataclass(frozen=True)
class Answer:
    """`verdict` is that of the launch, or of the question where nothing was chosen. `chosen` keeps the SLO, or misses
    it least where nothing does. `as_written`: the verdict on the file as it is, where one place was asked for."""

    resource: MoEDeployment
    verdict: FitVerdict
    traffic: Traffic
    slo: Slo
    ask: Ask | None = None
    found: Found | None = None
    chosen: Option | None = None
    launch: Launch | None = None
    as_written: FitVerdict | None = None
    costs: tuple[WorkloadCost, ...] = ()
    apis: tuple[Tariff, ...] = ()
    wire: Wire | None = None
    mixes: Mixes | None = None
    accuracy: float | None = None

    @property
    def keeps_slo(self) -> bool:
        return self.found is not None and self.found.best is not None

    @property
    def monthly_usd(self) -> float | None:
        """Rent of every replica for a month."""
        if self.chosen is None or self.chosen.place.usd_per_gpu_hour is None:
            return None
        return self.chosen.gpus * self.chosen.place.usd_per_gpu_hour * HOURS_PER_MONTH

    @property
    def serves(self) -> bool:
        """Whether it can be launched, as far as is known: an accelerator without a known speed may yet serve."""
        if self.verdict.fits is False or self.found is None:
            return False
        return self.chosen is not None or any(row.why == "unknown speed" for row in self.found.rejected)

    def open_cost(self, start: datetime) -> dict[str, Any] | None:
        """A month from `start` in OpenCost's form: the GPUs, and what a trace's mix sends to the API. None: no rent."""
        if self.chosen is None or self.chosen.place.usd_per_gpu_hour is None:
            return None
        gpus, external, busy = self.chosen.gpus, 0.0, None
        if self.mixes is not None:
            best = self.mixes.best
            gpus, busy = best.replicas * self.chosen.place.gpus, best.busy_share
            external = best.api_usd / self.mixes.seconds * SECONDS_PER_MONTH
        meta = self.resource.metadata
        return allocation_set(
            allocation(
                f"{meta.namespace}/{meta.name}",
                start=start,
                end=start + timedelta(hours=HOURS_PER_MONTH),
                gpus=gpus,
                gpu_usd_per_hour=self.chosen.place.usd_per_gpu_hour,
                external_usd=external,
                gpu_busy_share=busy,
                properties={"namespace": meta.namespace, "controllerKind": "moedeployment", "controller": meta.name},
            )
        )

    def to_json(self, now: datetime) -> dict[str, Any]:
        """Everything, in seconds, tokens, bytes and dollars."""
        plan = self.verdict.plan
        document: dict[str, Any] = {
            "model": self.resource.spec.model.id,
            "traffic": {
                "inputTokens": self.traffic.input_tokens,
                "outputTokens": self.traffic.output_tokens,
                "cachedShare": self.traffic.cached_share,
                "skew": self.traffic.skew,
                "tokensPerSecond": self.traffic.tokens_per_s,
                "utilisation": self.traffic.utilisation,
            },
            "slo": {"ttftSeconds": self.slo.ttft_s, "itlSeconds": self.slo.itl_s, "kept": self.keeps_slo},
            "fit": {
                "fits": self.verdict.fits,
                "reason": self.verdict.reason,
                "message": self.verdict.message,
                "plan": None if plan is None else plan.to_status().to_json(),
            },
        }
        if self.found is not None:
            document["front"] = [report.option_json(option) for option in self.found.front]
            document["rejected"] = [
                {
                    "accelerator": row.place.accelerator.name,
                    "gpusPerReplica": row.place.gpus,
                    "layout": None if row.layout is None else str(row.layout),
                    "why": row.why,
                    "text": row.text,
                }
                for row in self.found.rejected
            ]
        if self.chosen is None or self.found is None:
            return document
        document["chosen"] = report.option_json(self.chosen)
        document["radar"] = dict(report.radar(self.chosen, self.found, self.accuracy))
        if self.launch is not None:
            document["launch"] = {
                "spec": dict(self.launch.spec),
                "engineArguments": None if self.launch.arguments is None else dict(self.launch.arguments),
                "command": self.launch.command(),
                "why": self.launch.why,
            }
        document["usdPerMonth"] = self.monthly_usd
        document["openCost"] = self.open_cost(now)
        document["cost"] = [report.cost_json(row) for row in self.costs]
        if self.costs:
            document["sensitivities"] = {
                tariff.name: [report.sensitivity_json(row) for row in report.moves(self.costs[0], tariff)]
                for tariff in self.apis
            }
        if self.wire is not None:
            document["betweenGpus"] = report.wire_json(self.wire)
        if self.mixes is not None:
            document["mix"] = {"api": self.apis[0].name, **report.mix_json(self.mixes)}
        return document
