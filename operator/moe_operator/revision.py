"""Which revision a spec asks for: one that is pinned already, or a new one with a name of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from moe_api.disruption import Change, classify, inputs, worst
from moe_api.fields import Disruption
from moe_api.load import ResourceInvalid, load_object
from moe_api.resource import MoEDeployment
from moe_api.status import RevisionPhase as Phase
from moe_kube.managed import digest
from moe_operator.children import RecordFacts
from moe_operator.names import revision_name
from moe_operator.record import RevisionRecord
from moe_operator.rollout import Revision


def name_of(resource: MoEDeployment) -> str:
    """Name of the revision that is born from this spec: from a hash of its revision-class fields."""
    return revision_name(resource.metadata.name, digest(inputs(awake(resource), Disruption.REVISION)))


def asked_for(resource: MoEDeployment) -> str:
    """Digest of what a person asks for: hot fields are left out, but for those of spec.upgrade, which say how. While it
    stays as it is, a revision that has failed is not tried again.
    """
    spec = awake(resource)
    how = {path: value for path, value in inputs(spec, Disruption.HOT).items() if path.startswith("spec.upgrade.")}
    return digest({**inputs(spec, Disruption.ROLLING), **how})[:16]


def awake(resource: MoEDeployment) -> MoEDeployment:
    """The resource as if it were not suspended: suspending says whether a cluster runs, not which."""
    spec = resource.spec
    return (
        resource
        if not spec.suspend
        else resource.model_copy(update={"spec": spec.model_copy(update={"suspend": False})})
    )


def born(record: RevisionRecord) -> MoEDeployment | None:
    """What a revision was asked for at its birth; None where today's types cannot read it."""
    try:
        return _born(record.model_dump_json())
    except ResourceInvalid:
        return None


def changes_since(record: RevisionRecord, resource: MoEDeployment) -> list[Change] | None:
    """What the spec changed since the revision was born; None where nobody can tell."""
    before = born(record)
    return None if before is None else classify(before, awake(resource))


def serves(record: RevisionRecord, resource: MoEDeployment) -> bool:
    """Whether the revision can serve the spec without a new cluster."""
    changes = changes_since(record, resource)
    return changes is not None and worst(changes) != Disruption.REVISION


def pinned_for(
    records: Iterable[RevisionRecord], resource: MoEDeployment, remembered: Mapping[str, Revision]
) -> RevisionRecord | None:
    """The pinned revision to serve the spec: one that has not failed, then one that has served, then the youngest.

    A ceiling that was raised and made the new revision fail, and is lowered again, is also served by that revision: the
    one before must be preferred to it.
    """

    def standing(record: RevisionRecord) -> tuple[bool, bool, int]:
        own = remembered.get(record.name, Revision(record.name))
        return (own.phase != Phase.FAILED, own.served, record.number)

    return max((record for record in records if serves(record, resource)), key=standing, default=None)


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
