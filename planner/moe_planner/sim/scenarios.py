"""Worlds and workloads from a file in the form of the project's scenarios.json (docs/simulator.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from moe_planner.sim.engine import Engine, EngineInvalid
from moe_planner.sim.experts import Drift, Experts, ExpertsInvalid
from moe_planner.sim.workload import Arrivals, Lengths, Spikes, Workload, WorkloadInvalid, generate, read_trace
from moe_planner.sim.world import Api, Outage, Slo, World, WorldInvalid

T = TypeVar("T")
PACKAGED = Path(__file__).with_name("scenarios.json")
"""Made-up workloads of a plausible size, so that the command shows something before a file is written."""
BATCHED_TOKENS = 512
"""Token budget of a step where a pool names no `max_batched_tokens`: small, so that prompts hold up decodes little."""


class ScenarioInvalid(ValueError):
    """A scenario file that cannot be used. Names the field and the remedy."""


@dataclass(frozen=True)
class Scenario:
    """A named world and what arrives there."""

    name: str
    world: World
    workload: Workload
    seed: int


def names(path: Path) -> list[str]:
    """Scenarios of a file, in its order."""
    return _names(_document(path))


def _names(document: Mapping[str, Any]) -> list[str]:
    return [_text(one, "name", f"scenarios[{i}]") for i, one in enumerate(_list(document, "scenarios", ""))]


def load(path: Path, name: str, *, traces: Path | None = None, scale: float = 1.0, seed: int | None = None) -> Scenario:
    """Read one scenario.

    `scale` multiplies the rate (a trace's times are divided by it); `seed` replaces the file's; a trace is looked for
    beside the file, or in `traces`. Raises ScenarioInvalid.
    """
    document = _document(path)
    known = _names(document)
    if name not in known:
        _refuse("--scenario", f"{name!r} is not in {path}", f"one of {', '.join(known)}")
    if not (math.isfinite(scale) and scale > 0):
        _refuse("--scale", f"{scale} is no factor", "give a number above 0")
    where = f"scenarios.{name}"
    entry = _list(document, "scenarios", "")[known.index(name)]
    own = int(_number(entry, "seed", where, default=0)) if seed is None else seed
    world = _world(document, entry, where)
    if "trace" in entry:
        trace = (traces or path.parent) / _text(entry, "trace", where)
        workload = _named(f"{where}.trace", lambda: read_trace(trace).faster(scale))
    else:
        given = _mapping(entry, "generate", where)
        workload = _named(f"{where}.generate", lambda: generate(_arrivals(given, f"{where}.generate", scale), own))
    if not len(workload):
        _refuse(where, "no request arrives", "give it a higher rate or more minutes")
    return Scenario(name, world, workload, own)


def _document(path: Path) -> Mapping[str, Any]:
    remedy = "a JSON object with slo, pools, apis and scenarios is wanted"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        _refuse(str(path), error.strerror or "cannot be read", remedy)
    except ValueError as error:
        _refuse(str(path), f"it is no JSON: {error}", remedy)
    if not isinstance(document, dict):
        _refuse(str(path), "it is no JSON object", remedy)
    return document


def _world(document: Mapping[str, Any], entry: Mapping[str, Any], where: str) -> World:
    pool_name = _text(entry, "pool", where)
    pools = _mapping(document, "pools", "")
    if pool_name not in pools:
        _refuse(f"{where}.pool", f"{pool_name!r} is not in pools", f"one of {', '.join(pools) or 'none'}")
    pool, at = _mapping(pools, pool_name, "pools"), f"pools.{pool_name}"
    slo, apis = _mapping(document, "slo", ""), _mapping(document, "apis", "")
    outages = tuple(
        Outage(0, *_pair(pair, f"{where}.replica_down[{i}]"))
        for i, pair in enumerate(_list(entry, "replica_down", where, optional=True))
    )
    chosen = _list(entry, "api", where, optional=True)
    for name in chosen:
        if name not in apis:
            _refuse(f"{where}.api", f"{name!r} is not in apis", f"one of {', '.join(apis) or 'none'}")
    return _named(
        where,
        lambda: World(
            engine=_named(at, lambda: _engine(pool, at)),
            slo=Slo(_number(slo, "ttft_deadline_ms", "slo") / 1e3, _number(slo, "itl_p95_ms", "slo") / 1e3),
            replicas=int(_number(entry, "replicas", where, default=1)),
            apis=tuple(_api(_mapping(apis, name, "apis"), name) for name in chosen),
            experts=_named(at, lambda: _experts(pool, entry, at, where)),
            outages=outages,
            usd_per_hour=_number(pool, "usd_per_hour", at, default=0.0),
        ),
    )


def _engine(pool: Mapping[str, Any], at: str) -> Engine:
    rate = _number(pool, "prefill_tokens_per_s", at)
    if rate <= 0:
        _refuse(f"{at}.prefill_tokens_per_s", f"{rate:g}", "it must be above 0")
    active = int(_number(pool, "max_active", at))
    return Engine(
        prefill_token_s=1.0 / rate,
        decode_s=_number(pool, "itl_ms_base", at) / 1e3,
        active_s=_number(pool, "itl_ms_per_active", at) / 1e3,
        kv_tokens=int(_number(pool, "kv_tokens", at)),
        max_active=active,
        max_batched_tokens=int(_number(pool, "max_batched_tokens", at, default=max(BATCHED_TOKENS, active))),
    )


def _experts(pool: Mapping[str, Any], entry: Mapping[str, Any], at: str, where: str) -> Experts | None:
    if "experts" not in pool:
        return None
    drift = Drift()
    if "expert_drift" in entry:
        given, inside = _mapping(entry, "expert_drift", where), f"{where}.expert_drift"
        drift = Drift(
            _number(given, "random_walk_sigma_per_min", inside, default=0.0),
            _number(given, "topic_switch_per_hour", inside, default=0.0),
            _pair(given.get("topic_zipf", [0.0, 0.0]), f"{inside}.topic_zipf"),
        )
    return Experts(
        int(_number(pool, "experts", at)),
        int(_number(pool, "top_k", at)),
        int(_number(pool, "ranks", at)),
        _number(pool, "gate_zipf", at, default=0.0),
        drift,
    )


def _api(given: Mapping[str, Any], name: str) -> Api:
    at = f"apis.{name}"
    ttft = _mapping(given, "ttft_ms_lognormal", at)
    return Api(  # names itself where a figure cannot be
        name=name,
        ttft_median_s=_number(ttft, "median", f"{at}.ttft_ms_lognormal") / 1e3,
        ttft_p95_s=_number(ttft, "p95", f"{at}.ttft_ms_lognormal") / 1e3,
        itl_s=_number(given, "itl_ms", at) / 1e3,
        usd_per_m_input=_number(given, "usd_per_m_input", at),
        usd_per_m_output=_number(given, "usd_per_m_output", at),
        requests_per_minute=_number(given, "requests_per_minute", at, default=math.inf),
        p_429_in_burst=_number(given, "p_429_in_burst", at, default=0.0),
        outages=tuple(
            _pair(pair, f"{at}.outages[{i}]") for i, pair in enumerate(_list(given, "outages", at, optional=True))
        ),
    )


def _arrivals(given: Mapping[str, Any], at: str, scale: float) -> Arrivals:
    spikes = None
    if "spikes" in given:
        spiked, inside = _mapping(given, "spikes", at), f"{at}.spikes"
        spikes = Spikes(
            _number(spiked, "per_hour", inside),
            _number(spiked, "height", inside),
            _pair(spiked.get("seconds"), f"{inside}.seconds"),
        )
    return Arrivals(
        seconds=_number(given, "minutes", at) * 60.0,
        rps=_number(given, "mean_rps", at) * scale,
        inputs=_lengths(given, "input_lognormal", at),
        outputs=_lengths(given, "output_lognormal", at),
        shape=_number(given, "gamma_shape", at, default=1.0),
        shape_every_s=_number(given, "shape_redrawn_every_s", at) if "shape_redrawn_every_s" in given else None,
        spikes=spikes,
    )


def _lengths(given: Mapping[str, Any], name: str, at: str) -> Lengths:
    of, inside = _mapping(given, name, at), f"{at}.{name}"
    return _named(inside, lambda: Lengths(_number(of, "median", inside), _number(of, "p99", inside)))


def _named(where: str, make: Callable[[], T]) -> T:
    """Make it; a figure that cannot be is refused under the name that the file has for it."""
    try:
        return make()
    except ScenarioInvalid:
        raise
    except (EngineInvalid, ExpertsInvalid, WorkloadInvalid, WorldInvalid) as error:
        raise ScenarioInvalid(f"{where}: {error}") from None


def _number(given: Mapping[str, Any], name: str, at: str, *, default: float | None = None) -> float:
    value = given.get(name, default)
    path = f"{at}.{name}".lstrip(".")
    if value is None:
        _refuse(path, "it is missing", "give a number")
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        _refuse(path, f"{value!r} is no number", "give a number")
    if value < 0 or (math.isinf(value) and default is None):
        _refuse(path, f"{value!r}", "give a finite number of 0 or more")
    return float(value)


def _pair(value: Any, path: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        _refuse(path, f"{value!r} is no pair", "give two numbers as [from, to]")
    pair = {"0": value[0], "1": value[1]}
    return _number(pair, "0", path), _number(pair, "1", path)


def _text(given: Mapping[str, Any], name: str, at: str) -> str:
    value = given.get(name) if isinstance(given, Mapping) else None
    if not isinstance(value, str) or not value:
        _refuse(f"{at}.{name}".lstrip("."), f"{value!r}" if value is not None else "it is missing", "give a name")
    return value


def _mapping(given: Mapping[str, Any], name: str, at: str) -> Mapping[str, Any]:
    value = given.get(name)
    if not isinstance(value, dict):
        _refuse(f"{at}.{name}".lstrip("."), "it is missing" if value is None else f"{value!r}", "give an object")
    return value


def _list(given: Mapping[str, Any], name: str, at: str, *, optional: bool = False) -> list[Any]:
    value = given.get(name, [] if optional else None)
    if not isinstance(value, list):
        _refuse(f"{at}.{name}".lstrip("."), "it is missing" if value is None else f"{value!r}", "give a list")
    return value


def _refuse(field: str, message: str, remedy: str) -> NoReturn:
    raise ScenarioInvalid(f"{field}: {message}; {remedy}")
