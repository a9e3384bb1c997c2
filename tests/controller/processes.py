"""Operators as real processes on the world's cluster: reflectors, queue, workers and election, each on a clock and a
network of its own that can be stopped, cut and slowed; and a journal that tells who wrote while who held the lease.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from moe_core.clock import FakeClock
from moe_core.wire import Weights
from moe_kube import objects as k
from moe_kube.api import Api, WatchEvent
from moe_kube.calls import Call as Asked
from moe_kube.calls import Gate
from moe_kube.errors import ApiError, NotFound, Unreachable
from moe_kube.faults import WRITES, Call, Journal
from moe_kube.faulty import FaultyApi
from moe_kube.objects import Kind, Obj, Ref
from moe_kube.waits import INSTANT_S, at_most
from moe_operator.controller import Controller
from moe_operator.requests import AskGateways, Gateways, SendWeights
from moe_operator.server import LEASE_NAME, OperatorServer
from tests.controller.stories import STORIES, world_of
from tests.controller.world import CONFIG, USER

T = TypeVar("T")
LEASE = Ref(k.LEASE, CONFIG.namespace, LEASE_NAME)
NEIGHBOUR = Ref(k.LEASE, "others", "somebody")
STEP_S = 1.0
CONNECT_S = 5.0
"""How long a call tries to reach a server that does not answer."""
SILENT_S = 90.0
"""How long a watch of which nothing is heard is kept."""
LATE_S = 45.0
"""When a stopped server carries out what it had already received: long after another one leads."""
Hold = Literal["before", "after", "late"]
"""A write that hangs until its caller gives up: before it commits (and never does), after it, or it commits later."""


class TimedJournal(Journal):
    """A journal that knows when each call was sent and when the server was done with it, and which came first."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._clock = clock
        self._ticks = 0
        self.sent: dict[int, tuple[int, float]] = {}
        self.ended: dict[int, tuple[int, float]] = {}

    def begin(self, call: Call) -> Call:
        begun = super().begin(call)
        self.sent[begun.index] = self._tick()
        return begun

    def end(self, call: Call, result: str, *, committed: bool = False, answer: Obj | None = None) -> None:
        super().end(call, result, committed=committed, answer=answer)
        self.ended[call.index] = self._tick()

    def _tick(self) -> tuple[int, float]:
        self._ticks += 1
        return self._ticks, self._clock.monotonic()

    def told(self, call: Call) -> str:
        ended = self.ended.get(call.index, (0, float("nan")))[1]
        return f"{call.client}: {call} (sent at {self.sent[call.index][1]:.2f} s, over at {ended:.2f} s)"


class Stage:
    """The world of a story from where its faults begin; operators are put on it by the test."""

    def __init__(self, story: str) -> None:
        self.story = STORIES[story]
        self.world = world_of(self.story)
        self.clock = self.world.clock
        self.cluster = self.world.cluster
        self.journal = TimedJournal(self.clock)
        self.neighbour = False
        """Whether somebody else writes something each second, as on every real cluster."""
        self.sends: list[tuple[str, Weights]] = []
        self._before = self.world.counts()

    async def pass_time(self, seconds: float, step: float = STEP_S) -> None:
        """Others act, then time passes and the operators do what they do."""
        for number in range(round(seconds / step)):
            with suppress(NotFound):  # of a kind that is not installed just now
                self.world.others()
            self.cluster.collect_garbage()
            if self.neighbour:
                self.cluster.apply(NEIGHBOUR, {"spec": {"leaseTransitions": number}}, manager="other")
            await self.clock.advance(step)

    def act(self) -> None:
        """What the story is about."""
        self.story.act(self.world)

    # What came of it

    def state(self) -> Obj:
        return self.world.state()

    def made(self) -> Counter[tuple[str, str]]:
        """Objects that operators made and deleted since the start, apart from their lease and their Events."""
        counts = self.world.counts() - self._before
        return Counter({at: n for at, n in counts.items() if at[1] not in ("Lease", "Event")})

    def steps(self) -> list[dict[str, int]]:
        """The weights of revisions as status held them, one after the other."""
        found: list[dict[str, int]] = []
        for call in self.journal.calls:
            if call.kind == k.MOE_DEPLOYMENT and call.subresource == "status" and call.committed:
                weights = {r["name"]: r.get("weight", 0) for r in call.body["status"].get("revisions", ())}
                if found[-1:] != [weights]:
                    found.append(weights)
        return found

    def writes(self, client: str = "") -> list[Call]:
        """Writes that operators sent, other than of the lease."""
        return [c for c in self.journal.writes if c.kind != k.LEASE and client in ("", c.client)]


# -- one controller, with no election


@asynccontextmanager
async def controlled(stage: Stage, api: Api) -> AsyncIterator[Controller]:
    """A controller at work, on the world's own clock."""
    fleet = stage.world.pods
    controller = Controller(api, CONFIG, clock=stage.clock, fleet=fleet, teller=stage.world.told, rng=random.Random(3))
    following = asyncio.create_task(controller.follow())
    await controller.start()
    try:
        yield controller
    finally:
        await controller.stop()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


class Behind:
    """A client whose watches of one kind, or of all, are some writes behind."""

    def __init__(self, stage: Stage, writes: int, kind: Kind | None) -> None:
        self._now = stage.cluster.client(USER)
        self._then = stage.cluster.client(USER, lag_writes=writes)
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now, name)

    def watch(self, kind: Kind, **more: Any) -> AsyncGenerator[WatchEvent, None]:
        return (self._then if self._kind in (None, kind) else self._now).watch(kind, **more)


# -- whole processes


class OwnClock:
    """The clock of one process: its rate and wall time are its own, and it can be stopped."""

    def __init__(self, clock: FakeClock, *, rate: float = 1.0, wall_s: float = 0.0) -> None:
        self._clock, self._rate, self._wall_s = clock, rate, wall_s
        self._stopped_at: float | None = None
        self._lost_s = 0.0
        self._running = asyncio.Event()
        self._running.set()

    def time(self) -> float:
        return self._clock.time() + self._wall_s

    def monotonic(self) -> float:
        return (self._clock.monotonic() - self._lost_s) * self._rate

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await self._clock.sleep(0)
        due = self.monotonic() + seconds
        while due - self.monotonic() > INSTANT_S:
            await self._clock.sleep((due - self.monotonic()) / self._rate)
            await self.running()

    async def running(self) -> None:
        """Returns when the process runs."""
        await self._running.wait()

    def stop(self) -> None:
        """The process does nothing from here on."""
        self._stopped_at = self._clock.monotonic()
        self._running.clear()

    def go_on(self, *, jump: bool) -> None:
        """The process runs again. Its clock has jumped, or (a machine that was suspended) knows nothing of it."""
        if self._stopped_at is not None and not jump:
            self._lost_s += self._clock.monotonic() - self._stopped_at
        self._stopped_at = None
        self._running.set()


class Wire(FaultyApi):
    """The network of one process, and what the server does with a call that arrived."""

    def __init__(self, inner: Api, *, journal: Journal, clock: OwnClock, world_clock: FakeClock, client: str) -> None:
        super().__init__(inner, journal=journal, clock=clock, client=client)
        self._own_clock = clock
        self._world_clock = world_clock
        self.limit_s: float | None = None
        self.hold: Hold | None = None
        self.on_hold: Callable[[], None] = lambda: None
        self.on_write: Callable[[int], None] = lambda number: None
        """Called with the number of each write of a MoEDeployment or a child when it is about to be sent."""
        self.late: list[asyncio.Task[Any]] = []

    async def _run(self, call: Call, go: Callable[[], Awaitable[T]]) -> T:
        hold, self.hold = (self.hold, None) if _counts(call) else (None, self.hold)
        if hold is None:
            answer = await super()._run(call, go)
            await self._own_clock.running()
            return answer
        limit_s = self.limit_s
        assert limit_s is not None, "a write has a limit"
        self.on_hold()
        if hold == "after":
            await super()._run(call, go)
        if hold == "late":
            self.late.append(asyncio.create_task(self._late(call, go)))
        await self._own_clock.sleep(limit_s)
        if hold == "before":
            self.journal.end(call, "Unreachable")
        raise Unreachable("injected: no answer in time")

    async def _late(self, call: Call, go: Callable[[], Awaitable[Any]]) -> None:
        await self._world_clock.sleep(LATE_S)
        with suppress(ApiError):
            await super()._run(call, go)


def _counts(call: Call | Asked) -> bool:
    writes = call.writes if isinstance(call, Asked) else call.verb in WRITES
    return writes and call.kind not in (k.LEASE, k.EVENT)


class Line(Gate):
    """From the process to its wire: a call waits while the process is stopped, and finds nobody while it is cut off.

    As the real client does, it gives up when its limit has passed, and that before it sends anything.
    """

    def __init__(self, wire: Wire, clock: OwnClock) -> None:
        super().__init__(wire)
        self._wire = wire
        self._clock = clock
        self._whole = asyncio.Event()
        self._whole.set()
        self._number = 0

    @property
    def cut(self) -> bool:
        return not self._whole.is_set()

    @cut.setter
    def cut(self, cut: bool) -> None:
        (self._whole.clear if cut else self._whole.set)()

    async def before(self, call: Asked, timeout_s: float | None) -> float | None:
        limit_s = CONNECT_S if timeout_s is None else timeout_s
        until = self._clock.monotonic() + limit_s
        if _counts(call):
            number, self._number = self._number, self._number + 1
            self._wire.on_write(number)
        await self._clock.running()
        if self.cut:
            await at_most(self._clock, self._whole.wait(), min(limit_s, CONNECT_S))
        if self.cut or self._clock.monotonic() >= until:
            raise Unreachable("injected: not reached in time")
        self._wire.limit_s = timeout_s
        return timeout_s

    async def watch(self, kind: Kind, **more: Any) -> AsyncGenerator[WatchEvent, None]:  # type: ignore[override]
        async with aclosing(super().watch(kind, **more)) as events:
            async for event in events:
                await self._clock.running()
                if self.cut:
                    await at_most(self._clock, self._whole.wait(), SILENT_S)
                if self.cut:
                    raise Unreachable("injected: nothing was heard of the watch for too long")
                yield event


@dataclass
class Process:
    """One operator process. `on_write` of its wire is where a fault begins."""

    stage: Stage
    name: str
    rate: float = 1.0
    wall_s: float = 0.0
    clock: OwnClock = field(init=False)
    wire: Wire = field(init=False)
    line: Line = field(init=False)
    server: OperatorServer = field(init=False)

    def __post_init__(self) -> None:
        stage = self.stage
        self.clock = OwnClock(stage.clock, rate=self.rate, wall_s=self.wall_s)
        self.wire = Wire(
            stage.cluster.client(USER),
            journal=stage.journal,
            clock=self.clock,
            world_clock=stage.clock,
            client=self.name,
        )
        self.line = Line(self.wire, self.clock)
        config = CONFIG.model_copy(update={"identity": self.name})
        self.server = OperatorServer(config, self.line, clock=self.clock, fleet=self)

    @property
    def leads(self) -> bool:
        return self.server.election.leading

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Process]:
        await self.server.start()
        try:
            yield self
        finally:
            self.line.cut = False
            self.clock.go_on(jump=True)
            self.wire.calm()
            await self.stop()
            for task in self.wire.late:
                task.cancel()

    async def stop(self) -> None:
        """Told to end; time passes until it has."""
        stopping = asyncio.create_task(self.server.stop())
        for _ in range(100):
            if stopping.done():
                break
            await self.stage.pass_time(0.5, 0.5)
        await stopping

    # The gateways are reached by a network of their own

    async def ask(self, request: AskGateways) -> Gateways:
        await self.clock.running()
        return await self.stage.world.pods.ask(request)

    async def send(self, request: SendWeights) -> int:
        await self.clock.running()
        self.stage.sends.append((self.name, request.weights))
        return await self.stage.world.pods.send(request)


def lease_history(journal: TimedJournal) -> list[tuple[int, str]]:
    """Who held the lease by its record, from which moment of the journal on."""
    taken = [call for call in journal.writes if call.kind == k.LEASE and call.committed]
    return sorted((journal.ended[call.index][0], call.body["spec"].get("holderIdentity", "")) for call in taken)


def broken_terms(stage: Stage) -> list[str]:
    """Writes that were sent by one process while the record of the lease named another, or none."""
    journal, found = stage.journal, []
    history = lease_history(journal)
    for call in stage.writes():
        at = journal.sent[call.index][0]
        holder = next((name for since, name in reversed(history) if since < at), "")
        if holder != call.client:
            found.append(f"{journal.told(call)}, while the lease is held by {holder or 'nobody'}")
    return found


def overlaps(stage: Stage) -> list[str]:
    """Pairs of writes of two processes of which the later was sent before the server was done with the earlier."""
    journal, found = stage.journal, []
    writes = stage.writes()
    for number, later in enumerate(writes):
        for earlier in writes[:number]:
            over = journal.ended.get(earlier.index)
            if earlier.client != later.client and (over is None or over[0] > journal.sent[later.index][0]):
                found.append(f"{journal.told(earlier)} / {journal.told(later)}")
    return found
