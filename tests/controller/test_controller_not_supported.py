"""What cannot be kept yet is said, and nothing that runs suffers for having been asked."""

from __future__ import annotations

from typing import Any

import pytest

from moe_kube import objects as k
from moe_kube.objects import Obj
from tests.controller.stories import START_S, spec_with
from tests.controller.world import SPEC, World

ELSEWHERE = {"kind": "External", "url": "http://sglang:30000/v1"}
OPEN = {
    **{name: value for name, value in SPEC.items() if name not in {"hardware", "parallelism", "experts", "quality"}},
    "engine": ELSEWHERE,
}
LOCKED = {**OPEN, "engine": {**ELSEWHERE, "apiKeySecretRef": {"name": "s", "key": "k"}}}
PRICELESS = {"name": "gpt", "provider": "openai", "model": "m", "secretRef": {"name": "s", "key": "k"}}


def with_targets(*targets: Obj) -> Obj:
    return spec_with("fallback", {"targets": list(targets), "budget": {"usdPerDay": "5"}})


def alive(world: World) -> dict[str, Any]:
    """Everything that serves requests."""
    kinds = (k.DEPLOYMENT, k.SERVICE, k.NETWORK_POLICY, k.RAY_SERVICE, k.CONFIG_MAP)
    return {str(k.ref_of(kind, obj)): obj["metadata"]["uid"] for kind in kinds for obj in world.cluster.peek(kind)}


def test_a_new_resource_that_cannot_be_kept_makes_nothing_and_says_why() -> None:
    world = World()
    world.put(LOCKED)
    world.run(START_S)
    assert alive(world) == {}
    accepted = world.condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "NotSupported")
    assert accepted["message"].startswith(
        "spec.engine.apiKeySecretRef: the gateway sends no key to an external engine yet;"
    )


def test_what_runs_goes_on_when_it_is_asked_for_later() -> None:
    world = World()
    world.put(OPEN)
    world.run(START_S)
    before = alive(world)
    world.put(LOCKED)
    world.run(START_S)
    assert alive(world) == before
    assert world.condition("Accepted")["reason"] == "NotSupported"
    assert world.errors == []
    assert world.idle_writes() == 0
    world.put(OPEN)
    world.run(START_S)
    assert (alive(world), world.condition("Accepted")["status"]) == (before, "True")


@pytest.mark.parametrize(
    ("targets", "reason", "message"),
    [
        ((), "Valid", ""),
        ((PRICELESS,), "FallbackTargetLeftOut", "not used: gpt (spec.fallback.targets[0].price)"),
    ],
)
def test_a_target_that_is_not_used_is_named(targets: tuple[Obj, ...], reason: str, message: str) -> None:
    world = World()
    world.put(with_targets(*targets) if targets else SPEC)
    world.run(START_S)
    accepted = world.condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("True", reason)
    assert accepted.get("message", "").startswith(message)
