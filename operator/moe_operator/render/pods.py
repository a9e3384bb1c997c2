"""Typed builders of the parts of a pod that we use: nothing empty, and what the API server would add spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_api.common import SecretKeyRef
from moe_api.spec_cluster import Toleration, TopologySpread
from moe_operator.render.quantity import canonical

Json = dict[str, Any]


def filled(**values: Any) -> Json:
    """Only the values that say something: no None and nothing empty."""
    return {name: value for name, value in values.items() if value is not None and value not in ({}, [], (), "")}


@dataclass(frozen=True)
class Env:
    """An environment variable: a value, or a key of a Secret."""

    name: str
    value: str | None = None
    secret: SecretKeyRef | None = None

    def to_json(self) -> Json:
        if self.secret is not None:
            return {"name": self.name, "valueFrom": {"secretKeyRef": secret_key(self.secret)}}
        return {"name": self.name, "value": self.value or ""}


def secret_key(reference: SecretKeyRef) -> Json:
    return {"name": reference.name, "key": reference.key}


@dataclass(frozen=True)
class Volume:
    """A volume and where it is mounted. `source` is the volume source as JSON."""

    name: str
    path: str
    source: Mapping[str, Any]
    read_only: bool = False

    def volume(self) -> Json:
        return {"name": self.name, **self.source}

    def mount(self) -> Json:
        return {"name": self.name, "mountPath": self.path, **({"readOnly": True} if self.read_only else {})}


@dataclass(frozen=True)
class Port:
    """A port of a container."""

    name: str
    number: int

    def to_json(self) -> Json:
        return {"name": self.name, "containerPort": self.number, "protocol": "TCP"}


@dataclass(frozen=True)
class Resources:
    """Requests and limits by resource, in any form of quantity."""

    requests: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> Json:
        return filled(
            requests={name: canonical(value) for name, value in sorted(self.requests.items())},
            limits={name: canonical(value) for name, value in sorted(self.limits.items())},
        )


@dataclass(frozen=True)
class Container:
    """A container without privileges."""

    name: str
    image: str
    pull_policy: str
    ports: tuple[Port, ...] = ()
    env: tuple[Env, ...] = ()
    volumes: tuple[Volume, ...] = ()
    resources: Resources = Resources()
    command: tuple[str, ...] = ()
    read_only_root: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)
    """Probes and lifecycle."""

    def to_json(self) -> Json:
        return {
            **filled(
                name=self.name,
                image=self.image,
                imagePullPolicy=self.pull_policy,
                command=list(self.command),
                ports=[port.to_json() for port in self.ports],
                env=[variable.to_json() for variable in self.env],
                resources=self.resources.to_json(),
                volumeMounts=[volume.mount() for volume in self.volumes],
            ),
            "securityContext": unprivileged(self.read_only_root),
            **self.more,
        }


def unprivileged(read_only_root: bool = False) -> Json:
    """What the `restricted` Pod Security Standard asks of a container."""
    read_only = {"readOnlyRootFilesystem": True} if read_only_root else {}
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, **read_only}


def pod_security(user: int | None = None, group: int | None = None, fs_group: int | None = None) -> Json:
    """What the `restricted` Pod Security Standard asks of a pod: never root."""
    return {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
        **filled(runAsUser=user, runAsGroup=group, fsGroup=fs_group),
    }


def toleration(given: Toleration) -> Json:
    return {
        "operator": given.operator,
        **filled(key=given.key, value=given.value, effect=given.effect),
        **({} if given.toleration_seconds is None else {"tolerationSeconds": given.toleration_seconds}),
    }


def spread(given: TopologySpread, selector: Mapping[str, str]) -> Json:
    return {
        "topologyKey": given.topology_key,
        "maxSkew": given.max_skew,
        "whenUnsatisfiable": given.when_unsatisfiable,
        "labelSelector": {"matchLabels": dict(selector)},
    }
