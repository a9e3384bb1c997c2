"""Random writes of several managers on one object: what two API servers must answer alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_kube.api import Api
from moe_kube.errors import ApiError, Conflict, NotFound
from moe_kube.objects import CONFIG_MAP, DEPLOYMENT, MOE_DEPLOYMENT, RAY_SERVICE, Kind, Obj, Ref
from tests.kube.bodies import LABELS, MOE_SPEC, condition

MANAGERS = ("moestack-operator", "moestack-tuner", "kubectl")
VALUES = ("1", "2")


@dataclass(frozen=True)
class Step:
    """One write. `what` is its name and its arguments."""

    what: str
    body: Any = None
    manager: str = ""
    force: bool = False


def some(rng: random.Random, names: str) -> list[str]:
    """A few of the letters, in any order."""
    return rng.sample(names, rng.randint(0, len(names)))


def metadata(rng: random.Random) -> Obj:
    out: Obj = {}
    if labels := {name: rng.choice(VALUES) for name in some(rng, "ab")}:
        out["labels"] = labels
    if annotations := {f"moestack.dev/{name}": rng.choice(VALUES) for name in some(rng, "c")}:
        out["annotations"] = annotations
    return out


def config_map(rng: random.Random) -> Obj:
    return {"metadata": metadata(rng), "data": {name: rng.choice(VALUES) for name in some(rng, "abcd")}}


def env(rng: random.Random) -> list[Obj]:
    return [{"name": name, "value": rng.choice(VALUES)} for name in some(rng, "ABC")]


def moe_deployment(rng: random.Random) -> Obj:
    spec: Obj = {}
    if rng.random() < 0.7:
        spec = {"model": MOE_SPEC["model"], "hardware": MOE_SPEC["hardware"]}
    if rng.random() < 0.4:
        spec["suspend"] = rng.random() < 0.5
    if rng.random() < 0.6:
        spec["podTemplate"] = {"env": env(rng), "nodeSelector": {name: rng.choice(VALUES) for name in some(rng, "ab")}}
    if rng.random() < 0.5:
        spec["tiers"] = [{"name": name, "tenants": some(rng, "xyz")} for name in some(rng, "gs")]
    return {"metadata": metadata(rng), "spec": spec}


def moe_status(rng: random.Random) -> Obj:
    status: Obj = {}
    if rng.random() < 0.6:
        status["conditions"] = [
            condition(kind, rng.choice(("True", "False")))
            for kind in rng.sample(["Accepted", "Fits", "SLOMet"], rng.randint(0, 3))
        ]
    status["replicas"] = rng.randint(0, 2)
    if rng.random() < 0.5:
        pins = [{"knob": name, "value": rng.choice(VALUES), "source": "Spec"} for name in some(rng, "kl")]
        status["tuning"] = {"mode": rng.choice(("Auto", "Off")), "pins": pins}
    return {"status": status}


def pods(rng: random.Random) -> Obj:
    def container(name: str) -> Obj:
        ports = [{"containerPort": ord(port), "protocol": "TCP"} for port in some(rng, "ab")]
        return {"name": name, "image": rng.choice(VALUES), "env": env(rng), "ports": ports, "args": some(rng, "pq")}

    spec: Obj = {"containers": [container(name) for name in rng.choice(("m", "mn", "nm", "mno"))]}
    if rng.random() < 0.5:
        spec["nodeSelector"] = {"a": rng.choice(VALUES)}
    if rng.random() < 0.3:
        spec["tolerations"] = [{"key": key, "operator": "Exists"} for key in some(rng, "xy")]
    return spec


def deployment(rng: random.Random) -> Obj:
    template = {"metadata": {"labels": LABELS}, "spec": pods(rng)}
    # Without pods, so that its controller does not write status all the time.
    spec = {
        "replicas": 0,
        "revisionHistoryLimit": rng.randint(3, 4),
        "selector": {"matchLabels": LABELS},
        "template": template,
    }
    return {"metadata": metadata(rng), "spec": spec}


def ray_service(rng: random.Random) -> Obj:
    groups = [
        {"groupName": name, "maxReplicas": 2, "minReplicas": 0, "rayStartParams": {}, "template": {"spec": pods(rng)}}
        for name in rng.choice(("g", "gh"))
    ]
    head = {"rayStartParams": {name: rng.choice(VALUES) for name in some(rng, "ab")}, "template": {"spec": pods(rng)}}
    cluster = {"headGroupSpec": head, "workerGroupSpecs": groups}
    spec = {"rayClusterConfig": cluster, "serveConfigV2": rng.choice(VALUES), "upgradeStrategy": {"type": "None"}}
    return {"metadata": metadata(rng), "spec": spec}


BODIES: dict[Kind, Callable[[random.Random], Obj]] = {
    CONFIG_MAP: config_map,
    MOE_DEPLOYMENT: moe_deployment,
    DEPLOYMENT: deployment,
    RAY_SERVICE: ray_service,
}


def steps(kind: Kind, seed: int, count: int) -> list[Step]:
    """The writes of one run."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        body = BODIES[kind](rng)
        manager = rng.choice(MANAGERS)
        choice = rng.random()
        if choice < 0.06:
            out.append(Step("delete"))
        elif choice < 0.12:
            out.append(Step("create", body))
        elif choice < 0.22:
            out.append(Step("replace", body))
        elif choice < 0.32:
            path, value = rng.choice([("/metadata/labels", {"a": "9"}), ("/metadata/labels", None)])
            operation = {"op": "add", "path": path, "value": value} if value else {"op": "remove", "path": path}
            out.append(Step("json_patch", [operation]))
        elif kind == MOE_DEPLOYMENT and choice < 0.6:
            out.append(Step("status", moe_status(rng), manager, rng.random() < 0.5))
        else:
            out.append(Step("apply", body, manager, rng.random() < 0.5))
    return out


async def replace(api: Api, ref: Ref, body: Obj) -> None:
    """Replace the newest version; a controller that writes status meanwhile is no difference."""
    for last in (*[False] * 9, True):
        version = (await api.get(ref))["metadata"]["resourceVersion"]
        try:
            await api.replace(ref, {**body, "metadata": {**body.get("metadata", {}), "resourceVersion": version}})
        except Conflict:
            if last:
                raise
        else:
            return


async def run(api: Api, ref: Ref, step: Step) -> tuple[str, Obj | None]:
    """How it ended, and what is there then."""
    outcome = "ok"
    try:
        if step.what == "delete":
            await api.delete(ref)
        elif step.what == "create":
            await api.create(ref, step.body)
        elif step.what == "replace":
            await replace(api, ref, step.body)
        elif step.what == "json_patch":
            await api.json_patch(ref, step.body)
        else:
            subresource = "status" if step.what == "status" else ""
            await api.apply(ref, step.body, manager=step.manager, force=step.force, subresource=subresource)
    except ApiError as error:
        outcome = type(error).__name__
    try:
        return outcome, await api.get(ref)
    except NotFound:
        return outcome, None
