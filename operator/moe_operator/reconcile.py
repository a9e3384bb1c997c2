"""One reconcile: asks for what it needs, decides, carries the plan out. A generator that performs no I/O.

It yields requests (moe_operator.requests) and is sent the answers; an `ApiError` is raised into it where the answer is
one. What is remembered (weights, deadlines, failures) is written to status before anything is done about it, so that
it may end after any request and the next run comes to the same end.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from moe_api.annotations import API_VERSION, DEPLOYMENT_LABEL, KIND, OPERATOR_MANAGER
from moe_api.load import ResourceInvalid
from moe_api.resource import MoEDeployment
from moe_api.status import MoEDeploymentStatus, bounded
from moe_api.status import RevisionPhase as Phase
from moe_core.addresses import board_url
from moe_core.config import OperatorConfig
from moe_core.moments import unix_s
from moe_kube import objects as k
from moe_kube.errors import ApiError, Conflict, Forbidden, Invalid, NotFound
from moe_kube.managed import content, digest, owned
from moe_kube.objects import Obj, Ref
from moe_operator import live, told
from moe_operator.children import Child, Key, RayFacts, controller_uid, project
from moe_operator.conditions import refused, timed
from moe_operator.decide import Plan, decide
from moe_operator.names import Owner
from moe_operator.render.objects import Rendered
from moe_operator.requests import (
    Apply,
    AskGateways,
    Gateways,
    Get,
    Look,
    Observed,
    Outcome,
    Patch,
    Remove,
    Request,
    SendWeights,
    WriteStatus,
)
from moe_operator.snapshot import build, ours, parse, pods_of, status_of
from moe_planner import fit

Steps = Generator[Request, Any, Outcome]
Doing = Generator[Request, Any, None]

SOON_S = 0.5
"""When to look again where a cache is behind what another writer did."""
SETTLING_S = 180.0
"""For so long after the last step gateways are asked on: a kubelet may bring one the new revision's address late."""
STALE_S = 15.0
"""When to look again where a watch seems to have fallen silent: it finds out by itself within a minute and a half."""
CLEANUP_S = 2.0
"""When to look again where an object of a deleted namesake is still there."""
PODS = (k.RAY_SERVICE, k.DEPLOYMENT, k.HORIZONTAL_POD_AUTOSCALER)
"""Kinds that start pods, or scale what does (be it somebody else's): not made while something before them fails."""
LOSSES = (k.RAY_SERVICE, k.CONTROLLER_REVISION)
"""Kinds whose removal cannot be undone: not removed on the word of a cache that may be behind."""
PERMANENT = (Forbidden, Invalid, NotFound, Conflict)
"""Errors that another try at once does not cure: they are told, and the rest goes on."""


def reconcile(key: Key, config: OperatorConfig) -> Steps:
    """Bring one MoEDeployment closer to what it should be. Raises the ApiError of a call that may be tried again."""
    observed: Observed = yield Look(key)
    obj = observed.resource
    if obj is None or obj["metadata"].get("deletionTimestamp"):
        return Outcome()  # what it owned is collected by the cluster's own garbage collector
    try:
        resource, status = parse(obj)
    except ResourceInvalid as error:
        return (yield from _refuse(obj, error, observed))
    gateways = yield from _ask(resource, status, observed)
    verdict = fit.check(resource.spec)
    plan = decide(build(observed, resource, status, gateways, verdict, config))
    return (yield from _Execution(plan, obj).run())


def _refuse(obj: Obj, error: ResourceInvalid, observed: Observed) -> Steps:
    """A resource that the CRD of before let through: say so, and leave what runs as it is."""
    meta = obj["metadata"]
    generation = int(meta.get("generation", 0))
    before = status_of(obj)
    message = "; ".join(str(problem) for problem in error.problems) or str(error)
    after = before.model_copy(
        update={
            "observed_generation": generation,
            "conditions": timed(refused(message), before, generation, int(observed.now)),
        }
    )
    written = owned(obj, OPERATOR_MANAGER, "status").get("status", {})
    desired = status_body(bounded(after))
    owner = Owner(meta.get("namespace", ""), meta["name"], meta.get("uid", ""))
    if desired != written:
        ref = Ref(k.MOE_DEPLOYMENT, owner.namespace, owner.name)
        yield WriteStatus(ref, desired, meta.get("resourceVersion", ""))
        yield from told.between(before, after, owner)
    return Outcome()


def _ask(
    resource: MoEDeployment, status: MoEDeploymentStatus, observed: Observed
) -> Generator[Request, Any, Gateways | None]:
    """Ask the gateways while traffic moves, and otherwise as often as `status.live` is written."""
    pods = pods_of(ours(observed, resource))
    moving = any(
        r.phase != Phase.SERVING or r.weight < 100 or observed.now - (unix_s(r.step_started_at) or 0) < SETTLING_S
        for r in status.revisions
    )
    if not pods or not (moving or live.due(status.live, int(observed.now))):
        return None
    steps = [unix_s(r.step_started_at) for r in status.revisions if r.phase == Phase.PROMOTING]
    since = max((moment for moment in steps if moment is not None), default=None)
    window_s = live.WINDOW_S if since is None else min(300.0, max(10.0, observed.now - since))
    serving = [r.name for r in status.revisions if r.weight > 0]
    boards = tuple(board_url(resource.metadata.namespace, name) for name in serving)
    answer: Gateways = yield AskGateways((resource.metadata.namespace, resource.metadata.name), pods, boards, window_s)
    return answer


def status_body(status: MoEDeploymentStatus) -> dict[str, Any]:
    """Our part of the status as JSON: never `tuning`, which is the tuner's, and nothing empty."""
    document = status.model_copy(update={"tuning": None}).to_json()
    if "plan" in document:
        document["plan"] = _filled(document["plan"])
    return _filled(document)


def _filled(document: dict[str, Any]) -> dict[str, Any]:
    """Without empty lists and maps: nobody owns one, so what is read back would never be what was written."""
    return {key: value for key, value in document.items() if value not in ([], {}, None)}


def status_document(ref: Ref, status: dict[str, Any], resource_version: str) -> dict[str, Any]:
    """The body of a status apply."""
    meta = {"name": ref.name, "namespace": ref.namespace}
    if resource_version:
        meta["resourceVersion"] = resource_version
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "status": status}


class _Execution:
    """Carries one plan out."""

    def __init__(self, plan: Plan, obj: Obj) -> None:
        self.plan = plan
        self.snapshot = plan.snapshot
        self.owner = plan.snapshot.owner
        self.ref = Ref(k.MOE_DEPLOYMENT, self.owner.namespace, self.owner.name)
        self.resource_version = str(obj["metadata"].get("resourceVersion", ""))
        self.written = self.snapshot.written
        self.failures: list[tuple[str, str]] = []
        self.lacking = False
        """Something that belongs before pods could not be made."""
        self.fresh = False
        self.told: MoEDeploymentStatus = plan.snapshot.status
        self.wrote = False
        self.waits_s: list[float] = []

    def run(self) -> Steps:
        if (yield from self._failed_by_a_stale_cache()):
            return Outcome(requeue_s=STALE_S, settled=False)
        if self.plan.intends_anew:
            yield from self._status(())
            self.fresh = True
        for rendered in self.plan.objects:
            yield from self._one(self._ensure(rendered), rendered.ref)
        for patch in self.plan.patches:
            self.wrote = True
            yield from self._one(self._send(Patch(patch.ref, patch.operations)), patch.ref)
        for child in self.plan.removals:
            yield from self._one(self._remove(child), child.ref)
        if self.plan.weights is not None:
            yield SendWeights(self.snapshot.pods(), self.plan.weights)
        yield from self._status(tuple(self.failures))
        return self._outcome()

    def _failed_by_a_stale_cache(self) -> Generator[Request, Any, bool]:
        """Whether a revision is about to fail that the server knows to be well: a watch may have fallen silent."""
        before = {r.name: r.phase for r in self.snapshot.status.revisions}
        for revision in self.plan.status().revisions:
            if revision.phase != Phase.FAILED or before.get(revision.name) in (None, Phase.FAILED):
                continue
            found: Obj | None = yield Get(Ref(k.RAY_SERVICE, self.owner.namespace, revision.name))
            newest = project(k.RAY_SERVICE, found).facts if found is not None else None
            known = self.snapshot.facts(revision.name)
            if isinstance(newest, RayFacts) and newest.ready and not known.ready:
                return True
        return False

    def _outcome(self) -> Outcome:
        waits = list(self.waits_s)
        if self.plan.requeue_s is not None:
            waits.append(self.plan.requeue_s)
        if self.snapshot.pods():
            waits.append(float(live.PERIOD_S))
        return Outcome(
            requeue_s=min(waits) if waits else None,
            settled=not self.wrote and not self.failures,
            error="; ".join(message for _, message in self.failures),
        )

    def _status(self, failures: tuple[tuple[str, str], ...]) -> Doing:
        status = self.plan.status(failures)
        desired = status_body(status)
        if desired == self.written:
            return
        self.wrote = True
        answer: Obj = yield WriteStatus(self.ref, desired, self.resource_version)
        self.resource_version = str(answer["metadata"].get("resourceVersion", ""))
        self.written = desired
        before, self.told = self.told, status
        yield from told.between(before, status, self.owner)

    def _one(self, doing: Doing, ref: Ref) -> Doing:
        """One write; an error that another try would not cure is told, and the rest goes on."""
        try:
            yield from doing
        except PERMANENT as error:
            self.failures.append((_reason(error), f"{ref}: {error}"))
            self.lacking = True

    def _send(self, request: Request) -> Doing:
        yield request

    def _ensure(self, rendered: Rendered) -> Doing:
        child = self.snapshot.children.get(rendered.ref)
        if child is None:
            yield from self._make(rendered)
        elif child.deleting:
            self.waits_s.append(CLEANUP_S)
        elif child.digest != rendered.digest:
            yield from self._apply(rendered, child.uid)

    def _apply(self, rendered: Rendered, uid: str = "") -> Doing:
        """One apply; where what comes back is not what was sent, the next look would find a drift again, for ever."""
        self.wrote = True
        answer: Obj = yield Apply(rendered, uid)
        if digest(content(owned(answer, OPERATOR_MANAGER))) != rendered.digest:
            self.failures.append(
                ("DoesNotStay", f"{rendered.ref} does not stay as it is written: an admission webhook may change it")
            )

    def _make(self, rendered: Rendered) -> Doing:
        """Make what the cache does not know, unless it is there and somebody else's."""
        if rendered.ref.kind in PODS and self.lacking:
            return
        if rendered.ref.kind == k.RAY_SERVICE and not (yield from self._still_asked_for()):
            self.waits_s.append(SOON_S)
            return
        found: Obj | None = yield Get(rendered.ref)
        if found is None:
            yield from self._apply(rendered)
            return
        meta = found["metadata"]
        controller = controller_uid(found)
        labelled = (meta.get("labels") or {}).get(DEPLOYMENT_LABEL) == self.owner.name
        if controller == self.owner.uid or (not controller and labelled):
            if meta.get("deletionTimestamp"):
                self.waits_s.append(CLEANUP_S)
                return
            yield from self._apply(rendered, str(meta.get("uid", "")))
        elif labelled and _namesake(found, self.owner):
            self.waits_s.append(CLEANUP_S)  # of a MoEDeployment of this name that was deleted: it will be collected
        else:
            self.lacking = True
            self.failures.append(
                (
                    "NameTaken",
                    f"{rendered.ref} is there and not ours: rename or delete it, or rename this MoEDeployment",
                )
            )

    def _remove(self, child: Child) -> Doing:
        if child.ref.kind in LOSSES and not (yield from self._still_asked_for()):
            self.waits_s.append(SOON_S)
            return
        self.wrote = True
        yield Remove(child.ref, child.uid)

    def _still_asked_for(self) -> Generator[Request, Any, bool]:
        """Whether the cache was not behind: asked of the server before GPUs are taken or given back."""
        if self.fresh:
            return True
        newest: Obj | None = yield Get(self.ref)
        if newest is None:
            return False
        meta = newest["metadata"]
        self.fresh = (
            meta.get("uid") == self.owner.uid
            and not meta.get("deletionTimestamp")
            and int(meta.get("generation", 0)) == self.snapshot.generation
            and owned(newest, OPERATOR_MANAGER, "status").get("status", {}) == self.written
        )
        return self.fresh


def _namesake(obj: Obj, owner: Owner) -> bool:
    owners = obj["metadata"].get("ownerReferences") or ()
    return any(o.get("controller") and o.get("kind") == KIND and o.get("name") == owner.name for o in owners)


def _reason(error: ApiError) -> str:
    match error:
        case Forbidden():
            return "Forbidden"
        case Invalid():
            return "Rejected"
        case NotFound():
            return "KindMissing" if error.kind_missing else "Missing"
        case _:
            return "Conflict"
