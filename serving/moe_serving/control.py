"""Control of one engine: put knobs in force on every rank, read what the ranks counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from moe_core.clock import Clock, SystemClock
from moe_core.log import get_log
from moe_core.wire import Ack, Knobs, ReplicaDigest
from moe_serving import digest as digests
from moe_serving.digest import Identity, Totals
from moe_serving.utilisation import UNKNOWN, Peaks, Shapes, combined

CALL_TIMEOUT_S = 30.0

log = get_log("control")

Peak = Callable[[int, int], Peaks]
"""(devices, bytes of a weight) → what the hardware can do at best."""


def _unknown(_devices: int, _weight_bytes: int) -> Peaks:
    return UNKNOWN


class EngineDead(Exception):
    """The engine is gone for good; Serve's health check replaces the replica."""


class Engine(Protocol):
    """What control needs of an engine; vLLM's AsyncLLM through `AsyncLLMEngine`, or a fake."""

    async def ranks(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a method of `WorkerExtension` on every rank, at one point between two steps."""
        ...

    async def core(self, method: str, *args: Any) -> Any:
        """Call a utility of the engine core."""
        ...


class AsyncLLMEngine:
    """vLLM's AsyncLLM as an `Engine`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def ranks(self, method: str, *args: Any) -> list[dict[str, Any]]:
        # The engine itself gets no time limit: a late answer of a rank would be read as that of the next call.
        answers = await self._bounded(self._client.collective_rpc(method, None, args, None))
        return list(answers)

    async def core(self, method: str, *args: Any) -> Any:
        return await self._bounded(self._client.engine_core.call_utility_async(method, *args))

    @staticmethod
    async def _bounded(call: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await asyncio.wait_for(call, CALL_TIMEOUT_S)
        except EngineDeadError as error:
            raise EngineDead(str(error)) from None


class Control:
    """Applies knobs whole or not at all, and builds digests."""

    def __init__(
        self,
        engine: Engine,
        replica: str,
        revision: str,
        clock: Clock | None = None,
        model: str = "",
        peak: Peak = _unknown,
    ) -> None:
        self._engine = engine
        self._clock = clock or SystemClock()
        self._who = Identity(replica, revision, self._clock.time(), model)
        self._totals = Totals()
        self._shapes: Shapes | None = None
        self._peak, self._peaks = peak, UNKNOWN
        self._changing = asyncio.Lock()
        self.version = 0
        self.rank_count = 1

    @property
    def replica(self) -> str:
        return self._who.replica

    async def start(self) -> list[dict[str, Any]]:
        """Learn the number of ranks; returns the MoE layers as the first rank sees them."""
        answers: list[Any] = await self._engine.ranks("moestack_start")
        self.rank_count = len(answers)
        layers: list[dict[str, Any]] = answers[0]
        try:
            self._shapes = combined(await self._engine.ranks("moestack_shapes"))
        except (EngineDead, TimeoutError):
            raise
        except Exception as error:
            # A model that is built in a way that we do not know is served all the same.
            log.warning("no S-MBU and S-MFU: the model's shapes cannot be read", reason=_last_line(error))
        if self._shapes is not None:
            self._peaks = self._peak(self.rank_count, self._shapes.weight_bytes)
        return layers

    async def boot(self, knobs: Knobs) -> None:
        """Put in force what the resource says, as version 0: any knobs that the board has replace it.

        Raises ValueError where the engine cannot follow.
        """
        async with self._changing:
            acks = await self._apply(knobs, 0)
        errors = sorted({ack.error for ack in acks if ack.error})
        if errors:
            raise ValueError(f"spec.{'; '.join(errors)}")

    async def apply(self, knobs: Knobs) -> list[Ack]:
        """One Ack for each rank. An older version changes nothing and is acknowledged with what is in force."""
        # A caller that is cancelled half-way must not leave limits of one version with experts of another.
        return await asyncio.shield(asyncio.ensure_future(self._apply_newer(knobs)))

    async def _apply_newer(self, knobs: Knobs) -> list[Ack]:
        async with self._changing:
            if knobs.version <= self.version:
                return [self._ack(rank, self.version, None) for rank in range(self.rank_count)]
            return await self._apply(knobs, knobs.version)

    async def _apply(self, knobs: Knobs, version: int) -> list[Ack]:
        before = await self._engine.core("moestack_scheduler_state")
        try:
            await self._engine.core(
                "moestack_set_limits", knobs.engine.max_active_seqs, knobs.engine.max_batched_tokens
            )
        except (EngineDead, TimeoutError):
            raise
        except Exception as error:
            return [self._ack(rank, self.version, _last_line(error)) for rank in range(self.rank_count)]
        payload = knobs.experts.model_dump_json(by_alias=True, exclude_none=True)
        try:
            answers = await self._engine.ranks("moestack_apply", payload, version)
        except Exception:
            await self._engine.core("moestack_set_limits", before["active_seqs"], before["batched_tokens"])
            raise
        refused = any(answer["error"] for answer in answers)
        if refused:
            # Ranks of one engine hold the same layers and refuse alike; the limits go back, so nothing is half done.
            await self._engine.core("moestack_set_limits", before["active_seqs"], before["batched_tokens"])
        else:
            self.version = version
        return [
            Ack(
                replica=self.replica,
                rank=answer["rank"],
                version=answer["version"],
                applied_at_s=answer["at_s"],
                step=answer["step"],
                error=answer["error"],
            )
            for answer in answers
        ]

    async def digest(self) -> ReplicaDigest:
        """Counters since the replica started, and the window since the digest before."""
        ranks = await self._engine.ranks("moestack_read", True)
        scheduler = await self._engine.core("moestack_scheduler_state")
        digest, self._totals = digests.build(
            self._who, self._clock.time(), ranks, scheduler, self._totals, self._shapes, self._peaks
        )
        return digest

    async def matrix(self) -> dict[str, Any]:
        """Slots of every layer and expert since the replica started: demand and assigned (an ExpertMatrix)."""
        ranks = await self._engine.ranks("moestack_read", False)
        return digests.matrix(self._who, self._clock.time(), ranks).to_json()

    def _ack(self, rank: int, version: int, error: str | None) -> Ack:
        return Ack(replica=self.replica, rank=rank, version=version, applied_at_s=self._clock.time(), error=error)


def _last_line(error: Exception) -> str:
    """The sentence of an error that crossed processes, without the traceback that some transports put before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
