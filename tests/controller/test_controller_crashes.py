"""Crash matrix: every workload × every write × {before, after it commits} comes to the same end."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import pytest

from moe_kube.faults import CRASH_AFTER, CRASH_BEFORE, Action
from tests.controller.stories import STORIES, play, world_of

pytestmark = pytest.mark.faults
POINTS = {"before": CRASH_BEFORE, "after": CRASH_AFTER}


@lru_cache
def undisturbed(name: str) -> tuple[Any, Counter[tuple[str, str]], int]:
    """End state, creates and deletes, and number of writes of a run without faults."""
    world = world_of(STORIES[name])
    start = world.counts()
    play(STORIES[name], world)
    writes = len(world.journal.writes)
    assert world.errors == []
    assert world.idle_writes() == 0
    return world.state(), world.counts() - start, writes


@pytest.mark.parametrize("point", POINTS, ids=list(POINTS))
@pytest.mark.parametrize("name", STORIES, ids=list(STORIES))
def test_a_crash_at_any_write_changes_nothing(name: str, point: str) -> None:
    state, counts, writes = undisturbed(name)
    assert writes > 0
    for write in range(writes):
        crashed, made = _crashed(name, write, POINTS[point])
        assert crashed == state, f"crash {point} write {write}"
        assert made == counts, f"crash {point} write {write}"


def _crashed(name: str, write: int, action: Action) -> tuple[Any, Counter[tuple[str, str]]]:
    world = world_of(STORIES[name])
    start = world.counts()
    world.api.add(action, write=write)
    play(STORIES[name], world)
    assert world.crashes == 1
    assert world.idle_writes(1) == 0
    return world.state(), world.counts() - start
