"""Optuna's journal in PostgreSQL, so that studies move with the tuner: an append-only table, over asyncpg.

Optuna's own database storage asks for a driver that blocks; asyncpg is here already. The journal storage rebuilds a
study from its log, and needs nothing but reading from a number on and appending in order. Blocking, as Optuna is:
each call runs on a loop of this storage's own, in the thread that called.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import asyncpg
import orjson
from optuna.storages.journal import BaseJournalBackend

T = TypeVar("T")
CONNECT_S = 3.0
CALL_S = 5.0
_TABLE = (
    "CREATE TABLE IF NOT EXISTS moestack_studies"
    " (study TEXT NOT NULL, number BIGINT NOT NULL, entry TEXT NOT NULL, PRIMARY KEY (study, number))"
)
_NEXT = "SELECT COALESCE(MAX(number) + 1, 0) FROM moestack_studies WHERE study = $1"


class PostgresGone(OSError):
    """The database gave no answer. Its words are not repeated: they may hold its address."""


class PostgresJournal(BaseJournalBackend):
    """The log of one study, by name. Not for several threads at once: the caller has one."""

    def __init__(self, url: str, study: str) -> None:
        self._url = url
        self._study = study
        self._loop = asyncio.new_event_loop()
        self._connection: asyncpg.Connection | None = None

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        async def work(connection: asyncpg.Connection) -> list[dict[str, Any]]:
            query = "SELECT entry FROM moestack_studies WHERE study = $1 AND number >= $2 ORDER BY number"
            rows = await connection.fetch(query, self._study, log_number_from)
            return [orjson.loads(row["entry"]) for row in rows]

        return self._run(work)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        async def work(connection: asyncpg.Connection) -> None:
            async with connection.transaction():
                # Two tuners during a hand-over: the second waits here, and its entries come after.
                await connection.execute("SELECT pg_advisory_xact_lock(hashtext($1))", self._study)
                first = int(await connection.fetchval(_NEXT, self._study))
                rows = [(self._study, first + place, orjson.dumps(log).decode()) for place, log in enumerate(logs)]
                await connection.executemany("INSERT INTO moestack_studies VALUES ($1, $2, $3)", rows)

        self._run(work)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._disconnect())
            self._loop.close()

    def _run(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        async def call() -> T:
            if self._connection is None or self._connection.is_closed():
                self._connection = await asyncpg.connect(self._url, timeout=CONNECT_S, command_timeout=CALL_S)
                await self._connection.execute(_TABLE)
            return await work(self._connection)

        try:
            return self._loop.run_until_complete(asyncio.wait_for(call(), CONNECT_S + 2 * CALL_S))
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            self._loop.run_until_complete(self._disconnect())
            raise PostgresGone(type(error).__name__) from None

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                await connection.close(timeout=1.0)
