"""Everything that one decision rests on, frozen: the resource, what belongs to it, what gateways said, the time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import orjson
from pydantic import ValidationError

from moe_api.annotations import OPERATOR_MANAGER
from moe_api.enums import EngineKind
from moe_api.load import load_object
from moe_api.resource import MoEDeployment
from moe_api.status import MoEDeploymentStatus
from moe_core.addresses import GATEWAY_ADMIN_PORT, gateway_admin_name
from moe_core.config import OperatorConfig
from moe_core.moments import unix_s
from moe_core.process_config import Problem
from moe_kube import objects as k
from moe_kube.endpoints import EndpointFacts, at_port
from moe_kube.managed import owned
from moe_kube.objects import Kind, Obj, Ref
from moe_operator.children import Child, ClusterFacts, RayFacts, RecordFacts
from moe_operator.names import Owner
from moe_operator.record import RevisionRecord
from moe_operator.render import gateway
from moe_operator.requests import Gateways, Observed
from moe_operator.revision import unpacked
from moe_operator.rollout import Revision, Sight
from moe_planner.fit import FitVerdict


@dataclass(frozen=True)
class Snapshot:
    """What is known at one moment of one MoEDeployment."""

    now: int
    resource: MoEDeployment
    status: MoEDeploymentStatus
    written: dict[str, Any]
    """Our own part of the status as it stands in the cluster."""
    children: dict[Ref, Child]
    records: dict[str, RevisionRecord]
    absent: frozenset[Kind]
    gateways: Gateways | None
    """None where nobody asked them."""
    verdict: FitVerdict
    config: OperatorConfig

    @property
    def owner(self) -> Owner:
        return owner_of(self.resource)

    @property
    def generation(self) -> int:
        return self.resource.metadata.generation or 0

    @property
    def external(self) -> bool:
        return self.resource.spec.engine.kind == EngineKind.EXTERNAL

    def child(self, kind: Kind, name: str) -> Child | None:
        return self.children.get(Ref(kind, self.owner.namespace, name))

    def of_kind(self, kind: Kind) -> tuple[Child, ...]:
        """Children of a kind, by name."""
        return tuple(sorted((c for c in self.children.values() if c.ref.kind == kind), key=lambda c: c.ref.name))

    def runs(self, name: str) -> bool:
        """Whether a revision's RayService exists."""
        return self.child(k.RAY_SERVICE, name) is not None

    def cluster(self, name: str) -> ClusterFacts | None:
        """State of the live RayCluster of a revision."""
        return next(
            (
                child.facts
                for child in self.of_kind(k.RAY_CLUSTER)
                if isinstance(child.facts, ClusterFacts) and child.facts.service == name and not child.deleting
            ),
            None,
        )

    @cached_property
    def gateway_problems(self) -> tuple[Problem, ...]:
        """Why there can be no gateway as it is asked for."""
        return gateway.problems_of(self.resource, self.config)

    def facts(self, name: str) -> RayFacts:
        """State of a revision's RayService; nothing where there is none."""
        child = self.child(k.RAY_SERVICE, name)
        return child.facts if child is not None and isinstance(child.facts, RayFacts) else RayFacts()

    def remembered(self) -> tuple[Revision, ...]:
        """Revisions as status remembers them, and RayServices of ours that it does not know."""
        known = tuple(
            Revision(
                name=r.name,
                phase=r.phase,
                weight=r.weight,
                step_started_at=unix_s(r.step_started_at),
                drain_deadline=unix_s(r.drain_deadline),
                failed_generation=r.failed_generation,
                failed_for=r.failed_for,
                served=bool(r.served),
                message=r.message or None,
                slo_percent=r.slo_percent,
                unready_since=unix_s(r.unready_since),
            )
            for r in self.status.revisions
        )
        names = {revision.name for revision in known}
        return known + tuple(Revision(c.ref.name) for c in self.of_kind(k.RAY_SERVICE) if c.ref.name not in names)

    def sights(self) -> dict[str, Sight]:
        """What is seen of each revision that exists."""
        found = {}
        serving = {r.name for r in self.status.revisions if r.weight > 0}
        for child in self.of_kind(k.RAY_SERVICE):
            name, facts = child.ref.name, self.facts(child.ref.name)
            in_flight, met, missed = self._traffic(name)
            found[name] = Sight(
                exists=True,
                deleting=child.deleting,
                ready=facts.ready or (facts.deploying and name in serving),
                in_flight=in_flight,
                met=met,
                missed=missed,
            )
        return found

    def _traffic(self, name: str) -> tuple[int | None, int, int]:
        if self.gateways is None:
            return None, 0, 0
        rows = [t for digest in self.gateways.digests for t in digest.targets if t.name == name and t.local]
        in_flight = None if self.gateways.silent else sum(row.in_flight for row in rows)
        return in_flight, sum(row.met for row in rows), sum(row.missed for row in rows)

    def gateways_version(self) -> int | None:
        """Lowest version of the weights in force on any gateway; None where one did not say."""
        if not self.pods():
            return self.status.weights_version
        if self.gateways is None or self.gateways.silent or not self.gateways.digests:
            return None
        return min(digest.weights_version for digest in self.gateways.digests)

    def highest_version(self) -> int:
        """Highest version of the weights that any gateway has."""
        digests = self.gateways.digests if self.gateways is not None else ()
        return max((digest.weights_version for digest in digests), default=0)

    def arrivals(self) -> int:
        """Requests that came to all gateways in the last window."""
        return sum(digest.arrivals for digest in self.gateways.digests) if self.gateways is not None else 0

    def pods(self) -> tuple[str, ...]:
        """host:port of the admin ports of the gateway's pods."""
        return pods_of(self.children)


def owner_of(resource: MoEDeployment) -> Owner:
    return Owner(resource.metadata.namespace, resource.metadata.name, resource.metadata.uid or "")


def ours(observed: Observed, resource: MoEDeployment) -> dict[Ref, Child]:
    """The children that a decision may count on. Labels can be put on anything by anybody, so they prove nothing.

    Ours is what this MoEDeployment controls, a RayCluster that one of those RayServices controls, and an EndpointSlice
    that the Service of the gateway's admin ports controls.
    """
    uid = resource.metadata.uid or ""
    own = {child.ref: child for child in observed.children if uid and child.controller_uid == uid}
    admin = Ref(k.SERVICE, resource.metadata.namespace, gateway_admin_name(resource.metadata.name))
    parents = {
        k.RAY_CLUSTER: {child.uid for ref, child in own.items() if ref.kind == k.RAY_SERVICE},
        k.ENDPOINT_SLICE: {own[admin].uid} if admin in own else set(),
    }
    made = {c.ref: c for c in observed.children if c.controller_uid in parents.get(c.ref.kind, ())}
    return {ref: child for ref, child in own.items() if ref.kind not in parents} | made


def pods_of(children: Mapping[Ref, Child]) -> tuple[str, ...]:
    """Admin addresses of a deployment's gateway pods, from its own EndpointSlices: addresses of IP at that port, as the
    operator asks them over HTTP.
    """
    slices = (child.facts for child in children.values() if isinstance(child.facts, EndpointFacts))
    return at_port(slices, GATEWAY_ADMIN_PORT)


def parse(obj: Obj) -> tuple[MoEDeployment, MoEDeploymentStatus]:
    """The resource and its status. Raises ResourceInvalid for the former."""
    meta = {name: obj["metadata"][name] for name in _IDENTITY if name in obj["metadata"]}
    resource = _parsed(orjson.dumps({**{key: obj[key] for key in obj if key != "status"}, "metadata": meta}))
    return resource, status_of(obj)


def status_of(obj: Obj) -> MoEDeploymentStatus:
    """The status, less what cannot be read of it: a newer tuner's or operator's field must not cost the memory of an
    upgrade.
    """
    document = obj.get("status") or {}
    for _ in range(_UNREADABLE_MAX):
        try:
            return MoEDeploymentStatus.model_validate(document)
        except ValidationError as error:
            document = _without(document, error.errors(include_url=False)[0]["loc"])
    return MoEDeploymentStatus()


_UNREADABLE_MAX = 64


def _without(document: Any, path: tuple[int | str, ...]) -> Any:
    """The document without what is at that path; without what should hold it, where it is missing."""
    document = copy.deepcopy(document)
    nodes = [document]
    for part in path:
        try:
            nodes.append(nodes[-1][part])
        except (KeyError, IndexError, TypeError):
            break
    if len(nodes) == 1:
        return {}
    del nodes[-2][path[len(nodes) - 2]]
    return document


_IDENTITY = ("name", "namespace", "uid", "generation", "labels", "annotations")
"""Metadata that a decision rests on: the rest changes with every write of a status."""


@lru_cache(maxsize=64)
def _parsed(document: bytes) -> MoEDeployment:
    return load_object(orjson.loads(document))


def build(
    observed: Observed,
    resource: MoEDeployment,
    status: MoEDeploymentStatus,
    gateways: Gateways | None,
    verdict: FitVerdict,
    config: OperatorConfig,
) -> Snapshot:
    """A snapshot of what was observed."""
    children = ours(observed, resource)
    return Snapshot(
        now=int(observed.now),
        resource=resource,
        status=status,
        written=owned(observed.resource or {}, OPERATOR_MANAGER, "status").get("status", {}),
        children=children,
        records=dict(_records(tuple(children.values()))),
        absent=observed.absent,
        gateways=gateways,
        verdict=verdict,
        config=config,
    )


def _records(children: tuple[Child, ...]) -> list[tuple[str, RevisionRecord]]:
    found = []
    for child in children:
        if isinstance(child.facts, RecordFacts) and not child.deleting:
            try:
                record = unpacked(child.facts)
            except ValueError:
                continue  # not ours, or damaged: as good as none
            if record.name == child.ref.name:
                found.append((record.name, record))
    return found
