"""What the gateway says of itself: metrics by the common table, the digest of the last seconds, a log line."""

from __future__ import annotations

from collections import Counter as Tally
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest

from moe_core import metrics as table
from moe_core.config import SloConfig
from moe_core.log import Log
from moe_core.wire import GatewayDigest, TargetDigest
from moe_gateway.call import Call, Outcome
from moe_gateway.fleet import Fleet
from moe_gateway.gen_ai import GenAiCollector
from moe_gateway.tracing import provider_of

WINDOW_MAX_S = 300.0
EVENTS_MAX = 200_000
NONE = "none"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Finished:
    at_s: float
    target: str
    lost_at: tuple[str, ...]
    outcome: Outcome
    spilled: bool
    ttft_s: float | None
    itl_s: float | None
    met: bool | None
    prompt_tokens: int
    output_tokens: int


def slo_met(call: Call, slo: SloConfig, duration_s: float) -> bool | None:
    """Whether a finished request kept the promise; None where it makes none (the client erred or left).

    An answer that was not streamed is met when it came as fast as a stream within the SLO would have ended.
    """
    if call.outcome in {Outcome.CLIENT_ERROR, Outcome.CANCELLED}:
        return None
    if call.outcome is not Outcome.OK:
        return False
    if not call.stream:
        return duration_s <= slo.ttft_p95_s + max(0, call.output_tokens - 1) * slo.itl_p95_s
    if call.ttft_s is None:
        return duration_s <= slo.ttft_p95_s
    return call.ttft_s <= slo.ttft_p95_s and (call.itl_s is None or call.itl_s <= slo.itl_p95_s)


def sampled(number: int, share: float) -> bool:
    """Whether the request of this number is among the share that is shown: multiples of the golden ratio fill [0, 1)
    evenly, so any run of requests has its share."""
    return share >= 1 or number * 0.6180339887498949 % 1 < share


class Telemetry:
    """Counters and windows of one gateway. `now_s` is monotonic throughout."""

    def __init__(self, deployment: str, slo: SloConfig, fleet: Fleet, log: Log) -> None:
        self._deployment = deployment
        self._slo = slo
        self._log = log
        self._fleet = Fleet()
        self.registry = registry = CollectorRegistry()
        self.log_ok_share = 1.0
        self._requests = table.counter(table.GATEWAY_REQUESTS, registry)
        self._ttft = table.histogram(table.GATEWAY_TTFT, registry)
        self._itl = table.histogram(table.GATEWAY_ITL, registry)
        self._duration = table.histogram(table.GATEWAY_DURATION, registry)
        sources = {table.GEN_AI_DURATION: self._duration, table.GEN_AI_TTFT: self._ttft, table.GEN_AI_ITL: self._itl}
        registry.register(GenAiCollector(sources, self._provider_and_model))
        self._in_flight = table.gauge(table.GATEWAY_IN_FLIGHT, registry)
        self._spilled = table.counter(table.GATEWAY_SPILLED, registry)
        self._shed = table.counter(table.GATEWAY_SHED, registry)
        self._retries = table.counter(table.GATEWAY_RETRIES, registry)
        self._prompt = table.counter(table.GATEWAY_PROMPT_TOKENS, registry)
        self._output = table.counter(table.GATEWAY_OUTPUT_TOKENS, registry)
        self._spend = table.counter(table.GATEWAY_SPEND, registry)
        self._met = table.counter(table.GATEWAY_SLO, registry)
        self._version = table.gauge(table.GATEWAY_KNOBS_VERSION, registry)
        self._version.labels(deployment).set(0)
        self._weights_version = table.gauge(table.GATEWAY_WEIGHTS_VERSION, registry)
        self._config_loaded = table.gauge(table.GATEWAY_CONFIG_LOADED, registry)
        self.config_loaded(True)
        self.follow(fleet, slo)
        for result in ("met", "missed"):
            self._met.labels(deployment, result)
        self._arrivals: deque[float] = deque(maxlen=EVENTS_MAX)
        self._finished: deque[_Finished] = deque(maxlen=EVENTS_MAX)
        self._attempts: deque[tuple[float, str, bool]] = deque(maxlen=EVENTS_MAX)
        self._money: deque[tuple[float, str, Decimal]] = deque(maxlen=EVENTS_MAX)

    def follow(self, fleet: Fleet, slo: SloConfig) -> None:
        """Count for these upstreams and judge by this SLO from now on."""
        gone = self._fleet.names.keys() - fleet.names.keys()
        self._fleet, self._slo = fleet, slo
        for name in gone:
            self._in_flight.remove(self._deployment, name)
        for name, local in fleet.names.items():
            self._in_flight.labels(self._deployment, name).set_function(partial(fleet.in_flight, name))
            if not local:
                self._spend.labels(self._deployment, name)

    def arrived(self, now_s: float) -> None:
        self._arrivals.append(now_s)

    def attempted(self, now_s: float, upstream: str, failed: bool) -> None:
        """An attempt at an upstream ended; one request may have several."""
        self._attempts.append((now_s, upstream, failed))

    def retried(self, upstream: str, *, allowed: bool) -> None:
        """A request's attempt beyond its first was sent, or there was no budget for it."""
        self._retries.labels(self._deployment, upstream, "sent" if allowed else "refused").inc()

    def spent(self, now_s: float, target: str, usd: Decimal) -> None:
        self._spend.labels(self._deployment, target).inc(float(usd))
        self._money.append((now_s, target, usd))

    def knobs_version(self, version: int) -> None:
        self._version.labels(self._deployment).set(version)

    def weights_version(self, version: int) -> None:
        self._weights_version.labels(self._deployment).set(version)

    def config_loaded(self, loaded: bool) -> None:
        self._config_loaded.labels(self._deployment).set(loaded)

    def finished(self, call: Call, now_s: float) -> None:
        """Count a request that has ended, and log it."""
        deployment, target, outcome = self._deployment, call.upstream or NONE, call.outcome or Outcome.ERROR
        duration_s = now_s - call.arrived_s
        met = slo_met(call, self._slo, duration_s)
        self._requests.labels(deployment, target, call.tier, outcome.value).inc()
        if outcome is Outcome.SHED:
            self._shed.labels(deployment, call.reason.value if call.reason else "unavailable").inc()
        if call.upstream is not None:
            self._observe(call, target, duration_s)
        if met is not None:
            self._met.labels(deployment, "met" if met else "missed").inc()
        self._finished.append(
            _Finished(
                now_s,
                target,
                tuple(call.lost_at),
                outcome,
                call.spilled,
                call.ttft_s,
                call.itl_s,
                met,
                call.prompt_tokens,
                call.output_tokens,
            )
        )
        self._log_line(call, target, outcome, duration_s)

    def _observe(self, call: Call, target: str, duration_s: float) -> None:
        deployment = self._deployment
        self._duration.labels(deployment, target).observe(duration_s)
        if call.ttft_s is not None:
            self._ttft.labels(deployment, target).observe(call.ttft_s)
        if call.itl_s is not None:
            self._itl.labels(deployment, target).observe(call.itl_s)
        if call.spilled and call.reason is not None:
            self._spilled.labels(deployment, target, call.reason.value).inc()
        self._prompt.labels(deployment, target).inc(call.prompt_tokens)
        self._output.labels(deployment, target).inc(call.output_tokens)

    def _provider_and_model(self, name: str) -> tuple[str, str]:
        upstream = next((one for one in self._fleet.all if one.name == name), None)
        target = None if upstream is None else upstream.target
        return provider_of(target), "" if target is None else target.model

    def _log_line(self, call: Call, target: str, outcome: Outcome, duration_s: float) -> None:
        if outcome is Outcome.OK and not sampled(call.id, self.log_ok_share):
            return
        forecast = call.forecast
        fields = {
            "request_id": call.request_id,
            "endpoint": call.endpoint,
            "stream": call.stream,
            "tenant": call.tenant,
            "key_id": call.key_id,
            "tier": call.tier,
            "model": call.model or None,
            "prompt": call.prompt,
            "target": target,
            "reason": call.reason,
            "spilled": call.spilled,
            "blocked": call.blocked,
            "outcome": outcome.value,
            "status": call.status,
            "error": call.error,
            "attempts": call.attempts,
            "p_miss": None if forecast is None else round(forecast.p_miss, 4),
            "ttft_predicted_s": None if forecast is None else round(forecast.ttft_s, 4),
            "ttft_s": _rounded(call.ttft_s),
            "itl_s": _rounded(call.itl_s),
            "duration_s": _rounded(duration_s),
            "prompt_tokens": call.prompt_tokens,
            "output_tokens": call.output_tokens,
            "usd": str(call.usd) if call.usd else None,
        }
        self._log.info("request", **{name: value for name, value in fields.items() if value is not None})

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def counted(self, digest: GatewayDigest, now_s: float) -> GatewayDigest:
        """A digest with the counts of its window, `WINDOW_MAX_S` at most."""
        since = now_s - digest.window_s
        done = _recent(self._finished, since, lambda item: item.at_s)
        outcomes = Tally(item.outcome for item in done)
        ttft = sorted(item.ttft_s for item in done if item.ttft_s is not None)
        itl = sorted(item.itl_s for item in done if item.itl_s is not None)
        met = [item.met for item in done if item.met is not None]
        counts: dict[str, object] = {
            "arrivals": len(_recent(self._arrivals, since, lambda at: at)),
            "completed": outcomes[Outcome.OK],
            "failed": outcomes[Outcome.ERROR] + outcomes[Outcome.CUT],
            "spilled": sum(item.spilled for item in done),
            "shed": outcomes[Outcome.SHED],
            "prompt_tokens": sum(item.prompt_tokens for item in done),
            "output_tokens": sum(item.output_tokens for item in done),
            "ttft_p50_s": _quantile(ttft, 0.5),
            "ttft_p95_s": _quantile(ttft, 0.95),
            "itl_p95_s": _quantile(itl, 0.95),
            "slo_attained": sum(met) / len(met) if met else None,
            "targets": self._targets(since, done),
        }
        return digest.model_copy(update=counts)

    def _targets(self, since: float, done: list[_Finished]) -> tuple[TargetDigest, ...]:
        attempts = _recent(self._attempts, since, lambda item: item[0])
        sent = Tally(name for _, name, _ in attempts)
        failed = Tally(name for _, name, bad in attempts if bad)
        usd: dict[str, Decimal] = {}
        for _, name, amount in _recent(self._money, since, lambda item: item[0]):
            usd[name] = usd.get(name, Decimal(0)) + amount
        met = Tally(item.target for item in done if item.met)
        missed = Tally(name for item in done for name in _missed_by(item))
        return tuple(
            TargetDigest(
                name=name,
                local=local,
                requests=sent[name],
                failures=failed[name],
                met=met[name],
                missed=missed[name],
                in_flight=self._fleet.in_flight(name),
                usd=usd.get(name, Decimal(0)),
            )
            for name, local in self._fleet.names.items()
        )


def _missed_by(finished: _Finished) -> set[str]:
    """The upstreams at which a request missed the promise: where it ended late or badly, and those that lost it."""
    return {*finished.lost_at, *([finished.target] if finished.met is False else [])}


def _recent(events: deque[T], since_s: float, at: Callable[[T], float]) -> list[T]:
    """The events not older than `since_s`, oldest first."""
    found: list[T] = []
    for event in reversed(events):
        if at(event) < since_s:
            break
        found.append(event)
    found.reverse()
    return found


def _quantile(ordered: list[float], q: float) -> float | None:
    """Nearest-rank quantile of sorted values."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 5)
