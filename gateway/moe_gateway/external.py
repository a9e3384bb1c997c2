"""Load of engines that are not ours: their own metrics, polled each second, in our terms; and told on in our names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import aiohttp
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from moe_core import foreign, metrics
from moe_core.config import ForeignMetrics
from moe_core.forecast import EngineReport
from moe_core.foreign import ForeignLoad, NotUnderstood
from moe_gateway.boards import POLL_S, TIMEOUT_S, Board, of_others
from moe_gateway.state import Gateway

MAX_BYTES = 4 * 1024 * 1024
REPLICA = "external"
"""Label `replica` of an engine whose replicas nobody shows us."""


@dataclass
class _Engine:
    """What is remembered of one engine between polls."""

    metrics: ForeignMetrics
    board: Board
    load: ForeignLoad | None = None


class ExternalPoller:
    """Keeps `Upstream.report` of every revision that is an external engine."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._engines: list[_Engine] = []

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            for engine in self.engines:
                await self.poll(engine)
            await self._gateway.clock.sleep(POLL_S)

    @property
    def engines(self) -> list[_Engine]:
        """The external engines of the configuration in force. One that stays keeps what is remembered of it."""
        gateway = self._gateway
        known = {(engine.board.url, id(engine.board.upstream)): engine for engine in self._engines}
        found = []
        for revision in gateway.config.revisions:
            if revision.metrics is not None:
                upstream = gateway.upstreams[revision.name]
                engine = known.get((revision.metrics.url, id(upstream)))
                if engine is None or engine.metrics != revision.metrics:
                    engine = _Engine(revision.metrics, Board(revision.metrics.url, upstream))
                found.append(engine)
        self._engines = found
        return found

    def loads(self) -> dict[str, ForeignLoad]:
        """What each engine that answers said last, by revision."""
        return {engine.board.upstream.name: engine.load for engine in self._engines if engine.load is not None}

    async def poll(self, engine: _Engine) -> None:
        """Read one engine's metrics. One that cannot be read widens the forecast and stops nothing."""
        board, log = engine.board, self._gateway.log.bind(revision=engine.board.upstream.name)
        try:
            load = foreign.read(
                await self._text(engine.metrics.url), foreign.names_of(engine.metrics.dialect, engine.metrics.names)
            )
        except (aiohttp.ClientError, TimeoutError, NotUnderstood, UnicodeDecodeError) as error:
            if board.reachable:
                detail = str(error) or type(error).__name__
                log.warning("the engine's metrics cannot be read; forecasts go by the ledger alone", detail=detail)
            board.reachable, engine.load = False, None
            return
        if not board.reachable or engine.load is None:
            log.info("the engine's metrics are read", missing=list(load.missing))
        board.reachable, engine.load = True, load
        now_s = self._gateway.clock.monotonic()
        # An engine that tells no queue leaves nothing to set against the ledger.
        if load.running is not None and load.waiting is not None:
            sent = self._gateway.load(board.upstream, now_s)
            board.upstream.report = report(board, load, now_s, (sent.waiting, sent.running))
            board.upstream.report_at_s = now_s

    async def _text(self, url: str) -> str:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with self._gateway.client.get(url, timeout=timeout, allow_redirects=False) as response:
            if response.status != 200:
                raise NotUnderstood(f"HTTP {response.status}")
            body = await response.content.read(MAX_BYTES)
            while len(body) < MAX_BYTES and (more := await response.content.read(MAX_BYTES - len(body))):
                body += more
            return body.decode()


def report(board: Board, load: ForeignLoad, now_s: float, known: tuple[int, int] | None = None) -> EngineReport:
    """An engine's load as the forecast reads it. A cache whose usage is not told counts as free."""
    running, waiting = load.running or 0, load.waiting or 0
    if known is None:
        own_waiting, _, own_running = board.upstream.ledger.counts(now_s)
        known = (own_waiting, own_running)
    foreign_running, foreign_waiting = of_others(board, running, waiting, known)
    return EngineReport(
        running=running,
        waiting=waiting,
        kv_usage=load.kv_usage or 0.0,
        active_limit=load.limit,
        age_s=0.0,
        foreign_running=foreign_running,
        foreign_waiting=foreign_waiting,
    )


_NUMBERS: tuple[tuple[metrics.Metric, Callable[[ForeignLoad], float | None]], ...] = (
    (metrics.ENGINE_RUNNING, lambda load: load.running),
    (metrics.ENGINE_WAITING, lambda load: load.waiting),
    (metrics.ENGINE_KV_USAGE, lambda load: load.kv_usage),
    (metrics.ENGINE_ACTIVE_LIMIT, lambda load: load.active_limit),
    (metrics.ENGINE_PROMPT_TOKENS, lambda load: load.prompt_tokens),
    (metrics.ENGINE_OUTPUT_TOKENS, lambda load: load.generation_tokens),
)
_HISTOGRAMS: tuple[tuple[metrics.Metric, Callable[[ForeignLoad], foreign.Histogram | None]], ...] = (
    (metrics.ENGINE_TTFT, lambda load: load.ttft),
    (metrics.ENGINE_ITL, lambda load: load.itl),
)


class ExternalCollector(Collector):
    """An external engine's numbers under the names that our own engines have. Says nothing that it was not told."""

    def __init__(self, deployment: str, poller: ExternalPoller) -> None:
        self._deployment = deployment
        self._poller = poller

    def collect(self) -> Iterator[Family]:
        loads = self._poller.loads()
        for row, number in _NUMBERS:
            family = metrics.family(row)
            for name, load in loads.items():
                value = number(load)
                if value is not None:
                    family.add_metric([self._deployment, name, REPLICA], float(value))
            if family.samples:
                yield family
        for row, histogram in _HISTOGRAMS:
            told = HistogramMetricFamily(row.name, row.help, labels=row.labels)
            for name, load in loads.items():
                seen = histogram(load)
                if seen is not None:
                    buckets = [("+Inf" if bound == math.inf else repr(bound), count) for bound, count in seen.buckets]
                    told.add_metric([self._deployment, name, REPLICA], buckets, seen.sum_s)
            if told.samples:
                yield told
