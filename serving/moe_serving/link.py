"""A replica's link to the board: fetch knobs, acknowledge them, report each second; survives the board's death."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from moe_core.clock import Clock
from moe_core.log import Log
from moe_core.signing import CommandInvalid, SignatureRefused, Verifier
from moe_core.wire import Knobs, Signed
from moe_serving.control import Control, EngineDead

DIGEST_EVERY_S = 1.0
WAIT_S = 10.0
RETRY_S = 0.5


class BoardCalls(Protocol):
    """The board's side, by Ray actor calls or, in tests, the board itself."""

    async def register(self, replica: str, ranks: int, has: dict[str, Any] | None) -> None: ...
    async def wait(self, replica: str, version: int, timeout_s: float) -> dict[str, Any]: ...
    async def acknowledge(self, asked: int, acks: list[dict[str, Any]]) -> None: ...
    async def report(self, digest: dict[str, Any]) -> bool: ...
    async def matrix(self, replica: str, matrix: dict[str, Any]) -> None: ...


class Link:
    """Runs until cancelled. `connect` finds the board, or makes it, and is called again whenever it is lost."""

    def __init__(
        self,
        control: Control,
        connect: Callable[[], Awaitable[BoardCalls]],
        verifier: Verifier,
        clock: Clock,
        log: Log,
    ) -> None:
        self._control = control
        self._connect = connect
        self._verifier = verifier
        self._clock = clock
        self._log = log
        self._envelope: Signed | None = None
        self._asked = 0
        self._last: tuple[int, list[dict[str, Any]]] | None = None

    async def run(self) -> None:
        """Keep the link up, whatever fails. Only an engine that died ends it (EngineDead, in a group)."""
        while True:
            try:
                board = await self._connect()
                has = None if self._envelope is None else self._envelope.to_json()
                await board.register(self._control.replica, self._control.rank_count, has)
                if self._last is not None:
                    # A board that died has forgotten them.
                    await board.acknowledge(*self._last)
                self._asked = self._control.version
                self._log.info("registered with the board", replica=self._control.replica)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._follow(board))
                    group.create_task(self._report(board))
            except* EngineDead:
                raise
            except* Exception as failed:
                first = failed.exceptions[0]
                self._log.warning("the link is interrupted", reason=f"{type(first).__name__}: {first}")
            await self._clock.sleep(RETRY_S)

    async def _follow(self, board: BoardCalls) -> None:
        while True:
            answer = await board.wait(self._control.replica, self._asked, WAIT_S)
            if not answer["known"]:
                raise _Lost("the board does not know this replica")
            if answer["matrix"]:
                await board.matrix(self._control.replica, await self._control.matrix())
            if answer["knobs"] is not None:
                await self._take(board, Signed.model_validate(answer["knobs"]))

    async def _take(self, board: BoardCalls, envelope: Signed) -> None:
        try:
            knobs = self._verifier.open(envelope, Knobs)
        except (SignatureRefused, CommandInvalid) as error:
            self._log.error("knobs from the board refused", reason=str(error))
            await self._clock.sleep(WAIT_S)
            return
        acks = await self._control.apply(knobs)
        errors = sorted({ack.error for ack in acks if ack.error})
        # What was refused is acknowledged with the error, and not asked for again until a newer version comes.
        self._asked = knobs.version
        if errors:
            self._log.warning("knobs refused by the engine", version=knobs.version, reason="; ".join(errors))
        else:
            self._envelope = envelope
            self._log.info("knobs in force", version=knobs.version, replica=self._control.replica)
        self._last = (knobs.version, [ack.to_json() for ack in acks])
        await board.acknowledge(*self._last)

    async def _report(self, board: BoardCalls) -> None:
        while True:
            digest = await self._control.digest()
            if not await board.report(digest.to_json()):
                raise _Lost("the board does not know this replica")
            await self._clock.sleep(DIGEST_EVERY_S)


class _Lost(Exception):
    """The board has forgotten this replica."""
