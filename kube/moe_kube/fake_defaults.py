"""What the API server writes into the fields that we write: the form of quantities, and defaults inside what is whole.

A default beside our fields is nobody's and harms nobody. One inside a list or map that is owned as a whole becomes part
of what we own, and a quantity in another form is another text: both look like drift to whoever forgets them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

_QUANTITIES = {"limits", "requests"}
_SINGLE = {"sizeLimit", "averageValue"}
_QUANTITY = re.compile(r"([+-]?[0-9.]+)(Ki|Mi|Gi|Ti|Pi|Ei|n|u|m|k|M|G|T|P|E)?")
_BINARY = {"": 1, **{f"{letter}i": 1024 ** (at + 1) for at, letter in enumerate("KMGTPE")}}
_DECIMAL = {
    **{"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1)},
    **{letter: Decimal(1000) ** (at + 1) for at, letter in enumerate("kMGTPE")},
}
_WORKER_GROUP = {"maxReplicas": 2147483647, "minReplicas": 0, "numOfHosts": 1, "replicas": 0}


def quantity(value: Any) -> Any:
    """A resource quantity as built-in kinds are stored with it: `0.5` is `500m`, `1024Mi` is `1Gi`, 1 is `"1"`."""
    found = _QUANTITY.fullmatch(str(value))
    if found is None or isinstance(value, bool):
        return value
    number, suffix = Decimal(found[1]), found[2] or ""
    if suffix.endswith("i"):
        exact = number * _BINARY[suffix]
        if exact == int(exact):
            best = next(name for name in reversed(_BINARY) if exact % _BINARY[name] == 0)
            return f"{int(exact) // _BINARY[best]}{best}"
    exact = number * _DECIMAL.get(suffix, Decimal(_BINARY.get(suffix, 1)))
    best = next((name for name in reversed(_DECIMAL) if exact % _DECIMAL[name] == 0), "n")
    return f"{int(exact / _DECIMAL[best])}{best}" if exact else "0"


def typed(value: Any, name: str = "") -> Any:
    """The canonical form of a value of a built-in kind; the same object where it has that form."""
    if isinstance(value, dict):
        change: Callable[[str, Any], Any] = (lambda _, item: quantity(item)) if name in _QUANTITIES else _field
        out = None
        for key, item in value.items():
            fresh = change(key, item)
            if fresh is not item and (fresh != item or type(fresh) is not type(item)):
                out = dict(value) if out is None else out
                out[key] = fresh
        filled = value if out is None else out
        extra = {key: item for key, item in _ABSENT.get(name, {}).items() if key not in filled}
        return {**filled, **extra} if extra else filled
    if isinstance(value, list):
        items = [typed(item, f"{name}[]") for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


_ABSENT: dict[str, dict[str, Any]] = {
    "fieldRef": {"apiVersion": "v1"},
    "serviceAccountToken": {"expirationSeconds": 3600},
}


def _field(name: str, value: Any) -> Any:
    return quantity(value) if name in _SINGLE else typed(value, name)


def network_policy(spec: Any) -> Any:
    """The spec of a NetworkPolicy: ports are TCP where they do not say."""
    out = dict(spec)
    for name in ("ingress", "egress"):
        if name in spec:
            out[name] = [
                {**rule, "ports": [{"protocol": "TCP", **port} for port in rule["ports"]]} if "ports" in rule else rule
                for rule in spec[name]
            ]
    return out


def ray_cluster(spec: Any) -> Any:
    """The spec of a RayCluster, or a RayService's: KubeRay's CRD fills in worker groups, a list that is whole."""
    if "rayClusterConfig" in spec:
        return {**spec, "rayClusterConfig": ray_cluster(spec["rayClusterConfig"])}
    if not spec.get("workerGroupSpecs"):
        return spec
    return {**spec, "workerGroupSpecs": [{**_WORKER_GROUP, **group} for group in spec["workerGroupSpecs"]]}


SPECS: dict[str, Callable[[Any], Any]] = {
    "NetworkPolicy": network_policy,
    "RayCluster": ray_cluster,
    "RayService": ray_cluster,
}
"""What is filled into the spec of a kind, by its name."""
