"""Seeded bugs: ten ways in which an operator goes wrong, each put in place and caught by a suite of this folder.

A suite that catches none of them is worth nothing, however green it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from moe_kube import objects as k
from moe_kube.errors import ApiError
from moe_kube.faults import API_ERRORS, CRASH_AFTER, CRASH_BEFORE, Action
from moe_operator import decide, reconcile, rollout, shell
from moe_operator.conditions import Trouble
from moe_operator.requests import Apply
from tests.controller import stories
from tests.controller.stories import START_S, STORIES, play
from tests.controller.world import World

pytestmark = pytest.mark.faults
Seed = Callable[[pytest.MonkeyPatch], None]
Suite = Callable[[], None]


def _fresh(name: str) -> World:
    """A world at the start of a story, made with the bug in place."""
    stories._prepared.cache_clear()
    return stories.world_of(STORIES[name])


def crash_matrix(name: str, action: Action) -> Suite:
    """The crash matrix, for one story."""

    def suite() -> None:
        world = _fresh(name)
        start = world.counts()
        play(STORIES[name], world)
        state, counts, writes = world.state(), world.counts() - start, len(world.journal.writes)
        for write in range(writes):
            world = stories.world_of(STORIES[name])
            start = world.counts()
            world.api.add(action, write=write)
            play(STORIES[name], world)
            assert world.state() == state
            assert world.counts() - start == counts

    return suite


def stability(name: str) -> Suite:
    """What the stability suite asks of every world at its end, and of every moment before it."""

    def suite() -> None:
        world = _fresh(name)
        STORIES[name].act(world)
        for _ in range(60):
            world.turn()
            services = [o for o in world.cluster.peek(k.RAY_SERVICE) if "deletionTimestamp" not in o["metadata"]]
            names = {o["metadata"]["name"] for o in services}
            records = {o["metadata"]["name"] for o in world.cluster.peek(k.CONTROLLER_REVISION)}
            assert names <= records, "a RayService without a record"
            revisions = world.revisions()
            assert sum(weight for _, weight in revisions.values()) in (0, 100)
            assert {n for n, (_, weight) in revisions.items() if weight} <= names, "traffic to what is gone"
        assert world.condition("ServingReady")["status"] == "True"
        assert world.idle_writes() == 0

    return suite


def stale_caches() -> None:
    """The watch suite's reads behind the writes."""
    world = _fresh("upgrade by Surge")
    STORIES["upgrade by Surge"].act(world)
    made = 0
    for turn in range(60):
        world.caches.lag = 4 if turn % 2 else 0
        world.turn()
    world.caches.lag = 0
    world.run(60)
    made = world.counts()[("ADDED", "RayService")]
    assert made == 2, "a RayService was made twice"


def foreign_object() -> None:
    """A Service of somebody else has the gateway's name."""
    world = World()
    ref = k.Ref(k.SERVICE, "serving", "moe-gateway")
    body = {"metadata": {"name": ref.name, "namespace": ref.namespace}, "spec": {"ports": [{"port": 1}]}}
    before = world.cluster.create(ref, body, user="stranger")
    world.put()
    world.run(START_S)
    assert world.cluster.get(ref) == before
    assert world.condition("Degraded")["reason"] == "NameTaken"


def tuning_survives() -> None:
    """What the tuner wrote stays as it is."""
    world = _fresh("tuner change")
    play(STORIES["tuner change"], world)
    status = (world.resource() or {})["status"]
    assert status["tuning"]["acknowledged"] == 4


def api_errors() -> None:
    """One call of a start fails for good: it is told, and does not end the process."""
    world = World()
    world.put()
    world.api.add(API_ERRORS["422"], verbs=frozenset({"apply"}), kinds=frozenset({k.POD_DISRUPTION_BUDGET}))
    world.run(2 * START_S)
    assert world.condition("ServingReady")["status"] == "True"


def drains() -> None:
    """Requests in flight on the old revision end before it goes."""
    world = _fresh("upgrade by Recreate")
    old = next(iter(world.revisions()))
    world.pods.in_flight = {old: 1}
    STORIES["upgrade by Recreate"].act(world)
    world.run(20)
    assert any(o["metadata"]["name"] == old for o in world.cluster.peek(k.RAY_SERVICE))


# The bugs


def _acts_before_intent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decide.Plan, "intends_anew", property(lambda plan: False))


def _drops_the_record_first(patch: pytest.MonkeyPatch) -> None:
    original = decide._objects

    def without(*args: Any) -> Any:
        return tuple(r for r in original(*args) if r.ref.kind != k.CONTROLLER_REVISION)

    patch.setattr(decide, "_objects", without)


def _never_reads_before_it_makes(patch: pytest.MonkeyPatch) -> None:
    def make(self: Any, rendered: Any) -> Any:
        self.wrote = True
        yield Apply(rendered)

    patch.setattr(reconcile._Execution, "_make", make)

    async def forced(self: Any, request: Apply) -> Any:
        return await self._api.apply(request.rendered.ref, request.rendered.body, manager="moestack-operator")

    patch.setattr(shell.Performer, "_apply", forced)


def _writes_all_of_the_status(patch: pytest.MonkeyPatch) -> None:
    def body(status: Any) -> Any:
        return {**status.to_json(), "tuning": {"mode": "Auto", "acknowledged": 0}}

    patch.setattr(reconcile, "status_body", body)


def _stamps_the_time_of_each_look(patch: pytest.MonkeyPatch) -> None:
    original = decide._status

    def stamped(snapshot: Any, *args: Any) -> Any:
        status = original(snapshot, *args)
        conditions = tuple(
            c.model_copy(update={"message": f"seen {snapshot.now} {_tick()}"}) for c in status.conditions
        )
        return status.model_copy(update={"conditions": conditions})

    patch.setattr(decide, "_status", stamped)


_TICKS = iter(range(10**9))


def _tick() -> int:
    return next(_TICKS)


def _deletes_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rollout._Turn, "_hold_until_drained", lambda self, own, sight: None)


def _moves_traffic_to_what_is_not_ready(patch: pytest.MonkeyPatch) -> None:
    def start(self: Any, target: str) -> None:
        self._serve(target)
        self._drain_others({target})
        self.wanted.discard(target)

    patch.setattr(rollout._Turn, "_alone", start)


def _names_revisions_anew_each_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decide, "name_of", lambda resource: f"moe-{_tick():010d}")


def _forgets_that_it_failed(patch: pytest.MonkeyPatch) -> None:
    original = rollout.advance

    def amnesiac(context: Any) -> Any:
        clean = tuple(replace(r, failed_generation=None) for r in context.revisions)
        return original(replace(context, revisions=clean))

    patch.setattr(decide, "advance", amnesiac)


def _gives_up_at_the_first_error(patch: pytest.MonkeyPatch) -> None:
    def one(self: Any, doing: Any, ref: Any) -> Any:
        try:
            yield from doing
        except ApiError:
            self.plan = replace(self.plan, objects=(), trouble=Trouble("Broken", "for ever"))
            raise RuntimeError("unhandled") from None

    patch.setattr(reconcile._Execution, "_one", one)


def rollback_ends() -> None:
    """A revision that failed is not tried again for the same spec."""
    world = _fresh("rollback of Surge")
    STORIES["rollback of Surge"].act(world)
    world.run(600)
    assert world.counts()[("ADDED", "RayService")] == 2
    assert world.condition("Degraded")["reason"] == "RolledBack"


BUGS: dict[str, tuple[Seed, Suite]] = {
    "acts before its intent is in status": (
        _acts_before_intent,
        crash_matrix("upgrade by Surge", CRASH_AFTER),
    ),
    "makes a RayService without its record": (_drops_the_record_first, stability("create")),
    "makes without reading first": (_never_reads_before_it_makes, foreign_object),
    "writes the tuner's part of the status": (_writes_all_of_the_status, tuning_survives),
    "writes a new time at each look": (_stamps_the_time_of_each_look, stability("create")),
    "deletes what still has requests": (_deletes_at_once, drains),
    "moves traffic to what is not there": (_moves_traffic_to_what_is_not_ready, stability("create")),
    "names a revision anew each time": (_names_revisions_anew_each_time, crash_matrix("create", CRASH_BEFORE)),
    "tries what failed for ever": (_forgets_that_it_failed, rollback_ends),
    "dies of an error": (_gives_up_at_the_first_error, api_errors),
}


@pytest.mark.parametrize("name", BUGS, ids=list(BUGS))
def test_a_seeded_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, suite = BUGS[name]
    suite()  # it passes without the bug: what it catches is the bug
    seed(monkeypatch)
    try:
        with pytest.raises((AssertionError, RuntimeError, KeyError, IndexError, StopIteration)):
            suite()
    finally:
        monkeypatch.undo()
        stories._prepared.cache_clear()


def test_a_stale_cache_makes_nothing_twice() -> None:
    stale_caches()
