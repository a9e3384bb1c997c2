"""When a key is looked at, by whom, and what follows from how that ended; time is a fake clock's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from moe_core.clock import FakeClock
from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.errors import ApiError, Busy, Conflict, Fenced, ServerError
from moe_kube.fake import FakeCluster
from moe_kube.faults import answer
from moe_kube.faulty import FaultyApi
from moe_kube.objects import Obj, Ref
from moe_operator.children import Key
from moe_operator.controller import AGAIN_S, SOONEST_S, Controller, Result
from moe_operator.requests import AskGateways, Gateways, Get, Look, Outcome, Request, SendWeights, Tell

SPEC: Obj = {"model": {"id": "org/model"}, "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4}}
NAMES = ("one", "two", "three")
Doing = Generator[Request, Any, Outcome]
Plan = Callable[[Key], Doing]


class Nothing:
    """No gateways and no Events."""

    async def ask(self, request: AskGateways) -> Gateways:
        return Gateways()

    async def send(self, request: SendWeights) -> int:
        return 0

    def tell(self, tell: Tell) -> None:
        return None


@dataclass
class Bench:
    """Three MoEDeployments and a controller whose reconcile is the test's."""

    plan: Plan
    workers: int = 2
    looks: list[tuple[str, float]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.cluster = FakeCluster(clock=self.clock)
        self.api = FaultyApi(self.cluster.client("operator"), clock=self.clock)
        for name in NAMES:
            self.put(name)
        self.controller = Controller(
            self.api,
            OperatorConfig(workers=self.workers, resync_s=600.0),
            clock=self.clock,
            fleet=Nothing(),
            teller=Nothing(),
            observe=lambda result, _: self.results.append(result),
            reconcile=self._reconcile,
            rng=random.Random(1),
        )

    def _reconcile(self, key: Key, _: OperatorConfig) -> Doing:
        self.looks.append((key[1], self.clock.monotonic()))
        return (yield from self.plan(key))

    def put(self, name: str, **spec: Any) -> None:
        body = {"metadata": {}, "spec": {**SPEC, **spec}}
        self.cluster.apply(Ref(k.MOE_DEPLOYMENT, "a", name), body, manager="person")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        following = asyncio.create_task(self.controller.follow())
        try:
            await self.controller.start()
            await self.clock.advance(0.01)
            yield
        finally:
            await self.controller.stop()
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following

    def times(self, name: str) -> list[float]:
        return [at for looked, at in self.looks if looked == name]

    async def pass_time(self, seconds: float, steps: int = 50) -> None:
        for _ in range(steps):
            await self.clock.advance(seconds / steps)


def ends(outcome: Outcome) -> Plan:
    def plan(key: Key) -> Doing:
        yield Look(key)
        return outcome

    return plan


def fails(error: Exception, names: tuple[str, ...] = ("one",)) -> Plan:
    """These fail always, the others are settled."""

    def plan(key: Key) -> Doing:
        yield Look(key)
        if key[1] in names:
            raise error
        return Outcome()

    return plan


async def test_everything_is_looked_at_once_when_work_begins_and_then_rests_until_the_resync() -> None:
    bench = Bench(ends(Outcome()))
    async with bench.running():
        await bench.pass_time(470.0)
        assert sorted(name for name, _ in bench.looks) == sorted(NAMES)
        await bench.pass_time(140.0)
        assert all(len(bench.times(name)) == 2 for name in NAMES)
        again = {bench.times(name)[1] for name in NAMES}
        assert len(again) == 3  # not all at once
        assert all(480.0 <= at <= 600.1 for at in again)
    assert set(bench.results) == {"settled"}


async def test_many_that_have_nothing_to_do_leave_the_loop_to_others() -> None:
    bench = Bench(ends(Outcome()), workers=4)
    for number in range(200):
        bench.put(f"many-{number}")
    following = asyncio.create_task(bench.controller.follow())
    await bench.pass_time(1.0)
    turns = []

    async def other() -> None:
        while len(bench.looks) < 203:
            turns.append(len(bench.looks))
            await asyncio.sleep(0)
        turns.append(len(bench.looks))

    await bench.controller.start()
    await other()
    assert max(after - before for before, after in pairwise(turns)) <= 4
    await bench.controller.stop()
    following.cancel()


async def test_a_change_is_looked_at_at_once() -> None:
    bench = Bench(ends(Outcome()))
    async with bench.running():
        await bench.pass_time(10.0)
        bench.put("two", suspend=True)
        await bench.clock.advance(0.01)
        assert len(bench.times("two")) == 2


async def test_nothing_is_looked_at_before_the_caches_are_filled() -> None:
    bench = Bench(ends(Outcome()))
    bench.api.add(answer(403), verbs=frozenset({"list"}), kinds=frozenset({k.INGRESS}), times=None)
    async with bench.running():
        await bench.pass_time(60.0)
        assert bench.looks == []
        bench.api.calm()
        await bench.pass_time(60.0)
        assert len(bench.looks) == 3


async def test_nothing_is_looked_at_by_a_standby_though_its_caches_follow() -> None:
    bench = Bench(ends(Outcome()))
    following = asyncio.create_task(bench.controller.follow())
    await bench.pass_time(60.0)
    assert (bench.looks, len(bench.controller.caches)) == ([], 3)
    following.cancel()


@pytest.mark.parametrize(
    ("outcome", "second_s"),
    [
        pytest.param(Outcome(requeue_s=7.0), 7.0, id="a decision says when"),
        pytest.param(Outcome(requeue_s=0.0), SOONEST_S, id="a decision that says at once is not believed"),
        pytest.param(Outcome(settled=False), AGAIN_S, id="something was done: whether it is all"),
        pytest.param(Outcome(settled=False, requeue_s=0.4), 0.4, id="the earlier of both"),
    ],
)
async def test_when_the_next_look_is(outcome: Outcome, second_s: float) -> None:
    bench = Bench(ends(outcome))
    async with bench.running():
        await bench.pass_time(second_s + 0.15)
        assert bench.times("one")[1] == pytest.approx(second_s, abs=0.12)


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (ServerError("no", status=500), "failed"),
        (Conflict("lost", status=409), "retried"),
        (Busy("slow", status=429), "failed"),
        (ZeroDivisionError("a bug"), "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_an_error_of_one_key_is_tried_again_ever_later_and_costs_the_others_nothing(
    error: Exception, result: Result
) -> None:
    bench = Bench(fails(error), workers=1)
    async with bench.running():
        await bench.pass_time(100.0, steps=1000)
        waits = [b - a for a, b in zip(bench.times("one"), bench.times("one")[1:], strict=False)]
        assert 6 <= len(waits) <= 14
        assert waits[0] < 0.3
        assert waits[-1] > 10.0
        assert bench.times("two") == bench.times("three") == [pytest.approx(0.0, abs=0.1)]
        assert bench.results.count(result) >= len(waits)


async def test_a_success_makes_the_next_failure_the_first_again() -> None:
    fail = [True] * 5 + [False, True, False]

    def plan(key: Key) -> Doing:
        yield Look(key)
        if key[1] == "one" and fail.pop(0):
            raise ServerError("no", status=500)
        return Outcome()

    bench = Bench(plan)
    async with bench.running():
        await bench.pass_time(30.0, steps=300)
        assert len(bench.times("one")) == 6
        bench.put("one", suspend=True)
        await bench.pass_time(0.3, steps=30)
        assert len(bench.times("one")) == 8


async def test_a_server_that_says_how_long_to_wait_is_heeded() -> None:
    bench = Bench(fails(Busy("slow", status=429, retry_after_s=33.0)))
    async with bench.running():
        await bench.pass_time(32.0)
        assert len(bench.times("one")) == 1
        await bench.pass_time(3.0)
        assert len(bench.times("one")) == 2


async def test_what_could_not_all_be_done_backs_off_and_keeps_its_own_time() -> None:
    bench = Bench(ends(Outcome(requeue_s=20.0, settled=False, error="a name is taken")))
    async with bench.running():
        await bench.pass_time(19.0, steps=190)
        early = len(bench.times("one"))
        assert 5 <= early <= 10
        await bench.pass_time(600.0, steps=600)
        assert len(bench.times("one")) - early <= 2 * 600 / 20 + 10
    assert set(bench.results) == {"failed"}


async def test_a_fenced_write_ends_the_reconcile_there_and_then() -> None:
    after: list[str] = []

    def plan(key: Key) -> Doing:
        yield Look(key)
        try:
            yield Get(Ref(k.CONFIG_MAP, "a", key[1]))
        except ApiError as error:
            after.append(type(error).__name__)
            raise
        return Outcome()

    bench = Bench(plan)

    async def fenced(*_: object, **__: object) -> Obj:
        raise Fenced("not sent")

    bench.api.get = fenced  # type: ignore[method-assign]
    async with bench.running():
        assert after == ["Fenced"] * 3
        assert set(bench.results) == {"fenced"}
        await bench.pass_time(AGAIN_S + 0.1)
        assert len(bench.times("one")) == 2  # the lease may have been renewed: nothing is forgotten


async def test_one_key_is_never_with_two_workers() -> None:
    active: list[str] = []
    gate = asyncio.Event()

    def plan(key: Key) -> Doing:
        assert key[1] not in active
        active.append(key[1])
        yield Get(Ref(k.CONFIG_MAP, "a", "x"))
        active.remove(key[1])
        return Outcome()

    bench = Bench(plan, workers=8)

    async def slow(*_: object, **__: object) -> Obj:
        await gate.wait()
        return {}

    bench.api.get = slow  # type: ignore[method-assign]
    async with bench.running():
        assert sorted(active) == sorted(NAMES)
        for suspend in (True, False, True):
            bench.put("one", suspend=suspend)
            await bench.clock.advance(0.1)
        assert len(bench.times("one")) == 1
        gate.set()
        await bench.clock.advance(0.1)
        assert len(bench.times("one")) == 2
        assert bench.controller.under_way == 0


@pytest.mark.parametrize(
    ("outcome", "second_s"),
    [
        pytest.param(Outcome(), 0.0, id="it had nothing to do: the change is somebody else's"),
        pytest.param(Outcome(settled=False), AGAIN_S, id="it wrote: the change may well be its own"),
        pytest.param(Outcome(error="a name is taken"), AGAIN_S, id="it failed: its back-off, or this"),
    ],
)
async def test_a_change_while_a_worker_is_at_it_is_looked_at_once_more(outcome: Outcome, second_s: float) -> None:
    def plan(key: Key) -> Doing:
        yield Look(key)
        if key[1] == "one" and len(bench.times("one")) == 1:
            bench.put("one", suspend=True)
            yield Get(Ref(k.CONFIG_MAP, "a", "x"))
            return outcome
        return Outcome()

    bench = Bench(plan)

    async def slow(*_: object, **__: object) -> Obj:
        await bench.clock.sleep(0.2)
        return {}

    bench.api.get = slow  # type: ignore[method-assign]
    async with bench.running():
        await bench.pass_time(0.3, steps=30)
        await bench.pass_time(second_s, steps=50)
        assert len(bench.times("one")) >= 2
        await bench.pass_time(5.0)
        assert len(bench.times("one")) == 2


async def test_a_look_forgets_what_was_due_before_it() -> None:
    def plan(key: Key) -> Doing:
        yield Look(key)
        return Outcome(requeue_s=5.0) if len(bench.times(key[1])) == 1 else Outcome()

    bench = Bench(plan)
    async with bench.running():
        await bench.pass_time(2.0)
        bench.put("one", suspend=True)
        await bench.pass_time(10.0)
        assert len(bench.times("one")) == 2
        assert len(bench.times("two")) == 2


async def test_stopping_waits_for_the_call_under_way_and_takes_no_other_key() -> None:
    gate, done = asyncio.Event(), []

    def plan(key: Key) -> Doing:
        yield Get(Ref(k.CONFIG_MAP, "a", "x"))
        done.append(key[1])
        return Outcome()

    bench = Bench(plan, workers=1)

    async def slow(*_: object, **__: object) -> Obj:
        await gate.wait()
        return {}

    bench.api.get = slow  # type: ignore[method-assign]
    async with bench.running():
        stopping = asyncio.create_task(bench.controller.stop())
        await bench.clock.advance(1.0)
        assert not stopping.done()
        gate.set()
        await bench.clock.advance(0.1)
        assert stopping.done()
    assert len(done) == len(bench.looks) == 1


async def test_stopping_is_bounded_and_closes_a_reconcile_that_hangs() -> None:
    closed = []

    def plan(key: Key) -> Doing:
        try:
            yield Get(Ref(k.CONFIG_MAP, "a", "x"))
        finally:
            closed.append(key[1])
        return Outcome()

    bench = Bench(plan, workers=3)

    async def never(*_: object, **__: object) -> Obj:
        await asyncio.Event().wait()
        raise AssertionError

    bench.api.get = never  # type: ignore[method-assign]
    async with bench.running():
        stopping = asyncio.create_task(bench.controller.stop())
        await bench.pass_time(OperatorConfig().lease_s + 1)
        assert stopping.done()
        assert sorted(closed) == sorted(NAMES)


async def test_a_second_term_looks_at_everything_again() -> None:
    bench = Bench(ends(Outcome()))
    async with bench.running():
        await bench.controller.stop()
        bench.put("one", suspend=True)
        await bench.pass_time(10.0)
        assert len(bench.looks) == 3
        await bench.controller.start()
        await bench.clock.advance(0.1)
        assert len(bench.looks) == 6
        assert bench.controller.adds_total == 6


async def test_what_is_gone_is_forgotten() -> None:
    bench = Bench(ends(Outcome()))
    async with bench.running():
        for name in NAMES:
            bench.cluster.delete(Ref(k.MOE_DEPLOYMENT, "a", name))
        await bench.pass_time(2000.0)
        assert all(len(bench.times(name)) <= 3 for name in NAMES)
        assert bench.controller.delayed == 0
