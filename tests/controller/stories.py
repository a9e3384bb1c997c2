"""The workloads of the fault suites: what people and other controllers do, as scripts over a world."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moe_api.annotations import PAUSED
from moe_kube import objects as k
from moe_kube.objects import Obj
from tests.controller.world import SPEC, World

START_S = 60.0
"""How long a first start takes, with room."""
UPGRADE_S = 200.0
"""How long any upgrade takes here, to its end or back."""


def spec_with(path: str, value: Any, base: Obj = SPEC) -> Obj:
    """A spec with one field set: `spec_with("upgrade.strategy", "Bridge")`. None removes it."""
    spec = copy.deepcopy(base)
    node = spec
    *groups, last = path.split(".")
    for group in groups:
        node = node.setdefault(group, {})
    if value is None:
        node.pop(last, None)
    else:
        node[last] = value
    return spec


LONGER = spec_with("engine.maxModelLen", 16384)
"""A change of class revision."""
BRIDGE = spec_with("upgrade.strategy", "Bridge")
RECREATE = spec_with("upgrade.strategy", "Recreate")
LONGER_BRIDGE = spec_with("engine.maxModelLen", 16384, BRIDGE)
LONGER_RECREATE = spec_with("engine.maxModelLen", 16384, RECREATE)


def _break_new(world: World) -> None:
    """The newest revision never becomes ready; the one that runs is fine."""
    known = {obj["metadata"]["name"] for obj in world.cluster.peek(k.RAY_SERVICE)}

    def spoil() -> None:
        made = {obj["metadata"]["name"] for obj in world.cluster.peek(k.RAY_SERVICE)}
        world.ray.never_ready |= made - known

    others = world.others

    def turn() -> None:
        spoil()
        others()

    world.others = turn  # type: ignore[method-assign]


def _delete_and_recreate(world: World) -> None:
    world.drop()
    world.put()


def _delete_in_mid_upgrade(world: World) -> None:
    world.put(LONGER)
    world.run(30.0)
    world.drop()


@dataclass(frozen=True)
class Story:
    """`before` leads to where the faults begin, `act` is what happens then, `seconds` how long it takes to its end."""

    act: Callable[[World], Any]
    before: Callable[[World], Any] | None = None
    seconds: float = UPGRADE_S


def _put(spec: Obj) -> Callable[[World], None]:
    return lambda world: world.put(spec)


STORIES: dict[str, Story] = {
    "create": Story(_put(SPEC), seconds=START_S),
    "scale": Story(_put(spec_with("replicas", {"min": 2, "max": 4})), _put(SPEC), START_S),
    "change of parallelism": Story(_put(spec_with("hardware.gpusPerReplica", 8)), _put(SPEC)),
    "upgrade by Surge": Story(_put(LONGER), _put(SPEC)),
    "upgrade by Bridge": Story(_put(LONGER_BRIDGE), _put(BRIDGE)),
    "upgrade by Recreate": Story(_put(LONGER_RECREATE), _put(RECREATE)),
    "tuner change": Story(
        lambda world: world.tune({"mode": "Auto", "acknowledged": 4, "replicas": {"min": 2, "max": 3}}),
        _put(spec_with("replicas", {"min": 1, "max": 4})),
        START_S,
    ),
    "rollback of Surge": Story(lambda world: (_break_new(world), world.put(LONGER)), _put(SPEC)),
    "rollback of Bridge": Story(lambda world: (_break_new(world), world.put(LONGER_BRIDGE)), _put(BRIDGE), 320.0),
    "delete": Story(_delete_in_mid_upgrade, _put(SPEC), START_S),
    "delete and recreate": Story(_delete_and_recreate, _put(SPEC), START_S),
    "pause": Story(
        lambda world: world.put(spec_with("tuning.paused", True), annotations={PAUSED: "true"}),
        _put(SPEC),
        START_S,
    ),
    "suspend": Story(_put(spec_with("suspend", True)), _put(SPEC)),
    "fallback change": Story(
        _put(spec_with("fallback.budget", {"usdPerDay": "50", "usdPerMonth": "900"})), _put(SPEC), START_S
    ),
}


def world_of(story: Story) -> World:
    """A world at the point where the faults of a story begin, with an empty journal."""
    return copy.deepcopy(_prepared(story.before))


@lru_cache
def _prepared(before: Callable[[World], Any] | None) -> World:
    world = World()
    if before is not None:
        before(world)
        world.run(START_S)
        assert world.idle_writes(2) == 0
    world.journal.clear()
    return world


def play(story: Story, world: World) -> World:
    """The story from there to its end."""
    story.act(world)
    world.run(story.seconds)
    return world
