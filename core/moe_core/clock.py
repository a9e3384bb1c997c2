"""The one clock. Everything that waits or measures takes a `Clock`, so that tests run hours in milliseconds."""

from __future__ import annotations

import asyncio
import heapq
import time
from time import monotonic as _monotonic
from typing import Protocol


class Clock(Protocol):
    """Wall time, monotonic time and waiting."""

    def time(self) -> float:
        """Unix time in seconds: for records that others read, never for intervals."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back: for intervals and deadlines."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait. Zero or less yields once to the event loop."""
        ...


class SystemClock:
    """The machine's clock."""

    def time(self) -> float:
        return time.time()

    monotonic = staticmethod(_monotonic)  # asked a dozen times for each request

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))


class FakeClock:
    """A clock that moves only when told to. Wall time can be set apart from monotonic time (`jump`)."""

    def __init__(self, start_s: float = 1_700_000_000.0) -> None:
        self._now = 0.0
        self._wall_offset = start_s
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = 0

    def time(self) -> float:
        return self._wall_offset + self._now

    def monotonic(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._order += 1
        heapq.heappush(self._sleepers, (self._now + seconds, self._order, future))
        await future

    def jump(self, seconds: float) -> None:
        """Move wall time alone, as an NTP step does."""
        self._wall_offset += seconds

    async def advance(self, seconds: float) -> None:
        """Move both times forward and wake every sleeper that falls due, in order, letting each run."""
        end = self._now + seconds
        await self._settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, future = heapq.heappop(self._sleepers)
            self._now = max(self._now, due)
            if not future.done():
                future.set_result(None)
            await self._settle()
        self._now = end

    @staticmethod
    async def _settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0)
