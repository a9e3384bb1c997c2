"""Two whole operators on one cluster: whatever becomes of the lease, never two writers, and everything converges.

What a fence at the client excludes: a write that is *sent* after the lease has run out on the sender's own clock, and
one that is waited for beyond it. What it cannot exclude, as no API server looks at the lease: a write that a server
had received in time and carries out late, and a write of a machine that was suspended with a clock that does not know
it. For these two the tests show what is left: the preconditions of each write (uid, version), the next leader's own
look at the cluster, and that the old one learns of it with its next renewal.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import pytest

from moe_kube import objects as k
from moe_kube.errors import NotFound
from moe_kube.faults import TIMEOUT_AFTER_COMMIT, WRITES, before
from moe_kube.faulty import FaultyApi
from moe_kube.objects import Obj
from tests.controller.processes import LEASE, Hold, Process, Stage, broken_terms, controlled, overlaps
from tests.controller.world import KEY, USER

pytestmark = pytest.mark.faults
STORIES = ("create", "upgrade by Surge")
FIRST_S = 5.0
"""When one of the two has begun to lead, and the other stands by."""
AWAY_S = 60.0
"""Four times the lease."""
CALM_S = 60.0
RENEWAL_S = 2.5
"""How soon a leader renews its lease, and so hears of another one."""
HANDOVER_S = 8.0
"""The write under way, and the time between two looks of a candidate at a lease that was released."""
_undisturbed: dict[str, tuple[Obj, Counter[tuple[str, str]], list[dict[str, int]], int]] = {}


async def undisturbed(story: str) -> tuple[Obj, Counter[tuple[str, str]], list[dict[str, int]], int]:
    """End state, objects made and deleted, steps of the weights and number of writes with one controller alone."""
    if story not in _undisturbed:
        stage = Stage(story)
        async with controlled(stage, wire(stage)):
            await stage.pass_time(FIRST_S)
            stage.act()
            await stage.pass_time(stage.story.seconds)
        _undisturbed[story] = stage.state(), stage.made(), stage.steps(), len(stage.writes())
    return _undisturbed[story]


def wire(stage: Stage) -> FaultyApi:
    return FaultyApi(stage.cluster.client(USER), journal=stage.journal, clock=stage.clock)


class Pair:
    """Two operators on one stage: `one` leads from the start, `two` stands by."""

    def __init__(self, story: str, *, rates: tuple[float, float] = (1.0, 1.0)) -> None:
        self.story = story
        self.stage = Stage(story)
        self.one = Process(self.stage, "one", rate=rates[0], wall_s=-4.0)
        self.two = Process(self.stage, "two", rate=rates[1], wall_s=4.0)
        self._stack = AsyncExitStack()
        self.tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Pair:
        await self._stack.enter_async_context(self.one.running())
        await self.stage.pass_time(1.0)
        await self._stack.enter_async_context(self.two.running())
        await self.stage.pass_time(FIRST_S - 1.0)
        assert (self.one.leads, self.two.leads) == (True, False)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await self._stack.aclose()

    async def play(self, *, acting: bool = True) -> None:
        if acting:
            self.stage.act()
        await self.stage.pass_time(self.stage.story.seconds + AWAY_S + CALM_S)

    def at_write(self, number: int, begin: Callable[[], None], end: Callable[[], None], away_s: float = AWAY_S) -> None:
        """`begin` when `one` is about to send that write of the story, `end` a while later."""

        def reached(at: int) -> None:
            if at == number:
                begin()
                self.tasks.append(asyncio.create_task(over()))

        async def over() -> None:
            await self.stage.clock.sleep(away_s)
            end()

        self.one.wire.on_write = reached

    async def converged(self, *, strictly: bool = True, steady: bool = True, ended: Process | None = None) -> None:
        """The end is that of an undisturbed run, nothing was done twice, and nothing more is written."""
        stage = self.stage
        state, made, steps, _ = await undisturbed(self.story)
        assert stage.state() == state
        assert stage.made() == made, "nothing is made twice"
        assert stage.steps() == steps, "no step is taken twice"
        contents = {(weights.version, str(weights.percent)) for _, weights in stage.sends}
        assert len(contents) == len({version for version, _ in contents}), "one version, one content"
        if strictly:
            assert broken_terms(stage) == []
            assert overlaps(stage) == []
        processes = [process for process in (self.one, self.two) if process is not ended]
        assert [process.leads for process in processes].count(True) in ((1,) if steady else (0, 1))
        assert all(process.server.crashed == "" for process in processes)
        before_ = len(stage.writes())
        for _ in range(10):
            for process in processes:
                process.server.controller.wake(KEY)
            await stage.pass_time(2.0)
        assert len(stage.writes()) == before_


@pytest.mark.parametrize("number", range(0, 17, 2))
@pytest.mark.parametrize("hold", ["before", "after", "late"])
@pytest.mark.parametrize("story", STORIES)
async def test_a_lease_lost_in_the_middle_of_a_write(story: str, hold: Hold, number: int) -> None:
    """The write hangs beyond the lease: it never commits, or did at once, or does so when another has long led.

    The last is beyond a client's fence. It was sent in time, and its own preconditions make nothing of it.
    """
    assert number < (await undisturbed(story))[3]
    async with Pair(story) as pair:
        one = pair.one

        def cut(cut: bool) -> None:
            one.line.cut = cut

        one.wire.on_hold = lambda: cut(True)
        pair.at_write(number, lambda: setattr(one.wire, "hold", hold), lambda: cut(False))
        await pair.play()
        assert one.wire.hold is None, "it was met"
        assert pair.two.leads
        assert broken_terms(pair.stage) == []
        assert hold == "late" or overlaps(pair.stage) == []
        await pair.converged(strictly=False)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.95, 1.05), (1.05, 0.95)], ids=str)
@pytest.mark.parametrize("number", range(0, 16, 5))
@pytest.mark.parametrize("story", STORIES)
async def test_a_leader_that_is_cut_off(story: str, number: int, rates: tuple[float, float]) -> None:
    async with Pair(story, rates=rates) as pair:
        one = pair.one
        pair.at_write(number, lambda: setattr(one.line, "cut", True), lambda: setattr(one.line, "cut", False))
        await pair.play()
        assert pair.two.leads
        await pair.converged()


@pytest.mark.parametrize("number", [0, 7])
@pytest.mark.parametrize("story", STORIES)
async def test_a_leader_whose_answers_are_lost(story: str, number: int) -> None:
    """Its renewals arrive, and it does not know it: nobody writes for as long, and nobody twice."""
    async with Pair(story) as pair:
        one = pair.one
        pair.at_write(number, lambda: void(one.wire.add(TIMEOUT_AFTER_COMMIT, verbs=WRITES, times=None)), one.wire.calm)
        await pair.play()
        await pair.converged()


def void(_: object) -> None:
    return None


@pytest.mark.parametrize("away_s", [3.0, 12.0, AWAY_S])
@pytest.mark.parametrize("number", range(0, 16, 5))
@pytest.mark.parametrize("story", STORIES)
async def test_a_process_that_is_paused(story: str, number: int, away_s: float) -> None:
    """Between the look at the lease and the sending of a write; its clock then jumps."""
    async with Pair(story) as pair:
        one = pair.one
        pair.at_write(number, one.clock.stop, lambda: one.clock.go_on(jump=True), away_s)
        await pair.play()
        assert pair.two.leads == (away_s > 15.0) or away_s == 12.0
        await pair.converged()


@pytest.mark.parametrize("number", range(0, 16, 5))
@pytest.mark.parametrize("story", STORIES)
async def test_a_machine_that_is_suspended_and_whose_clock_does_not_know_it(story: str, number: int) -> None:
    """Beyond a client's fence: it may write until it hears of the new leader, at its next renewal, and no longer."""
    async with Pair(story) as pair:
        one, clock = pair.one, pair.stage.clock
        back: list[float] = []

        def go_on() -> None:
            back.append(clock.monotonic())
            one.clock.go_on(jump=False)

        pair.at_write(number, one.clock.stop, go_on)
        await pair.play()
        assert pair.two.leads
        sent = [pair.stage.journal.sent[call.index][1] for call in pair.stage.writes("one")]
        assert max(sent, default=0.0) <= back[0] + RENEWAL_S
        await pair.converged(strictly=False)


@pytest.mark.parametrize("story", STORIES)
async def test_a_lease_that_is_deleted_again_and_again(story: str) -> None:
    async with Pair(story) as pair:
        stage = pair.stage
        stage.act()
        for _ in range(12):
            with suppress(NotFound):
                stage.cluster.delete(LEASE)
            await stage.pass_time(7.0)
        await stage.pass_time(stage.story.seconds)
        assert pair.one.leads
        await pair.converged()


@pytest.mark.parametrize("takes_s", [3.0, 6.0, 9.0, 12.0])
@pytest.mark.parametrize("story", STORIES)
async def test_renewals_that_take_long(story: str, takes_s: float) -> None:
    async with Pair(story) as pair:
        one, stage = pair.one, pair.stage

        async def slow(_: object) -> None:
            await stage.clock.sleep(takes_s)

        one.wire.add(before(slow), kinds=frozenset({k.LEASE}), verbs=WRITES, times=None)
        await pair.play()
        # At six seconds it is never in time, and its own record keeps the other one out: it leads with gaps.
        assert pair.one.leads or takes_s > 5.0
        assert pair.two.leads == (takes_s > 8.0)
        await pair.converged(steady=takes_s != 6.0)


@pytest.mark.parametrize("number", range(0, 16, 5))
@pytest.mark.parametrize("story", STORIES)
async def test_a_leader_that_is_told_to_end_hands_over_when_its_write_is_done(story: str, number: int) -> None:
    """The write under way takes three seconds more; the next one leads soon after, and not when a lease runs out."""
    async with Pair(story) as pair:
        one, stage = pair.one, pair.stage

        async def slow(_: object) -> None:
            await stage.clock.sleep(3.0)

        def end() -> None:
            one.wire.add(before(slow), when=lambda call: call.kind not in (k.LEASE, k.EVENT), verbs=WRITES)
            pair.tasks.append(asyncio.create_task(one.server.stop()))

        pair.at_write(number, end, lambda: None)
        stage.act()
        await until(stage, lambda: not one.leads)
        since = stage.clock.monotonic()
        await until(stage, lambda: pair.two.leads)
        assert stage.clock.monotonic() - since <= HANDOVER_S
        await pair.play(acting=False)
        await pair.converged(ended=one)


async def until(stage: Stage, come: Callable[[], bool]) -> None:
    for _ in range(600):
        if come():
            return
        await stage.pass_time(0.25, 0.25)
    raise AssertionError("it did not come")
