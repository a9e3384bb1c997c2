"""Time limits of many waits by one timer: a timer for each costs more than most answers take to pass on."""

from __future__ import annotations

import asyncio
from types import TracebackType

TICK_S = 0.05
"""A limit may end so much later than it says."""


class Deadlines:
    """The limits of one event loop."""

    def __init__(self) -> None:
        self._waits: set[Within] = set()
        self._timer: asyncio.TimerHandle | None = None

    def within(self, seconds: float) -> Within:
        """`with deadlines.within(2.0):` raises TimeoutError inside the task if its body takes longer."""
        return Within(self, seconds)

    def add(self, wait: Within) -> None:
        self._waits.add(wait)
        if self._timer is None:
            self._timer = wait.loop.call_later(TICK_S, self._look, wait.loop)

    def drop(self, wait: Within) -> None:
        self._waits.discard(wait)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        for wait in [wait for wait in self._waits if wait.ends_s <= now_s]:
            self._waits.discard(wait)
            wait.end()
        self._timer = loop.call_later(TICK_S, self._look, loop) if self._waits else None


class Within:
    """One limit. Cancels its task, and turns that cancellation, and no other, into TimeoutError."""

    __slots__ = ("_all", "_before", "_late", "_seconds", "_task", "ends_s", "loop")

    def __init__(self, deadlines: Deadlines, seconds: float) -> None:
        self._all = deadlines
        self._seconds = seconds
        self._late = False

    def __enter__(self) -> None:
        self.loop = loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None:
            raise RuntimeError("a limit is of a task")
        self._task: asyncio.Task[object] = task
        self._before = task.cancelling()
        self.ends_s = loop.time() + self._seconds
        self._all.add(self)

    def end(self) -> None:
        """The time is up."""
        self._late = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._all.drop(self)
        if self._late and self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise TimeoutError from error
