"""API errors: every call × every way to fail. It converges, or says in a condition why not; retries are bounded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pytest

from moe_kube import objects as k
from moe_kube.fake import FakeApi
from moe_kube.faults import API_ERRORS, Rule, answer
from moe_kube.objects import Obj, Ref
from tests.controller.stories import START_S, STORIES, play, world_of
from tests.controller.world import SPEC, USER, World

pytestmark = pytest.mark.faults
NAMES = ("create", "upgrade by Surge", "rollback of Bridge")
LASTING = {
    "403": ("Forbidden", "Forbidden"),
    "409": ("Conflict", "Conflict"),
    "422": ("Rejected", "Invalid"),
}
"""Errors that stay until a person acts: the reason of the condition that tells them."""


@lru_cache
def undisturbed(name: str) -> tuple[object, int]:
    """End state and number of calls of a run without faults."""
    world = play(STORIES[name], world_of(STORIES[name]))
    return world.state(), len(world.journal.calls)


@pytest.mark.parametrize("error", API_ERRORS, ids=list(API_ERRORS))
@pytest.mark.parametrize("name", NAMES)
def test_one_failed_call_changes_nothing_in_the_end(name: str, error: str) -> None:
    state, calls = undisturbed(name)
    for call in range(calls):
        world = world_of(STORIES[name])
        rule = world.api.add(API_ERRORS[error], call=call)
        play(STORIES[name], world)
        world.run(90.0)
        assert rule.met == 1
        assert world.state() == state, f"{error} at call {call}: {world.journal.calls[call]}"
        assert world.idle_writes(1) == 0
        assert len(world.journal.calls) <= 3 * calls + 400, "retries are bounded"


@pytest.mark.parametrize("error", LASTING, ids=list(LASTING))
@pytest.mark.parametrize(
    "kind", [k.CONTROLLER_REVISION, k.CONFIG_MAP, k.SERVICE, k.DEPLOYMENT, k.NETWORK_POLICY, k.RAY_SERVICE]
)
def test_an_error_that_stays_is_told_and_heals_by_itself(kind: k.Kind, error: str) -> None:
    world = World()
    world.put()
    world.api.rules.append(Rule(API_ERRORS[error], verbs=frozenset({"apply"}), kinds=frozenset({kind}), times=None))
    world.run(START_S)
    degraded = world.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", LASTING[error][0])
    assert kind.kind in degraded["message"]
    calls = len(world.journal.calls)
    world.run(600.0)
    assert len(world.journal.calls) - calls < 40 * 30, "it tries again at a bounded rate"
    world.api.calm()
    world.run(180.0)
    assert world.condition("Degraded")["status"] == "False"
    assert world.condition("ServingReady")["status"] == "True"
    assert world.idle_writes() == 0


def test_an_outage_of_the_api_server_ends_without_a_storm() -> None:
    world = World()
    world.put()
    world.run(START_S)
    state = world.state()
    world.api.rules.append(Rule(answer(503), times=None))
    world.put({**SPEC, "slo": {"ttftP95": "1s"}})
    before = len(world.journal.calls)
    world.run(600.0)
    assert len(world.journal.calls) - before < 60
    world.api.calm()
    world.run(120.0)
    assert world.state() != state
    assert world.idle_writes() == 0


def test_a_retry_after_is_kept() -> None:
    world = World()
    world.put()
    world.api.rules.append(Rule(answer(429, retry_after_s=30.0), verbs=frozenset({"apply"}), times=1))
    world.turn()
    writes = len(world.journal.writes)
    for _ in range(5):
        world.turn()
    assert len(world.journal.writes) == writes
    world.run(30.0)
    assert len(world.journal.writes) > writes


def test_without_kuberay_it_says_so_and_starts_when_kuberay_comes() -> None:
    world = World()
    for kind in (k.RAY_SERVICE, k.RAY_CLUSTER):
        world.cluster.remove(kind)
    world.put()
    others, world.others = world.others, lambda: world.pods.turn(world.cluster)  # type: ignore[method-assign]
    world.run(START_S)
    assert world.condition("ClusterReady")["reason"] == "KubeRayMissing"
    assert world.condition("GatewayReady")["status"] == "True", "the closed API answers meanwhile"
    assert world.idle_writes() == 0
    for kind in (k.RAY_SERVICE, k.RAY_CLUSTER):
        world.cluster.install(kind)
    world.others = others  # type: ignore[method-assign]
    world.cluster.store.version += 1  # the caches wake every key when a kind comes
    world.run(2 * START_S)
    assert world.condition("ServingReady")["status"] == "True"


class _Webhook(FakeApi):
    """A client behind an admission webhook that changes each PodDisruptionBudget."""

    async def apply(self, ref: Ref, body: Mapping[str, Any], **more: Any) -> Obj:
        if ref.kind == k.POD_DISRUPTION_BUDGET:
            body = {**body, "spec": {**body["spec"], "maxUnavailable": 7}}
        return await super().apply(ref, body, **more)


def test_an_object_that_does_not_stay_as_it_is_written_is_told_and_not_written_for_ever() -> None:
    world = World()
    world.api.inner = _Webhook(world.cluster, user=USER)
    world.put()
    world.run(600.0)
    assert world.condition("Degraded")["reason"] == "DoesNotStay"
    assert world.condition("ServingReady")["status"] == "True"
    writes = len(world.journal.writes)
    world.run(600.0)
    assert len(world.journal.writes) - writes < 30
