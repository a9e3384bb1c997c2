"""Somebody else's Deployment by the gateway's name: nothing of ours acts on it."""

from __future__ import annotations

from moe_kube import objects as k
from moe_kube.objects import Ref
from moe_operator.names import gateway_name
from tests.controller.stories import START_S
from tests.controller.world import KEY, NAMESPACE, World


def test_no_autoscaler_is_made_for_a_foreign_deployment() -> None:
    world = World()
    ref = Ref(k.DEPLOYMENT, NAMESPACE, gateway_name(KEY[1]))
    labels = {"app": "other"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "other"}]}}
    foreign = {"metadata": {"labels": labels}, "spec": {"selector": {"matchLabels": labels}, "template": template}}
    world.cluster.create(ref, foreign)
    # The world gives every Deployment a gateway's pods; this one has none.
    world.pods.turn = lambda cluster: None  # type: ignore[method-assign]
    world.put()
    world.run(START_S)
    assert world.condition("Degraded")["reason"] == "NameTaken"
    assert world.cluster.peek(k.HORIZONTAL_POD_AUTOSCALER) == []
    world.cluster.delete(ref)
    world.run(2 * START_S)
    assert [obj["metadata"]["name"] for obj in world.cluster.peek(k.HORIZONTAL_POD_AUTOSCALER)] == [ref.name]
    assert world.condition("Degraded")["status"] == "False"
