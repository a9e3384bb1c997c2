"""The work queue: cases by name, and a stateful test of its promise: one worker a key, and nothing lost."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_core.clock import FakeClock
from moe_core.retry import Backoff
from moe_kube.queue import QueueClosed, WorkQueue


def queue(clock: FakeClock, **options: object) -> WorkQueue[str]:
    return WorkQueue(clock, rng=random.Random(3), **options)  # type: ignore[arg-type]


async def test_a_key_added_many_times_is_handed_out_once():
    q = queue(FakeClock())
    for _ in range(3):
        q.add("a")
    q.add("b")
    assert (len(q), q.adds_total) == (2, 2)
    assert [await q.get(), await q.get()] == ["a", "b"]
    assert len(q) == 0


async def test_a_key_added_while_it_is_worked_on_comes_again_after_done():
    q = queue(FakeClock())
    q.add("a")
    assert await q.get() == "a"
    q.add("a")
    q.add("a")
    assert len(q) == 0
    q.done("a")
    assert await q.get() == "a"
    q.done("a")
    assert len(q) == 0


async def test_an_unscheduled_key_does_not_come_unless_it_is_added_again():
    clock = FakeClock()
    q = queue(clock)
    q.add_after("a", 10)
    q.add_after("b", 10)
    q.unschedule("a")
    q.unschedule("never added")
    await clock.advance(11)
    assert list(q._ready) == ["b"]
    q.add_after("a", 5)
    q.unschedule("a")
    q.add_after("a", 20)
    await clock.advance(10)
    assert list(q._ready) == ["b"]
    await clock.advance(11)
    assert list(q._ready) == ["b", "a"]


async def test_what_was_unscheduled_does_not_pile_up():
    clock = FakeClock()
    q = queue(clock)
    for key in "abc":
        q.add_after(key, 50)
    for _ in range(5000):
        q.unschedule("a")
        q.add_after("a", 1000)
    assert len(q._heap) < 200
    await clock.advance(51)
    assert sorted(q._ready) == ["b", "c"]
    await clock.advance(1000)
    assert sorted(q._ready) == ["a", "b", "c"]


async def test_the_earliest_delayed_add_wins():
    clock = FakeClock()
    q = queue(clock)
    q.add_after("a", 60)
    q.add_after("a", 10)
    q.add_after("a", 30)
    q.add_after("b", 5)
    assert q.delayed == 2
    await clock.advance(9.9)
    assert list(q._ready) == ["b"]
    await clock.advance(0.2)
    assert list(q._ready) == ["b", "a"]
    await q.get()
    await q.get()
    await clock.advance(100)
    assert (len(q), q.delayed) == (0, 0)


async def test_a_delayed_key_that_is_worked_on_when_due_comes_after_done():
    clock = FakeClock()
    q = queue(clock)
    q.add("a")
    await q.get()
    q.add_after("a", 1)
    await clock.advance(2)
    assert len(q) == 0
    q.done("a")
    assert len(q) == 1


async def test_failures_wait_longer_each_time_until_forgotten():
    q = queue(FakeClock(), backoff=Backoff(initial_s=1.0, max_s=60.0))
    waits = [q.add_rate_limited("a") for _ in range(8)]
    bounds = [1, 2, 4, 8, 16, 32, 60, 60]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert q.failures("a") == 8
    q.forget("a")
    assert q.add_rate_limited("a") <= 1.0
    assert q.add_rate_limited("b", at_least_s=25.0) == 25.0


async def test_all_retries_together_are_bounded():
    clock = FakeClock()
    q = queue(clock, backoff=Backoff(initial_s=0.01, max_s=0.01), retry_qps=10.0, retry_burst=5)
    for n in range(105):
        q.add_rate_limited(f"k{n}")
    await clock.advance(5.0)
    assert 50 <= len(q) <= 60
    await clock.advance(5.2)
    assert len(q) == 105


async def test_ages_for_metrics():
    clock = FakeClock()
    q = queue(clock)
    assert (q.oldest_age_s(), q.longest_work_s()) == (0.0, 0.0)
    q.add("a")
    await clock.advance(3)
    q.add("b")
    await clock.advance(2)
    assert q.oldest_age_s() == 5.0
    await q.get()
    await clock.advance(4)
    assert (q.oldest_age_s(), q.longest_work_s()) == (6.0, 4.0)


async def test_a_cancelled_worker_loses_no_key():
    q = queue(FakeClock())
    first, second = asyncio.create_task(q.get()), asyncio.create_task(q.get())
    await asyncio.sleep(0)
    q.add("a")
    first.cancel()
    assert await asyncio.wait_for(second, 1) == "a"


async def test_closing_sends_waiting_workers_home_and_lets_running_ones_finish():
    clock = FakeClock()
    q = queue(clock)
    q.add("busy")
    await q.get()
    waiting = [asyncio.create_task(q.get()) for _ in range(2)]
    await asyncio.sleep(0)
    q.add_after("later", 5)
    q.close()
    for task in waiting:
        with pytest.raises(QueueClosed):
            await task
    q.add("more")
    joined = asyncio.create_task(q.join())
    await clock.advance(10)
    assert not joined.done()
    assert (len(q), q.delayed) == (0, 0)
    q.done("busy")
    await joined
    with pytest.raises(QueueClosed):
        await q.get()


KEYS = st.sampled_from("abcd")


class QueueMachine(RuleBasedStateMachine):
    """Against a model: `owed` are keys added since they were last handed out, `due` the earliest delayed add."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock()
        self.queue: WorkQueue[str] = WorkQueue(self.clock, rng=random.Random(1))
        self.owed: set[str] = set()
        self.due: dict[str, float] = {}
        self.working: set[str] = set()
        self.workers: list[asyncio.Task[str]] = []

    def teardown(self) -> None:
        self.loop.run_until_complete(self.drain())
        self.loop.close()

    async def drain(self) -> None:
        """Nothing is lost: whatever is owed or delayed is handed out in the end, and nothing else."""
        await self.elapse(10_000)
        for task in self.workers:
            task.cancel()
        await self.elapse(0)
        while self.working or len(self.queue):
            for key in sorted(self.working):
                self.working.discard(key)
                self.queue.done(key)
            while len(self.queue):
                self.workers.append(self.loop.create_task(self.queue.get()))
                await self.elapse(0)
        assert self.owed == set()
        self.queue.close()

    async def elapse(self, seconds: float) -> None:
        await self.clock.advance(seconds)
        now = self.clock.monotonic()
        for key in [key for key, due in self.due.items() if due <= now]:
            del self.due[key]
            self.owed.add(key)
        await self.collect()

    async def collect(self) -> None:
        """What waiting workers got: never a key that another one has."""
        for task in [task for task in self.workers if task.done()]:
            self.workers.remove(task)
            if not task.cancelled():
                key = task.result()
                assert key not in self.working
                assert key in self.owed
                self.working.add(key)
                self.owed.discard(key)

    def step(self, seconds: float = 0.0) -> None:
        self.loop.run_until_complete(self.elapse(seconds))

    @rule(key=KEYS)
    def add(self, key: str) -> None:
        self.queue.add(key)
        self.owed.add(key)
        self.step()

    @rule(key=KEYS, seconds=st.integers(1, 30))
    def add_after(self, key: str, seconds: int) -> None:
        async def go() -> None:
            self.queue.add_after(key, seconds)

        self.loop.run_until_complete(go())
        due = self.clock.monotonic() + seconds
        self.due[key] = min(self.due.get(key, due), due)

    @rule(key=KEYS)
    def fail(self, key: str) -> None:
        async def go() -> float:
            return self.queue.add_rate_limited(key)

        due = self.clock.monotonic() + self.loop.run_until_complete(go())
        self.due[key] = min(self.due.get(key, due), due)

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        self.queue.forget(key)

    @rule(seconds=st.integers(0, 40))
    def wait(self, seconds: int) -> None:
        self.step(seconds)

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def worker_comes(self) -> None:
        self.workers.append(self.loop.create_task(self.queue.get()))
        self.step()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def worker_is_cancelled(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.workers)).cancel()
        self.step()

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def worker_is_done(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.working)))
        self.working.discard(key)
        self.queue.done(key)
        self.step()

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert set(self.queue._working) == self.working
        assert set(self.queue._ready) == self.owed - self.working
        assert set(self.queue._again) == self.owed & self.working
        assert set(self.queue._due) == set(self.due)
        # No worker waits while there is a key for it.
        assert not (self.queue._ready and self.workers)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
