"""Where the books of a budget lie: one versioned document, read and swapped whole. The port, and two of its stores.

A store is trusted to do one thing: replace the document if and only if it is still the version that was read. All that
the money needs is built on that (`moe_gateway.money`), so that every store passes one suite.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")
WAL_TRIES = 100


class StoreGone(Exception):
    """The store does not answer, or not as it should. Whether a swap under way was done, nobody knows."""


@dataclass(frozen=True)
class Versioned:
    """A document and its version, which means something to its store alone."""

    version: str
    document: bytes


class Store(Protocol):
    """One document of one deployment. Every call raises StoreGone where the store cannot be used."""

    report_every_s: float
    """Shortest time between two reports of a process that spends: what the store can be asked to take."""

    async def read(self) -> Versioned | None:
        """The newest document; None where there is none yet."""
        ...

    async def swap(self, version: str | None, document: bytes) -> bool:
        """Write a document if the newest version is still this one (None: if there is none). False: it is not."""
        ...

    async def close(self) -> None: ...


class MemoryStore:
    """In memory: for tests, and the measure of what the others must do."""

    report_every_s = 1.0

    def __init__(self) -> None:
        self.newest: Versioned | None = None

    async def read(self) -> Versioned | None:
        return self.newest

    async def swap(self, version: str | None, document: bytes) -> bool:
        if (None if self.newest is None else self.newest.version) != version:
            return False
        self.newest = Versioned(str(int(version or 0) + 1), document)
        return True

    async def close(self) -> None:
        return None


class SqliteStore:
    """A file of one host, for all its processes. On a thread of its own."""

    report_every_s = 1.0

    _TABLE = (
        "CREATE TABLE IF NOT EXISTS books"
        " (deployment TEXT PRIMARY KEY, version INTEGER NOT NULL, document BLOB NOT NULL)"
    )

    def __init__(self, path: Path, deployment: str) -> None:
        self._path = path
        self._deployment = deployment
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="budget")
        self._db: sqlite3.Connection | None = None

    async def read(self) -> Versioned | None:
        def work(db: sqlite3.Connection) -> Versioned | None:
            select = "SELECT version, document FROM books WHERE deployment = ?"
            row = db.execute(select, (self._deployment,)).fetchone()
            return None if row is None else Versioned(str(row[0]), bytes(row[1]))

        return await self._run(work)

    async def swap(self, version: str | None, document: bytes) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            if version is None:
                insert = "INSERT INTO books VALUES (?, 1, ?) ON CONFLICT DO NOTHING"
                return db.execute(insert, (self._deployment, document)).rowcount == 1
            update = "UPDATE books SET version = version + 1, document = ? WHERE deployment = ? AND version = ?"
            return db.execute(update, (document, self._deployment, int(version))).rowcount == 1

        return await self._run(work)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _connected(self) -> sqlite3.Connection:
        if self._db is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self._path, timeout=2.0, isolation_level=None, check_same_thread=False)
            self._write_ahead(db)
            db.execute("PRAGMA synchronous=FULL")
            db.execute(self._TABLE)
            self._db = db
        return self._db

    @staticmethod
    def _write_ahead(db: sqlite3.Connection) -> None:
        """The one statement that does not wait for others by itself."""
        for attempt in range(WAL_TRIES):
            try:
                db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if attempt == WAL_TRIES - 1:
                    raise
                time.sleep(0.01)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def call() -> T:
            try:
                return work(self._connected())
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                raise StoreGone(f"{self._path}: {error}") from None

        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
