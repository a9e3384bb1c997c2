"""The decision: from a snapshot to a plan. Pure; the plan is data that can be printed, compared and carried out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moe_api.enums import TuningMode
from moe_api.resource import MoEDeployment
from moe_api.spec_model import ParallelismSpec
from moe_api.status import MoEDeploymentStatus, PlanStatus, RevisionStatus, bounded
from moe_api.status import RevisionPhase as Phase
from moe_core.addresses import board_name
from moe_core.config import ServingConfig
from moe_core.moments import rfc3339
from moe_core.process_config import rolling_arguments
from moe_core.wire import Weights
from moe_kube import objects as k
from moe_kube.objects import Ref
from moe_operator import live
from moe_operator.children import MESSAGE_MAX, NOT_OURS, Child, ClusterFacts
from moe_operator.conditions import Trouble, judge, timed
from moe_operator.names import gateway_budget_name
from moe_operator.record import Bounds, RevisionRecord
from moe_operator.render import gateway, monitoring, revision
from moe_operator.render.objects import RENDERER_VERSION, Rendered
from moe_operator.revision import asked_for, name_of, pinned_for
from moe_operator.rollout import Context, Revision, Rollout, advance
from moe_operator.snapshot import Snapshot
from moe_planner import fit
from moe_planner.fit import FitVerdict

_SIZES = ("tensor", "data", "expert", "pipeline")


@dataclass(frozen=True)
class ClusterPatch:
    """Bounds of a live RayCluster, which KubeRay does not take over from its RayService."""

    ref: Ref
    operations: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    """What should be, and what to do about it."""

    snapshot: Snapshot
    rollout: Rollout | None
    objects: tuple[Rendered, ...]
    """Everything that should exist, in the order in which it is made."""
    removals: tuple[Child, ...]
    patches: tuple[ClusterPatch, ...]
    weights: Weights | None
    """Not None: some gateway does not use these yet."""
    trouble: Trouble
    requeue_s: float | None

    def status(self, failures: tuple[tuple[str, str], ...] = ()) -> MoEDeploymentStatus:
        """Our part of the status, with what failed on the way; at most 32 KiB."""
        if not failures:
            return self._undisturbed
        return _status(self.snapshot, self.rollout, replace(self.trouble, failures=failures))

    @cached_property
    def _undisturbed(self) -> MoEDeploymentStatus:
        return _status(self.snapshot, self.rollout, self.trouble)

    @property
    def intends_anew(self) -> bool:
        """Whether what is remembered of the rollout changes: it must be in status before anything is done."""
        before, after = self.snapshot.status, self.status()
        return before.revisions != after.revisions or before.weights_version != after.weights_version


def decide(snapshot: Snapshot) -> Plan:
    """What should exist for this resource, and what of it is not so yet."""
    if snapshot.external:
        return _external(snapshot)
    candidate, trouble = _candidate(snapshot)
    target = None if snapshot.resource.spec.suspend else candidate.name if candidate is not None else _running(snapshot)
    if candidate is not None:  # as good as pinned: status speaks of it at once, not only when the cache has it
        records = {**snapshot.records, candidate.name: candidate}
        snapshot = replace(snapshot, records=records, verdict=_verdict(snapshot, candidate))
    # Where nothing runs and nothing may be made, there is nothing to roll out.
    idle = target is None and not snapshot.resource.spec.suspend
    rollout = None if idle else advance(_context(snapshot, target))
    rolls = candidate.name if candidate is not None and not trouble.blocked else None
    objects = _objects(snapshot, rollout, rolls)
    return Plan(
        snapshot=snapshot,
        rollout=rollout,
        objects=objects,
        removals=_removals(snapshot, rollout, objects),
        patches=_patches(snapshot, objects),
        weights=_weights(snapshot, rollout),
        trouble=replace(trouble, lost=_lost(snapshot, rollout)),
        requeue_s=rollout.requeue_s if rollout is not None else None,
    )


def _candidate(snapshot: Snapshot) -> tuple[RevisionRecord | None, Trouble]:
    """The revision that the spec asks for; None where a new one is needed and cannot be made.

    Trouble tells why, or why one that runs does not take new arguments.
    """
    resource, config = snapshot.resource, snapshot.config
    remembered = {revision.name: revision for revision in snapshot.remembered()}
    pinned = pinned_for(snapshot.records.values(), resource, remembered)
    if pinned is not None:
        today = rolling_arguments(resource.spec)
        in_force = _in_force(snapshot, pinned)
        if all(getattr(in_force, name) == value for name, value in today.items()):
            return pinned, Trouble()
        verdict = _as_born(snapshot, pinned)
        return pinned, Trouble("DoesNotFit", verdict.message) if verdict.fits is False else Trouble()
    if snapshot.verdict.fits is False:
        return None, Trouble("DoesNotFit", snapshot.verdict.message)
    image = resource.spec.engine.image or config.engine_image
    if image is None:
        return None, Trouble("ImageMissing", "set spec.engine.image, or the chart's engine image")
    if snapshot.verdict.plan is None:
        return None, Trouble("NoPlan", snapshot.verdict.message)
    number = max((record.number for record in snapshot.records.values()), default=0) + 1
    try:
        record = revision.pin(
            resource, snapshot.verdict.plan, image=image, config=config, name=name_of(resource), number=number
        )
    except revision.NotRenderable as error:
        return None, Trouble("NotSupported", str(error))
    alive = snapshot.child(k.RAY_SERVICE, record.name)
    if alive is not None and not alive.deleting:
        again = revision.ray_service(record, resource, bounds_of(resource, snapshot.status), snapshot.owner)
        if again.digest != alive.digest:
            # Its record was deleted, and today it would be another: what runs is not rebuilt because of that.
            return None, Trouble()
    return record, Trouble()


def _verdict(snapshot: Snapshot, record: RevisionRecord) -> FitVerdict:
    """The verdict on what a revision was born with, where today's planner would cut the GPUs in another way."""
    today = snapshot.verdict.plan
    if today is None or all(record.plan.get(size) == getattr(today, size) for size in _SIZES):
        return snapshot.verdict
    return _as_born(snapshot, record)


def _as_born(snapshot: Snapshot, record: RevisionRecord) -> FitVerdict:
    cut = ParallelismSpec.model_validate({size: record.plan[size] for size in _SIZES if size in record.plan})
    return fit.check(snapshot.resource.spec.model_copy(update={"parallelism": cut}))


def _in_force(snapshot: Snapshot, record: RevisionRecord) -> ServingConfig:
    """Arguments of a revision's application as they are: those of its birth where it does not run."""
    kept = snapshot.facts(record.name).arguments
    try:
        return ServingConfig.model_validate({**record.serving.to_json(), **json.loads(kept or "{}")})
    except ValueError:
        return record.serving


def _running(snapshot: Snapshot) -> str | None:
    """The revision that goes on while a new one cannot be made: one that runs, or can be made again."""
    remembered = [r for r in snapshot.remembered() if snapshot.runs(r.name) or r.name in snapshot.records]
    best = max(
        remembered,
        key=lambda r: (r.phase != Phase.FAILED, r.weight, snapshot.runs(r.name), r.served, r.name),
        default=None,
    )
    return best.name if best is not None else None


def _lost(snapshot: Snapshot, rollout: Rollout | None) -> str:
    """What cannot be kept right, because nobody knows any more what it was born with."""
    wanted = sorted(rollout.wanted) if rollout is not None else []
    names = [name for name in wanted if name not in snapshot.records]
    if not names:
        return ""
    runs = [name for name in names if snapshot.runs(name)]
    what = "it goes on as it is, and no change reaches it" if runs else "it cannot be made again"
    cure = "change a field of class revision, such as spec.engine.image, to make a new one"
    return f"the ControllerRevision {', '.join(names)} is gone or unreadable: {what}; {cure}"


def _context(snapshot: Snapshot, target: str | None) -> Context:
    upgrade = snapshot.resource.spec.upgrade
    return Context(
        now=snapshot.now,
        generation=snapshot.generation,
        target=target,
        revisions=snapshot.remembered(),
        sights=snapshot.sights(),
        strategy=upgrade.strategy,
        steps=upgrade.steps,
        step_s=int(upgrade.step_duration.seconds),
        progress_s=int(upgrade.progress_deadline.seconds),
        drain_s=int(upgrade.drain_timeout.seconds),
        rollback_on_slo_miss=upgrade.rollback_on_slo_miss,
        weights_version=snapshot.status.weights_version,
        gateways_version=snapshot.gateways_version(),
        highest_version=snapshot.highest_version(),
        arrivals=snapshot.arrivals(),
        asked=asked_for(snapshot.resource),
    )


def bounds_of(resource: MoEDeployment, status: MoEDeploymentStatus) -> Bounds:
    """Bounds of autoscaling: what the tuner asks for, inside what the spec allows."""
    floor, ceiling = resource.spec.replicas.min, resource.spec.replicas.ceiling
    tuned = status.tuning is not None and resource.spec.tuning.mode != TuningMode.OFF
    asked = status.tuning.replicas if tuned and status.tuning is not None else None
    least = floor if asked is None or asked.min is None else min(max(asked.min, floor), ceiling)
    most = ceiling if asked is None or asked.max is None else min(max(asked.max, least, 1), ceiling)
    return Bounds(min=least, max=most)


def _objects(snapshot: Snapshot, rollout: Rollout | None, rolls: str | None) -> tuple[Rendered, ...]:
    """`rolls`: the revision that fields of class rolling reach. One on its way out must not take up what the next one
    is to prove, nor one what does not fit it."""
    resource, owner, records = snapshot.resource, snapshot.owner, snapshot.records
    shown = () if rollout is None else tuple(r.name for r in rollout.revisions if _shown(snapshot, rollout, r.name))
    made = list(_gateway(snapshot, rollout, shown))
    if rollout is not None:
        pinned = sorted(r.name for r in rollout.revisions if r.name in records)
        made += [revision.controller_revision(records[name], owner) for name in pinned]
        if k.RAY_SERVICE not in snapshot.absent:
            bounds = bounds_of(resource, snapshot.status)
            for record in (records[name] for name in pinned if name in rollout.wanted):
                made.append(revision.board_service(record, owner))
                kept = None if record.name == rolls else _in_force(snapshot, record)
                made.append(revision.ray_service(record, resource, bounds, owner, kept=kept))
    present = {kind for kind in (k.POD_MONITOR, k.PROMETHEUS_RULE) if kind not in snapshot.absent}
    made += monitoring.objects(resource, present=present, config=snapshot.config, owner=owner, revisions=shown)
    return tuple(made)


def _shown(snapshot: Snapshot, rollout: Rollout, name: str) -> bool:
    """Revisions that gateways know: those that run or are to run."""
    return name in rollout.wanted or snapshot.runs(name)


def _gateway(snapshot: Snapshot, rollout: Rollout | None, shown: tuple[str, ...]) -> tuple[Rendered, ...]:
    if snapshot.gateway_problems:
        return ()  # what there is stays as it is: `_removals`
    weights = {} if rollout is None else {name: rollout.weights.get(name, 0) for name in shown}
    version = snapshot.status.weights_version if rollout is None else rollout.weights_version
    made = gateway.objects(
        snapshot.resource,
        revisions=shown,
        weights=weights,
        weights_version=version,
        config=snapshot.config,
        owner=snapshot.owner,
    )
    return tuple(rendered for rendered in made if rendered.ref.kind not in snapshot.absent)


def _external(snapshot: Snapshot) -> Plan:
    """An engine of somebody else: a gateway in front of it, and nothing else; revisions of before are drained."""
    rollout = advance(_context(snapshot, None)) if snapshot.remembered() else None
    version = max(snapshot.status.weights_version, 1) if rollout is None else rollout.weights_version
    rollout = rollout or Rollout((), frozenset(), version)
    objects = _objects(snapshot, rollout, None)
    return Plan(
        snapshot=snapshot,
        rollout=rollout,
        objects=objects,
        removals=_removals(snapshot, rollout, objects),
        patches=(),
        weights=None,
        trouble=Trouble(),
        requeue_s=rollout.requeue_s,
    )


def _removals(snapshot: Snapshot, rollout: Rollout | None, objects: tuple[Rendered, ...]) -> tuple[Child, ...]:
    """What is ours and should not be. RayServices go first, then what belongs to them.

    What could not be rendered is not for that reason unwanted: a gateway stays that today cannot be made, and so does
    a revision whose record is lost.
    """
    wanted = {rendered.ref for rendered in objects}
    kept = {
        Ref(kind, snapshot.owner.namespace, own)
        for name in (rollout.wanted if rollout is not None else ())
        for kind, own in ((k.RAY_SERVICE, name), (k.CONTROLLER_REVISION, name), (k.SERVICE, board_name(name)))
    }
    # Books that were begun anew would spend a day's budget twice: they go with the MoEDeployment alone.
    kept.add(Ref(k.CONFIG_MAP, snapshot.owner.namespace, gateway_budget_name(snapshot.owner.name)))
    # A gateway that cannot be made as asked goes on as it was: a mistake in the spec is no reason for an outage.
    stays = gateway.names(snapshot.owner) if snapshot.gateway_problems else frozenset()
    surplus = [
        child
        for ref, child in snapshot.children.items()
        if ref not in wanted | kept and ref.kind not in NOT_OURS and not child.deleting and ref.name not in stays
    ]
    return tuple(sorted(surplus, key=lambda child: (child.ref.kind != k.RAY_SERVICE, child.ref)))


def _patches(snapshot: Snapshot, objects: tuple[Rendered, ...]) -> tuple[ClusterPatch, ...]:
    groups = {
        (rendered.ref.name, group["groupName"]): group
        for rendered in objects
        if rendered.ref.kind == k.RAY_SERVICE
        for group in rendered.body["spec"]["rayClusterConfig"].get("workerGroupSpecs", ())
    }
    patches = []
    for child in snapshot.of_kind(k.RAY_CLUSTER):
        facts = child.facts
        if child.deleting or not isinstance(facts, ClusterFacts):
            continue
        operations: list[Mapping[str, Any]] = []
        for index, live_group in enumerate(facts.groups):
            wanted = groups.get((facts.service, live_group.name))
            if wanted is None:
                continue
            path = f"/spec/workerGroupSpecs/{index}"
            changed = [
                {"op": "replace", "path": f"{path}/{field}", "value": wanted[field]}
                for field, value in (("minReplicas", live_group.min), ("maxReplicas", live_group.max))
                if wanted[field] != value
            ]
            if changed:
                operations += [{"op": "test", "path": f"{path}/groupName", "value": live_group.name}, *changed]
        if operations:
            patches.append(ClusterPatch(child.ref, tuple(operations)))
    return tuple(patches)


def _weights(snapshot: Snapshot, rollout: Rollout | None) -> Weights | None:
    """The weights, where some gateway is known not to use them yet."""
    if rollout is None or snapshot.gateways is None or not snapshot.config.signing_key_file:
        return None
    if all(digest.weights_version >= rollout.weights_version for digest in snapshot.gateways.digests):
        return None
    percent = {name: weight for name, weight in rollout.weights.items() if _shown(snapshot, rollout, name)}
    return Weights(deployment=snapshot.owner.key, version=rollout.weights_version, percent=percent)


def _status(snapshot: Snapshot, rollout: Rollout | None, trouble: Trouble) -> MoEDeploymentStatus:
    resource, before = snapshot.resource, snapshot.status
    bounds = bounds_of(resource, before)
    revisions = () if rollout is None else tuple(_revision(snapshot, r, rollout) for r in rollout.revisions)
    return bounded(
        MoEDeploymentStatus(
            observed_generation=snapshot.generation,
            conditions=timed(judge(snapshot, rollout, trouble), before, snapshot.generation, snapshot.now),
            replicas=bounds.min if rollout is not None and rollout.wanted else 0,
            ready_replicas=sum(r.ready_replicas for r in revisions),
            revisions=revisions,
            weights_version=before.weights_version if rollout is None else rollout.weights_version,
            plan=_plan(snapshot, rollout),
            live=live.update(snapshot),
        )
    )


def _revision(snapshot: Snapshot, own: Revision, rollout: Rollout) -> RevisionStatus:
    name = own.name
    record = snapshot.records.get(name)
    before = next((r for r in snapshot.status.revisions if r.name == name), None)
    return RevisionStatus.model_validate(
        {
            "name": name,
            "phase": own.phase,
            "weight": own.weight,
            "replicas": bounds_of(snapshot.resource, snapshot.status).min if name in rollout.wanted else 0,
            "readyReplicas": _ready_replicas(snapshot, name),
            "image": record.image if record is not None else before.image if before is not None else None,
            "rendererVersion": record.renderer if record is not None else RENDERER_VERSION,
            "createdAt": before.created_at if before is not None and before.created_at else rfc3339(snapshot.now),
            "stepStartedAt": None if own.step_started_at is None else rfc3339(own.step_started_at),
            "drainDeadline": None if own.drain_deadline is None else rfc3339(own.drain_deadline),
            "unreadySince": None if own.unready_since is None else rfc3339(own.unready_since),
            "failedGeneration": own.failed_generation,
            "failedFor": own.failed_for,
            "served": own.served or None,
            "sloPercent": own.slo_percent,
            "message": (own.message or (snapshot.facts(name).message if snapshot.runs(name) else "") or "")[
                :MESSAGE_MAX
            ]
            or None,
        }
    )


def _ready_replicas(snapshot: Snapshot, name: str) -> int:
    """Replicas whose workers are up, where the application answers."""
    if not snapshot.facts(name).ready:
        return 0
    record = snapshot.records.get(name)
    pods = record.nodes_per_replica if record is not None else 1
    cluster = snapshot.cluster(name)
    return cluster.workers // pods if cluster is not None else 0


def _plan(snapshot: Snapshot, rollout: Rollout | None) -> PlanStatus | None:
    """The plan of the revision that serves, as it was when that was born."""
    if rollout is None or not rollout.revisions:
        return None
    leader = max(rollout.revisions, key=lambda r: (r.weight, r.name in rollout.wanted))
    record = snapshot.records.get(leader.name)
    return PlanStatus.model_validate(record.plan) if record is not None else snapshot.status.plan
