"""Everything that one decision rests on, frozen: the resource, what belongs to it, what gateways said, the time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson
from pydantic import ValidationError

from moe_api.annotations import OPERATOR_MANAGER
from moe_api.enums import EngineKind
from moe_api.load import load_object
from moe_api.resource import MoEDeployment
from moe_api.status import MoEDeploymentStatus
from moe_core.config import OperatorConfig
from moe_core.moments import unix_s
from moe_kube import objects as k
from moe_kube.managed import owned
from moe_kube.objects import Kind, Obj, Ref
from moe_operator.children import Child, EndpointFacts, RayFacts, RecordFacts
from moe_operator.names import Owner, gateway_admin_name
from moe_operator.record import RevisionRecord
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
        return tuple(child for ref, child in sorted(self.children.items()) if ref.kind == kind)

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
        return pods_of(self.resource.metadata.name, tuple(self.children.values()))


def owner_of(resource: MoEDeployment) -> Owner:
    return Owner(resource.metadata.namespace, resource.metadata.name, resource.metadata.uid or "")


def pods_of(name: str, children: tuple[Child, ...]) -> tuple[str, ...]:
    """Admin addresses of a deployment's gateway pods, from the EndpointSlices of their headless Service."""
    prefix = f"{gateway_admin_name(name)}-"
    found = {
        f"[{address}]:{child.facts.port}" if ":" in address else f"{address}:{child.facts.port}"
        for child in children
        if isinstance(child.facts, EndpointFacts) and child.ref.name.startswith(prefix)
        for address in child.facts.addresses
    }
    return tuple(sorted(found))


def parse(obj: Obj) -> tuple[MoEDeployment, MoEDeploymentStatus]:
    """The resource and its status. Raises ResourceInvalid for the former; a status that is damaged counts as none."""
    meta = {name: obj["metadata"][name] for name in _IDENTITY if name in obj["metadata"]}
    resource = _parsed(orjson.dumps({**{key: obj[key] for key in obj if key != "status"}, "metadata": meta}))
    try:
        status = MoEDeploymentStatus.model_validate(obj.get("status") or {})
    except ValidationError:
        status = MoEDeploymentStatus()
    return resource, status


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
    """A snapshot of what was observed. Children of another owner are left out: they are not ours to count on."""
    uid = resource.metadata.uid or ""
    ours = {
        c.ref: c
        for c in observed.children
        if c.controller_uid == uid or c.ref.kind in (k.RAY_CLUSTER, k.ENDPOINT_SLICE)
    }
    return Snapshot(
        now=int(observed.now),
        resource=resource,
        status=status,
        written=owned(observed.resource or {}, OPERATOR_MANAGER, "status").get("status", {}),
        children=ours,
        records=dict(_records(tuple(ours.values()))),
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
                found.append((child.ref.name, unpacked(child.facts)))
            except ValueError:
                continue  # not ours, or damaged: as good as none; a revision that is wanted is pinned again
    return found
