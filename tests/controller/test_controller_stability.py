"""Stability: a thousand random histories of fifty steps with faults in between; then it converges and is still.

A seeded generator makes each history as data, so that one seed replays alone: `play(seed)`. hypothesis would shrink
better, and a thousand of its stateful runs would take the time of all other suites together.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from moe_api.annotations import OPERATOR_MANAGER
from moe_api.status import MAX_BYTES
from moe_kube import objects as k
from moe_kube.faults import API_ERRORS, CRASH_AFTER, CRASH_BEFORE
from moe_kube.objects import Obj
from tests.controller.stories import LONGER, LONGER_BRIDGE, LONGER_RECREATE, SPEC, spec_with
from tests.controller.world import World

RUNS, STEPS, BLOCK = 1000, 50, 25
REST_S = 900.0
"""Longer than every deadline of these specs together."""
SPECS: tuple[Obj, ...] = (
    SPEC,
    LONGER,
    LONGER_BRIDGE,
    LONGER_RECREATE,
    spec_with("upgrade.strategy", "Bridge"),
    spec_with("upgrade.strategy", "Recreate"),
    spec_with("replicas", {"min": 2, "max": 3}),
    spec_with("slo", {"ttftP95": "3s"}),
    spec_with("engine.extraArgs", {"seed": "7"}),
    spec_with("hardware.gpusPerReplica", 8),
    spec_with("hardware.gpusPerReplica", 1),  # does not fit
    spec_with("suspend", True),
    spec_with("fallback.budget", {"usdPerDay": "7"}),
    spec_with("monitoring.monitors", "Disabled"),
)
LOST = (k.CONFIG_MAP, k.SERVICE, k.DEPLOYMENT, k.RAY_SERVICE, k.NETWORK_POLICY, k.POD_MONITOR)
"""Kinds whose objects a person deletes by hand."""
RAY = (k.RAY_SERVICE, k.RAY_CLUSTER)


class History:
    """One world and the random steps that befall it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.world = World()
        self.tuned: Obj | None = None
        self.log: list[str] = []
        self.world.put()
        self.steps: tuple[tuple[int, Callable[[], Any]], ...] = (
            (8, self.change),
            (3, self.tune),
            (3, self.spoil),
            (3, self.heal),
            (3, self.busy),
            (2, self.silence),
            (4, self.error),
            (4, self.crash),
            (3, self.lag),
            (3, self.lose),
            (2, self.meddle),
            (1, self.kuberay),
            (1, self.jump),
            (1, self.again),
            (8, self.wait),
        )

    def step(self) -> None:
        weights = [weight for weight, _ in self.steps]
        (act,) = self.rng.choices([act for _, act in self.steps], weights)
        self.log.append(act.__name__)
        act()
        for _ in range(self.rng.randint(1, 3)):
            self.world.turn()
            self.check()

    # What befalls it

    def change(self) -> None:
        self.world.put(self.rng.choice(SPECS))

    def tune(self) -> None:
        if self.world.resource() is not None:
            replicas = {"min": self.rng.randint(1, 3), "max": 3}
            self.tuned = {"mode": "Auto", "acknowledged": self.rng.randint(1, 9), "replicas": replicas}
            self.world.tune(self.tuned)

    def spoil(self) -> None:
        for obj in self.world.cluster.peek(k.RAY_SERVICE) if self._has_ray() else ():
            name = obj["metadata"]["name"]
            chosen = self.rng.choice(["unready", "slow", "nothing"])
            if chosen == "unready":
                self.world.ray.unready.add(name)
            elif chosen == "slow":
                self.world.pods.shares[name] = 0.5

    def heal(self) -> None:
        self.world.ray.unready.clear()
        self.world.ray.never_ready.clear()
        self.world.pods.shares.clear()

    def busy(self) -> None:
        names = list(self.world.revisions())
        self.world.pods.in_flight = {name: self.rng.randint(0, 2) for name in names}

    def silence(self) -> None:
        self.world.pods.silent, self.world.pods.deaf = self.rng.choice([(True, False), (False, True), (False, False)])

    def error(self) -> None:
        self.world.api.add(self.rng.choice(list(API_ERRORS.values())), skip=self.rng.randint(0, 12))

    def crash(self) -> None:
        point = self.rng.choice([CRASH_BEFORE, CRASH_AFTER])
        writes = frozenset({"apply", "delete", "json_patch"})
        self.world.api.add(point, verbs=writes, skip=self.rng.randint(0, 6))

    def lag(self) -> None:
        self.world.caches.lag = self.rng.choice([0, 0, 1, 3, 10])

    def lose(self) -> None:
        """A person deletes something of ours."""
        refs = [ref for kind in LOST if kind not in RAY or self._has_ray() for ref in self.world.cluster.refs(kind)]
        if refs:
            self.world.cluster.delete(self.rng.choice(refs), user="person")

    def meddle(self) -> None:
        """A person sets a field that is ours."""
        for ref in self.world.cluster.refs(k.HORIZONTAL_POD_AUTOSCALER):
            self.world.cluster.edit(ref, _more, user="person")

    def kuberay(self) -> None:
        if self._has_ray():
            for kind in RAY:
                self.world.cluster.remove(kind)
        else:
            self._install()

    def jump(self) -> None:
        self.world.clock.jump(self.rng.choice([-20.0, 20.0, 300.0]))

    def again(self) -> None:
        """Deleted, and for the most part made again at once."""
        if self.world.resource() is not None:
            self.world.drop()
        self.tuned = None
        if self.rng.random() < 0.8:
            self.world.put(self.rng.choice(SPECS))

    def wait(self) -> None:
        self.world.run(self.rng.choice([10.0, 40.0, 120.0]))

    # What holds at every moment

    def check(self) -> None:
        world = self.world
        resource = world.resource()
        if resource is None:
            return
        status = resource.get("status") or {}
        uid = resource["metadata"]["uid"]
        ray = world.cluster.peek(k.RAY_SERVICE) if self._has_ray() else []
        live = [o["metadata"] for o in ray if "deletionTimestamp" not in o["metadata"]]
        ours = [meta for meta in live if meta["ownerReferences"][0]["uid"] == uid]
        records = {o["metadata"]["name"] for o in world.cluster.peek(k.CONTROLLER_REVISION)}
        assert {meta["name"] for meta in ours} <= records, "a RayService without its record"
        assert len(ours) <= 2, "a third cluster"
        assert sum(r.get("weight", 0) for r in status.get("revisions", ())) in (0, 100)
        if self.tuned is not None:
            assert status.get("tuning") == self.tuned, "the tuner's part was touched"
        assert len(str(status)) <= MAX_BYTES
        managers = {e["manager"] for e in resource["metadata"]["managedFields"] if e.get("subresource") == "status"}
        assert managers <= {OPERATOR_MANAGER, "moestack-tuner"}

    # The end

    def rest(self) -> None:
        """No more faults; a last word of the person; time enough."""
        world = self.world
        world.api.calm()
        world.caches.lag = 0
        self.heal()
        world.pods.in_flight, world.pods.silent, world.pods.deaf = {}, False, False
        if not self._has_ray():
            self._install()
        if world.resource() is None:
            self.tuned = None
        world.put(LAST)
        world.run(REST_S)
        self.check()

    def _has_ray(self) -> bool:
        return self.world.caches._installed(k.RAY_SERVICE)

    def _install(self) -> None:
        for kind in RAY:
            self.world.cluster.install(kind)
        self.world.cluster.store.version += 1  # caches wake every key when a kind comes


LAST = spec_with("engine.maxModelLen", 8192, spec_with("slo", {"ttftP95": "1500ms"}))
"""The last word: a revision that no step before asked for, so that no failure of before holds it up."""


def _more(obj: Obj) -> None:
    obj["spec"]["maxReplicas"] = 77


@lru_cache
def fresh() -> dict[str, Any]:
    world = World()
    world.put(LAST)
    world.run(200.0)
    return _kept(world)


def _kept(world: World) -> dict[str, Any]:
    """What exists, with its content where that does not depend on the way that led there."""
    pinned = (k.CONTROLLER_REVISION.kind, k.RAY_SERVICE.kind, k.MOE_DEPLOYMENT.kind)
    return {ref: None if ref.startswith(pinned) else body for ref, body in world.state().items()}


def play(seed: int) -> None:
    """One history, to its end and ten looks beyond."""
    history = History(seed)
    try:
        for _ in range(STEPS):
            history.step()
        history.rest()
        world = history.world
        assert _kept(world) == fresh()
        assert [phase for phase, _ in world.revisions().values()] == ["Serving"]
        assert world.condition("ServingReady")["status"] == "True"
        assert world.condition("Degraded")["status"] == "False"
        assert world.idle_writes() == 0
    except Exception as error:
        raise AssertionError(
            f"seed {seed}, after {len(history.log)} steps, last {history.log[-5:]}: {error}"
        ) from error


def test_a_few_histories() -> None:
    for seed in range(3):
        play(seed)


@pytest.mark.faults
@pytest.mark.parametrize("block", range(RUNS // BLOCK))
def test_a_thousand_histories(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        play(seed)
