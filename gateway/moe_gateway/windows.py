"""What happened in the last minutes, in memory that is taken once: requests, attempts and money, newest last.

A list of objects would grow for as long as its window fills, and have every collection of garbage look through it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

_MOST = 2**62
"""An upstream may claim any number."""


class Instants:
    """Instants of the last `most` events, in monotonic seconds that never fall. Other columns are a subclass's."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.at_s = _column("d", most)
        self._next = 0
        self._full = False

    def add(self, at_s: float) -> int:
        """Take a place for an event, the oldest one's where all are taken."""
        index = self._next
        self.at_s[index] = at_s
        self._next = index + 1
        if self._next == self.most:
            self._next, self._full = 0, True
        return index

    def since(self, since_s: float) -> Iterator[int]:
        """Places of the events not older than this, newest first."""
        for index in range(self._next - 1, -1, -1):
            if self.at_s[index] < since_s:
                return
            yield index
        if self._full:
            for index in range(self.most - 1, self._next - 1, -1):
                if self.at_s[index] < since_s:
                    return
                yield index


@dataclass(frozen=True, slots=True)
class Kind:
    """What many requests have in common."""

    target: str
    lost_at: tuple[str, ...]
    outcome: str
    spilled: bool
    met: bool | None


class Requests(Instants):
    """Requests that have ended. A time that there was none of is NaN."""

    KINDS_MAX = 4096

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.ttft_s, self.itl_s = _column("d", most), _column("d", most)
        self.prompt_tokens, self.output_tokens = _column("q", most), _column("q", most)
        self.kind: list[Kind | None] = [None] * most
        self._kinds: dict[tuple[object, ...], Kind] = {}

    def ended(
        self,
        at_s: float,
        kind: tuple[str, tuple[str, ...], str, bool, bool | None],
        ttft_s: float | None,
        itl_s: float | None,
        prompt_tokens: int,
        output_tokens: int,
    ) -> None:
        index = self.add(at_s)
        self.ttft_s[index] = math.nan if ttft_s is None else ttft_s
        self.itl_s[index] = math.nan if itl_s is None else itl_s
        self.prompt_tokens[index], self.output_tokens[index] = min(prompt_tokens, _MOST), min(output_tokens, _MOST)
        known = self._kinds.get(kind)
        if known is None:
            if len(self._kinds) >= self.KINDS_MAX:
                self._kinds.clear()  # names of upstreams come and go
            known = self._kinds[kind] = Kind(*kind)
        self.kind[index] = known

    def times(self, places: list[int]) -> tuple[list[float], list[float]]:
        """Every TTFT and every ITL that there was, sorted."""
        return (
            sorted(found for index in places if not math.isnan(found := self.ttft_s[index])),
            sorted(found for index in places if not math.isnan(found := self.itl_s[index])),
        )


class Attempts(Instants):
    """Attempts that have ended."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.upstream: list[str] = [""] * most
        self.failed = bytearray(most)

    def ended(self, at_s: float, upstream: str, failed: bool) -> None:
        index = self.add(at_s)
        self.upstream[index], self.failed[index] = upstream, failed


class Spending(Instants):
    """What calls have cost, in pico-dollars."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.target: list[str] = [""] * most
        self.pico = _column("q", most)

    def spent(self, at_s: float, target: str, pico: int) -> None:
        index = self.add(at_s)
        self.target[index], self.pico[index] = target, min(pico, _MOST)


def _column(kind: str, most: int) -> array:  # type: ignore[type-arg]
    return array(kind, bytes(8 * most))
