"""The in-memory API server answers random writes of several field managers as the real one does, field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_kube.api import Api
from moe_kube.connect import connect
from moe_kube.fake import FakeCluster
from moe_kube.managed import owned
from moe_kube.objects import DEPLOYMENT, RAY_SERVICE, Kind, Obj, Ref
from tests.cluster.control_plane import ControlPlane
from tests.kube.random_writes import BODIES, MANAGERS, run, steps

pytestmark = pytest.mark.cluster

STEPS = 60
FILLED_IN = {DEPLOYMENT, RAY_SERVICE}
"""Kinds with defaults and rules that the in-memory server does not know, and with a controller that writes status."""
USER = "moestack"
"""The field manager that the real server makes of our client's User-Agent."""


def comparable(kind: Kind, obj: Obj | None) -> Any:
    """All but what two servers may name as they like. Of kinds that the real one fills in, what appliers own."""
    if obj is None:
        return None
    meta = {
        name: value
        for name, value in obj["metadata"].items()
        if name not in ("uid", "resourceVersion", "creationTimestamp", "managedFields", "namespace", "selfLink")
    }
    entries = {
        f"{entry['manager']} {entry['operation']} {entry.get('subresource', '')}".strip(): entry["fieldsV1"]
        for entry in obj["metadata"].get("managedFields", ())
    }
    if kind in FILLED_IN:
        applied = {manager: owned(obj, manager) for manager in MANAGERS}
        return {"owned": applied, "entries": {key: entries[key] for key in entries if " Apply" in key}}
    return {**obj, "metadata": meta, "entries": entries}


async def compare(real: Api, namespace: str, kind: Kind, seed: int) -> list[str]:
    """The first difference of a run, with the steps that led there; nothing where there is none."""
    fake = FakeCluster().client(USER)
    ref = Ref(kind, namespace, f"r{seed}")
    done: list[str] = []
    versions: tuple[Any, Any] = (None, None)
    for step in steps(kind, seed, STEPS):
        theirs, ours = await run(real, ref, step), await run(fake, ref, step)
        if kind in FILLED_IN and (theirs[0], ours[0]) == ("Invalid", "ok"):
            return []  # The rules of these kinds are the real server's alone.
        done.append(f"{step.what} by {step.manager} force={step.force}: {json.dumps(step.body)}: {theirs[0]}")
        told = [(outcome, comparable(kind, obj)) for outcome, obj in (theirs, ours)]
        if told[0] != told[1]:
            return [
                *done[-4:],
                f"real: {json.dumps(told[0], sort_keys=True)}",
                f"fake: {json.dumps(told[1], sort_keys=True)}",
            ]
        now = tuple(obj and obj["metadata"]["resourceVersion"] for _, obj in (theirs, ours))
        wrote = [new != old for new, old in zip(now, versions, strict=True)]
        if wrote[0] != wrote[1] and kind not in FILLED_IN:
            return [*done[-4:], f"a write: real {wrote[0]}, fake {wrote[1]}"]
        versions = (now[0], now[1])
    return []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.kind)
async def test_random_writes(kind: Kind, seed: int, crds: ControlPlane, namespace: str) -> None:
    async with await connect(crds.kubeconfigs["admin"]) as api:
        difference = await compare(api, namespace, kind, seed)
    assert not difference, "\n".join(difference)
