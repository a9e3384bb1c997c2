"""What is kept in memory of each object that belongs to a MoEDeployment: identity, a digest of our part, few facts."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.alias_generators import to_camel

from moe_api.annotations import DEPLOYMENT_LABEL, OPERATOR_MANAGER, REVISION_LABEL
from moe_api.redact import redact
from moe_core.process_config import ROLLING_ARGUMENTS
from moe_kube import objects as k
from moe_kube.endpoints import EndpointFacts, endpoint_facts
from moe_kube.managed import content, digest, owned
from moe_kube.objects import Kind, Obj, Ref

Key = tuple[str, str]
"""Namespace and name of a MoEDeployment."""

REQUIRED: tuple[Kind, ...] = (
    k.CONTROLLER_REVISION,
    k.CONFIG_MAP,
    k.SERVICE_ACCOUNT,
    k.ROLE,
    k.ROLE_BINDING,
    k.SERVICE,
    k.DEPLOYMENT,
    k.HORIZONTAL_POD_AUTOSCALER,
    k.POD_DISRUPTION_BUDGET,
    k.NETWORK_POLICY,
    k.INGRESS,
    k.ENDPOINT_SLICE,
)
OPTIONAL: tuple[Kind, ...] = (k.RAY_SERVICE, k.RAY_CLUSTER, k.POD_MONITOR, k.PROMETHEUS_RULE, k.HTTP_ROUTE)
"""Kinds whose CRDs may be missing, and may come later."""
WATCHED: tuple[Kind, ...] = (*REQUIRED, *OPTIONAL)
NOT_OURS: frozenset[Kind] = frozenset({k.RAY_CLUSTER, k.ENDPOINT_SLICE})
"""Made by other controllers for us: read, never pruned."""
MESSAGE_MAX = 1024
"""Longest message that is kept of another controller's: Serve puts whole tracebacks there."""


_ROLLING = tuple(to_camel(name) for name in ROLLING_ARGUMENTS)


@dataclass(frozen=True, slots=True)
class RayFacts:
    """State of a RayService. KubeRay's own Ready says that proxies answer, whatever becomes of the application."""

    ready: bool = False
    """The application runs and is reached."""
    deploying: bool = False
    """It is reached, and Serve is changing it: replicas of before may still answer."""
    message: str = ""
    arguments: str = ""
    """Rolling arguments of its application as they are in force, as JSON; empty where they cannot be read."""


@dataclass(frozen=True, slots=True)
class Group:
    """Bounds of a worker group of a live RayCluster."""

    name: str
    min: int
    max: int


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """State of a RayCluster."""

    groups: tuple[Group, ...] = ()
    workers: int = 0
    service: str = ""


@dataclass(frozen=True, slots=True)
class DeploymentFacts:
    """State of the gateway's Deployment."""

    available: int = 0
    current: bool = False
    message: str = ""


@dataclass(frozen=True, slots=True)
class RecordFacts:
    """A pinned revision, packed: records are the largest thing that is kept."""

    packed: bytes = b""

    def unpack(self) -> Any:
        return json.loads(zlib.decompress(self.packed)) if self.packed else {}


Facts = RayFacts | ClusterFacts | DeploymentFacts | RecordFacts | EndpointFacts | None


@dataclass(frozen=True, slots=True)
class Child:
    """One object that carries our label."""

    ref: Ref
    uid: str
    resource_version: str
    deployment: str
    revision: str
    controller_uid: str
    deleting: bool
    digest: str
    """Of the fields that we own: that of what was applied, unless somebody changed it."""
    facts: Facts = None

    @property
    def key(self) -> Key:
        return (self.ref.namespace, self.deployment)


def project(kind: Kind, obj: Obj) -> Child:
    """The part of an object that is kept."""
    meta = obj["metadata"]
    labels = meta.get("labels") or {}
    return Child(
        ref=k.ref_of(kind, obj),
        uid=meta.get("uid", ""),
        resource_version=meta.get("resourceVersion", ""),
        deployment=labels.get(DEPLOYMENT_LABEL, ""),
        revision=labels.get(REVISION_LABEL, ""),
        controller_uid=controller_uid(obj),
        deleting=bool(meta.get("deletionTimestamp")),
        digest="" if kind in NOT_OURS else digest(content(owned(obj, OPERATOR_MANAGER))),
        facts=_FACTS[kind](obj) if kind in _FACTS else None,
    )


def controller_uid(obj: Mapping[str, Any]) -> str:
    """Uid of the owner that controls an object; empty where none does."""
    owners = obj.get("metadata", {}).get("ownerReferences") or ()
    return next((str(owner.get("uid", "")) for owner in owners if owner.get("controller")), "")


def keys_of(child: Child) -> Iterable[Key]:
    """Index function of the caches: the MoEDeployment that a child belongs to."""
    return (child.key,) if child.deployment else ()


def _said(message: str) -> str:
    """A message of another controller, as status may repeat it: an engine's traceback may quote a token."""
    return str(redact(message))[:MESSAGE_MAX]


def _condition(obj: Obj, kind: str) -> dict[str, Any]:
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((dict(condition) for condition in conditions if condition.get("type") == kind), {})


def _ray_service(obj: Obj) -> RayFacts:
    status = obj.get("status") or {}
    ready = _condition(obj, "Ready")
    active = status.get("activeServiceStatus") or {}
    pending = status.get("pendingServiceStatus") or {}
    messages = [
        str(app.get("message", ""))
        for part in (active, pending)
        for app in (part.get("applicationStatuses") or {}).values()
        if app.get("status") not in ("RUNNING", None)
    ]
    apps = [str(app.get("status")) for app in (active.get("applicationStatuses") or {}).values()]
    reached = ready.get("status") == "True" and bool(apps)
    up = reached and all(app == "RUNNING" for app in apps)
    return RayFacts(
        ready=up,
        deploying=reached and all(app in ("RUNNING", "DEPLOYING") for app in apps),
        message=_said(next((m for m in messages if m), "") or ("" if up else str(ready.get("message", "")))),
        arguments=_arguments((obj.get("spec") or {}).get("serveConfigV2")),
    )


def _arguments(serve_config: object) -> str:
    try:
        arguments = json.loads(str(serve_config))["applications"][0]["args"]
        return json.dumps({name: arguments[name] for name in _ROLLING if name in arguments}, sort_keys=True)
    except (ValueError, LookupError, TypeError):
        return ""


def _ray_cluster(obj: Obj) -> ClusterFacts:
    groups = (obj.get("spec") or {}).get("workerGroupSpecs") or ()
    labels = obj["metadata"].get("labels") or {}
    return ClusterFacts(
        groups=tuple(
            Group(str(g.get("groupName", "")), int(g.get("minReplicas", 0)), int(g.get("maxReplicas", 0)))
            for g in groups
        ),
        workers=int((obj.get("status") or {}).get("availableWorkerReplicas", 0)),
        service=labels.get("ray.io/originated-from-cr-name", ""),
    )


def _deployment(obj: Obj) -> DeploymentFacts:
    status = obj.get("status") or {}
    stuck = _condition(obj, "Progressing")
    return DeploymentFacts(
        available=int(status.get("availableReplicas", 0)),
        current=int(status.get("observedGeneration", 0)) >= int(obj["metadata"].get("generation", 0)),
        message=_said(str(stuck.get("message", ""))) if stuck.get("status") == "False" else "",
    )


def _record(obj: Obj) -> RecordFacts:
    raw = json.dumps(obj.get("data") or {}, separators=(",", ":")).encode()
    return RecordFacts(zlib.compress(raw, 6))


_FACTS: dict[Kind, Any] = {
    k.RAY_SERVICE: _ray_service,
    k.RAY_CLUSTER: _ray_cluster,
    k.DEPLOYMENT: _deployment,
    k.CONTROLLER_REVISION: _record,
    k.ENDPOINT_SLICE: endpoint_facts,
}
