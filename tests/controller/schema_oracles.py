"""What the schema suite holds of one leaf, after Acto (SOSP'23): states are compared, whatever way led there.

- reach(A → B) = fresh(B): what a change leads to is what creating it at once leads to.
- A → bad → A = A: a bad value is refused by name at admission; one that got past it is told, and nothing else changes.
- Each change shows in a child or in a condition, or the field is one that others act on.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from moe_kube import fake_kinds
from moe_kube import objects as k
from moe_kube.errors import Invalid
from moe_kube.objects import Obj
from tests.controller.leaves import UNSET, changed, concrete, leaves, told, value_at
from tests.controller.mutations import Mutations, mutations
from tests.controller.world import World

QUIET_S = 35.0
"""Nothing is written for so long: longer than the totals in status are apart."""
LONGEST_S = 900.0

TUNED = "the tuner reads it, and sends it to boards and gateways: the operator touches no hot knob"
ROLLED = "it is read when traffic moves: tests of the rollout"
NOT_ASKED = (
    "it belongs to a mode that is not asked for; asking for one that the gateway lacks is refused by a condition"
)
SILENT = {
    **dict.fromkeys(("experts.capacityFactor", "experts.perToken", "quality.minExpertsPerToken"), TUNED),
    "tiers[].expertsPerToken": TUNED,
    **dict.fromkeys(("tuning.bounds.", "tuning.pins.", "tuning.changeBudget."), TUNED),
    "monitoring.prometheus.": TUNED,
    "upgrade.": ROLLED,
    **dict.fromkeys(("gateway.auth.secretName", "gateway.auth.issuer", "gateway.auth.audience"), NOT_ASKED),
    **dict.fromkeys(("gateway.auth.tenantClaim", "gateway.exposure.host", "gateway.exposure.className"), NOT_ASKED),
    **dict.fromkeys(("gateway.exposure.tlsSecretName", "engine.apiKeySecretRef."), NOT_ASKED),
    "gateway.budgetStore.urlSecretRef.": NOT_ASKED,
}
"""Leaves, by the beginning of their path, whose changes show in no child and in no condition, and why."""
UNHEEDED = {
    "quality.tiers[].": "spec.quality.tiers",
    "fallback.targets[].limits.": "spec.fallback.targets[0].limits",
    "monitoring.dashboards": "spec.monitoring.dashboards",
}
"""Leaves that nothing acts on in this version, and the field that condition Accepted names: see
process_config.unheeded."""
SAME = {
    ("experts.overflow", "ExpertChoice"): TUNED,
    ("fallback.targets[].region", UNSET): "no region is as good as one that is not allowed",
    ("monitoring.monitors", "Enabled"): "the same as Auto where the kind is installed",
    ("monitoring.alerts", "Enabled"): "the same as Auto where the kind is installed",
}
"""Single values that mean what the value before them does."""


def why_silent(path: str, value: Any) -> str:
    """Why a change to this value need not show; empty where it must."""
    if isinstance(value, str) or value is UNSET:
        found = SAME.get((path, value))
        if found is not None:
            return found
    return next((why for start, why in SILENT.items() if path.startswith(start)), "")


Picture = dict[str, Obj]
"""Every object by kind and name, as it is compared."""


def faults_of(path: str) -> Iterator[str]:
    """What is wrong with a leaf, one line each; nothing where every oracle holds."""
    tried = mutations(next(leaf for leaf in leaves() if leaf.path == path))
    leaf, world = tried.leaf, _world()
    start = before = settled(world, tried.start)
    old = value_at(tried.start, path)
    for new, spec in tried.good:
        what = f"{path} from {old!r:.60} to {new!r:.60}"
        reached, wanted, silent = settled(world, spec), fresh(spec), why_silent(path, new)
        if leaf.lowered and isinstance(new, int) and isinstance(old, int) and new < old:
            # A lower ceiling is the tuner's to keep: what runs was launched with the higher one, and goes on.
            yield from _differences(f"{what}: runs on", _running(reached), _running(before))
            shows = not silent
        elif _blocked(world):
            # It cannot be made: what ran goes on, and the condition is that of a resource that never ran.
            yield from _differences(f"{what}: blocked", _conditions(reached), _conditions(wanted))
            yield from _differences(f"{what}: runs on", _running(reached), _running(before))
            shows = not silent
        else:
            yield from _differences(f"{what}: reached, not fresh", _comparable(reached), _comparable(wanted))
            shows = _seen(reached) != _seen(before)
        unheeded = next((field for start, field in UNHEEDED.items() if path.startswith(start)), None)
        if unheeded is None and shows == bool(silent):
            yield f"{what}: {f'shows, although {silent}' if shows else 'shows nowhere'}"
        if unheeded is not None and new not in (UNSET, "Disabled") and not _tells(world, unheeded):
            yield f"{what}: nothing tells that it has no effect"
        if world.idle_writes(2):
            yield f"{what}: a settled object is written"
        before, old = reached, new
    yield from _differences(f"{path}: back", _comparable(settled(world, tried.start)), _comparable(start))
    for value in tried.bad:
        yield from _refused(world, tried, value)


def _refused(world: World, tried: Mutations, value: Any) -> Iterator[str]:
    """A → bad → A = A, at admission and, with a CRD of before that let it through, in the operator."""
    leaf, version, before = tried.leaf, world.cluster.version, picture(world)
    bad = changed(tried.start, leaf.path, value)
    place = told(concrete(tried.start, leaf.path))
    what = f"{leaf.path} = {value!r:.60}"
    try:
        world.put(bad)
    except Invalid as error:
        if not _names(str(error), place):
            yield f"{what}: refused without naming {place}: {error}"
    else:
        yield f"{what}: taken"
        return
    if world.cluster.version != version:
        yield f"{what}: refused, and something was written"
    with _old_crd():
        try:
            after = settled(world, bad)
        except Invalid:
            return  # no list of this type was ever stored so
        condition = world.condition("Accepted")
        if condition["status"] != "False" or not _names(condition["message"], place):
            yield f"{what}: not told by a condition that names {place}: {condition}"
        yield from _differences(f"{what}: not taken", _children(after), _children(before))
    yield from _differences(f"{what}: back", settled(world, tried.start), before)


def _names(message: str, place: str) -> bool:
    """Whether an error says where: field by field, or of an item without its key the list and the key."""
    said, path = (re.sub(r"\[[^\]]*\]", "", text) for text in (message, place))
    group, _, key = path.rpartition(".")
    return path in said or (f".{group}: element" in said and f"key field '{key}'" in said)


@contextmanager
def _old_crd() -> Iterator[None]:
    """Admission as it was before the rule came."""
    with mock.patch.object(fake_kinds, "_problem", return_value=""):
        yield


# States


def _world() -> World:
    world = World()
    world.ray.ready_after_s = 0.0
    return world


def fresh(spec: Obj) -> Picture:
    """What creating it at once leads to."""
    return settled(_world(), spec)


def settled(world: World, spec: Obj) -> Picture:
    """Apply a spec and let everything come to rest."""
    world.put(spec)
    now = world.clock.time()
    quiet_since, version, end = now, -1, now + LONGEST_S
    while world.clock.time() - quiet_since < QUIET_S:
        assert world.clock.time() < end, "it never comes to rest"
        world.turn()
        if world.cluster.version != version:
            version, quiet_since = world.cluster.version, world.clock.time()
    assert world.errors == [], world.errors
    return picture(world)


def picture(world: World) -> Picture:
    """What exists, with revisions under names that do not depend on their hash."""
    text = json.dumps(world.state())
    for number, name in enumerate(world.revisions()):
        text = text.replace(name, f"revision-{number}")
    found: Picture = json.loads(text)
    return found


def _blocked(world: World) -> bool:
    """Whether something is told to be impossible: a new revision, or what is asked of the gateway."""
    return world.condition("Degraded")["status"] == "True" or world.condition("Accepted")["status"] == "False"


def _tells(world: World, field: str) -> bool:
    return field in world.condition("Accepted")["message"]


def _status(seen: Picture) -> Obj:
    found: Obj = next(obj for ref, obj in seen.items() if ref.startswith(k.MOE_DEPLOYMENT.kind)).get("status", {})
    return found


def _conditions(seen: Picture) -> Obj:
    """What people are told: not what runs."""
    return {c["type"]: c for c in _status(seen).get("conditions", ()) if c["type"] in ("Accepted", "Fits")}


def _children(seen: Picture) -> Picture:
    return {ref: obj for ref, obj in seen.items() if not ref.startswith(k.MOE_DEPLOYMENT.kind)}


def _running(seen: Picture) -> Picture:
    return {ref: obj for ref, obj in seen.items() if ref.startswith((k.RAY_SERVICE.kind, k.CONTROLLER_REVISION.kind))}


def _seen(seen: Picture) -> Any:
    """What shows of a spec: every child but the record, which holds the spec itself, and what is said."""
    children = {ref: obj for ref, obj in _children(seen).items() if not ref.startswith(k.CONTROLLER_REVISION.kind)}
    return children, _status(seen).get("conditions")


def _comparable(seen: Picture) -> Picture:
    """Without what a revision keeps from its birth by design (ADR 0014): see PINNED. And without the budget's books,
    which stay once they were begun."""
    books = f"{k.CONFIG_MAP.kind} serving/moe-gateway-budget"
    return {ref: _unpinned(ref, obj) for ref, obj in seen.items() if ref != books}


def _unpinned(ref: str, obj: Obj) -> Obj:
    obj = copy.deepcopy(obj)
    if ref.startswith(k.CONTROLLER_REVISION.kind):
        obj.pop("revision")
        for path in PINNED:
            _drop(obj["data"], path.split("."))
        for group in obj["data"]["cluster"]["rayClusterConfig"]["workerGroupSpecs"]:
            for name in ("replicas", "minReplicas", "maxReplicas"):
                group.pop(name)
    elif ref.startswith(k.RAY_SERVICE.kind):
        document = json.loads(obj["spec"]["serveConfigV2"])
        document["applications"][0]["args"].pop("bootKnobs")  # the board says what is in force
        obj["spec"]["serveConfigV2"] = document
    return obj


PINNED = (
    "number",  # which birth it was
    "spec",  # the whole spec at birth
    "cluster.excludeHeadPodFromServeSvc",  # follows the floor of replicas
    *(f"serving.{name}" for name in ("bootKnobs", "replicasMin", "replicasMax")),
    # Arguments of class rolling are taken from today's spec.
    *(f"serving.{name}" for name in ("dtype", "enforceEager", "prefixCaching", "redundantExperts", "engineArgs")),
)
"""Of a record: what is as it was at birth, and of which a live RayService shows today's."""


def _drop(node: Obj, path: list[str]) -> None:
    for name in path[:-1]:
        node = node[name]
    node.pop(path[-1], None)


def _differences(what: str, found: Any, wanted: Any) -> Iterator[str]:
    """The first places where two states differ."""
    for number, place in enumerate(_places("", found, wanted)):
        if number == 4:
            yield f"{what}: …"
            return
        yield f"{what}: {place}"


def _places(path: str, found: Any, wanted: Any) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted({*found, *wanted}):
            yield from _places(f"{path}/{name}", found.get(name), wanted.get(name))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from _places(f"{path}/{index}", one, other)
    elif found != wanted:
        yield f"{path} is {found!r:.200}, not {wanted!r:.200}"
