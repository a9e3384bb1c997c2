"""What this gateway has at an upstream: prompt tokens waiting for a first token, and requests that are decoding."""

from __future__ import annotations

import heapq


class Ledger:
    """Requests in flight at one upstream. Times are monotonic seconds.

    A request that does not stream shows no first token; it is taken to decode from `first_token_due_s` on.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, float] = {}
        self._running: set[int] = set()
        self._due: list[tuple[float, int]] = []
        self._waiting_tokens = 0.0

    def sent(self, call: int, prompt_tokens: float, first_token_due_s: float | None = None) -> None:
        self._waiting[call] = prompt_tokens
        self._waiting_tokens += prompt_tokens
        if first_token_due_s is not None:
            heapq.heappush(self._due, (first_token_due_s, call))

    def first_token(self, call: int) -> None:
        tokens = self._waiting.pop(call, None)
        if tokens is not None:
            self._waiting_tokens -= tokens
            self._running.add(call)

    def ended(self, call: int) -> None:
        self._waiting_tokens -= self._waiting.pop(call, 0.0)
        self._running.discard(call)
        if not self._waiting:
            self._waiting_tokens = 0.0  # so that rounding errors never add up

    def counts(self, now_s: float) -> tuple[int, float, int]:
        """(requests without a first token, their prompt tokens, requests decoding)."""
        while self._due and self._due[0][0] <= now_s:
            self.first_token(heapq.heappop(self._due)[1])
        return len(self._waiting), self._waiting_tokens, len(self._running)

    @property
    def in_flight(self) -> int:
        return len(self._waiting) + len(self._running)
