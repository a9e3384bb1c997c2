"""KubeRay in a few lines: a RayService gets a RayCluster, becomes ready after a while, and goes as KubeRay lets it go.

Names, finalizer, conditions and status fields are those of KubeRay 1.6.2, with `upgradeStrategy: None`: a changed
cluster spec or changed replicas never reach a live RayCluster, a changed serveConfigV2 does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from moe_kube.fake import FakeCluster
from moe_kube.fake_store import timestamp
from moe_kube.objects import RAY_CLUSTER, RAY_SERVICE, Obj, Ref, ref_of

USER = "kuberay-operator"
FINALIZER = "ray.io/rayservice-finalizer"


@dataclass
class Trouble:
    """What is wrong with one RayService. Any field may be changed at any time."""

    never_ready: bool = False
    """Its application never runs: DEPLOY_FAILED, with this message."""
    message: str = "the engine did not start"
    unready: bool = False
    """It has no serving endpoint, though it had."""
    ready_after_s: float | None = None
    stuck_deletion: bool = False
    """Its finalizer is never taken off."""


@dataclass
class KubeRay:
    """Step it after every change and after time has passed; `step` returns how many writes it made."""

    cluster: FakeCluster
    ready_after_s: float = 30.0
    troubles: dict[str, Trouble] = field(default_factory=dict)
    """By name of the RayService."""
    serving: dict[str, str] = field(default_factory=dict)
    """The serveConfigV2 that each RayCluster runs, by name."""
    down: bool = False
    """The operator of KubeRay itself does nothing."""
    _born_s: dict[str, float] = field(default_factory=dict)

    def trouble(self, name: str) -> Trouble:
        """The trouble of a RayService, to be changed by the test."""
        return self.troubles.setdefault(name, Trouble())

    def step(self) -> int:
        """One reconcile of every RayService."""
        if self.down:
            return 0
        before = self.cluster.version
        for ref in self.cluster.refs(RAY_SERVICE):
            service = self.cluster.find(ref)
            if service is not None:
                self._reconcile(ref, service)
        return self.cluster.version - before

    def _reconcile(self, ref: Ref, service: Obj) -> None:
        meta = service["metadata"]
        owned = self._clusters_of(meta["uid"], ref.namespace)
        if "deletionTimestamp" in meta:
            for cluster in owned:
                if "deletionTimestamp" not in cluster["metadata"]:
                    self.cluster.delete(ref_of(RAY_CLUSTER, cluster), user=USER)
            if not owned and FINALIZER in meta.get("finalizers", ()) and not self._of(ref).stuck_deletion:
                self.cluster.edit(ref, lambda obj: obj["metadata"]["finalizers"].remove(FINALIZER), user=USER)
            return
        if FINALIZER not in meta.get("finalizers", ()):
            self.cluster.edit(
                ref, lambda obj: obj["metadata"].setdefault("finalizers", []).append(FINALIZER), user=USER
            )
            return
        status = service.get("status", {})
        active = _name(status, "activeServiceStatus")
        pending = _name(status, "pendingServiceStatus")
        if pending and not any(cluster["metadata"]["name"] == pending for cluster in owned):
            self._create(ref, service, pending)
            return
        found = {cluster["metadata"]["name"]: cluster for cluster in owned}
        if active not in found and not pending:
            active, pending = "", _cluster_name(ref.name, meta["uid"], status)
        name = active or pending
        running = name in found and self._runs(ref, found[name])
        if name in found:
            self._set_cluster_status(found[name])
            self.serving[name] = service["spec"].get("serveConfigV2", "")
        if running and pending:
            active, pending = pending, ""
        self._set_service_status(ref, service, active, pending, running=running)

    def _of(self, ref: Ref) -> Trouble:
        return self.troubles.get(ref.name, _NONE)

    def _clusters_of(self, uid: str, namespace: str) -> list[Obj]:
        return [
            cluster
            for cluster in self.cluster.peek(RAY_CLUSTER, namespace)
            if any(owner["uid"] == uid for owner in cluster["metadata"].get("ownerReferences", ()))
        ]

    def _create(self, ref: Ref, service: Obj, name: str) -> None:
        meta = service["metadata"]
        labels = {
            **meta.get("labels", {}),
            "ray.io/originated-from-cr-name": ref.name,
            "ray.io/originated-from-crd": "RayService",
        }
        owner = {
            "apiVersion": RAY_SERVICE.api_version,
            "blockOwnerDeletion": True,
            "controller": True,
            "kind": "RayService",
            "name": ref.name,
            "uid": meta["uid"],
        }
        body = {
            "metadata": {
                "labels": labels,
                "annotations": meta.get("annotations", {}),
                "ownerReferences": [owner],
            },
            "spec": service["spec"]["rayClusterConfig"],
        }
        self.cluster.create(Ref(RAY_CLUSTER, ref.namespace, name), body, user=USER)

    def _runs(self, ref: Ref, cluster: Obj) -> bool:
        """Whether its head and its application are up."""
        trouble = self._of(ref)
        now_s = self.cluster.clock.monotonic()
        born_s = self._born_s.setdefault(cluster["metadata"]["uid"], now_s)
        wait_s = self.ready_after_s if trouble.ready_after_s is None else trouble.ready_after_s
        return not trouble.never_ready and now_s - born_s >= wait_s

    def _set_cluster_status(self, cluster: Obj) -> None:
        groups = cluster["spec"].get("workerGroupSpecs") or []
        desired = sum(_pods(group, "replicas") for group in groups)
        name = cluster["metadata"]["name"]
        status = {
            "state": "ready",
            "desiredWorkerReplicas": desired,
            "availableWorkerReplicas": desired,
            "readyWorkerReplicas": desired,
            "minWorkerReplicas": sum(_pods(group, "minReplicas") for group in groups),
            "maxWorkerReplicas": sum(_pods(group, "maxReplicas") for group in groups),
            "head": {"podName": f"{name}-head", "serviceName": f"{name}-head-svc"},
            "observedGeneration": cluster["metadata"]["generation"],
        }
        self.cluster.set_status(ref_of(RAY_CLUSTER, cluster), status, user=USER)

    def _set_service_status(self, ref: Ref, service: Obj, active: str, pending: str, *, running: bool) -> None:
        trouble = self._of(ref)
        before = service.get("status", {})
        serves = running and not trouble.unready
        was_ready = any(one["type"] == "Ready" and one["status"] == "True" for one in before.get("conditions", ()))
        observed = service["metadata"]["generation"]
        if serves:
            ready = ("True", "NonZeroServeEndpoints", "Number of serve endpoints is greater than 0")
        elif was_ready:
            ready = ("False", "ZeroServeEndpoints", "Number of serve endpoints dropped to 0")
        else:
            ready = _kept(before, "Ready") or ("False", "Initializing", "RayService is initializing")
        if active and pending:
            upgrade = ("True", "BothActivePendingClustersExist", "Both active and pending Ray clusters exist")
        elif active:
            upgrade = ("False", "NoPendingCluster", "Active Ray cluster exists and no pending Ray cluster")
        else:
            upgrade = ("False", "Initializing", "RayService is initializing")
        app = {"status": "RUNNING"} if serves else {"status": "DEPLOYING"}
        if trouble.never_ready or (running and trouble.unready):
            app = {"status": "DEPLOY_FAILED" if trouble.never_ready else "UNHEALTHY", "message": trouble.message}
        clusters = {"activeServiceStatus": active, "pendingServiceStatus": pending}
        endpoints = self._endpoints(ref, active) if serves else 0
        status: Obj = {
            "observedGeneration": observed,
            "conditions": [
                _condition(before, "Ready", *ready, observed, self._now()),
                _condition(before, "UpgradeInProgress", *upgrade, observed, self._now()),
            ],
            "serviceStatus": "Running" if serves else "",
            "numServeEndpoints": endpoints,
            **{
                part: {"rayClusterName": name, "applicationStatuses": {"llm": app}} if name else {}
                for part, name in clusters.items()
            },
        }
        status = {key: value for key, value in status.items() if value not in ("", 0, {})}
        self.cluster.set_status(ref, status, user=USER)

    def _endpoints(self, ref: Ref, name: str) -> int:
        cluster = self.cluster.find(Ref(RAY_CLUSTER, ref.namespace, name))
        workers = (cluster or {}).get("status", {}).get("readyWorkerReplicas", 0)
        return max(1, int(workers))

    def _now(self) -> str:
        return timestamp(self.cluster.clock.time())


_NONE = Trouble()


def _name(status: Obj, part: str) -> str:
    return str(status.get(part, {}).get("rayClusterName", ""))


def _cluster_name(service: str, uid: str, status: Obj) -> str:
    """As KubeRay names one: the service's name and five characters; here they follow from what came before."""
    seed = f"{uid}/{_name(status, 'activeServiceStatus')}"
    return f"{service}-{hashlib.sha256(seed.encode()).hexdigest()[:5]}"


def _pods(group: Obj, name: str) -> int:
    return int(group.get(name, 0)) * int(group.get("numOfHosts", 1))


def _kept(status: Obj, kind: str) -> tuple[str, str, str] | None:
    found = next((one for one in status.get("conditions", ()) if one["type"] == kind), None)
    return (found["status"], found["reason"], found["message"]) if found else None


def _condition(before: Obj, kind: str, status: str, reason: str, message: str, observed: int, now: str) -> Obj:
    """A condition whose transition time is that of its last change of status."""
    old: dict[str, Any] = next((one for one in before.get("conditions", ()) if one["type"] == kind), {})
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "observedGeneration": observed,
        "lastTransitionTime": old["lastTransitionTime"] if old.get("status") == status else now,
    }
