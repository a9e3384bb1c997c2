"""How the API server takes objects apart for field ownership: which lists are maps, sets or whole, for each kind.

The tables hold only what differs from the rule: a map is taken apart, a list is taken whole. They were read from the
OpenAPI of Kubernetes 1.37 and from KubeRay's CRDs, for the fields that we write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from moe_api import crd
from moe_api.annotations import KIND


@dataclass(slots=True)
class Shape:
    """One node. `keys` are the key fields of a list of maps, each with the default that the server fills in."""

    form: Literal["map", "whole", "list", "set"] = "map"
    fields: dict[str, Shape] = field(default_factory=dict)
    rest: Shape | None = None
    keys: tuple[tuple[str, Any], ...] = ()
    open: bool = False
    """Keys of this map are data (labels), not declared fields."""

    def child(self, name: str) -> Shape | None:
        return self.fields.get(name, self.rest)


def _by(*keys: str) -> Shape:
    return Shape("list", keys=tuple((key, "TCP" if key == "protocol" else None) for key in keys))


WHOLE = "whole"
_CONTAINER: dict[str, Any] = {
    "env": _by("name"),
    "env[].valueFrom.configMapKeyRef": WHOLE,
    "env[].valueFrom.fieldRef": WHOLE,
    "env[].valueFrom.resourceFieldRef": WHOLE,
    "env[].valueFrom.secretKeyRef": WHOLE,
    "ports": _by("containerPort", "protocol"),
    "resources.claims": _by("name"),
    "volumeDevices": _by("devicePath"),
    "volumeMounts": _by("mountPath"),
}
_AFFINITY = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution"
_POD_SPEC: dict[str, Any] = {
    _AFFINITY: WHOLE,
    "containers": _by("name"),
    **{f"containers[].{path}": shape for path, shape in _CONTAINER.items()},
    "hostAliases": _by("ip"),
    "imagePullSecrets": _by("name"),
    "imagePullSecrets[]": WHOLE,
    "initContainers": _by("name"),
    **{f"initContainers[].{path}": shape for path, shape in _CONTAINER.items()},
    "nodeSelector": WHOLE,
    "resourceClaims": _by("name"),
    "schedulingGates": _by("name"),
    "topologySpreadConstraints": _by("topologyKey", "whenUnsatisfiable"),
    "topologySpreadConstraints[].labelSelector": WHOLE,
    "volumes": _by("name"),
}
_META: dict[str, Any] = {
    "metadata.finalizers": Shape("set"),
    "metadata.ownerReferences": _by("uid"),
    "metadata.ownerReferences[]": WHOLE,
}
_CONDITIONS: dict[str, Any] = {"status.conditions": _by("type")}
_SERVICE_SPEC: dict[str, Any] = {"ports": _by("port", "protocol"), "selector": WHOLE}


def _under(prefix: str, table: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{path}": shape for path, shape in table.items()}


# KubeRay's workerGroupSpecs is a list without a type, so it is taken whole, with all that is in it.
_RAY_CLUSTER_SPEC = {
    **_under("headGroupSpec.template.spec", {**_POD_SPEC, "volumes[].configMap": WHOLE}),
    **_under("headGroupSpec.headService.spec", _SERVICE_SPEC),
    "autoscalerOptions.resources.claims": _by("name"),
}
_TABLES: dict[str, dict[str, Any]] = {
    "Deployment": {"spec.selector": WHOLE, **_under("spec.template.spec", _POD_SPEC)},
    "Pod": _under("spec", _POD_SPEC),
    "Service": _under("spec", _SERVICE_SPEC),
    "ServiceAccount": {"secrets": _by("name"), "secrets[]": WHOLE},
    "ControllerRevision": {"data": WHOLE},
    "PodDisruptionBudget": {"spec.selector": WHOLE},
    "NetworkPolicy": {"spec.podSelector": WHOLE},
    "Event": {"regarding": WHOLE, "related": WHOLE},
    "Ingress": {"spec.defaultBackend.resource": WHOLE, "spec.defaultBackend.service.port": WHOLE},
    "RayService": {
        **_under("spec.rayClusterConfig", _RAY_CLUSTER_SPEC),
        **_under("spec.serveService.spec", _SERVICE_SPEC),
        "status.activeServiceStatus.rayClusterStatus.conditions": _by("type"),
        "status.pendingServiceStatus.rayClusterStatus.conditions": _by("type"),
    },
    "RayCluster": _under("spec", _RAY_CLUSTER_SPEC),
    "PodMonitor": {"spec.selector": WHOLE},
    "PrometheusRule": {"spec.groups": _by("name")},
    "HTTPRoute": {},
}


@lru_cache(maxsize=1)
def moe_schema() -> Mapping[str, Any]:
    """The structural schema of our own CRD."""
    return crd.schema()


@lru_cache(maxsize=64)
def shape_of(kind: str) -> Shape:
    """The shape of a kind, by its name. A kind that is not known is taken by the rule alone."""
    if kind == KIND:
        root = from_openapi(moe_schema())
        _add(root, _META)
        return root
    root = Shape()
    _add(root, {**_META, **_CONDITIONS, **_TABLES.get(kind, {})})
    return root


def _add(root: Shape, table: Mapping[str, Any]) -> None:
    """Write a table into the tree; an item of a list is `name[]`."""
    for path, wanted in table.items():
        node = root
        parts = path.replace("[]", ".[]").split(".")
        for part in parts[:-1]:
            node = _step(node, part)
        leaf = Shape("whole") if wanted == WHOLE else Shape(wanted.form, keys=wanted.keys)
        if parts[-1] == "[]":
            node.rest = leaf
        else:
            node.fields[parts[-1]] = leaf


def _step(node: Shape, part: str) -> Shape:
    if part == "[]":
        node.rest = node.rest or Shape()
        return node.rest
    return node.fields.setdefault(part, Shape())


def from_openapi(schema: Mapping[str, Any]) -> Shape:
    """The shape that a structural schema of a CRD declares."""
    kind = schema.get("type")
    if kind == "array":
        declared = schema.get("x-kubernetes-list-type", "atomic")
        items = schema.get("items", {})
        if declared == "map":
            fields = items.get("properties", {})
            keys = tuple((key, fields.get(key, {}).get("default")) for key in schema["x-kubernetes-list-map-keys"])
            return Shape("list", rest=from_openapi(items), keys=keys)
        return Shape("set") if declared == "set" else Shape("whole")
    if kind == "object":
        if schema.get("x-kubernetes-map-type") == "atomic":
            return Shape("whole")
        if isinstance(values := schema.get("additionalProperties"), dict):
            return Shape(rest=from_openapi(values), open=True)
        return Shape(fields={name: from_openapi(child) for name, child in schema.get("properties", {}).items()})
    return Shape("whole")


def defaults_of(schema: Mapping[str, Any], value: Any) -> Any:
    """The value with the defaults of a structural schema filled in; the same object where nothing is missing."""
    if isinstance(value, dict):
        fields: Mapping[str, Any] = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        out = None
        for name, child in fields.items():
            if value.get(name) is None:
                if "default" not in child:
                    continue
                fresh = defaults_of(child, child["default"])
            else:
                fresh = defaults_of(child, value[name])
                if fresh is value[name]:
                    continue
            out = dict(value) if out is None else out
            out[name] = fresh
        if isinstance(rest, dict):
            for name, item in value.items():
                fresh = defaults_of(rest, item)
                if fresh is not item:
                    out = dict(value) if out is None else out
                    out[name] = fresh
        return value if out is None else out
    if isinstance(value, list) and isinstance(items := schema.get("items"), dict):
        filled = [defaults_of(items, item) for item in value]
        return filled if any(new is not old for new, old in zip(filled, value, strict=True)) else value
    return value
