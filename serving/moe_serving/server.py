"""MoEServer: Ray Serve's LLMServer with hot knobs and expert load."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.llm.deployment import DPServer, LLMServer

from moe_core.clock import SystemClock
from moe_core.config import ServingConfig
from moe_core.log import configure, get_log
from moe_core.signing import Verifier
from moe_core.wire import Knobs
from moe_serving import board
from moe_serving.builder import CORES, rank_cores
from moe_serving.control import AsyncLLMEngine, Control
from moe_serving.hardware import peaks_of
from moe_serving.link import BoardCalls, Link

log = get_log("replica")


class MoEServer(LLMServer):  # type: ignore[misc]  # ray ships no types
    """A replica: one vLLM engine, expert parallel, linked to the application's board."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits constructors
        self, llm_config: Any, *, serving: dict[str, Any]
    ) -> None:
        configure()
        self._serving = ServingConfig.model_validate(serving)
        if os.path.isdir(self._serving.source):  # noqa: ASYNC240  # once, before anything is served
            # A checkpoint that lies here needs no task on each node that looks for it.
            llm_config.get_or_create_callback().ctx.run_init_node = False
        await super().__init__(llm_config)
        self._control = Control(
            AsyncLLMEngine(self.engine._engine_client),
            _replica_name(),
            self._serving.revision,
            model=self._serving.model,
            peak=partial(peaks_of, self._serving.accelerator),
        )
        layers = await self._control.start()
        log.info(
            "engine is up",
            ranks=self._control.rank_count,
            hooked=sum(1 for layer in layers if layer["hooked"]),
            bypassed={layer["name"]: layer["why"] for layer in layers if not layer["hooked"]},
            counted_only={layer["name"]: layer["why"] for layer in layers if layer["hooked"] and layer["why"]},
            ruled_out=layers[0]["ruled_out"] if layers else {},
        )
        if self._serving.boot_knobs is not None:
            await self._control.boot(self._serving.boot_knobs)
        link = Link(self._control, self._connect, Verifier(self._serving.trusted_keys), SystemClock(), log)
        self._link = asyncio.create_task(link.run())
        self._link.add_done_callback(_report_end)

    async def _start_engine(self) -> None:
        """Start the engine, without the usage report that Ray's own server sends after it."""
        await self.engine.start()

    async def check_health(self) -> None:
        """Healthy while the engine is, and while knobs can reach it."""
        await super().check_health()
        link = getattr(self, "_link", None)
        if link is not None and link.done():
            raise RuntimeError("the link to the board has ended")

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """What a replica boots with. It is not the path of a change: the board is."""
        if user_config and self._control.version == 0:
            await self._control.boot(Knobs.model_validate(user_config))

    async def _connect(self) -> BoardCalls:
        config = self._serving
        handle = board.actor(
            config.deployment, config.revision, list(config.trusted_keys), config.board_host, config.board_port
        )
        await handle.start.remote()
        return _ActorCalls(handle)


class MoEGangServer(MoEServer, DPServer):  # type: ignore[misc]  # ray ships no types
    """A replica that is one rank of data-parallel attention: it has its own requests, engine core and knobs, and its
    gang holds the experts together. Serve starts and restarts gangs whole.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits constructors
        self, llm_config: Any, *, serving: dict[str, Any]
    ) -> None:
        bound = os.environ.get(CORES)
        if bound is not None:
            # Each engine of a gang takes itself for the first of its machine.
            rank = serve.get_replica_context().gang_context.rank
            os.environ[CORES] = rank_cores(bound, rank, int(serving.get("tensorParallel", 1)))
        await super().__init__(llm_config, serving=serving)


class _ActorCalls:
    """Board calls over Ray."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def register(self, replica: str, ranks: int, has: dict[str, Any] | None) -> None:
        await self._handle.register.remote(replica, ranks, has)

    async def wait(self, replica: str, version: int, timeout_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = await self._handle.wait.remote(replica, version, timeout_s)
        return answer

    async def acknowledge(self, asked: int, acks: list[dict[str, Any]]) -> None:
        await self._handle.acknowledge.remote(asked, acks)

    async def report(self, digest: dict[str, Any]) -> bool:
        known: bool = await self._handle.report.remote(digest)
        return known

    async def matrix(self, replica: str, matrix: dict[str, Any]) -> None:
        await self._handle.matrix.remote(replica, matrix)


def _replica_name() -> str:
    """Short name of this replica: Serve's unique id, or the process where Serve does not run it."""
    try:
        return str(serve.get_replica_context().replica_tag).split("#")[-1]
    except RayServeException:
        return f"process-{os.getpid()}"


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        # The engine died: Serve's health check replaces this replica.
        log.error("the link ended", reason=f"{type(task.exception()).__name__}: {task.exception()}")
