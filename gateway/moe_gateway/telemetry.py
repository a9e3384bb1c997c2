"""What the gateway says of itself: metrics by the common table, the digest of the last seconds, a log line."""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from decimal import Decimal
from functools import partial

from prometheus_client import CollectorRegistry, generate_latest

from moe_api.spec import DEFAULT_TIER
from moe_core import metrics as table
from moe_core.config import SloConfig
from moe_core.log import Log, flush
from moe_core.prices import PICO, pico
from moe_core.wire import GatewayDigest, TargetDigest
from moe_gateway.call import Call, Outcome
from moe_gateway.fleet import Fleet
from moe_gateway.gen_ai import GenAiCollector
from moe_gateway.lines import line_of_request, plain
from moe_gateway.merging import Window, thinned
from moe_gateway.tallies import Counts, Spread
from moe_gateway.tracing import provider_of
from moe_gateway.windows import Attempts, Instants, Kind, Requests, Spending

WINDOW_MAX_S = 300.0
EVENTS_MAX = 200_000
NONE = "none"
OK = Outcome.OK.value
LINES_S = 0.02
"""Lines of requests that went well and cost nothing beyond are written together, so long after the first of them: what
a crash may take with it. Whatever tells of money, of data that left or of an error is written at once."""


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
        self._requests = Counts(table.GATEWAY_REQUESTS)
        self._ttft, self._itl = Spread(table.GATEWAY_TTFT), Spread(table.GATEWAY_ITL)
        self._duration = Spread(table.GATEWAY_DURATION)
        self._prompt, self._output = Counts(table.GATEWAY_PROMPT_TOKENS), Counts(table.GATEWAY_OUTPUT_TOKENS)
        self._met = Counts(table.GATEWAY_SLO)
        for mine in (self._requests, self._ttft, self._itl, self._duration, self._prompt, self._output, self._met):
            registry.register(mine)
        sources = {table.GEN_AI_DURATION: self._duration, table.GEN_AI_TTFT: self._ttft, table.GEN_AI_ITL: self._itl}
        registry.register(GenAiCollector(sources, self._provider_and_model))
        self._in_flight = table.gauge(table.GATEWAY_IN_FLIGHT, registry)
        self._breaker = table.gauge(table.GATEWAY_BREAKER_OPEN, registry)
        self._spilled = table.counter(table.GATEWAY_SPILLED, registry)
        self._shed = table.counter(table.GATEWAY_SHED, registry)
        self._retries = table.counter(table.GATEWAY_RETRIES, registry)
        self._broken = table.counter(table.GATEWAY_BROKEN, registry)
        self._spend = table.counter(table.GATEWAY_SPEND, registry)
        self._version = table.gauge(table.GATEWAY_KNOBS_VERSION, registry)
        self._version.labels(deployment).set(0)
        self._weights_version = table.gauge(table.GATEWAY_WEIGHTS_VERSION, registry)
        self._config_loaded = table.gauge(table.GATEWAY_CONFIG_LOADED, registry)
        self.config_loaded(True)
        self.follow(fleet, slo)
        for result in ("met", "missed"):
            self._met.add((deployment, DEFAULT_TIER, result), 0.0)
        self._arrivals = Instants(EVENTS_MAX)
        self._finished = Requests(EVENTS_MAX)
        self._attempts = Attempts(EVENTS_MAX)
        self._money = Spending(EVENTS_MAX)
        self._lines_wait = False

    def follow(self, fleet: Fleet, slo: SloConfig) -> None:
        """Count for these upstreams and judge by this SLO from now on."""
        gone = self._fleet.names.keys() - fleet.names.keys()
        self._fleet, self._slo = fleet, slo
        for name in gone:
            self._in_flight.remove(self._deployment, name)
            self._breaker.remove(self._deployment, name)
        for name, local in fleet.names.items():
            self._in_flight.labels(self._deployment, name).set_function(partial(fleet.in_flight, name))
            self._breaker.labels(self._deployment, name).set_function(partial(fleet.probing, name))
            if not local:
                self._spend.labels(self._deployment, name)

    def arrived(self, now_s: float) -> None:
        self._arrivals.add(now_s)

    def attempted(self, now_s: float, upstream: str, failed: bool) -> None:
        """An attempt at an upstream ended; one request may have several."""
        self._attempts.ended(now_s, upstream, failed)

    def retried(self, upstream: str, *, allowed: bool) -> None:
        """A request's attempt beyond its first was sent, or there was no budget for it."""
        self._retries.labels(self._deployment, upstream, "sent" if allowed else "refused").inc()

    def broke(self, upstream: str, how: str, why: str) -> None:
        """It was decided how a stream goes on that broke, or why it does not."""
        self._broken.labels(self._deployment, upstream, how, why).inc()

    def spent(self, now_s: float, target: str, usd: Decimal) -> None:
        self._spend.labels(self._deployment, target).inc(float(usd))
        self._money.spent(now_s, target, pico(usd))

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
        met = slo_met(call, call.slo or self._slo, duration_s)
        ended = outcome.value
        self._requests.add((deployment, target, call.tier, ended))
        if outcome is Outcome.SHED:
            self._shed.labels(deployment, call.reason.value if call.reason else "unavailable").inc()
        if call.upstream is not None:
            self._observe(call, target, duration_s)
        if met is not None:
            self._met.add((deployment, call.tier, "met" if met else "missed"))
        kind = (target, (*call.lost_at, *call.broke_at), ended, call.spilled, met)
        self._finished.ended(now_s, kind, call.ttft_s, call.itl_s, call.prompt_tokens, call.output_tokens)
        if outcome is not Outcome.OK or sampled(call.id, self.log_ok_share):
            self._log_line(call, target, ended, duration_s)

    def _observe(self, call: Call, target: str, duration_s: float) -> None:
        labels = (self._deployment, target)
        self._duration.observe(labels, duration_s)
        if call.ttft_s is not None:
            self._ttft.observe(labels, call.ttft_s)
        if call.itl_s is not None:
            self._itl.observe(labels, call.itl_s)
        if call.spilled and call.reason is not None:
            self._spilled.labels(self._deployment, call.spilled_to or target, call.reason.value).inc()
        self._prompt.add(labels, call.prompt_tokens)
        carried = call.carried_tokens if call.broke_at else 0
        if carried:
            self._output.add((self._deployment, call.broke_at[-1]), carried)
        self._output.add(labels, call.output_tokens - carried)

    def _provider_and_model(self, name: str) -> tuple[str, str]:
        upstream = next((one for one in self._fleet.all if one.name == name), None)
        target = None if upstream is None else upstream.target
        return provider_of(target), "" if target is None else target.model

    def _log_line(self, call: Call, target: str, outcome: str, duration_s: float) -> None:
        fields = line_of_request(call, target, outcome, duration_s)
        if outcome != OK or not plain(call):
            self._log.info("request", **fields)
        elif self._log.info_soon("request", fields) and not self._lines_wait:
            self._lines_wait = True
            asyncio.get_running_loop().call_later(LINES_S, self._flush)

    def _flush(self) -> None:
        self._lines_wait = False
        flush()

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def counted(self, digest: GatewayDigest, now_s: float) -> GatewayDigest:
        """A digest with the counts of its window, `WINDOW_MAX_S` at most."""
        since = now_s - digest.window_s
        requests = self._finished
        done = list(requests.since(since))
        kinds = Tally(requests.kind[index] for index in done)
        of = [(kind, count) for kind, count in kinds.items() if kind is not None]
        outcomes: Tally[str] = Tally()
        for kind, count in of:
            outcomes[kind.outcome] += count
        ttft, itl = requests.times(done)
        judged = sum(count for kind, count in of if kind.met is not None)
        met = sum(count for kind, count in of if kind.met)
        counts: dict[str, object] = {
            "arrivals": sum(1 for _ in self._arrivals.since(since)),
            "completed": outcomes[Outcome.OK.value],
            "failed": outcomes[Outcome.ERROR.value] + outcomes[Outcome.CUT.value],
            "spilled": sum(count for kind, count in of if kind.spilled),
            "shed": outcomes[Outcome.SHED.value],
            "prompt_tokens": sum(requests.prompt_tokens[index] for index in done),
            "output_tokens": sum(requests.output_tokens[index] for index in done),
            "ttft_p50_s": _quantile(ttft, 0.5),
            "ttft_p95_s": _quantile(ttft, 0.95),
            "itl_p95_s": _quantile(itl, 0.95),
            "slo_attained": met / judged if judged else None,
            "targets": self._targets(since, of),
        }
        return digest.model_copy(update=counts)

    def window(self, digest: GatewayDigest, now_s: float) -> Window:
        """A digest with what quantiles over several workers need."""
        requests = self._finished
        done = list(requests.since(now_s - digest.window_s))
        ttft, itl = requests.times(done)
        return Window(
            digest=digest,
            judged=sum(1 for index in done if (kind := requests.kind[index]) is not None and kind.met is not None),
            ttft_count=len(ttft),
            itl_count=len(itl),
            ttft_s=thinned(ttft),
            itl_s=thinned(itl),
        )

    def _targets(self, since: float, of: list[tuple[Kind, int]]) -> tuple[TargetDigest, ...]:
        """Of each upstream; `of`: requests that have ended, by kind."""
        sent: Tally[str] = Tally()
        failed: Tally[str] = Tally()
        for index in self._attempts.since(since):
            sent[self._attempts.upstream[index]] += 1
            failed[self._attempts.upstream[index]] += self._attempts.failed[index]
        owed: Tally[str] = Tally()
        for index in self._money.since(since):
            owed[self._money.target[index]] += self._money.pico[index]
        met: Tally[str] = Tally()
        missed: Tally[str] = Tally()
        for kind, count in of:
            met[kind.target] += count if kind.met else 0
            for name in _missed_by(kind):
                missed[name] += count
        return tuple(
            TargetDigest(
                name=name,
                local=local,
                requests=sent[name],
                failures=failed[name],
                met=met[name],
                missed=missed[name],
                in_flight=self._fleet.in_flight(name),
                usd=owed[name] / PICO,
            )
            for name, local in self._fleet.names.items()
        )


def _missed_by(kind: Kind) -> set[str]:
    """The upstreams at which a request missed the promise: where it ended late or badly, and those that lost it."""
    return {*kind.lost_at, *([kind.target] if kind.met is False else [])}


def _quantile(ordered: list[float], q: float) -> float | None:
    """Nearest-rank quantile of sorted values."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None
