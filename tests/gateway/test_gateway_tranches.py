"""Whatever crashes when, and whatever the clock and the store do: the money adds up and no budget is passed."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Coroutine
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_core.clock import FakeClock
from moe_gateway.budget import Budget, BudgetUnavailable
from moe_gateway.money import DEPLOYMENT, LOST, Book, Limits, total, utc_day
from moe_gateway.money_store import MemoryStore, StoreGone, Versioned

T = TypeVar("T")
LIMITS = Limits(Decimal(1), Decimal("1.3"), tenants={"small": Decimal("0.3")})
DAY_PICO, MONTH_PICO, SMALL_PICO = 10**12, 13 * 10**11, 3 * 10**11
AMOUNTS = st.integers(1, 40).map(lambda cents: Decimal(cents) / 100)
TENANTS = st.sampled_from([None, "small", "big"])


class Crash(BaseException):
    """The process ends here."""


class LossyStore(MemoryStore):
    """The common document, over a bad line: what the next swaps do is told beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: list[str] = []
        self.late: tuple[str | None, bytes] | None = None

    async def read(self) -> Versioned | None:
        if self.plan and self.plan[0] == "gone":
            self.plan.pop(0)
            raise StoreGone("told to")
        return await super().read()

    async def swap(self, version: str | None, document: bytes) -> bool:
        step = self.plan.pop(0) if self.plan else "good"
        match step:
            case "crash before":
                raise Crash
            case "lost before":
                raise StoreGone("the request was lost")
            case "late":
                self.late = (version, document)
                raise StoreGone("the request will arrive some day")
        done = await super().swap(version, document)
        if step == "crash after":
            raise Crash
        if step == "lost after":
            raise StoreGone("the answer was lost")
        return done

    def arrive(self) -> None:
        """A request of long ago reaches the server at last."""
        if self.late is not None:
            late, self.late = self.late, None
            asyncio.run(super().swap(*late))


class Process:
    """A gateway process: its budget and its disk, and what it owes to providers."""

    def __init__(self, store: LossyStore, clock: FakeClock, folder: Path) -> None:
        self.folder = folder
        self.budget = Budget(store, LIMITS, clock, folder)
        self.open: dict[str, tuple[str, str | None, Decimal]] = {}
        """Reservation → day, tenant, most."""


STEPS = ["good", "lost before", "lost after", "late", "crash before", "crash after", "gone"]


class Tranches(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.store, self.clock = LossyStore(), FakeClock(1_764_547_200.0 + 43_200)
        self.owed: dict[tuple[str, str], int] = {}
        """(day, tenant) → what providers will bill in the end: settled calls, and the whole of calls that died."""
        self.number = 0
        self.processes: list[Process] = []
        for _ in range(3):
            self.processes.append(Process(self.store, self.clock, Path(tempfile.mkdtemp(dir=self.root))))

    def teardown(self) -> None:
        if not hasattr(self, "root"):
            return
        try:
            self._end()
        finally:
            shutil.rmtree(self.root)

    def _run(self, process: Process, work: Coroutine[object, object, T]) -> T | None:
        """Do a thing of a process; where it crashes in it, its successor comes up on the same disk."""
        try:
            return asyncio.run(_with_a_fresh_lock(process.budget, work))
        except BudgetUnavailable:
            return None
        except Crash:
            self._die(process)
            return None

    def _die(self, process: Process) -> None:
        for day, tenant, most in process.open.values():
            self._owe(day, tenant, most)
        if process.budget._journal is not None:
            os.close(process.budget._journal._file)
        self.processes[self.processes.index(process)] = Process(self.store, self.clock, process.folder)

    def _owe(self, day: str, tenant: str | None, usd: Decimal) -> None:
        key = (day, tenant or "")
        self.owed[key] = self.owed.get(key, 0) + int(usd * 10**12)

    @rule(which=st.integers(0, 2), usd=AMOUNTS, tenant=TENANTS)
    def reserve(self, which: int, usd: Decimal, tenant: str | None) -> None:
        process, self.number = self.processes[which], self.number + 1
        name, day = f"call-{self.number}", utc_day(self.clock.time())
        if self._run(process, process.budget.reserve(name, f"t{self.number % 2}", usd, tenant)):
            process.open[name] = (day, tenant, usd)

    @precondition(lambda self: any(process.open for process in self.processes))
    @rule(data=st.data(), share=st.integers(0, 4))
    def settle(self, data: st.DataObject, share: int) -> None:
        process = data.draw(st.sampled_from([process for process in self.processes if process.open]))
        name = data.draw(st.sampled_from(sorted(process.open)))
        day, tenant, most = process.open.pop(name)
        usd = most * share / 4
        process.budget.settle(name, usd)
        self._owe(day, tenant, usd)

    @rule(which=st.integers(0, 2))
    def tick(self, which: int) -> None:
        process = self.processes[which]
        process.budget._looked_s = float("-inf")
        self._run(process, process.budget.tick())

    @rule(which=st.integers(0, 2))
    def kill(self, which: int) -> None:
        self._die(self.processes[which])

    @rule(which=st.integers(0, 2))
    def start(self, which: int) -> None:
        self._run(self.processes[which], self.processes[which].budget.open())

    @rule(hours=st.sampled_from([-26, -13, -1, 1, 13, 26]))
    def jump(self, hours: int) -> None:
        self.clock.jump(hours * 3600)

    @rule(plan=st.lists(st.sampled_from(STEPS), min_size=1, max_size=3))
    def trouble(self, plan: list[str]) -> None:
        self.store.plan = plan

    @rule()
    def arrive(self) -> None:
        self.store.arrive()

    @invariant()
    def no_budget_is_passed(self) -> None:
        if not hasattr(self, "store"):
            return
        at_most = dict(self.owed)
        for process in self.processes:
            for day, tenant, usd in process.open.values():
                key = (day, tenant or "")
                at_most[key] = at_most.get(key, 0) + int(usd * 10**12)
        days = {day for day, _ in at_most}
        for day in days:
            assert sum(pico for (of, _), pico in at_most.items() if of == day) <= DAY_PICO
            assert at_most.get((day, "small"), 0) <= SMALL_PICO
        for month in {day[:7] for day in days}:
            assert sum(pico for (of, _), pico in at_most.items() if of[:7] == month) <= MONTH_PICO

    def _end(self) -> None:
        """All troubles over, every process ends in order or comes up again and ends: the books are exact."""
        self.store.plan = []
        for process in self.processes:
            for name, (day, tenant, most) in process.open.items():
                process.budget.settle(name, most)
                self._owe(day, tenant, most)
            asyncio.run(_with_a_fresh_lock(process.budget, _open_and_close(process.budget)))
        self.store.arrive()
        newest = self.store.newest
        book = Book.read(b"" if newest is None else newest.document)
        told: dict[tuple[str, str], int] = {}
        for day, row in book.days.items():
            assert row.held == {}, "something is held for ever"
            for tenant in row.spent:
                told[day, tenant] = total({"x": row.spent[tenant]})
        owed = {key: pico for key, pico in self.owed.items() if pico}
        folded = {key: pico for key, pico in owed.items() if key[0] <= book.folded}
        assert {key: pico for key, pico in told.items() if pico} == {k: v for k, v in owed.items() if k not in folded}
        for month in book.months:
            spent = sum(pico for (day, _), pico in folded.items() if day[:7] == month)
            lost = book.months[month].get("", {}).get(LOST, 0)
            assert spent <= total(book.months[month], DEPLOYMENT) <= spent + lost


async def _with_a_fresh_lock(budget: Budget, work: Coroutine[object, object, T]) -> T:
    """Each step has an event loop of its own."""
    budget._turn = asyncio.Lock()
    return await work


async def _open_and_close(budget: Budget) -> None:
    await budget.open()
    await budget.close()


Tranches.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTranches = Tranches.TestCase


async def test_a_lease_that_arrives_after_its_day_was_ended_holds_nothing() -> None:
    store, clock = LossyStore(), FakeClock()
    budget = Budget(store, LIMITS, clock)
    store.plan = ["late"]
    with pytest.raises(BudgetUnavailable):
        await budget.reserve("a", "t", Decimal("0.5"))
    clock.jump(-26 * 3600)
    await budget.tick()
    await _arrive(store)
    await budget.close()
    _nothing_is_held(store)


async def test_a_lease_that_arrives_after_its_process_was_buried_holds_nothing(tmp_path: Path) -> None:
    store, clock = LossyStore(), FakeClock()
    dead = Budget(store, LIMITS, clock, tmp_path)
    await dead.open()
    store.plan = ["late"]
    with pytest.raises(BudgetUnavailable):
        await dead.reserve("a", "t", Decimal("0.5"))
    assert dead._journal is not None
    os.close(dead._journal._file)
    successor = Budget(store, LIMITS, clock, tmp_path)
    await successor.open()
    await _arrive(store)
    await successor.close()
    _nothing_is_held(store)


async def _arrive(store: LossyStore) -> None:
    assert store.late is not None
    await MemoryStore.swap(store, *store.late)


def _nothing_is_held(store: LossyStore) -> None:
    assert store.newest is not None
    assert all(not day.held for day in Book.read(store.newest.document).days.values())
