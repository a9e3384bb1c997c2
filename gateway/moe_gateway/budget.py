"""The money: reserve before a paid call, settle after it, from a tranche leased of books that all processes share.

Amounts are integers of pico-dollars, so sums never drift. A reservation counts in full until it is settled, against the
day on which it was made. Whoever cannot reach the books spends nothing, not even what is left of its tranche: nobody
would know of it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TypeVar

from moe_core.clock import Clock
from moe_core.log import get_log
from moe_core.prices import PICO, pico
from moe_gateway.money import DEPLOYMENT, Book, BookInvalid, Entry, Limits, Spent, utc_day
from moe_gateway.money_journal import Account, Found, Journal, Reserved, orphans
from moe_gateway.money_store import Store, StoreGone

T = TypeVar("T")
TICK_S = 1.0
LOOK_S = 5.0
"""Longest time between two looks at the books."""
CALL_S = 4.0
TRIES = 100


class BudgetUnavailable(Exception):
    """The store cannot be used; nothing may be spent."""


class Budget:
    """The budget as the event loop uses it. `run` it as a task, `close` it in the end.

    What is left informs decisions; only `reserve` grants. Without a store nothing that costs anything is allowed.
    """

    def __init__(self, store: Store | None, limits: Limits, clock: Clock, folder: Path | None = None) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._folder = folder
        self._holder = uuid.uuid4().hex
        self._journal: Journal | None = None
        self._account = Account()
        self._granted: dict[str, dict[str, int]] = {}
        """Day → scope → what the books say that we hold, or less. Lowered before the books are, raised after them."""
        self._ending: set[str] = set()
        """Days whose account is being ended: nobody knows yet whether it was."""
        self._book = Book()
        self._left: dict[tuple[str, str], int] = {}
        self._told: tuple[int | None, Decimal] = (None, Decimal(0))
        """What was left when it was asked last, in pico-dollars and in dollars."""
        self._turn = asyncio.Lock()
        self._leases: set[asyncio.Task[bool]] = set()
        self._used: dict[tuple[str, str], int] = {}
        """(day, scope) → spent and set aside by us."""
        self._uncertain = False
        """A write of ours may be under way still. The next one that is answered makes it too late for it."""
        self._dirty = False
        self._looked_s = float("-inf")
        self._spent_since = 0
        self.gone: str | None = None
        """Why the store cannot be used, while it cannot."""
        self._log = get_log("gateway.budget")

    async def open(self) -> None:
        """Read the books, and give back what dead processes on this disk had held. Raises BudgetUnavailable."""
        if self._store is None:
            return
        await self._in_turn(self._look)

    async def run(self) -> None:
        """Keep the books and the tranche up to date until cancelled."""
        while True:
            await self._clock.sleep(TICK_S if self._store is None else self._store.report_every_s)
            await self.tick()

    async def tick(self) -> None:
        """Report, give back what is not needed, and look at the books, where it is time for it."""
        idle = self.gone is None and not self._dirty
        if self._store is None or (idle and self._clock.monotonic() - self._looked_s < LOOK_S):
            return
        try:
            await self._in_turn(self._report)
        except BudgetUnavailable:
            return  # said where it was noticed

    async def limit(self, limits: Limits) -> None:
        """Take other limits from now on. What is held under the old ones goes back first."""
        if limits == self._limits:
            return
        self._limits, self._left = limits, {}
        self._dirty, self._spent_since = True, 0
        for day in self._granted:
            self._lower(day, keep=0)
        await self.tick()

    def left_usd(self, tenant: str | None = None) -> Decimal | None:
        """What may still be spent today as far as known; None where nothing may."""
        if self._store is None or self._limits.usd_per_day is None:
            return None
        if self.gone is not None:
            return Decimal(0)
        day = utc_day(self._clock.time())
        granted, left = self._granted.get(day, {}), None
        for scope in self._limits.scopes(tenant):
            free = granted.get(scope, 0) - self._used.get((day, scope), 0)
            here = max(0, free) + self._left_in_books(day, scope)
            left = here if left is None or here < left else left
        if left != self._told[0]:
            self._told = left, max(Decimal(0), (left or 0) / PICO)
        return self._told[1]

    async def reserve(self, reservation: str, target: str, usd: Decimal, tenant: str | None = None) -> bool:
        """Set the most that a call may cost aside. False: it would pass a budget. Raises BudgetUnavailable."""
        if usd == 0:
            return True
        if self._store is None or self._limits.usd_per_day is None:
            return False
        if self.gone is not None:
            raise BudgetUnavailable(self.gone)
        wanted = Reserved(utc_day(self._clock.time()), tenant or "", target, pico(usd))
        scopes = self._limits.scopes(tenant)
        for _ in range(TRIES):
            if self._covers(wanted, scopes):
                self._set_aside(reservation, wanted)
                return True
            # Whoever asked may go away; the lease ends by itself, for whoever comes next.
            lease = asyncio.ensure_future(self._in_turn(lambda: self._grow(wanted, scopes)))
            self._leases.add(lease)
            lease.add_done_callback(self._leases.discard)
            lease.add_done_callback(lambda done: done.cancelled() or done.exception())
            if not await asyncio.shield(lease):
                return False
            # A tranche may serve one of those who waited for it; the next one asks again.
        return False

    def settle(self, reservation: str, usd: Decimal) -> None:
        """Say what a call cost, from any point of its end. Does nothing for one that is unknown or settled. Where it
        cannot be written down the reservation stays, which counts the call in full."""
        if reservation not in self._account.reserved:
            return
        amount = pico(usd)
        try:
            if self._journal is not None:
                self._journal.settle(reservation, amount)
        except OSError as error:
            self._log.error("a call could not be settled; its reservation stays", error=str(error), usd=str(usd))
            return
        self._count(self._account.reserved[reservation], amount - self._account.reserved[reservation].pico)
        self._account.settle(reservation, amount)
        self._spent_since += amount
        self._dirty = True

    def release(self, reservation: str) -> None:
        """Give back a reservation whose call was never sent."""
        self.settle(reservation, Decimal(0))

    async def close(self) -> None:
        """End the account: what was spent is written down, the rest is given back."""
        if self._store is None:
            return
        await asyncio.gather(*self._leases, return_exceptions=True)
        for row in list(self._account.reserved):
            self._account.settle(row, self._account.reserved[row].pico)
        try:
            await self._in_turn(self._end_all)
        except BudgetUnavailable:
            self._log.warning("what was spent could not be written down; the journal keeps it, where there is one")
        if self._journal is not None:
            self._journal.end(keep=bool(self._granted or self._account.spent))
        await self._store.close()

    async def books(self) -> Book:
        """The books as they are now, with our own account in them. Raises BudgetUnavailable."""
        if self._store is not None:
            self._dirty = True
            await self._in_turn(self._report)
        return self._book

    @property
    def last_seen(self) -> Book:
        """The books as they were at the last look."""
        return self._book

    # What we hold

    def _free(self, day: str, scope: str) -> int:
        return self._granted.get(day, {}).get(scope, 0) - self._used.get((day, scope), 0)

    def _count(self, row: Reserved, amount: int) -> None:
        for scope in {DEPLOYMENT, row.tenant}:
            key = (row.day, scope)
            self._used[key] = self._used.get(key, 0) + amount

    def _covers(self, wanted: Reserved, scopes: tuple[str, ...]) -> bool:
        if wanted.day in self._ending:
            return False
        return all(self._free(wanted.day, scope) >= wanted.pico for scope in scopes)

    def _set_aside(self, reservation: str, wanted: Reserved) -> None:
        try:
            if self._journal is not None:
                self._journal.reserve(reservation, wanted)
        except OSError as error:
            raise BudgetUnavailable(f"the journal in {self._folder} cannot be written: {error.strerror}") from None
        self._account.reserved[reservation] = wanted
        self._count(wanted, wanted.pico)
        self._dirty = True

    def _lower(self, day: str, keep: int) -> None:
        """Hold no more than what is spent, set aside, and `keep`."""
        granted = self._granted[day]
        for scope in granted:
            granted[scope] = min(granted[scope], granted[scope] - self._free(day, scope) + keep)

    def _left_in_books(self, day: str, scope: str) -> int:
        key = (day, scope)
        if key not in self._left:
            self._left[key] = self._book.left(day, scope, self._limits)
        return self._left[key]

    # Trips to the books: one at a time

    async def _in_turn(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do one thing with the store, alone. Remembers and says whether it can be used."""
        async with self._turn:
            try:
                async with asyncio.timeout(CALL_S):
                    done = await work()
            except (StoreGone, BookInvalid, OSError) as error:
                why = str(error) or type(error).__name__
                if self.gone is None:
                    self._log.error("the budget store cannot be used; nothing is spent", error=why)
                self.gone = why
                raise BudgetUnavailable(why) from None
        if self.gone is not None:
            self._log.info("the budget store is back")
            self.gone = None
        return done

    async def _change(self, edit: Callable[[Book], T]) -> T:
        """Read, edit and swap, until nobody was there first."""
        if self._store is None:
            raise StoreGone("there is no store")
        for _ in range(TRIES):
            found = await self._store.read()
            book = Book.read(b"" if found is None else found.document)
            before = book.write()
            result = edit(book)
            if book.write() == before and not self._uncertain:
                self._seen(book)
                return result
            book.serial += 1
            self._uncertain = True
            swapped = await self._store.swap(None if found is None else found.version, book.write())
            self._uncertain = False
            if swapped:
                self._seen(book)
                return result
        raise StoreGone("too many others write at once")

    def _seen(self, book: Book) -> None:
        self._book, self._left = book, {}
        self._looked_s = self._clock.monotonic()

    async def _look(self) -> None:
        """Give back what the dead held; begin our own journal."""
        if self._folder is not None:
            for found in list(orphans(self._folder)):
                self._uncertain = True  # of it, or of the dead
                await self._change(partial(_end_for, found=found))
                found.path.unlink(missing_ok=True)
                self._log.info("a dead process's money was given back", holder=found.holder)
            if self._journal is None:
                self._journal = Journal(self._folder, self._holder)
        await self._change(_nothing)

    async def _grow(self, wanted: Reserved, scopes: tuple[str, ...]) -> bool:
        """Take a tranche that covers a call. False: a budget would be passed."""
        await self._settle_endings()
        day = wanted.day
        needs = {scope: wanted.pico - self._free(day, scope) for scope in scopes}
        needs = {scope: need for scope, need in needs.items() if need > 0}
        if not needs:
            return True  # somebody before us in the queue took a tranche that is enough for both
        if self._folder is not None and self._journal is None:
            await self._look()

        def edit(book: Book) -> dict[str, int] | None:
            return book.lend(self._holder, day, self._entry(day), needs, self._limits)

        self._granted.setdefault(day, {})  # so that a lease whose answer is lost goes back too
        granted = await self._change(edit)
        if granted is None:
            return False
        self._granted[day] = granted
        return True

    async def _report(self) -> None:
        """Write down what was spent, keep as much as the last while needed, give back the rest; end days gone by."""
        if self._journal is None and self._folder is not None:
            await self._look()
        await self._settle_endings()
        self._dirty = False
        keep, self._spent_since = 2 * self._spent_since, 0
        today = utc_day(self._clock.time())
        busy = {row.day for row in self._account.reserved.values()}
        for day in self._granted:
            if day == today or day in busy:
                self._lower(day, keep if day == today else 0)
            else:
                self._ending.add(day)
        await self._settle_endings()

        def edit(book: Book) -> None:
            for day in self._granted:
                book.report(self._holder, day, self._entry(day))
            book.tidy(self._holder)

        await self._change(edit)
        if keep:
            self._dirty = True  # to be given back when it was not needed after all
        if self._journal is not None:
            self._journal.compact(self._account)

    async def _settle_endings(self) -> None:
        """End the accounts that are to be ended. Doing it twice does nothing."""
        for day in sorted(self._ending):
            spent: Spent = self._account.spent.get(day, {})
            await self._change(partial(_end, holder=self._holder, day=day, spent=spent))
            if self._journal is not None:
                self._journal.forget(day)
            self._account.spent.pop(day, None)
            self._granted.pop(day, None)
            self._used = {key: used for key, used in self._used.items() if key[0] != day}
            self._ending.discard(day)

    async def _end_all(self) -> None:
        self._ending.update(self._granted)
        await self._settle_endings()

    def _entry(self, day: str) -> Entry:
        spent = {tenant: dict(targets) for tenant, targets in self._account.spent.get(day, {}).items()}
        return Entry(dict(self._granted.get(day, {})), spent)


def _nothing(book: Book) -> None:
    return None


def _end(book: Book, *, holder: str, day: str, spent: Spent) -> None:
    book.fold(holder, day, spent)


def _end_for(book: Book, *, found: Found) -> None:
    """End the accounts of a process that is no more."""
    for name in list(book.days):
        book.fold(found.holder, name, found.spent.get(name, {}))
