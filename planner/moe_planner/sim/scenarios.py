"""Worlds and workloads from a file in the form of the project's scenarios.json (docs/simulator.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moe_planner.sim import fields
from moe_planner.sim.engine import Engine
from moe_planner.sim.experts import Drift, Experts
from moe_planner.sim.fields import Fields, ScenarioInvalid
from moe_planner.sim.invalid import Invalid
from moe_planner.sim.workload import Arrivals, Lengths, Spikes, Workload, generate, read_trace
from moe_planner.sim.world import Api, Outage, Slo, Tier, World

T = TypeVar("T")
PACKAGED = Path(__file__).with_name("scenarios.json")
"""Made-up workloads of a plausible size, so that the command shows something before a file is written."""
BATCHED_TOKENS = 512
"""Token budget of a step where a pool names no `max_batched_tokens`: small, so that prompts hold up decodes little."""

# Every field of the form. What stands in no list is refused, so that nothing is passed over.
FILE = ("slo", "pools", "apis", "scenarios", "quality")
SLO = ("ttft_deadline_ms", "itl_p95_ms", "attained")
_TIMES = ("prefill_tokens_per_s", "itl_ms_base", "itl_ms_per_active")
_EXPERTS = ("experts", "top_k", "ranks", "gate_zipf")
POOL = (*_TIMES, "max_active", "max_batched_tokens", "kv_tokens", "usd_per_hour", *_EXPERTS)
_PRICES = ("usd_per_m_input", "usd_per_m_cached_input", "usd_per_m_output")
API = ("ttft_ms_lognormal", "itl_ms", *_PRICES, "requests_per_minute", "p_429_in_burst", "outages")
SCENARIO = (
    *("name", "pool", "replicas", "api", "seed", "trace", "generate"),
    *("expert_drift", "replica_down", "budget_usd", "tiers"),
)
_LENGTHS = ("input_lognormal", "output_lognormal")
GENERATE = ("minutes", "mean_rps", "gamma_shape", "shape_redrawn_every_s", "spikes", *_LENGTHS)
SPIKES = ("per_hour", "height", "seconds")
DRIFT = ("random_walk_sigma_per_min", "topic_switch_per_hour", "topic_zipf")
TIER = ("name", "share", "ttft_deadline_ms", "itl_p95_ms", "fallback")

# Names that the simulator's own figures have in the file.
_SLO_NAMES = {"ttft_s": "ttft_deadline_ms", "itl_s": "itl_p95_ms"}
_POOL_NAMES = {"prefill_token_s": _TIMES[0], "launch_s": _TIMES[1], "decode_s": _TIMES[1], "active_s": _TIMES[2]}
_API_NAMES = {"ttft_median_s": API[0], "ttft_p95_s": API[0], "itl_s": "itl_ms"}
_WORLD_NAMES = {"outages": "replica_down", "apis": "api"}
_DRIFT_NAMES = {"sigma_per_min": DRIFT[0], "topics_per_hour": DRIFT[1]}
_GENERATE_NAMES = {"seconds": "minutes", "rps": "mean_rps", "shape": "gamma_shape"}


@dataclass(frozen=True)
class Scenario:
    """A named world and what arrives there."""

    name: str
    world: World
    workload: Workload
    seed: int


def names(path: Path) -> list[str]:
    """Scenarios of a file, in its order."""
    return [entry.text("name") for entry in _entries(_document(path))]


def load(path: Path, name: str, *, traces: Path | None = None, scale: float = 1.0, seed: int | None = None) -> Scenario:
    """Read one scenario.

    `scale` multiplies the rate (a trace's times are divided by it); `seed` replaces the file's; a trace is looked for
    beside the file, or in `traces`. Raises ScenarioInvalid.
    """
    document = _document(path)
    known = {entry.text("name"): entry for entry in _entries(document)}
    if name not in known:
        raise ScenarioInvalid("--scenario", f"{name!r} is not in {path}", f"one of {', '.join(known)}")
    if not (math.isfinite(scale) and scale > 0):
        raise ScenarioInvalid("--scale", f"{scale:g} is no factor", "give a number above 0")
    entry = Fields(known[name].given, f"scenarios.{name}", SCENARIO)
    own = entry.whole("seed", default=0, least=0) if seed is None else seed
    world = _world(document, entry)
    if ("trace" in entry) == ("generate" in entry):
        has = "both" if "trace" in entry else "neither"
        entry.refuse("generate", f"it has {has} of trace and generate", "give one of them")
    if "trace" in entry:
        trace = (traces or path.parent) / entry.text("trace")
        workload = _named(entry, lambda: read_trace(trace).faster(scale))
    else:
        given = entry.object("generate", GENERATE)
        arrivals = _arrivals(given, scale)
        workload = _named(given, lambda: generate(arrivals, own), _GENERATE_NAMES)
        if not len(workload):
            given.refuse("mean_rps", "no request arrives", "give a higher rate, or more minutes")
    return Scenario(name, world, workload, own)


def _document(path: Path) -> Fields:
    given = fields.read(path)
    # Text at the top is for people: the form keeps its own rules there.
    return Fields({name: value for name, value in given.items() if not isinstance(value, str)}, "", FILE)


def _entries(document: Fields) -> list[Fields]:
    entries = list(document.objects("scenarios", SCENARIO))
    if not entries:
        document.refuse("scenarios", "it is empty", "give one scenario or more")
    seen: set[str] = set()
    for entry in entries:
        if (name := entry.text("name")) in seen:
            entry.refuse("name", f"{name!r} is there twice", "give each scenario a name of its own")
        seen.add(name)
    return entries


def _world(document: Fields, entry: Fields) -> World:
    pools, apis = document.object("pools"), document.object("apis")
    pool_name = entry.text("pool")
    if pool_name not in pools:
        entry.refuse("pool", f"{pool_name!r} is not in pools", f"one of {', '.join(pools.given) or 'none'}")
    chosen = entry.list("api") if "api" in entry else []
    for name in chosen:
        if not isinstance(name, str) or name not in apis:
            entry.refuse("api", f"{name!r} is not in apis", f"one of {', '.join(apis.given) or 'none'}")
    pool, slo = pools.object(pool_name, POOL), document.object("slo", SLO)
    if "quality" in document:
        document.object("quality")
    promised = _slo(slo)
    parts: dict[str, Any] = {
        "engine": _engine(pool),
        "slo": promised,
        "replicas": entry.whole("replicas", default=1, least=0),
        "apis": tuple(_api(apis.object(name, API), name) for name in chosen),
        "experts": _experts(pool, entry),
        "outages": tuple(Outage(0, *pair) for pair in entry.pairs("replica_down")),
        "budget_usd": entry.number("budget_usd") if "budget_usd" in entry else math.inf,
        "usd_per_hour": pool.number("usd_per_hour", default=0.0),
        "tiers": _tiers(entry, promised),
    }
    return _named(entry, lambda: World(**parts), _WORLD_NAMES)


def _slo(given: Fields) -> Slo:
    ttft_s, itl_s = given.number("ttft_deadline_ms") / 1e3, given.number("itl_p95_ms") / 1e3
    return _named(given, lambda: Slo(ttft_s, itl_s), _SLO_NAMES)


def _tiers(entry: Fields, slo: Slo) -> tuple[Tier, ...]:
    found = []
    for given in entry.objects("tiers", TIER) if "tiers" in entry else ():
        own = {
            "ttft_deadline_ms": given.number("ttft_deadline_ms", default=slo.ttft_s * 1e3),
            "itl_p95_ms": given.number("itl_p95_ms", default=slo.itl_s * 1e3),
        }
        promised = _slo(Fields(own, given.at))
        figures = (given.text("name"), given.number("share"), promised, given.flag("fallback", default=True))
        found.append(_tier(given, figures))
    return tuple(found)


def _tier(given: Fields, figures: tuple[str, float, Slo, bool]) -> Tier:
    return _named(given, lambda: Tier(*figures))


def _engine(pool: Fields) -> Engine:
    rate = pool.number("prefill_tokens_per_s")
    if rate <= 0:
        pool.refuse("prefill_tokens_per_s", f"{rate:g}", "it must be above 0")
    active = pool.whole("max_active")
    figures: dict[str, Any] = {
        "prefill_token_s": 1.0 / rate,
        "decode_s": pool.number("itl_ms_base") / 1e3,
        "active_s": pool.number("itl_ms_per_active") / 1e3,
        "kv_tokens": pool.whole("kv_tokens"),
        "max_active": active,
        "max_batched_tokens": pool.whole("max_batched_tokens", default=max(BATCHED_TOKENS, active)),
    }
    return _named(pool, lambda: Engine(**figures), _POOL_NAMES)


def _experts(pool: Fields, entry: Fields) -> Experts | None:
    if "experts" not in pool:
        if "expert_drift" in entry:
            entry.refuse("expert_drift", "its pool has no experts", "give the pool experts, top_k and ranks")
        for name in _EXPERTS[1:]:
            if name in pool:
                pool.refuse(name, "it is there without experts", "give experts, or leave it out")
        return None
    drift = Drift()
    if "expert_drift" in entry:
        given = entry.object("expert_drift", DRIFT)
        figures = (
            given.number("random_walk_sigma_per_min", default=0.0),
            given.number("topic_switch_per_hour", default=0.0),
            given.pair("topic_zipf", default=(0.0, 0.0)),
        )
        drift = _named(given, lambda: Drift(*figures), _DRIFT_NAMES)
    count, top_k, ranks = (pool.whole(name) for name in _EXPERTS[:3])
    zipf = pool.number("gate_zipf", default=0.0)
    return _named(pool, lambda: Experts(count, top_k, ranks, zipf, drift))


def _api(given: Fields, name: str) -> Api:
    ttft = given.object("ttft_ms_lognormal", ("median", "p95"))
    given.number("usd_per_m_cached_input", default=0.0)  # checked, not used: no prefix cache is simulated
    figures: dict[str, Any] = {
        "name": name,
        "ttft_median_s": ttft.number("median") / 1e3,
        "ttft_p95_s": ttft.number("p95") / 1e3,
        "itl_s": given.number("itl_ms") / 1e3,
        "usd_per_m_input": given.number("usd_per_m_input"),
        "usd_per_m_output": given.number("usd_per_m_output"),
        "requests_per_minute": given.number("requests_per_minute") if "requests_per_minute" in given else math.inf,
        "p_429_in_burst": given.number("p_429_in_burst", default=0.0),
        "outages": given.pairs("outages"),
    }
    return _named(given, lambda: Api(**figures), _API_NAMES)


def _arrivals(given: Fields, scale: float) -> Arrivals:
    spikes = None
    if "spikes" in given:
        inside = given.object("spikes", SPIKES)
        per_hour, height, seconds = inside.number("per_hour"), inside.number("height"), inside.pair("seconds")
        spikes = _named(inside, lambda: Spikes(per_hour, height, seconds))
    redrawn = "shape_redrawn_every_s"
    figures: dict[str, Any] = {
        "seconds": given.number("minutes") * 60.0,
        "rps": given.number("mean_rps") * scale,
        "inputs": _lengths(given.object("input_lognormal", ("median", "p99"))),
        "outputs": _lengths(given.object("output_lognormal", ("median", "p99"))),
        "shape": given.number("gamma_shape", default=1.0),
        "shape_every_s": given.number(redrawn) if redrawn in given else None,
        "spikes": spikes,
    }
    return _named(given, lambda: Arrivals(**figures), _GENERATE_NAMES)


def _lengths(given: Fields) -> Lengths:
    median, p99 = given.number("median"), given.number("p99")
    return _named(given, lambda: Lengths(median, p99))


def _named(given: Fields, make: Callable[[], T], names: Mapping[str, str] | None = None) -> T:
    """Make it; a figure that cannot be is refused under the name that the file has for it."""
    try:
        return make()
    except Invalid as error:
        raise ScenarioInvalid(
            given.path((names or {}).get(error.field, error.field)), error.message, error.remedy
        ) from None
