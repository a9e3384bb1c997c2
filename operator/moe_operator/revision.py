"""Which revision a spec asks for: one that is pinned already, or a new one with a name of its own."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from moe_api.disruption import Change, classify, inputs, worst
from moe_api.fields import Disruption
from moe_api.load import load_object
from moe_api.resource import MoEDeployment
from moe_kube.managed import digest
from moe_operator.children import RecordFacts
from moe_operator.names import revision_name
from moe_operator.record import RevisionRecord


def name_of(resource: MoEDeployment) -> str:
    """Name of the revision that is born from this spec: from a hash of its revision-class fields."""
    return revision_name(resource.metadata.name, digest(inputs(awake(resource), Disruption.REVISION)))


def awake(resource: MoEDeployment) -> MoEDeployment:
    """The resource as if it were not suspended: suspending says whether a cluster runs, not which."""
    spec = resource.spec
    return (
        resource
        if not spec.suspend
        else resource.model_copy(update={"spec": spec.model_copy(update={"suspend": False})})
    )


def changes_since(record: RevisionRecord, resource: MoEDeployment) -> list[Change]:
    """What the spec changed since the revision was born."""
    return classify(_born(record.model_dump_json()), awake(resource))


def serves(record: RevisionRecord, resource: MoEDeployment) -> bool:
    """Whether the revision can serve the spec without a new cluster."""
    return worst(changes_since(record, resource)) != Disruption.REVISION


def pinned_for(records: Iterable[RevisionRecord], resource: MoEDeployment) -> RevisionRecord | None:
    """The youngest pinned revision that can serve the spec."""
    for record in sorted(records, key=lambda r: r.number, reverse=True):
        if serves(record, resource):
            return record
    return None


def unpacked(facts: RecordFacts) -> RevisionRecord:
    """The record that a ControllerRevision holds. Raises ValueError for one that is not ours."""
    return _unpacked(facts.packed)


@lru_cache(maxsize=256)
def _unpacked(packed: bytes) -> RevisionRecord:
    return RevisionRecord.model_validate(RecordFacts(packed).unpack())


@lru_cache(maxsize=256)
def _born(record_json: str) -> MoEDeployment:
    record = RevisionRecord.model_validate_json(record_json)
    return load_object(
        {
            "apiVersion": "moestack.dev/v1alpha1",
            "kind": "MoEDeployment",
            "metadata": {"name": "born"},
            "spec": record.spec,
        }
    )
