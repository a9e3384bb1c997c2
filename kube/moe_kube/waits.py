"""Waiting for something, but not longer than a time on our own clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from moe_core.clock import Clock

INSTANT_S = 1e-6
"""Less than this is now: a difference of two times may round to a wait that no clock can take."""


async def at_most(clock: Clock, one: Awaitable[Any], seconds: float) -> None:
    """Wait for it or for the time, whichever comes first; what has not come is cancelled. Never raises its error."""
    waits = [asyncio.ensure_future(one), asyncio.ensure_future(clock.sleep(seconds))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
