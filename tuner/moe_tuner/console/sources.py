"""Asks boards and gateways for what a page wants to see: one call at a time for one thing, answers kept briefly.

So any number of open pages costs a deployment what one does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import aiohttp
from pydantic import TypeAdapter, ValidationError

from moe_core.clock import Clock
from moe_core.config import TunerConfig
from moe_core.costs import CostReport
from moe_core.expert_load import since
from moe_core.http import HttpError, call_json
from moe_core.wire import ExpertMatrix, GatewayDigest, ReplicaDigest
from moe_tuner.console.answers import Costs, costs

ASK_S, EXPERTS_S = 2.0, 8.0
COSTS_KEPT_S, EXPERTS_KEPT_S = 10.0, 2.0
WINDOW_LEAST_S, WINDOW_KEPT = 8.0, 6
"""The window of the live map: the shortest, and how many matrices are remembered for it."""
BOARDS_KEPT = 8
"""Boards looked at last, whose matrices are remembered."""
MOST_BYTES = 32 * 2**20
DIGEST_WINDOW_S = 300
V = TypeVar("V")
_MATRICES = TypeAdapter(list[ExpertMatrix])
_REPLICAS = TypeAdapter(tuple[ReplicaDigest, ...])


class Unanswered(Exception):
    """Nobody answered; the message is for the page."""


class Kept(Generic[V]):
    """One answer for each key, asked for again when it is older than `kept_s`. Failures are kept as long."""

    def __init__(self, clock: Clock, kept_s: float) -> None:
        self._clock, self._kept_s = clock, kept_s
        self._asked: dict[str, tuple[float, asyncio.Task[V]]] = {}

    async def get(self, key: str, ask: Callable[[], Awaitable[V]]) -> V:
        now_s = self._clock.monotonic()
        for old in [k for k, (at_s, task) in self._asked.items() if task.done() and now_s - at_s > self._kept_s]:
            self._asked.pop(old)
        if key not in self._asked:
            self._asked[key] = (now_s, asyncio.ensure_future(ask()))
        # Shielded: a page that is closed must not take the answer from the others.
        return await asyncio.shield(self._asked[key][1])

    async def close(self) -> None:
        for _, task in self._asked.values():
            task.cancel()
        await asyncio.gather(*(task for _, task in self._asked.values()), return_exceptions=True)


class Sources:
    """Costs and expert loads of deployments, by their configuration."""

    def __init__(
        self,
        client: aiohttp.ClientSession,
        clock: Clock,
        usd_per_gpu_hour: float | None,
        shown: Callable[[str], str | None],
    ) -> None:
        """`shown`: the pass that opens what belongs to a deployment."""
        self._client, self._clock, self._rent, self._shown = client, clock, usd_per_gpu_hour, shown
        self._costs = Kept[Costs](clock, COSTS_KEPT_S)
        self._matrices = Kept[list[ExpertMatrix]](clock, EXPERTS_KEPT_S)
        self._before: dict[str, list[dict[str, ExpertMatrix]]] = {}

    async def close(self) -> None:
        await self._costs.close()
        await self._matrices.close()

    async def costs(self, config: TunerConfig) -> Costs:
        """Raises Unanswered."""
        return await self._costs.get(config.deployment, lambda: self._ask_costs(config))

    async def experts(self, config: TunerConfig, *, since_start: bool) -> list[ExpertMatrix]:
        """All replicas' matrices, of the last seconds or since they started. Raises Unanswered."""
        found = await self._matrices.get(config.board_url, lambda: self._ask_experts(config))
        if since_start or not found:
            return found
        before = self._window(config.board_url, found)
        return [since(before.get(matrix.replica, matrix), matrix) for matrix in found]

    def _window(self, board: str, found: list[ExpertMatrix]) -> dict[str, ExpertMatrix]:
        """The matrices that the window begins with: the youngest that are old enough, else the oldest there are."""
        kept = self._before[board] = self._before.pop(board, [])
        while len(self._before) > BOARDS_KEPT:
            self._before.pop(next(iter(self._before)))
        if not kept or all(kept[-1].get(m.replica) != m for m in found):
            kept.append({matrix.replica: matrix for matrix in found})
            del kept[:-WINDOW_KEPT]
        now_s = max(matrix.at_s for matrix in found)
        old = [row for row in kept if now_s - max(m.at_s for m in row.values()) >= WINDOW_LEAST_S]
        return old[-1] if old else kept[0]

    async def _ask_experts(self, config: TunerConfig) -> list[ExpertMatrix]:
        board, shown = config.board_url.rstrip("/"), self._shown(config.deployment)
        raw = await self._ask(f"{board}/v1/experts", shown, EXPERTS_S, "the board")
        return self._read(_MATRICES.validate_python, raw, "the board")

    async def _ask_costs(self, config: TunerConfig) -> Costs:
        """From the first gateway that answers: all of them share one set of books."""
        said, shown = "no gateway is configured", self._shown(config.deployment)
        for url in config.gateway_admin_urls:
            base = url.rstrip("/")
            try:
                raw = await self._ask(f"{base}/v1/costs", shown, ASK_S, "the gateway")
                report = self._read(CostReport.model_validate, raw, "the gateway")
                raw = await self._ask(f"{base}/v1/digest?window={DIGEST_WINDOW_S}", shown, ASK_S, "the gateway")
                digest = self._read(GatewayDigest.model_validate, raw, "the gateway")
            except Unanswered as error:
                said = str(error)
                continue
            return costs(report, digest, await self._replicas(config.board_url, shown), self._rent)
        raise Unanswered(said)

    async def _replicas(self, board: str, shown: str | None) -> tuple[ReplicaDigest, ...]:
        if self._rent is None:
            return ()
        try:
            raw = await self._ask(f"{board.rstrip('/')}/v1/digests", shown, ASK_S, "the board")
            return self._read(_REPLICAS.validate_python, raw, "the board")
        except Unanswered:
            return ()

    async def _ask(self, url: str, shown: str | None, total_s: float, who: str) -> Any:
        try:
            return await call_json(self._client, "GET", url, total_s=total_s, max_bytes=MOST_BYTES, token=shown)
        except HttpError as error:
            # Its address is no business of who may only look.
            why = f"HTTP {error.status}" if error.status else "no answer"
            raise Unanswered(f"{who} does not say: {why}") from None

    def _read(self, parse: Callable[[Any], V], raw: Any, who: str) -> V:
        try:
            return parse(raw)
        except ValidationError:
            raise Unanswered(f"{who} is of another release: its answer cannot be read") from None
