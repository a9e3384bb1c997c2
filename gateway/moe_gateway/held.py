"""Requests that wait at the gateway for a decision that knows more, in order of arrival."""

from __future__ import annotations

import asyncio

from moe_core.clock import Clock


class Held:
    """Those of one process. Each is asked about again at its time, or when it is the first and something ends."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[asyncio.Future[None], None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, until_s: float) -> None:
        """Until a monotonic moment, or an earlier release. A client that leaves cancels it like any wait."""
        woken = asyncio.get_running_loop().create_future()
        self._waiting[woken] = None
        try:
            await asyncio.wait({woken}, timeout=max(0.0, until_s - self._clock.monotonic()))
        finally:
            self._waiting.pop(woken, None)

    def release(self) -> None:
        """Something has ended: the one that has waited longest is decided anew."""
        woken = next(iter(self._waiting), None)
        if woken is not None:
            del self._waiting[woken]
            woken.set_result(None)

    def release_all(self) -> None:
        """The gateway drains: each is decided now."""
        while self._waiting:
            self.release()
