"""`moectl plan`: from a file or from options to an answer, without starting anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_api.enums import Overflow
from moe_api.load import ResourceInvalid, load_object
from moe_api.spec import MoEDeploymentSpec
from moe_api.spec_model import HardwareSpec, ParallelismSpec
from moe_api.v1alpha1 import MoEDeployment
from moe_cli.arrivals import Arrival, read_trace
from moe_cli.files import read
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.plan_answer import Answer, Launch
from moe_cli.say import Say
from moe_core import process_config
from moe_core.clock import Clock
from moe_planner import config_json, fit, overlay, report, search
from moe_planner.breakeven import Tariffed
from moe_planner.catalog import Catalog, CatalogInvalid, ModelFacts
from moe_planner.cost import SECONDS_PER_MONTH, CostInvalid, Tariff, Workload
from moe_planner.fit import FitVerdict
from moe_planner.memory import Ask
from moe_planner.mix import Mixes, Replica, Trace, mixes
from moe_planner.profiles import CHAT, COMPLETION
from moe_planner.search import Found, Option, Place, Slo, Traffic
from moe_planner.speed import SpeedUnknown

OUTPUTS = (".html", ".svg")
USUAL_APIS = ("gpt-5.5", "claude-opus-4.7")
USUAL_TOKENS = (2000.0, 200.0)
"""Input and output of a mean request where nobody says: a chat of a few turns."""
_NOT_PLANNED = {
    "ExternalEngine": "plan a file whose engine runs here",
    "MemoryUnknown": "name an accelerator of the catalog, with --accelerator or in the file",
    "UnknownModel": "give its config.json with --config, or docs/catalog.md says how to add it",
    "UnknownAccelerator": "docs/catalog.md says how to add an accelerator",
    "UnknownPrecision": "name a checkpoint whose name says its form",
}
WINDOW_S = 10.0
"""How long work of a trace may wait where no TTFT is promised: the shortest spike in the Azure trace."""


@dataclass(frozen=True)
class PlanOptions:
    """What was asked. None and empty: the file's, the catalog's, or any."""

    file: Path | None = None
    model: str | None = None
    accelerators: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    input_tokens: float | None = None
    output_tokens: float | None = None
    cached_share: float = 0.0
    skew: float = 0.0
    capacity: bool = False
    rps: float | None = None
    tokens_per_month: float | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None
    apis: tuple[str, ...] = ()
    rent: float | None = None
    utilisation: float = 1.0
    accuracy: float | None = None
    trace: Path | None = None
    catalog: tuple[Path, ...] = ()
    config: Path | None = None
    explain: bool = False
    as_json: bool = False
    output: Path | None = None


def run(options: PlanOptions, say: Say, clock: Clock) -> Exit:
    """Answer and print. Raises Refusal."""
    if options.output is not None and options.output.suffix.lower() not in OUTPUTS:
        message = f"{options.output.name} is no {' or '.join(OUTPUTS)} file"
        raise Refusal(Problem(field="--output", message=message, remedy="name it with one of these endings"))
    found = answer(options)
    if options.as_json:
        now = datetime.fromtimestamp(clock.time(), UTC).replace(microsecond=0)
        say.line(json.dumps(found.to_json(now), ensure_ascii=False, indent=2))
    else:
        from moe_cli import plan_text

        for line in plan_text.lines(found, explain=options.explain):
            say.line(line)
    if options.output is not None:
        from moe_cli import plan_picture

        made = plan_picture.svg(found) if options.output.suffix.lower() == ".svg" else plan_picture.html(found)
        try:
            options.output.write_text(made, encoding="utf-8")
        except OSError as error:
            message = f"{options.output}: {error.strerror}"
            raise Refusal(Problem(field="--output", message=message, remedy="name a writable file")) from None
        (say.aside if options.as_json else say.line)(f"wrote {options.output}")
    return Exit.OK if found.serves else Exit.BAD_INPUT


def answer(options: PlanOptions) -> Answer:
    """The answer to a question. Raises Refusal where it cannot be put: an unknown name, a number that cannot be."""
    try:
        return _answer(options)
    except CostInvalid as error:
        raise Refusal(Problem(field=_option(error.field), message=error.message, remedy=error.remedy)) from None


def _answer(options: PlanOptions) -> Answer:
    catalog, listed = _catalog(options)
    resource = _resource(options, catalog)
    if options.config is not None:
        catalog = overlay.with_model(catalog, _facts(options.config, resource.spec.model.id))
    places = _places(options, resource, catalog)
    if options.file is not None and (options.accelerators or options.gpus):
        resource = resource.model_copy(update={"spec": _placed(resource, places[0])})
    spec = resource.spec
    arrivals = read_trace(options.trace) if options.trace is not None else []
    traffic = _traffic(options, arrivals)
    slo = _slo(options, resource)
    asked = fit.asked(spec, catalog)
    if isinstance(asked, FitVerdict):
        if asked.reason in _NOT_PLANNED:
            raise Refusal(Problem(message=asked.message, remedy=_NOT_PLANNED[asked.reason]))
        return Answer(resource=resource, verdict=asked, traffic=traffic, slo=slo)
    verdict = fit.check(spec, catalog)
    if len(places) == 1 and verdict.fits is not True:
        return Answer(resource=resource, verdict=verdict, traffic=traffic, slo=slo, ask=asked)
    found = search.plan(
        asked,
        traffic,
        slo,
        catalog,
        places,
        parallelism=spec.parallelism,
        context=spec.engine.max_model_len,
        gammas=search.GAMMAS if options.capacity or spec.experts.overflow is not Overflow.UNLIMITED else (None,),
    )
    best = found.best or found.nearest
    if best is None:
        largest = max(places, key=lambda place: place.gpus * place.accelerator.memory_bytes)
        verdict = fit.check(_placed(resource, largest), catalog)
        return Answer(resource, verdict, traffic, slo, ask=asked, found=found)
    chosen = _launched(resource, best, found, catalog)
    launch = _launch(resource, chosen, asked, catalog)
    apis = _apis(options, resource, listed)
    workloads = (Workload("asked", traffic.input_tokens, traffic.output_tokens, traffic.cached_share), CHAT, COMPLETION)
    try:
        costs = report.workload_costs(
            asked, chosen, workloads, apis, catalog, skew=traffic.skew, utilisation=traffic.utilisation
        )
    except SpeedUnknown:
        costs = ()
    return Answer(
        resource=resource,
        verdict=launch.verdict,
        traffic=traffic,
        slo=slo,
        ask=asked,
        found=found,
        chosen=chosen,
        launch=launch,
        as_written=verdict if len(places) == 1 else None,
        costs=costs,
        apis=apis,
        wire=report.wire(replace(asked, accelerator=chosen.place.accelerator), chosen, _fresh_share(traffic)),
        mixes=_mix(arrivals, chosen, apis, slo, traffic),
        accuracy=options.accuracy,
    )


def _catalog(options: PlanOptions) -> tuple[Catalog, Mapping[str, Tariff]]:
    """Figures and prices: the packaged ones, with the files' own over them."""
    try:
        return overlay.load(options.catalog), overlay.load_prices(options.catalog)
    except CatalogInvalid as error:
        raise Refusal(Problem(field="--catalog", message=error.where, remedy=error.remedy)) from None


def _facts(config: Path, name: str) -> ModelFacts:
    """A model's facts from the config.json of its checkpoint."""
    try:
        return config_json.read(config.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        remedy = "name the config.json of a checkpoint"
        raise Refusal(Problem(field="--config", message=f"{config}: {error}", remedy=remedy)) from None
    except CatalogInvalid as error:
        raise Refusal(Problem(field="--config", message=error.where, remedy=error.remedy)) from None


def _resource(options: PlanOptions, catalog: Catalog) -> MoEDeployment:
    """The file, or a resource of the options alone; its accelerator is the first that is asked for."""
    if options.file is not None:
        if options.model is not None:
            raise Refusal(Problem(field="--model", message="is the file's", remedy="leave it out, or the file"))
        return read(options.file)
    if options.model is None:
        raise Refusal(Problem(field="--model", message="no model", remedy="name one, or give a MoEDeployment file"))
    names = _accelerators(options, catalog)
    accelerator = names[0] if names else next(iter(catalog.accelerators))
    hardware = {"accelerator": accelerator, "gpusPerReplica": options.gpus[0] if options.gpus else 1}
    document = {
        "apiVersion": "moestack.dev/v1alpha1",
        "kind": "MoEDeployment",
        "metadata": {"name": "plan"},
        "spec": {"model": {"id": options.model}, "hardware": hardware},
    }
    try:
        return load_object(document)
    except ResourceInvalid as error:
        named = {"spec.model.id": "--model", "spec.hardware.gpusPerReplica": "--gpus"}
        problems = [Problem(field=named.get(p.path, p.path), message=p.remedy) for p in error.problems]
        raise Refusal(*problems) from None


def _accelerators(options: PlanOptions, catalog: Catalog) -> tuple[str, ...]:
    found = []
    for name in options.accelerators:
        known = catalog.accelerator_named(name)
        if known is None:
            remedy = f"one of {', '.join(sorted(catalog.accelerators))}, or one of your own with --catalog FILE"
            raise Refusal(Problem(field="--accelerator", message=f"{name} is not in the catalog", remedy=remedy))
        found.append(known.name)
    return tuple(found)


def _places(options: PlanOptions, resource: MoEDeployment, catalog: Catalog) -> tuple[Place, ...]:
    names, gpus = _accelerators(options, catalog), options.gpus
    hardware = resource.spec.hardware
    if options.file is not None and hardware is not None:
        names = names or ((hardware.accelerator,) if hardware.accelerator in catalog.accelerators else ())
        gpus = gpus or (hardware.gpus_per_replica,)
    found = search.places(catalog, names, gpus)
    return tuple(replace(place, rent=options.rent) for place in found)


def _traffic(options: PlanOptions, arrivals: list[Arrival]) -> Traffic:
    """Mean request and rate: of the options, else of the trace."""
    inputs, outputs = options.input_tokens, options.output_tokens
    rps = options.rps
    if arrivals:
        count = len(arrivals)
        inputs = sum(a.input_tokens for a in arrivals) / count if inputs is None else inputs
        outputs = sum(a.output_tokens for a in arrivals) / count if outputs is None else outputs
    if rps is not None and options.tokens_per_month is not None:
        raise Refusal(Problem(field="--rps", message="says what --tokens-per-month says", remedy="leave one out"))
    inputs = USUAL_TOKENS[0] if inputs is None else inputs
    outputs = USUAL_TOKENS[1] if outputs is None else outputs
    rate = None if rps is None else rps * (inputs + outputs)
    if options.tokens_per_month is not None:
        rate = options.tokens_per_month / SECONDS_PER_MONTH
    return Traffic(inputs, outputs, options.cached_share, options.skew, rate, options.utilisation)


def _slo(options: PlanOptions, resource: MoEDeployment) -> Slo:
    slo = resource.spec.slo
    ttft = slo.ttft_p95.seconds if options.ttft_ms is None else options.ttft_ms / 1000
    itl = slo.itl_p95.seconds if options.itl_ms is None else options.itl_ms / 1000
    return Slo(ttft, itl)


def _apis(options: PlanOptions, resource: MoEDeployment, listed: Mapping[str, Tariff]) -> tuple[Tariff, ...]:
    """The APIs named; else the file's fallback targets, at their own prices or the catalog's; else the usual ones."""
    for name in options.apis:
        if name not in listed:
            remedy = f"one of {', '.join(sorted(listed))}, or one of your own with --catalog FILE"
            raise Refusal(Problem(field="--api", message=f"{name} has no price in the catalog", remedy=remedy))
    if options.apis:
        return tuple(listed[name] for name in options.apis)
    found: list[Tariff] = []
    for target in resource.spec.fallback.targets:
        price = target.price
        if price.input_usd_per_m_tokens is not None and price.output_usd_per_m_tokens is not None:
            cached = price.cached_input_usd_per_m_tokens
            found.append(
                Tariffed(
                    target.model,
                    float(price.input_usd_per_m_tokens),
                    float(price.output_usd_per_m_tokens),
                    None if cached is None else float(cached),
                )
            )
        elif (known := price_of(target.model, listed)) is not None:
            found.append(known)
    return tuple(found) or tuple(listed[name] for name in USUAL_APIS)


def price_of(model: str, listed: Mapping[str, Tariff]) -> Tariff | None:
    """A price by the provider's own name of a model, which writes versions with dots or dashes."""
    wanted = model.lower().replace("-", ".")
    return next((price for name, price in listed.items() if name.replace("-", ".") == wanted), None)


def _launched(resource: MoEDeployment, best: Option, found: Found, catalog: Catalog) -> Option:
    """The cheapest option of the layout that the operator takes where the file leaves it out, if it keeps the SLO."""
    if resource.spec.parallelism != ParallelismSpec():
        return best
    plan = fit.check(_placed(resource, best.place), catalog).plan
    same = [o for o in found.options if plan is not None and (o.place, o.layout) == (best.place, plan.layout)]
    return min(same, key=search.preference, default=best)


def _launch(resource: MoEDeployment, chosen: Option, ask: Ask, catalog: Catalog) -> Launch:
    """The resource with what was chosen written into it, judged again, and the engine's arguments for it."""
    layout, seqs = chosen.layout, report.active_seqs(chosen)
    document: dict[str, Any] = resource.to_json()
    spec = document["spec"]
    spec["hardware"] = {"accelerator": chosen.place.accelerator.name, "gpusPerReplica": chosen.place.gpus}
    spec["parallelism"] = {
        "tensor": layout.tensor,
        "data": layout.data,
        "expert": layout.expert,
        "pipeline": layout.pipeline,
    }
    changed: dict[str, Any] = {"hardware": spec["hardware"], "parallelism": spec["parallelism"]}
    # What the file sets of the engine stands: the tuner's bounds lie below it.
    ceilings = {"maxActiveSeqs": seqs, "maxBatchedTokens": max(chosen.batched_tokens, seqs)}
    engine = spec.setdefault("engine", {})
    if not ceilings.keys() & engine.keys():
        engine |= ceilings
        changed["engine"] = ceilings
    experts = spec.setdefault("experts", {})
    told: dict[str, Any] = {"redundant": chosen.redundant} if chosen.redundant else {}
    if chosen.gamma is not None:
        overflow = experts.get("overflow", "Unlimited")
        told["overflow"] = "Reroute" if overflow == "Unlimited" else overflow
        told["capacityFactor"] = {**experts.get("capacityFactor", {}), "prefill": f"{chosen.gamma:g}"}
    if told:
        changed["experts"] = told
    experts |= {"redundant": chosen.redundant, **told}
    try:
        written = load_object(document)
    except ResourceInvalid as error:
        why = "; ".join(str(problem) for problem in error.problems)
        return Launch(fit.check(resource.spec, catalog), changed, None, why)
    verdict = fit.check(written.spec, catalog)
    if verdict.plan is None:
        return Launch(verdict, changed, None, verdict.message)
    plan = verdict.plan
    config = process_config.serving_config(
        written,
        revision="plan",
        source=process_config.checkpoint_source(written.spec.model, "/claims"),
        tensor=plan.tensor,
        data=plan.data,
        pipeline=plan.pipeline,
        expert_parallel=plan.expert > 1,
        max_model_len=plan.max_model_len,
        max_active_seqs=plan.max_active_seqs,
        max_batched_tokens=plan.max_batched_tokens,
        trusted_keys=(),
    )
    from moe_serving.builder import NotServable, engine_kwargs

    try:
        return Launch(verdict, changed, {"model": config.source, **engine_kwargs(config)})
    except NotServable as error:
        return Launch(verdict, changed, None, str(error))


def _fresh_share(traffic: Traffic) -> float:
    return 1.0 - traffic.input_tokens * traffic.cached_share / traffic.tokens


def _mix(arrivals: list[Arrival], chosen: Option, apis: tuple[Tariff, ...], slo: Slo, traffic: Traffic) -> Mixes | None:
    """The cheapest mix for a trace, with the first API; None without a trace or a rent."""
    rent = chosen.place.usd_per_gpu_hour
    if not arrivals or rent is None:
        return None
    decode = chosen.speed.running / chosen.speed.step_s
    replica = Replica(rent * chosen.place.gpus, chosen.speed.prefill_tokens_per_s, decode)
    trace = Trace([a.at_s for a in arrivals], [a.input_tokens for a in arrivals], [a.output_tokens for a in arrivals])
    window = slo.ttft_s or WINDOW_S
    return mixes(trace, replica, apis[0], window_s=window, cached_share=traffic.cached_share)


def _placed(resource: MoEDeployment, place: Place) -> MoEDeploymentSpec:
    """The spec on other GPUs."""
    hardware = HardwareSpec(accelerator=place.accelerator.name, gpus_per_replica=place.gpus)
    return resource.spec.model_copy(update={"hardware": hardware})


def _option(name: str) -> str:
    """The option that sets a figure."""
    named = {"tokens_per_s": "--rps or --tokens-per-month"}
    return named.get(name, name if "." in name else f"--{name.replace('_', '-')}")
