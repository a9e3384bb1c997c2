"""The election with two candidates, every fault of a write, and clocks that disagree: never two who may write."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.clock import FakeClock
from moe_kube import errors
from moe_kube.errors import Unreachable
from moe_kube.fence import FencedApi
from moe_kube.lease import Election
from moe_kube.objects import CONFIG_MAP, LEASE, Ref
from tests.kube.scripted import CasStore

LEADER = Ref(LEASE, "moestack", "operator")


class Candidate:
    """An election of its own, behind a network of its own that can be cut before or after a call commits."""

    def __init__(self, store: CasStore, clock: Any, name: str, **options: Any) -> None:
        self.store, self.clock, self.name = store, clock, name
        self.cut = ""
        self.silent = False
        self.told: list[str] = []
        self.election = Election(
            self,  # type: ignore[arg-type]
            LEADER,
            clock=clock,
            identity=name,
            on_started=self._started,
            on_stopped=self._stopped,
            rng=random.Random(name),
            **options,
        )
        self.task: asyncio.Task[None] | None = None

    async def _started(self) -> None:
        self.told.append("started")

    async def _stopped(self) -> None:
        assert self.election.held_for_s() == 0
        self.told.append("stopped")

    async def _pass(self, call: Any) -> Any:
        if self.silent:
            await self.clock.sleep(1e6)
        if self.cut == "before":
            raise Unreachable("refused")
        answer = await call()
        if self.cut == "after":
            raise Unreachable("the answer was lost")
        return answer

    async def get(self, ref: Ref, **more: Any) -> Any:
        return await self._pass(lambda: self.store.get(ref, **more))

    async def create(self, ref: Ref, body: Any, **more: Any) -> Any:
        return await self._pass(lambda: self.store.create(ref, body, **more))

    async def replace(self, ref: Ref, body: Any, **more: Any) -> Any:
        return await self._pass(lambda: self.store.replace(ref, body, **more))

    def start(self) -> Candidate:
        self.task = asyncio.create_task(self.election.run())
        return self

    async def end(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def world():
    clock, store, made = FakeClock(), CasStore(), []

    def candidate(name: str, **options: Any) -> Candidate:
        made.append(Candidate(store, options.pop("clock", clock), name, **options))
        return made[-1]

    yield clock, store, candidate
    for one in made:
        one.silent, one.cut = False, "before"
        await one.end()


def spec(store: CasStore) -> dict[str, Any]:
    return store.objects[LEADER]["spec"]


async def test_the_first_one_leads_and_renews(world):
    clock, store, candidate = world
    a = candidate("a").start()
    await clock.advance(1)
    assert a.election.leading
    assert a.told == ["started"]
    assert spec(store)["holderIdentity"] == "a"
    assert spec(store)["leaseTransitions"] == 0
    await clock.advance(60)
    assert a.election.held_for_s() > 7.0
    assert 25 <= len(store.writes) <= 35
    assert spec(store)["renewTime"] > spec(store)["acquireTime"]


async def test_a_second_one_waits_while_the_first_renews(world):
    clock, _, candidate = world
    a, b = candidate("a").start(), candidate("b").start()
    for _ in range(100):
        await clock.advance(1)
        assert not (a.election.leading and b.election.leading)
    assert a.election.leading
    assert b.told == []
    assert b.election.holder == "a"


async def test_a_leader_that_is_cut_off_stops_before_another_begins(world):
    clock, store, candidate = world
    a, b = candidate("a").start(), candidate("b")
    await clock.advance(1)
    b.start()
    await clock.advance(3)
    a.cut = "before"
    gap = 0
    for _ in range(300):
        await clock.advance(0.1)
        assert not (a.election.leading and b.election.leading)
        gap += not (a.election.leading or b.election.leading)
    assert a.told == ["started", "stopped"]
    assert b.election.leading
    assert spec(store)["leaseTransitions"] == 1
    assert gap >= 30  # The reserve between deadline and duration.


async def test_a_call_that_never_returns_does_not_keep_a_leader(world):
    clock, _, candidate = world
    a = candidate("a").start()
    await clock.advance(1)
    a.silent = True
    await clock.advance(12)
    assert not a.election.leading
    assert a.told == ["started", "stopped"]


async def test_time_counts_from_before_the_renewal_was_sent(world):
    clock, store, candidate = world

    async def slow(verb: str) -> None:
        if verb == "replace":
            await clock.sleep(4)

    a = candidate("a").start()
    await clock.advance(1)
    store.after = slow
    await clock.advance(3)
    sent_at = 2.0  # The renewal that is answered at 6 s.
    await clock.advance(2.1)
    assert a.election.held_for_s() == pytest.approx(sent_at + 10.0 - clock.monotonic(), abs=0.3)


async def test_released_on_stop_so_that_the_next_begins_at_once(world):
    clock, store, candidate = world
    a, b = candidate("a").start(), candidate("b")
    await clock.advance(1)
    b.start()
    await clock.advance(5)
    a.election.stop()
    await clock.advance(0)
    assert a.task.done()
    assert a.told == ["started", "stopped"]
    assert "holderIdentity" not in spec(store)
    await clock.advance(4.1)
    assert b.election.leading


async def test_a_stop_waits_for_writes_under_way_before_it_releases(world):
    clock, store, candidate = world
    a = candidate("a").start()
    await clock.advance(1)

    async def writes_end() -> None:
        await clock.sleep(5)

    a.election._on_stopped = writes_end
    a.election.stop()
    await clock.advance(4)
    assert spec(store)["holderIdentity"] == "a"
    assert a.election.held_for_s() == 0
    await clock.advance(2)
    assert "holderIdentity" not in spec(store)


async def test_a_write_whose_answer_was_lost_is_recognised(world):
    clock, store, candidate = world
    a = candidate("a")
    a.cut = "after"
    a.start()
    await clock.advance(1)
    assert not a.election.leading
    assert spec(store)["holderIdentity"] == "a"
    a.cut = ""
    await clock.advance(10)
    assert a.election.leading
    assert spec(store)["leaseTransitions"] == 0


async def test_wall_clocks_do_not_matter(world):
    clock, _, candidate = world
    a = candidate("a").start()
    await clock.advance(1)
    clock.jump(-86_400)
    b = candidate("b").start()
    await clock.advance(30)
    clock.jump(3 * 86_400)
    await clock.advance(30)
    assert a.election.leading
    assert b.told == []


async def test_a_deleted_lease_changes_nothing(world):
    clock, store, candidate = world
    a, b = candidate("a").start(), candidate("b")
    await clock.advance(1)
    b.start()
    await clock.advance(10)
    del store.objects[LEADER]
    await clock.advance(30)
    assert a.election.leading
    assert a.told == ["started"]
    assert b.told == []


async def test_a_stranger_in_the_record_ends_the_leadership_at_once(world):
    clock, store, candidate = world
    a = candidate("a").start()
    await clock.advance(1)
    store.objects[LEADER]["spec"]["holderIdentity"] = "someone"
    store.objects[LEADER]["metadata"]["resourceVersion"] = "999"
    await clock.advance(2.1)
    assert not a.election.leading
    assert a.told == ["started", "stopped"]


@pytest.mark.parametrize(("duration", "deadline", "retry"), [(10, 10.0, 2.0), (15, 2.0, 2.0), (15, 10.0, 0.0)], ids=str)
async def test_times_that_could_let_two_lead_are_refused(duration, deadline, retry):
    with pytest.raises(ValueError, match="retry_s < renew_deadline_s < duration_s"):
        Election(CasStore(), LEADER, clock=FakeClock(), duration_s=duration, renew_deadline_s=deadline, retry_s=retry)  # type: ignore[arg-type]


class Skewed:
    """A clock that runs a little faster or slower than another one, and shows another wall time."""

    def __init__(self, clock: FakeClock, rate: float, wall_s: float) -> None:
        self._clock, self._rate, self._wall_s = clock, rate, wall_s

    def time(self) -> float:
        return self._clock.time() + self._wall_s

    def monotonic(self) -> float:
        return self._clock.monotonic() * self._rate

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds / self._rate)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_never_two_writers_whatever_fails(data):
    """Three candidates with clocks of their own write through fences; a write commits late or never."""

    async def scenario() -> None:
        clock, store = FakeClock(), CasStore()
        candidates = []
        for name in "abc":
            skew = Skewed(clock, data.draw(st.sampled_from([0.95, 1.0, 1.05])), data.draw(st.integers(-1000, 1000)))
            candidates.append(Candidate(store, skew, name).start())
        leaders: list[str] = []
        for _ in range(data.draw(st.integers(5, 25))):
            one = data.draw(st.sampled_from(candidates))
            one.cut = data.draw(st.sampled_from(["", "", "before", "after"]))
            one.silent = data.draw(st.sampled_from([False, False, True]))
            for _ in range(data.draw(st.integers(1, 20))):
                await clock.advance(1)
                leading = [one.name for one in candidates if one.election.leading]
                assert len(leading) <= 1
                leaders += [name for name in leading if leaders[-1:] != [name]]
        for one in candidates:
            one.cut, one.silent = "", False
        await clock.advance(120)
        assert sum(one.election.leading for one in candidates) == 1
        for one in candidates:
            one.cut = "before"
            await one.end()

    asyncio.run(scenario())


async def test_a_lease_lost_in_the_middle_of_a_write_bounds_the_write(world):
    clock, _, candidate = world
    target, a = CasStore(), candidate("a").start()
    await clock.advance(1)
    fenced = FencedApi(target, a.election.held_for_s, margin_s=2.0)  # type: ignore[arg-type]
    ref = Ref(CONFIG_MAP, "default", "x")
    await fenced.create(ref, {"metadata": {"name": "x"}})
    assert target.timeouts[-1] == pytest.approx(a.election.held_for_s(), abs=2.1)
    a.cut = "before"
    await clock.advance(8.5)
    with pytest.raises(errors.Fenced, match="create ConfigMap default/y: not sent"):
        await fenced.create(Ref(CONFIG_MAP, "default", "y"), {"metadata": {"name": "y"}})
    assert len(target.writes) == 1
