"""What differs between kinds on the in-memory API server: status, generation, defaults, rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson
from pydantic import ValidationError

from moe_api.load import ResourceInvalid, load_object
from moe_api.status import MoEDeploymentStatus
from moe_kube import fake_defaults, objects
from moe_kube.errors import Invalid
from moe_kube.fake_shapes import Shape, defaults_of, moe_schema, shape_of
from moe_kube.objects import Kind, Obj, Ref

CUSTOM: tuple[Kind, ...] = (
    objects.MOE_DEPLOYMENT,
    objects.RAY_SERVICE,
    objects.RAY_CLUSTER,
    objects.HTTP_ROUTE,
    objects.POD_MONITOR,
    objects.PROMETHEUS_RULE,
)
"""Kinds that exist only where their CRD is installed."""
BUILT_IN: tuple[Kind, ...] = (
    objects.CONTROLLER_REVISION,
    objects.DEPLOYMENT,
    objects.SERVICE,
    objects.SERVICE_ACCOUNT,
    objects.ROLE,
    objects.ROLE_BINDING,
    objects.CONFIG_MAP,
    objects.POD,
    objects.NAMESPACE,
    objects.EVENT,
    objects.ENDPOINT_SLICE,
    objects.HORIZONTAL_POD_AUTOSCALER,
    objects.POD_DISRUPTION_BUDGET,
    objects.NETWORK_POLICY,
    objects.INGRESS,
    objects.LEASE,
    objects.CUSTOM_RESOURCE_DEFINITION,
)
ALL: tuple[Kind, ...] = (*BUILT_IN, *CUSTOM)

_NO_STATUS = {
    *("ConfigMap", "ServiceAccount", "ControllerRevision", "Lease", "Event", "EndpointSlice", "NetworkPolicy"),
    *("Role", "RoleBinding"),
}
_NO_GENERATION = {
    *("ConfigMap", "ServiceAccount", "ControllerRevision", "Lease", "Event", "Service", "Namespace"),
    *("Role", "RoleBinding"),
}
_RAW = {objects.CONTROLLER_REVISION, objects.CUSTOM_RESOURCE_DEFINITION}
"""Built-in kinds that carry documents of others, which the server leaves as they are."""
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_NAME = re.compile(r"([A-Za-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")

_ANY_SPEC = {"model": {"id": "x"}, "hardware": {"accelerator": "cpu", "gpusPerReplica": 1}}
_IDENTITY = {"apiVersion": objects.MOE_DEPLOYMENT.api_version, "kind": objects.MOE_DEPLOYMENT.kind}

Prepare = Callable[[Ref, Obj, Obj | None], Obj]
"""(reference, new content, old content) to the content that is stored. Raises Invalid."""


@dataclass(frozen=True, slots=True)
class Traits:
    """How one kind is served."""

    kind: Kind
    shape: Shape
    status: bool
    generation: bool
    unconditional_update: bool
    """A replace without resourceVersion is taken."""
    prepare: Prepare


@lru_cache(maxsize=128)
def traits_of(kind: Kind) -> Traits:
    """The traits of a kind. A kind that is in no table is served as a custom resource with a status."""
    custom = kind not in BUILT_IN
    shape = shape_of(kind.kind)
    return Traits(
        kind=kind,
        shape=shape,
        status=kind.kind not in _NO_STATUS,
        generation=kind.kind not in _NO_GENERATION,
        unconditional_update=not custom and kind != objects.LEASE,
        prepare=_moe_deployment
        if kind == objects.MOE_DEPLOYMENT
        else _preparer(kind, shape, typed=not custom and kind not in _RAW),
    )


def invalid(ref: Ref, problem: str) -> Invalid:
    """422, worded as the API server words it."""
    group = f".{ref.kind.group}" if ref.kind.group else ""
    return Invalid(f'{ref.kind.kind}{group} "{ref.name}" is invalid: {problem}', status=422, reason="Invalid")


def check_metadata(ref: Ref, meta: Mapping[str, Any]) -> None:
    """Name and labels. Raises Invalid."""
    pattern, limit = (_SERVICE_NAME, 63) if ref.kind == objects.SERVICE else (_NAME, 253)
    if len(ref.name) > limit or not pattern.fullmatch(ref.name):
        raise invalid(ref, f'metadata.name: Invalid value: "{ref.name}": must be at most {limit} of a-z, 0-9 and -')
    for name, value in meta.get("labels", {}).items():
        if not _label(name, value):
            raise invalid(ref, f'metadata.labels: Invalid value: "{name}={value}": no label')
    for name, value in meta.get("annotations", {}).items():
        if not isinstance(value, str) or not _label(name, ""):
            raise invalid(ref, f'metadata.annotations: Invalid value: "{name}": no annotation')


@lru_cache(maxsize=4096)
def _label(name: str, value: Any) -> bool:
    return bool(_LABEL_NAME.fullmatch(name)) and isinstance(value, str) and bool(_LABEL_VALUE.fullmatch(value))


_MAPS = {"annotations", "binaryData", "data", "labels", "limits", "matchLabels", "nodeSelector", "requests", "selector"}
"""Maps of built-in kinds that are left out where they are empty; an empty group (emptyDir) is kept."""


def _preparer(kind: Kind, shape: Shape, *, typed: bool) -> Prepare:
    """Defaults, and for built-in kinds the form that their types give: quantities, and nothing that is empty."""
    fill = fake_defaults.SPECS.get(kind.kind)

    fixed = _IMMUTABLE.get(kind.kind, ())

    def prepare(ref: Ref, new: Obj, old: Obj | None) -> Obj:
        out: Obj = {}
        for name, value in new.items():
            if old is None or value is not old.get(name):
                fresh = _without_empty(fake_defaults.typed(value, name)) if typed else value
                if typed and _empty(name, fresh):
                    continue
                if not typed and (path := null_path(value, name)):
                    raise invalid(ref, f'{path}: Invalid value: "null": must not be null')
                if fill is not None and name == "spec":
                    fresh = fill(fresh)
                child = shape.fields.get(name)
                out[name] = fill_keys(fresh, child) if child else fresh
            else:
                out[name] = value
        if old is not None:
            for field in fixed:
                if _at(out, field) != _at(old, field):
                    raise invalid(ref, f"{'.'.join(field)}: Invalid value: field is immutable")
        return out

    return prepare


_IMMUTABLE: dict[str, tuple[tuple[str, ...], ...]] = {
    "ControllerRevision": (("data",),),
    "Deployment": (("spec", "selector"),),
}


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _empty(name: str, value: Any) -> bool:
    return value is None or value == [] or (value == {} and name in _MAPS)


def null_path(value: Any, path: str) -> str:
    """Where the first null is; empty where there is none."""
    if value is None:
        return path
    if isinstance(value, dict):
        return next((found for name, item in value.items() if (found := null_path(item, f"{path}.{name}"))), "")
    if isinstance(value, list):
        return next((found for at, item in enumerate(value) if (found := null_path(item, f"{path}[{at}]"))), "")
    return ""


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        out = None
        for name, item in value.items():
            fresh = _without_empty(item)
            drop = _empty(name, fresh)
            if drop or fresh is not item:
                out = dict(value) if out is None else out
                if drop:
                    del out[name]
                else:
                    out[name] = fresh
        return value if out is None else out
    if isinstance(value, list):
        items = [_without_empty(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


def fill_keys(value: Any, shape: Shape) -> Any:
    """The value with the defaults of key fields (a port's protocol) written out."""
    if shape.form == "map" and isinstance(value, dict):
        out = value
        for name, child in shape.fields.items():
            if name in value and (fresh := fill_keys(value[name], child)) is not value[name]:
                out = {**out, name: fresh}
        return out
    if shape.form == "list" and isinstance(value, list):
        absent = {name: default for name, default in shape.keys if default is not None}
        items = []
        for item in value:
            full = {**absent, **item} if any(name not in item for name in absent) else item
            items.append(fill_keys(full, shape.rest) if shape.rest else full)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


def _moe_deployment(ref: Ref, new: Obj, old: Obj | None) -> Obj:
    """Defaults and rules of our own CRD, from the types that it is generated from."""
    before = old or {}
    spec, status = new.get("spec"), new.get("status")
    if isinstance(spec, dict) and spec is not before.get("spec"):
        spec = defaults_of(moe_schema()["properties"]["spec"], spec)
        new = {**new, "spec": spec}
    for name in ("spec", "status"):
        if new.get(name) is not before.get(name) and (path := null_path(new.get(name, {}), name)):
            raise invalid(ref, f'{path}: Invalid value: "null": must not be null')
    problem = ""
    if old is None or spec is not before.get("spec"):
        problem = _spec_problem(ref.name, orjson.dumps(spec, option=orjson.OPT_SORT_KEYS))
    if not problem and status is not None and status is not before.get("status"):
        problem = _status_problem(orjson.dumps(status, option=orjson.OPT_SORT_KEYS))
    if problem:
        raise invalid(ref, problem)
    return new


@lru_cache(maxsize=4096)
def _spec_problem(name: str, raw: bytes) -> str:
    spec = orjson.loads(raw)
    return _problem({"metadata": {"name": name}, **({} if spec is None else {"spec": spec})})


@lru_cache(maxsize=4096)
def _status_problem(raw: bytes) -> str:
    status = orjson.loads(raw)
    try:
        MoEDeploymentStatus.model_validate(status, by_alias=True, by_name=False)
    except ValidationError:
        return _problem({"metadata": {"name": "x"}, "spec": _ANY_SPEC, "status": status})
    return ""


def _problem(document: Obj) -> str:
    try:
        load_object({**_IDENTITY, **document})
    except ResourceInvalid as error:
        return ", ".join(str(problem) for problem in error.problems)
    return ""
