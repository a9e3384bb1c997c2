"""What differs between kinds on the in-memory API server: status, generation, defaults, rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from moe_api import crd
from moe_api.load import ResourceInvalid, load_object
from moe_kube import objects
from moe_kube.errors import Invalid
from moe_kube.fake_shapes import Shape, defaults_of, shape_of
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
}
_NO_GENERATION = {
    *("ConfigMap", "ServiceAccount", "ControllerRevision", "Lease", "Event", "Service", "Namespace"),
}
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_NAME = re.compile(r"([A-Za-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")

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
        prepare=_moe_deployment if kind == objects.MOE_DEPLOYMENT else _filler(shape),
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


def _filler(shape: Shape) -> Prepare:
    def prepare(_ref: Ref, new: Obj, old: Obj | None) -> Obj:
        filled = dict(new)
        for name, child in shape.fields.items():
            if name in new and (old is None or new[name] is not old.get(name)):
                filled[name] = fill_keys(new[name], child)
        return filled

    return prepare


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


@lru_cache(maxsize=1)
def _moe_schema() -> Mapping[str, Any]:
    spec: Mapping[str, Any] = crd.schema()["properties"]["spec"]
    return spec


def _moe_deployment(ref: Ref, new: Obj, old: Obj | None) -> Obj:
    """Defaults and rules of our own CRD, from the types that it is generated from."""
    spec = new.get("spec")
    if isinstance(spec, dict) and (old is None or spec is not old.get("spec")):
        new = {**new, "spec": defaults_of(_moe_schema(), spec)}
    read = {name: new[name] for name in ("spec", "status") if name in new}
    if old is None or any(read.get(name) is not old.get(name) for name in ("spec", "status")):
        problem = _problem(ref.name, orjson.dumps(read, option=orjson.OPT_SORT_KEYS))
        if problem:
            raise invalid(ref, problem)
    return new


@lru_cache(maxsize=4096)
def _problem(name: str, raw: bytes) -> str:
    try:
        load_object({**_IDENTITY, "metadata": {"name": name}, **orjson.loads(raw)})
    except ResourceInvalid as error:
        return ", ".join(str(problem) for problem in error.problems)
    return ""
