"""Stores of a budget that every pod can reach: PostgreSQL and Valkey (or Redis), by address."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import asyncpg
from valkey import asyncio as valkey
from valkey.exceptions import ValkeyError

from moe_gateway.money_store import StoreGone, Versioned

T = TypeVar("T")
CONNECT_S = 2.0
CALL_S = 2.0


class PostgresStore:
    """A row of table `moestack_budget`, over one connection, made anew when it broke. The table is made where it is
    missing; commits are as durable as the server's `synchronous_commit` says."""

    report_every_s = 1.0
    _TABLE = (
        "CREATE TABLE IF NOT EXISTS moestack_budget"
        " (deployment TEXT PRIMARY KEY, version BIGINT NOT NULL, document BYTEA NOT NULL)"
    )

    def __init__(self, url: str, deployment: str) -> None:
        self._url = url
        self._deployment = deployment
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()

    async def read(self) -> Versioned | None:
        async def work(connection: asyncpg.Connection) -> Versioned | None:
            select = "SELECT version, document FROM moestack_budget WHERE deployment = $1"
            row = await connection.fetchrow(select, self._deployment)
            return None if row is None else Versioned(str(row["version"]), bytes(row["document"]))

        return await self._run(work)

    async def swap(self, version: str | None, document: bytes) -> bool:
        async def work(connection: asyncpg.Connection) -> bool:
            if version is None:
                insert = "INSERT INTO moestack_budget VALUES ($1, 1, $2) ON CONFLICT DO NOTHING"
                return str(await connection.execute(insert, self._deployment, document)) == "INSERT 0 1"
            update = (
                "UPDATE moestack_budget SET version = version + 1, document = $1 WHERE deployment = $2 AND version = $3"
            )
            return str(await connection.execute(update, document, self._deployment, int(version))) == "UPDATE 1"

        return await self._run(work)

    async def close(self) -> None:
        async with self._turn:
            await self._disconnect()

    async def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _run(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        async with self._turn:
            try:
                if self._connection is None or self._connection.is_closed():
                    self._connection = await asyncpg.connect(self._url, timeout=CONNECT_S, command_timeout=CALL_S)
                    await self._connection.execute(self._TABLE)
                return await work(self._connection)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError) as error:
                await self._disconnect()
                # The address holds a password; what the driver says may quote it.
                raise StoreGone(f"PostgreSQL: {type(error).__name__}") from None
            except BaseException:
                await self._disconnect()
                raise


class ValkeyStore:
    """A hash under one key. A server that forgets writes when it restarts (appendonly no) forgets money with them."""

    report_every_s = 1.0
    _SWAP = """
local newest = redis.call('HGET', KEYS[1], 'version')
if (newest or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'document', ARGV[3])
return 1
"""

    def __init__(self, url: str, deployment: str) -> None:
        self._key = f"moestack:budget:{deployment}"
        try:
            self._client = valkey.from_url(  # type: ignore[no-untyped-call]
                url, socket_connect_timeout=CONNECT_S, socket_timeout=CALL_S, single_connection_client=False
            )
        except ValueError:
            raise StoreGone("Valkey: the address is not one, such as valkey://host:6379/0") from None

    async def read(self) -> Versioned | None:
        async def work() -> Versioned | None:
            version, document = await self._client.hmget(self._key, ["version", "document"])
            return None if version is None else Versioned(version.decode(), document)

        return await self._run(work)

    async def swap(self, version: str | None, document: bytes) -> bool:
        async def work() -> bool:
            following = str(int(version or 0) + 1)
            done = self._client.eval(self._SWAP, 1, self._key, version or "", following, document)
            return int(await done) == 1

        return await self._run(work)

    async def close(self) -> None:
        await self._client.aclose()

    async def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            return await work()
        except (ValkeyError, OSError, ValueError) as error:
            raise StoreGone(f"Valkey: {type(error).__name__}") from None
