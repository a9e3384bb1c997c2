"""What this gateway has at an upstream: prompt tokens waiting for a first token, and requests that are decoding."""

from __future__ import annotations

import heapq
import math


class Ledger:
    """Requests in flight at one upstream. Times are monotonic seconds.

    A request that does not stream shows no first token; it is taken to decode from `first_token_due_s` on.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[float, float]] = {}
        self._running: set[int] = set()
        self._due: list[tuple[float, int]] = []
        self._waiting_tokens = 0.0
        self._quiet: set[int] = set()
        self.progress_s = 0.0
        """When a prompt was done last."""
        self.gaps = 0
        """Tokens of streams that came after another token of theirs."""

    def sent(
        self, call: int, prompt_tokens: float, first_token_due_s: float | None = None, now_s: float = math.inf
    ) -> None:
        self._waiting[call] = (now_s, prompt_tokens)
        self._waiting_tokens += prompt_tokens
        if first_token_due_s is not None:
            heapq.heappush(self._due, (first_token_due_s, call))
            self._quiet.add(call)

    def first_token(self, call: int, now_s: float = 0.0) -> None:
        waited = self._waiting.pop(call, None)
        if waited is not None:
            self._waiting_tokens -= waited[1]
            self._running.add(call)
            self.progress_s = now_s

    def ended(self, call: int) -> None:
        self._waiting_tokens -= self._waiting.pop(call, (0.0, 0.0))[1]
        self._running.discard(call)
        self._quiet.discard(call)
        if not self._waiting:
            self._waiting_tokens = 0.0  # so that rounding errors never add up

    def counts(self, now_s: float) -> tuple[int, float, int]:
        """(requests without a first token, their prompt tokens, requests decoding)."""
        while self._due and self._due[0][0] <= now_s:
            due_s, call = heapq.heappop(self._due)
            self.first_token(call, due_s)
        return len(self._waiting), self._waiting_tokens, len(self._running)

    def head(self) -> tuple[float, float]:
        """(when it was sent, its prompt tokens) of the request that waits longest; (∞, 0) where none does."""
        return next(iter(self._waiting.values()), (math.inf, 0.0))

    @property
    def streams(self) -> int:
        """Requests that decode and show it."""
        return len(self._running - self._quiet)

    @property
    def in_flight(self) -> int:
        return len(self._waiting) + len(self._running)
