"""The knobs that the slow loop explores: ranges from the bounds without the pins, and settings from drawn values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from decimal import Decimal

from moe_api.base import Model
from moe_core.config import KnobBounds
from moe_core.setting import ACTIVE_SEQS, CAPACITY, OVERFLOW, Setting, on_grain, pinned
from moe_core.wire import Overflow


class Space(Model):
    """Ranges, inclusive. None: not explored."""

    gamma: tuple[float, float] | None = None
    active_seqs: tuple[int, int] | None = None

    @property
    def empty(self) -> bool:
        return self.gamma is None and self.active_seqs is None

    def draw(self, rng: random.Random) -> dict[str, float]:
        """A point drawn evenly."""
        point = dict[str, float]()
        if self.gamma is not None:
            point[CAPACITY] = rng.uniform(*self.gamma)
        if self.active_seqs is not None:
            point[ACTIVE_SEQS] = rng.randint(*self.active_seqs)
        return point

    def holds(self, params: Mapping[str, float]) -> bool:
        """Whether a trial of an earlier life of the study lies in this space."""
        for name, limits in ((CAPACITY, self.gamma), (ACTIVE_SEQS, self.active_seqs)):
            if (limits is None) != (name not in params):
                return False
            if limits is not None and not limits[0] <= params[name] <= limits[1]:
                return False
        return True


def space_of(bounds: KnobBounds, ceiling: int | None = None) -> Space:
    """The space inside the bounds; a knob with a pin or with a single value is left out."""
    gamma: tuple[float, float] | None = (float(bounds.capacity_factor_min), float(bounds.capacity_factor_max))
    if pinned(CAPACITY, bounds) or pinned(OVERFLOW, bounds) or bounds.capacity_factor_min >= bounds.capacity_factor_max:
        gamma = None
    top = min(bounds.active_seqs_max, ceiling or bounds.active_seqs_max)
    seqs: tuple[int, int] | None = (bounds.active_seqs_min, top)
    if pinned(ACTIVE_SEQS, bounds) or bounds.active_seqs_min >= top:
        seqs = None
    return Space(gamma=gamma, active_seqs=seqs)


def candidate(incumbent: Setting, params: Mapping[str, float], bounds: KnobBounds) -> Setting:
    """The incumbent with the drawn values in place of its own; γ on its grain, everything inside the bounds."""
    setting = incumbent
    if CAPACITY in params:
        factor = on_grain(Decimal(str(round(params[CAPACITY], 4))), bounds)
        setting = setting.capped(factor, Overflow(bounds.overflow))
    if ACTIVE_SEQS in params:
        limit = min(bounds.active_seqs_max, max(bounds.active_seqs_min, round(params[ACTIVE_SEQS])))
        setting = setting.with_active_seqs(limit)
    return setting


def gentle_start(incumbent: Setting, space: Space, limit_in_force: int | None) -> dict[str, float]:
    """The first candidate of a new study: the one that differs least from what is in force."""
    params = dict[str, float]()
    if space.gamma is not None:
        cap = incumbent.prefill_cap
        params[CAPACITY] = space.gamma[1] if cap is None else min(space.gamma[1], max(space.gamma[0], float(cap)))
    if space.active_seqs is not None:
        low, high = space.active_seqs
        params[ACTIVE_SEQS] = min(high, max(low, incumbent.engine.max_active_seqs or limit_in_force or high))
    return params
