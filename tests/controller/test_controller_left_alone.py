"""What a change of the spec leaves alone: a revision on its way out, and one that cannot take the change."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_api.load import load_object
from moe_kube import objects as k
from moe_kube.objects import Ref
from moe_planner import prefer
from moe_planner.fit import check
from tests.controller.stories import LONGER, spec_with
from tests.controller.world import NAMESPACE, SPEC, World


def settled() -> tuple[World, str]:
    """A world in which one revision serves, and its name."""
    world = World()
    world.put(SPEC)
    world.run(60)
    (name,) = world.revisions()
    return world, name


def arguments(world: World, name: str) -> Any:
    """Arguments of a revision's application."""
    service = world.cluster.get(Ref(k.RAY_SERVICE, NAMESPACE, name))
    return json.loads(service["spec"]["serveConfigV2"])["applications"][0]["args"]


def test_a_revision_on_its_way_out_is_not_rolled() -> None:
    world, old = settled()
    world.put(spec_with("engine.extraArgs", {"seed": "1"}))
    world.run(30)
    rolled = arguments(world, old)
    assert rolled["engineArgs"] == {"seed": 1}
    world.put(spec_with("engine.extraArgs", {"seed": "2"}, LONGER))
    world.run(20)
    (new,) = world.revisions().keys() - {old}
    assert arguments(world, old) == rolled, "its replicas would be replaced while they carry the traffic"
    assert arguments(world, new)["engineArgs"] == {"seed": 2}


def test_a_revision_to_which_traffic_returns_keeps_its_arguments() -> None:
    world, old = settled()
    before = arguments(world, old)
    world.put(spec_with("engine.extraArgs", {"seed": "2"}, LONGER))
    world.run(10)
    world.ray.never_ready = set(world.revisions()) - {old}
    world.run(200)
    assert world.condition("Degraded")["reason"] == "RolledBack"
    assert arguments(world, old) == before


def test_a_rolling_change_that_does_not_fit_is_told_and_not_made() -> None:
    world, name = settled()
    before = arguments(world, name)
    world.put(spec_with("experts.redundant", 1))  # 129 experts on 4 GPUs
    world.run(30)
    assert arguments(world, name) == before
    assert world.condition("Degraded")["reason"] == "DoesNotFit"
    assert "redundant" in world.condition("Degraded")["message"]
    assert world.revisions() == {name: ("Serving", 100)}
    assert world.idle_writes() == 0


def test_a_rolling_change_that_fits_only_when_cut_otherwise_is_told_and_not_made() -> None:
    world, name = settled()
    before = arguments(world, name)
    world.put(spec_with("experts.redundant", 2))  # the planner would cut the replica into two stages
    world.run(30)
    assert arguments(world, name) == before
    assert world.condition("Degraded")["reason"] == "DoesNotFit"


def test_a_revision_whose_record_is_lost_serves_on() -> None:
    world, old = settled()
    world.put(LONGER)
    world.run(20)
    world.cluster.delete(Ref(k.CONTROLLER_REVISION, NAMESPACE, old))
    for _ in range(40):
        world.turn()
        if world.revisions().get(old, ("", 0))[1]:
            assert world.cluster.find(Ref(k.RAY_SERVICE, NAMESPACE, old)) is not None
    assert [phase for phase, _ in world.revisions().values()] == ["Serving"]


def test_the_head_becomes_the_door_where_no_replica_may_be_there() -> None:
    world, name = settled()
    ref = Ref(k.RAY_SERVICE, NAMESPACE, name)
    assert world.cluster.get(ref)["spec"]["excludeHeadPodFromServeSvc"] is True
    world.put(spec_with("replicas", {"min": 0, "max": 2}))
    world.run(30)
    assert "excludeHeadPodFromServeSvc" not in world.cluster.get(ref)["spec"]


def test_a_planner_that_would_cut_the_gpus_anew_moves_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Born by the order alone, as before predictions were asked; then the operator is upgraded."""
    # An ITL that lets many requests run at once: then data ranks are clearly faster.
    world, wide = World(), spec_with("slo.itlP95", "1s", spec_with("hardware.gpusPerReplica", 8))
    with monkeypatch.context() as before:
        before.setattr(prefer, "prefer", lambda *_: prefer.Preferred(0, "the first in order"))
        world.put(wide)
        world.run(60)
    (name,) = world.revisions()
    service = world.cluster.get(Ref(k.RAY_SERVICE, NAMESPACE, name))
    document = {"metadata": {"name": "m"}, "spec": wide, "apiVersion": "moestack.dev/v1alpha1", "kind": "MoEDeployment"}
    today = check(load_object(document).spec).plan
    assert today is not None
    assert today.data > 1
    world.put(spec_with("slo.ttftP95", "3s", wide))
    world.run(60)
    assert list(world.revisions()) == [name]
    assert world.cluster.get(Ref(k.RAY_SERVICE, NAMESPACE, name))["spec"] == service["spec"]
    assert "tensor 8 × data 1" in world.condition("Fits")["message"]
