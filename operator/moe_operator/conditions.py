"""Conditions of a MoEDeployment: what is true, why, and what a person can do about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_api.enums import TuningMode
from moe_api.status import Condition, ConditionType, MoEDeploymentStatus
from moe_api.status import RevisionPhase as Phase
from moe_core.moments import rfc3339
from moe_core.process_config import unheeded, unsupported
from moe_kube import objects as k
from moe_operator.children import MESSAGE_MAX, DeploymentFacts
from moe_operator.names import gateway_name
from moe_operator.render import exposure, gateway
from moe_operator.rollout import SLO_MIN_REQUESTS, SLO_SHARE, Rollout
from moe_operator.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Said:
    """A condition before it has a time."""

    type: ConditionType
    status: str
    reason: str
    message: str = ""


@dataclass(frozen=True)
class Trouble:
    """What keeps the operator from doing what it should, said in conditions."""

    blocked: str = ""
    """Reason word: no new revision can be made."""
    blocked_message: str = ""
    lost: str = ""
    """What cannot be kept right, as its record is gone."""
    failures: tuple[tuple[str, str], ...] = field(default=())
    """(reason, message) of writes that failed in this reconcile."""


def judge(snapshot: Snapshot, rollout: Rollout | None, trouble: Trouble) -> tuple[Said, ...]:
    """Every condition that speaks of this snapshot."""
    return (
        _accepted(snapshot),
        _fits(snapshot),
        _cluster(snapshot, rollout, trouble),
        _serving(snapshot, rollout),
        _gateway(snapshot),
        _slo(snapshot),
        _tuning(snapshot),
        _degraded(snapshot, rollout, trouble),
    )


def _accepted(snapshot: Snapshot) -> Said:
    kind, resource = ConditionType.ACCEPTED, snapshot.resource
    unmade = [*unsupported(resource), *exposure.problems_of(resource)]
    if unmade:
        return Said(kind, "False", "NotSupported", "; ".join(map(str, unmade)))
    out = [f"not used: {one.name} ({one.field}): {one.why}" for one in gateway.left_out(resource)]
    idle = [f"{field}: {why}" for field, why in unheeded(resource.spec)]
    reason = "FallbackTargetLeftOut" if out else "NotAllInForce" if idle else "Valid"
    return Said(kind, "True", reason, "; ".join([*out, *idle]))


def refused(message: str) -> tuple[Said, ...]:
    """Conditions of a resource that cannot be read: what runs goes on as it was."""
    return (Said(ConditionType.ACCEPTED, "False", "Invalid", message),)


def timed(said: tuple[Said, ...], before: MoEDeploymentStatus, generation: int, now: int) -> tuple[Condition, ...]:
    """The conditions with their times: that of the last change of `status` stays."""
    found = []
    for one in said:
        old = before.condition(one.type)
        since = old.last_transition_time if old is not None and old.status == one.status else rfc3339(now)
        found.append(
            Condition.model_validate(
                {
                    "type": one.type,
                    "status": one.status,
                    "observedGeneration": generation,
                    "lastTransitionTime": since,
                    "reason": one.reason,
                    "message": one.message[:MESSAGE_MAX],
                }
            )
        )
    spoken = {one.type for one in said}
    return tuple(found) + tuple(old for old in before.conditions if old.type not in spoken)


def _fits(snapshot: Snapshot) -> Said:
    if snapshot.external:
        return Said(ConditionType.FITS, "True", "External", "the engine is not ours to place")
    verdict = snapshot.verdict
    status = {True: "True", False: "False", None: "Unknown"}[verdict.fits]
    return Said(ConditionType.FITS, status, verdict.reason, verdict.message)


def _leader(rollout: Rollout | None) -> str | None:
    """The revision that takes most of the traffic, or is on its way to."""
    if rollout is None or not rollout.revisions:
        return None
    phases = (Phase.SERVING, Phase.PROMOTING, Phase.STARTING, Phase.PENDING)
    candidates = [r for r in rollout.revisions if r.phase in phases]
    if not candidates:
        return None
    return min(candidates, key=lambda r: (-r.weight, phases.index(r.phase), r.name)).name


def _cluster(snapshot: Snapshot, rollout: Rollout | None, trouble: Trouble) -> Said:
    kind = ConditionType.CLUSTER_READY
    if snapshot.external:
        return Said(kind, "True", "External", "the engine is not ours to run")
    if k.RAY_SERVICE in snapshot.absent:
        return Said(kind, "False", "KubeRayMissing", "install KubeRay: the kind RayService (ray.io/v1) is not there")
    leader = _leader(rollout)
    if leader is None:
        if snapshot.resource.spec.suspend:
            return Said(kind, "False", "Suspended", "spec.suspend is true")
        return Said(kind, "False", trouble.blocked or "NoRevision", trouble.blocked_message or "no revision runs")
    if not snapshot.runs(leader) and rollout is not None and rollout.waits_for:
        return Said(kind, "False", "Creating", rollout.waits_for)
    cluster = snapshot.cluster(leader)
    if cluster is None:
        return Said(kind, "False", "Creating", f"KubeRay has made no cluster for {leader} yet")
    workers, wanted = cluster.workers, sum(group.min for group in cluster.groups)
    if workers < wanted:
        return Said(
            kind,
            "False",
            "WaitingForPods",
            f"{leader}: {workers} of {wanted} worker groups are up; see its pods' events",
        )
    return Said(kind, "True", "Ready", "")


def _serving(snapshot: Snapshot, rollout: Rollout | None) -> Said:
    kind = ConditionType.SERVING_READY
    if snapshot.external:
        return Said(kind, "Unknown", "External", "the gateway finds out whether the engine answers")
    leader = _leader(rollout)
    if leader is None:
        reason = "Suspended" if snapshot.resource.spec.suspend else "NoRevision"
        return Said(kind, "False", reason, "no revision answers")
    facts = snapshot.facts(leader)
    if facts.ready:
        return Said(kind, "True", "Ready", "")
    return Said(kind, "False", "NotReady", f"{leader}: {facts.message or 'the application is not up yet'}")


def _gateway(snapshot: Snapshot) -> Said:
    kind = ConditionType.GATEWAY_READY
    name = gateway_name(snapshot.owner.name)
    child = snapshot.child(k.DEPLOYMENT, name)
    trouble = gateway_trouble(snapshot)
    if trouble is not None:
        return Said(kind, "False", *trouble)
    facts = child.facts if child is not None and isinstance(child.facts, DeploymentFacts) else DeploymentFacts()
    if facts.available >= 1 and facts.current:
        return Said(kind, "True", "Ready", "")
    return Said(kind, "False", "NotReady", facts.message or f"no pod of {name} is available")


def gateway_trouble(snapshot: Snapshot) -> tuple[str, str] | None:
    """(reason, message) why the gateway cannot be made or changed; what is there stays as it is."""
    if not snapshot.config.gateway_image:
        return "ImageMissing", "the operator was given no gateway image: set it in the chart"
    problems = snapshot.gateway_problems
    return ("NotSupported", "; ".join(map(str, problems))) if problems else None


def _slo(snapshot: Snapshot) -> Said:
    kind = ConditionType.SLO_MET
    before = snapshot.status.condition(kind)
    if snapshot.gateways is None:
        return Said(kind, before.status, before.reason, before.message) if before else _no_requests()
    if not snapshot.gateways.digests and snapshot.gateways.silent:
        words = (
            "no gateway answers the operator, so upgrades wait: see their logs, and whether a NetworkPolicy is between"
        )
        return Said(kind, "Unknown", "GatewaysSilent", words)
    targets = [t for digest in snapshot.gateways.digests for t in digest.targets]
    met, missed = sum(t.met for t in targets), sum(t.missed for t in targets)
    missed += sum(digest.shed for digest in snapshot.gateways.digests)
    if met + missed < SLO_MIN_REQUESTS:
        return _no_requests()
    share = met / (met + missed)
    if share >= SLO_SHARE:
        return Said(kind, "True", "Met", "")
    return Said(kind, "False", "Missed", f"less than {SLO_SHARE:.0%} of requests keep the SLO: see status.live")


def _no_requests() -> Said:
    return Said(ConditionType.SLO_MET, "Unknown", "NoRequests", "too few requests to tell")


def _tuning(snapshot: Snapshot) -> Said:
    kind = ConditionType.TUNING_ACTIVE
    mode, tuning = snapshot.resource.spec.tuning.mode, snapshot.status.tuning
    if mode == TuningMode.OFF:
        return Said(kind, "False", "Off", "spec.tuning.mode is Off")
    if tuning is None:
        return Said(kind, "Unknown", "NoTuner", "no tuner has written status.tuning yet")
    if tuning.pauses:
        return Said(kind, "False", "Paused", "paused: see status.tuning.pauses")
    return Said(kind, "True", mode.value, "")


def _degraded(snapshot: Snapshot, rollout: Rollout | None, trouble: Trouble) -> Said:
    kind = ConditionType.DEGRADED
    if trouble.failures:
        reason, message = trouble.failures[0]
        return Said(kind, "True", reason, "; ".join(text for _, text in trouble.failures) if message else "")
    if rollout is not None and rollout.rolled_back:
        return Said(
            kind,
            "True",
            "RolledBack",
            f"{rollout.rolled_back}; the revision before serves; "
            "to try again, change a field that is not hot, or spec.upgrade",
        )
    if trouble.blocked:
        return Said(kind, "True", trouble.blocked, trouble.blocked_message)
    if trouble.lost:
        return Said(kind, "True", "RecordLost", trouble.lost)
    if rollout is not None and rollout.late:
        return Said(kind, "True", "NotReadyInTime", f"{rollout.late}: see ServingReady, and the events of its pods")
    impossible = gateway_trouble(snapshot)
    if impossible is not None:
        return Said(kind, "True", impossible[0], f"the gateway: {impossible[1]}")
    return Said(kind, "False", "AsExpected", rollout.waits_for if rollout is not None else "")
