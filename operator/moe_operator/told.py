"""Events that a person should notice, from one status to the next."""

from __future__ import annotations

from collections.abc import Iterator

from moe_api.status import ConditionType, MoEDeploymentStatus
from moe_api.status import RevisionPhase as Phase
from moe_kube.objects import MOE_DEPLOYMENT, Ref
from moe_operator.names import Owner
from moe_operator.requests import Tell

_WORDS = {
    Phase.STARTING: ("Normal", "RevisionStarting", "{name} is coming up"),
    Phase.PROMOTING: ("Normal", "TrafficMoving", "{name} takes {weight} % of the traffic"),
    Phase.SERVING: ("Normal", "RevisionServing", "{name} takes {weight} % of the traffic"),
    Phase.DRAINING: ("Normal", "RevisionDraining", "{name} takes no new request and is deleted by {deadline}"),
    Phase.FAILED: ("Warning", "RolledBack", "{message}"),
}
_WATCHED = (ConditionType.ACCEPTED, ConditionType.FITS, ConditionType.DEGRADED, ConditionType.CLUSTER_READY)
_GOOD = {ConditionType.DEGRADED: "False"}


def between(before: MoEDeploymentStatus, after: MoEDeploymentStatus, owner: Owner) -> Iterator[Tell]:
    """An Event for each revision that moved on, and for each condition that turned."""
    resource = Ref(MOE_DEPLOYMENT, owner.namespace, owner.name)
    old = {revision.name: revision for revision in before.revisions}
    for revision in after.revisions:
        was = old.get(revision.name)
        same_step = was is not None and (was.phase, was.weight) == (revision.phase, revision.weight)
        if same_step or revision.phase not in _WORDS or (revision.phase == Phase.SERVING and revision.weight < 100):
            continue
        kind, reason, words = _WORDS[revision.phase]
        note = words.format(
            name=revision.name,
            weight=revision.weight,
            deadline=revision.drain_deadline or "",
            message=revision.message or f"{revision.name} failed",
        )
        yield Tell(resource, owner.uid, "Warning" if kind == "Warning" else "Normal", reason, note)
    for gone in sorted(old.keys() - {revision.name for revision in after.revisions}):
        yield Tell(resource, owner.uid, "Normal", "RevisionGone", f"{gone} is deleted")
    for type_ in _WATCHED:
        now, was_said = after.condition(type_), before.condition(type_)
        if now is None or (was_said is not None and (was_said.status, was_said.reason) == (now.status, now.reason)):
            continue
        good = now.status == _GOOD.get(type_, "True")
        if good and was_said is None:
            continue
        if now.status != "Unknown":
            kind = "Normal" if good or type_ == ConditionType.CLUSTER_READY else "Warning"
            note = now.message or f"{type_.value} is {now.status}"
            yield Tell(resource, owner.uid, "Warning" if kind == "Warning" else "Normal", now.reason, note)
