"""The money: reserve before a paid call, settle after it, in one SQLite file that outlives the process.

Amounts are integers of pico-dollars (tokens × dollars per million tokens are exact in them), so sums never drift. A
reservation counts in full until it is settled; one whose process died stays counted for its day, because nobody knows
what the provider billed. A store that cannot be used allows no spending.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import TypeVar

from moe_core.clock import Clock
from moe_core.log import get_log

T = TypeVar("T")
PICO = Decimal(10) ** 12
_SCHEMA = """
CREATE TABLE IF NOT EXISTS spend (day TEXT NOT NULL, target TEXT NOT NULL, pico INTEGER NOT NULL,
                                  PRIMARY KEY (day, target));
CREATE TABLE IF NOT EXISTS reserved (id TEXT PRIMARY KEY, day TEXT NOT NULL, target TEXT NOT NULL,
                                     pico INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS reserved_by_day ON reserved (day);
"""


class BudgetUnavailable(Exception):
    """The store cannot be used; nothing may be spent."""


def utc_day(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(unix_s))


class BudgetStore:
    """The SQLite file. Every method is one transaction, safe against other processes. Used from one thread."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    def reserve(self, reservation: str, day: str, target: str, usd: Decimal, limit_usd: Decimal) -> bool:
        """Set `usd` aside if spent + reserved + `usd` stays within the limit of the day."""
        pico = _pico(usd)
        with self._transaction() as db:
            if self._used_pico(db, day) + pico > _pico(limit_usd):
                return False
            db.execute("INSERT INTO reserved VALUES (?, ?, ?, ?)", (reservation, day, target, pico))
            return True

    def settle(self, reservation: str, usd: Decimal) -> None:
        """Replace a reservation by what was spent. Does nothing for one that is unknown or settled."""
        with self._transaction() as db:
            row = db.execute("SELECT day, target FROM reserved WHERE id = ?", (reservation,)).fetchone()
            if row is None:
                return
            db.execute("DELETE FROM reserved WHERE id = ?", (reservation,))
            if usd > 0:
                db.execute(
                    "INSERT INTO spend VALUES (?, ?, ?)"
                    " ON CONFLICT (day, target) DO UPDATE SET pico = pico + excluded.pico",
                    (*row, _pico(usd)),
                )

    def used_usd(self, day: str) -> Decimal:
        """Spent and reserved on a day."""
        return self._used_pico(self._db, day) / PICO

    def spent_usd(self, day: str) -> dict[str, Decimal]:
        """Settled spending of a day by target."""
        rows = self._db.execute("SELECT target, pico FROM spend WHERE day = ?", (day,)).fetchall()
        return {target: pico / PICO for target, pico in rows}

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)

    @staticmethod
    def _used_pico(db: sqlite3.Connection, day: str) -> int:
        row = db.execute(
            "SELECT (SELECT COALESCE(SUM(pico), 0) FROM spend WHERE day = ?1)"
            " + (SELECT COALESCE(SUM(pico), 0) FROM reserved WHERE day = ?1)",
            (day,),
        ).fetchone()
        return int(row[0])


class _Transaction:
    """BEGIN IMMEDIATE, so that what is read cannot change before what is written."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


class Budget:
    """The budget as the event loop uses it: the store on a thread of its own, in order, and a cached remainder.

    The remainder informs decisions; only `reserve` grants. `limit_usd` None allows nothing that costs anything.
    """

    def __init__(self, path: Path | None, limit_usd: Decimal | None, clock: Clock) -> None:
        self._path = path
        self._limit_usd = limit_usd
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="budget")
        self._store: BudgetStore | None = None
        self._settling: set[asyncio.Future[None]] = set()
        self._day = ""
        self._left_usd: Decimal | None = None
        self._log = get_log("gateway.budget")

    async def open(self) -> None:
        """Open the store and learn what is left. Raises BudgetUnavailable."""
        await self._refresh()

    async def limit(self, usd: Decimal | None) -> None:
        """Take another daily limit from now on. Where the store cannot be used, nothing is spent until it can."""
        if usd == self._limit_usd:
            return
        self._limit_usd, self._day = usd, ""
        try:
            await self._refresh()
        except BudgetUnavailable as error:
            self._log.error("the budget store cannot be used; nothing is spent", error=str(error))

    def left_usd(self) -> Decimal | None:
        """What may still be spent today as far as known; None where nothing may."""
        if self._limit_usd is None:
            return None
        return self._left_usd if self._day == utc_day(self._clock.time()) else self._limit_usd

    async def reserve(self, reservation: str, target: str, usd: Decimal) -> bool:
        """Set the most that a call may cost aside. False: it would pass the budget. Raises BudgetUnavailable."""
        if usd == 0:
            return True
        limit = self._limit_usd
        if limit is None or self._path is None:
            return False
        day = utc_day(self._clock.time())
        granted = await self._run(lambda store: store.reserve(reservation, day, target, usd, limit))
        await self._refresh()
        return granted

    def settle(self, reservation: str, usd: Decimal) -> None:
        """Say what a call cost, from any point of its end; the store follows in the background, in order.

        Where that fails the reservation stays, which counts the call in full.
        """
        if self._path is None:
            return
        task = asyncio.ensure_future(self._settle(reservation, usd))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    def release(self, reservation: str) -> None:
        """Give back a reservation whose call was never sent."""
        self.settle(reservation, Decimal(0))

    async def close(self) -> None:
        """Wait for what is being settled, then close the store."""
        while self._settling:
            await asyncio.gather(*self._settling, return_exceptions=True)
        store = self._store
        if store is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, store.close)
        self._thread.shutdown()

    async def _settle(self, reservation: str, usd: Decimal) -> None:
        try:
            await self._run(lambda store: store.settle(reservation, usd))
            await self._refresh()
        except BudgetUnavailable as error:
            self._log.error("a call could not be settled; its reservation stays", error=str(error), usd=str(usd))

    async def _refresh(self) -> None:
        limit = self._limit_usd
        if limit is None or self._path is None:
            return
        day = utc_day(self._clock.time())
        used = await self._run(lambda store: store.used_usd(day))
        if limit == self._limit_usd:  # else it was changed meanwhile, and is counted anew
            self._day, self._left_usd = day, max(Decimal(0), limit - used)

    async def _run(self, work: Callable[[BudgetStore], T]) -> T:
        def call() -> T:
            path = self._path
            if path is None:
                raise BudgetUnavailable("there is no state folder")
            try:
                if self._store is None:
                    self._store = BudgetStore(path)
                return work(self._store)
            except (sqlite3.Error, OSError) as error:
                if self._store is not None:
                    self._store.close()
                    self._store = None
                raise BudgetUnavailable(f"{path}: {error}") from None

        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def _pico(usd: Decimal) -> int:
    return int((usd * PICO).to_integral_value(ROUND_CEILING))
