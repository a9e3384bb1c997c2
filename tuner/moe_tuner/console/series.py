"""What the ticks saw, kept for the page: a quarter of an hour finely and half a day coarsely, in a fixed room. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import isnan, nan

from moe_core.setting import Signals

COLUMNS = (
    *("attained", "spilled", "shed", "arrivalsPerS", "ttftP95S", "itlP95S", "waiting", "rankImbalance"),
    *("gamma", "version"),
)
FINE_S, FINE_KEPT = 2.0, 450
COARSE_S, COARSE_KEPT = 60.0, 720


def sample(signals: Signals, gamma: float | None, version: int) -> tuple[float, ...]:
    """One row of COLUMNS; NaN is unknown."""
    found = (
        *(signals.slo_attained, signals.spill_share, signals.shed_share, signals.arrivals_per_s),
        *(signals.ttft_p95_s, signals.itl_p95_s, signals.waiting, signals.rank_assigned, gamma, version),
    )
    return tuple(nan if value is None else float(value) for value in found)


class Ring:
    """The last `size` rows of `width` numbers."""

    def __init__(self, size: int, width: int) -> None:
        self._size, self._width, self._count = size, width, 0
        self._at = array("d", [0.0]) * size
        self._values = array("f", [nan]) * (size * width)

    def add(self, at_s: float, values: Sequence[float]) -> None:
        place = self._count % self._size
        self._at[place] = round(at_s, 2)
        self._values[place * self._width : (place + 1) * self._width] = array("f", values)
        self._count += 1

    def rows(self, since_s: float) -> list[list[float | None]]:
        """Time and values of rows later than `since_s`, oldest first; five digits, None where unknown."""
        found = []
        for index in range(max(0, self._count - self._size), self._count):
            place = index % self._size
            if self._at[place] > since_s:
                cells = self._values[place * self._width : (place + 1) * self._width]
                found.append([self._at[place], *(None if isnan(x) else float(f"{x:.5g}") for x in cells)])
        return found


class Series:
    """Both rings of one deployment."""

    def __init__(self) -> None:
        width = len(COLUMNS)
        self._fine, self._coarse = Ring(FINE_KEPT, width), Ring(COARSE_KEPT, width)
        self._fine_due_s, self._minute = 0.0, 0
        self._sums, self._counts = [0.0] * width, [0] * width

    def add(self, at_s: float, values: Sequence[float]) -> None:
        """Take what a tick saw. The coarse ring gets means over the minutes, of what was known in them."""
        if at_s >= self._fine_due_s:
            self._fine.add(at_s, values)
            self._fine_due_s = at_s + FINE_S - 0.5
        minute = int(at_s // COARSE_S)
        if self._minute and minute != self._minute:
            means = [total / n if n else nan for total, n in zip(self._sums, self._counts, strict=True)]
            self._coarse.add((self._minute + 1) * COARSE_S, means)
            self._sums, self._counts = [0.0] * len(COLUMNS), [0] * len(COLUMNS)
        self._minute = minute
        for index, value in enumerate(values):
            if not isnan(value):
                self._sums[index] += value
                self._counts[index] += 1

    def rows(self, since_s: float, *, coarse: bool) -> list[list[float | None]]:
        return (self._coarse if coarse else self._fine).rows(since_s)
