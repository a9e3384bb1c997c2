"""A MoEDeployment as a world to simulate: the launch and step times of `moectl plan`, its promises, its APIs.

What the file cannot say is an option (traffic, shares of tiers, latency of closed APIs) or left out and said so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from moe_api.enums import FallbackRight, Provider
from moe_api.spec import DEFAULT_TIER, MoEDeploymentSpec
from moe_api.spec_traffic import FallbackTarget
from moe_cli import plan
from moe_cli.arrivals import parse_lengths
from moe_cli.files import read
from moe_cli.outcome import Problem, Refusal
from moe_cli.plan_answer import Answer
from moe_core import process_config
from moe_core.forecast import Thresholds
from moe_planner import overlay, speed
from moe_planner.sim.engine import Engine, from_speed
from moe_planner.sim.invalid import Invalid
from moe_planner.sim.scenarios import Scenario
from moe_planner.sim.workload import Arrivals, Lengths, Workload, generate, read_trace
from moe_planner.sim.world import Api, Slo, Tier, World
from moe_planner.speed import Load, SpeedUnknown

SECONDS = 600.0
API_TTFT_MS, API_ITL_MS = "600,1600", 20.0
"""Latency of a closed API where nobody says: round numbers of a plausible size, no measurement."""
_DAY_S = 86_400.0
_OPTIONS = {"seconds": "--seconds", "rps": "--rps", "shape": "--burstiness", "trace": "--trace", "scale": "--scale"}


@dataclass(frozen=True)
class FileOptions:
    """What `moectl simulate` is told of a MoEDeployment. None: not given."""

    rps: float | None = None
    input_tokens: str | None = None
    output_tokens: str | None = None
    burstiness: float | None = None
    seconds: float | None = None
    trace: Path | None = None
    tiers: tuple[str, ...] = ()
    replicas: int | None = None
    api_ttft_ms: str | None = None
    api_itl_ms: float | None = None
    catalog: tuple[Path, ...] = ()

    def given(self) -> list[str]:
        """Options that were given, by name."""
        named = {"tiers": "--tier"}
        values = vars(self).items()
        return [named.get(n, f"--{n.replace('_', '-')}") for n, value in values if value is not None and value != ()]


@dataclass(frozen=True)
class Planned:
    """What is simulated, as JSON says it (`plan`) and as people read it (`notes`)."""

    scenario: Scenario
    plan: dict[str, Any]
    notes: tuple[str, ...]


def planned(file: Path, options: FileOptions, *, scale: float, seed: int) -> Planned:
    """The world of a file, and its traffic. Raises Refusal."""
    resource = read(file)
    spec = resource.spec
    workload = _workload(options, scale, seed)
    inputs, outputs = float(workload.input_tokens.mean()), float(workload.output_tokens.mean())
    rate = len(workload) / max(1.0, float(workload.at_s[-1]))
    asked = plan.PlanOptions(file=file, input_tokens=inputs, output_tokens=outputs, rps=rate, catalog=options.catalog)
    answer = plan.answer(asked)
    chosen, launch, ask = answer.chosen, answer.launch, answer.ask
    if chosen is None or launch is None or ask is None or launch.verdict.plan is None:
        raise _unplanned(answer)
    launched, layout = launch.verdict.plan, chosen.layout
    ask = replace(ask, accelerator=chosen.place.accelerator, redundant=chosen.redundant)
    catalog = overlay.load(options.catalog)
    most = (launched.max_active_seqs or 1) * layout.data
    try:
        alone, full = (speed.predict(ask, layout, Load(inputs, outputs, n), catalog) for n in (1, most))
        _, cache = speed.room(ask, layout, catalog)
    except SpeedUnknown as error:
        raise Refusal(Problem(field="spec.hardware", message=str(error))) from None
    each = speed.room_of_sequence(ask, layout, Load(inputs, outputs, 1))
    cached_tokens = cache / each * math.ceil(inputs + outputs) * layout.data
    notes = [] if answer.keeps_slo else ["the plan keeps its SLO in no layout: the nearest is simulated"]
    longest = int((workload.input_tokens + workload.output_tokens).max())
    if launched.max_model_len is not None and longest > launched.max_model_len:
        notes.append(f"requests of up to {longest:,} tokens: the engine would refuse those above maxModelLen")
    replicas = spec.replicas.min if options.replicas is None else options.replicas
    if (spec.replicas.max or replicas) > replicas:
        notes.append(f"{replicas} of up to {spec.replicas.max} replicas: nothing scales here; --replicas tries others")
    rent = chosen.place.usd_per_gpu_hour
    if rent is None:
        notes.append("the catalog has no rent of this accelerator: it counts nothing")
    try:
        engine = from_speed(
            alone,
            full,
            kv_tokens=int(cached_tokens),
            max_active=most,
            max_batched_tokens=(launched.max_batched_tokens or most) * layout.data,
            at=full.running,
        )
        slo = Slo(spec.slo.ttft_p95.seconds, spec.slo.itl_p95.seconds)
        trigger = spec.fallback.trigger
        world = World(
            engine,
            slo,
            replicas,
            apis=_apis(spec, options, notes),
            thresholds=Thresholds(float(trigger.miss_probability), float(trigger.share_cap)),
            budget_usd=_budget_usd(spec, workload),
            usd_per_hour=(rent or 0.0) * chosen.place.gpus,
            gateways=spec.gateway.replicas.min,
            tiers=_tiers(spec, options, slo, notes),
        )
    except Invalid as error:
        raise Refusal(Problem(field=error.field, message=error.message, remedy=error.remedy)) from None
    where = f"{chosen.place.gpus} × {chosen.place.accelerator.name}"
    figures = {name: round(getattr(engine, name) * 1e3, 6) for name in ("prefill_token_s", "decode_s", "active_s")}
    document = {
        "model": spec.model.id,
        "place": where,
        "layout": str(layout),
        "replicas": replicas,
        "gateways": world.gateways,
        "engine_ms": {name.removesuffix("_s"): value for name, value in figures.items()},
        **{name: getattr(engine, name) for name in ("kv_tokens", "max_active", "max_batched_tokens")},
        "budget_usd": None if math.isinf(world.budget_usd) else world.budget_usd,
        "notes": notes,
    }
    header = f"{spec.model.id} on {replicas} × ({where}, {layout}): {_words(engine)}"
    return Planned(Scenario(resource.metadata.name, world, workload, seed), document, (header, *notes))


def _unplanned(answer: Answer) -> Refusal:
    """Why there is no launch to simulate."""
    slow = [row.text for row in answer.found.rejected if row.why == "unknown speed"] if answer.found is not None else []
    if slow:
        remedy = "a speed needs its figures: add them with --catalog (docs/catalog.md)"
        return Refusal(Problem(field="spec.hardware.accelerator", message=slow[0], remedy=remedy))
    return Refusal(Problem(field="spec", message=answer.verdict.message, remedy="`moectl plan` says what would fit"))


def _words(engine: Engine) -> str:
    alone, full = engine.step_s(0, 1) * 1e3, engine.step_s(0, engine.max_active) * 1e3
    return (
        f"a step of 1 sequence {alone:.1f} ms, of {engine.max_active} {full:.1f} ms, prompts"
        f" {1 / engine.prefill_token_s:,.0f} tokens/s, cache {engine.kv_tokens:,} tokens"
    )


def _workload(options: FileOptions, scale: float, seed: int) -> Workload:
    try:
        if options.trace is not None:
            for name in ("--rps", "--input-tokens", "--output-tokens", "--burstiness"):
                if name in options.given():
                    raise Refusal(Problem(field=name, message="says what the trace says", remedy="leave one out"))
            workload = read_trace(options.trace).faster(scale)
            workload = workload if options.seconds is None else workload.until(options.seconds)
        elif options.rps is None:
            remedy = "give --rps, or a CSV with --trace"
            raise Refusal(Problem(field="--rps", message="no traffic is described", remedy=remedy))
        else:
            usual = plan.USUAL_TOKENS
            inputs = parse_lengths(options.input_tokens or f"{usual[0]:.0f}", "--input-tokens")
            outputs = parse_lengths(options.output_tokens or f"{usual[1]:.0f}", "--output-tokens")
            arrivals = Arrivals(
                SECONDS if options.seconds is None else options.seconds,
                options.rps * scale,
                Lengths(inputs.median, inputs.p99),
                Lengths(outputs.median, outputs.p99),
                1.0 if options.burstiness is None else options.burstiness,
            )
            workload = generate(arrivals, seed)
    except Invalid as error:
        field = _OPTIONS.get(error.field, error.field)
        raise Refusal(Problem(field=field, message=error.message, remedy=error.remedy)) from None
    if not len(workload):
        field = "--rps" if options.trace is None else "--seconds"
        raise Refusal(Problem(field=field, message="no request arrives", remedy="give more requests or more seconds"))
    return workload


def _apis(spec: MoEDeploymentSpec, options: FileOptions, notes: list[str]) -> tuple[Api, ...]:
    ttft = parse_lengths(options.api_ttft_ms or API_TTFT_MS, "--api-ttft-ms")
    itl_ms = API_ITL_MS if options.api_itl_ms is None else options.api_itl_ms
    prices = overlay.load_prices(options.catalog)
    found = []
    for i, target in enumerate(spec.fallback.targets):
        why = process_config.forbidden(spec, target)
        if why is not None:
            notes.append(f"target {target.name} gets nothing: {why}")
            continue
        per_m = _prices(target, prices, f"spec.fallback.targets[{i}].price")
        if target.limits.tokens_per_minute is not None or target.limits.concurrency is not None:
            notes.append(f"target {target.name}: tokensPerMinute and concurrency are not simulated")
        rate = target.limits.requests_per_minute
        limit = math.inf if rate is None else float(rate)
        found.append(Api(target.name, ttft.median / 1e3, ttft.p99 / 1e3, itl_ms / 1e3, *per_m, limit))
    if found and options.api_ttft_ms is None:
        notes.append(
            f"closed APIs: TTFT {ttft.median} ms in the median and {ttft.p99} ms at the 95th percentile is assumed"
        )
    if found and options.api_itl_ms is None:
        notes.append(f"closed APIs: ITL {itl_ms:g} ms is assumed")
    return tuple(found)


def _prices(target: FallbackTarget, listed: Any, where: str) -> tuple[float, float]:
    """USD for a million input and output tokens: the file's, else the catalog's; an own server's may cost nothing."""
    own = (target.price.input_usd_per_m_tokens, target.price.output_usd_per_m_tokens)
    known = plan.price_of(target.model, listed)
    if None in own and known is not None:
        return known.input_usd_per_m, known.output_usd_per_m
    if None in own and target.provider is not Provider.OPENAI_COMPATIBLE:
        remedy = "set inputUsdPerMTokens and outputUsdPerMTokens, or give the price with --catalog"
        raise Refusal(Problem(field=where, message=f"{target.model} has no price in the catalog", remedy=remedy))
    return float(own[0] or Decimal(0)), float(own[1] or Decimal(0))


def _budget_usd(spec: MoEDeploymentSpec, workload: Workload) -> float:
    """The bound of a day, for each day that the traffic begins."""
    day = process_config.usd_per_day(spec.fallback)
    days = math.floor(float(workload.at_s[-1]) / _DAY_S) + 1
    return math.inf if day is None else float(day) * days


def _tiers(spec: MoEDeploymentSpec, options: FileOptions, slo: Slo, notes: list[str]) -> tuple[Tier, ...]:
    shares: dict[str, float] = {}
    known = [
        *(tier.name for tier in spec.tiers),
        *([] if any(t.name == DEFAULT_TIER for t in spec.tiers) else [DEFAULT_TIER]),
    ]
    for text in options.tiers:
        name, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise Refusal(Problem(field="--tier", message=f"{text!r} is no NAME=SHARE", remedy="such as gold=0.2"))
        if name not in known:
            raise Refusal(
                Problem(field="--tier", message=f"{name!r} is not in the file", remedy=f"one of {', '.join(known)}")
            )
        if name in shares:
            raise Refusal(Problem(field="--tier", message=f"{name!r} is there twice", remedy="give each tier once"))
        shares[name] = share
    total = sum(shares.values())
    if total > 1 + 1e-9 or (DEFAULT_TIER in shares and total < 1 - 1e-9):
        remedy = "make them 1 at most" if total > 1 else f"make them 1, or leave {DEFAULT_TIER} out: it takes the rest"
        raise Refusal(Problem(field="--tier", message=f"shares add up to {total:g}", remedy=remedy))
    if not shares:
        if spec.tiers:
            notes.append(f"every request is of tier {DEFAULT_TIER}; --tier NAME=SHARE shares them out")
        if not any(tier.name == DEFAULT_TIER for tier in spec.tiers):
            return ()
    shares.setdefault(DEFAULT_TIER, max(0.0, 1.0 - total))
    found = []
    for name, share in shares.items():
        tier = next((tier for tier in spec.tiers if tier.name == name), None)
        if tier is None:
            found.append(Tier(name, share, slo))
            continue
        ttft, itl = tier.slo.ttft_p95, tier.slo.itl_p95
        own = Slo(slo.ttft_s if ttft is None else ttft.seconds, slo.itl_s if itl is None else itl.seconds)
        found.append(Tier(name, share, own, tier.fallback is not FallbackRight.NEVER))
    return tuple(found)
