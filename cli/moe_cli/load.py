"""The load generator: an open loop, so that a slow server does not slow the arrivals that it is measured with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from moe_cli.arrivals import Arrival
from moe_cli.stream import Outcome
from moe_core.clock import Clock

Send = Callable[[int, Arrival, float], Awaitable[Outcome]]
"""(number, arrival, due time on the monotonic clock) → how it went. Never raises for a failed request."""


async def offer(
    arrivals: Sequence[Arrival],
    send: Send,
    clock: Clock,
    *,
    limit: int | None = None,
    on_sent: Callable[[], None] = lambda: None,
    on_done: Callable[[Outcome], None] = lambda _: None,
    outcomes: list[Outcome],
) -> None:
    """Send every arrival at its time and wait for all answers, which go to `outcomes` as they come.

    `limit` bounds requests in flight: later ones wait, and their latency counts from when they were due. When this is
    cancelled, requests in flight are cancelled too and `outcomes` holds what was finished.
    """
    start_s = clock.monotonic()
    gate = asyncio.Semaphore(limit) if limit is not None else None
    running: set[asyncio.Task[None]] = set()

    async def one(number: int, arrival: Arrival) -> None:
        try:
            on_sent()
            outcome = await send(number, arrival, start_s + arrival.at_s)
        finally:
            if gate is not None:
                gate.release()
        outcomes.append(outcome)
        on_done(outcome)

    try:
        for number, arrival in enumerate(arrivals):
            wait_s = start_s + arrival.at_s - clock.monotonic()
            if wait_s > 0:
                await clock.sleep(wait_s)
            if gate is not None:
                await gate.acquire()
            task = asyncio.create_task(one(number, arrival))
            running.add(task)
            task.add_done_callback(running.discard)
        while running:
            await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def clip(arrivals: Sequence[Arrival], context: int | None, room: int = 64) -> tuple[list[Arrival], int]:
    """Arrivals that fit a context of that many tokens, `room` of them for the chat template; and how many were cut."""
    if context is None:
        return list(arrivals), 0
    cut = 0
    fitted = []
    for arrival in arrivals:
        outputs = min(arrival.output_tokens, max(1, context // 2))
        inputs = min(arrival.input_tokens, max(1, context - outputs - room))
        cut += (inputs, outputs) != (arrival.input_tokens, arrival.output_tokens)
        fitted.append(Arrival(arrival.at_s, inputs, outputs))
    return fitted, cut


def request_body(model: str, text: str, output_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": output_tokens,
        "temperature": 0.0,
    }
    return {**body, "ignore_eos": True} if ignore_eos else body
