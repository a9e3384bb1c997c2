"""What Kubernetes itself does for a Deployment: its status over time, and the EndpointSlices of its Services."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_kube.fake import FakeCluster
from moe_kube.fake_store import timestamp
from moe_kube.objects import DEPLOYMENT, ENDPOINT_SLICE, SERVICE, Obj, Ref

DEPLOYMENT_USER = "deployment-controller"
ENDPOINTS_USER = "endpointslice-controller"


@dataclass
class Pod:
    """One pod of a Deployment; `template` names the version of the template that it was made from."""

    name: str
    address: str
    template: str
    labels: Mapping[str, str]
    ports: Mapping[str, int]
    born_s: float
    ready: bool = False


@dataclass
class Deployments:
    """Deployment and EndpointSlice controllers. Pods exist here alone, not as objects."""

    cluster: FakeCluster
    ready_after_s: float = 5.0
    never_ready: set[str] = field(default_factory=set)
    """Deployments, by name, whose new pods never become ready."""
    pods: dict[Ref, list[Pod]] = field(default_factory=dict)
    _made: int = 0

    def step(self) -> int:
        """One reconcile of every Deployment and Service. Returns how many writes it made."""
        before = self.cluster.version
        deployments = {ref: obj for ref in self.cluster.refs(DEPLOYMENT) if (obj := self.cluster.find(ref))}
        for gone in [ref for ref in self.pods if ref not in deployments]:
            del self.pods[gone]
        for ref, obj in deployments.items():
            self._roll(ref, obj)
            self._set_status(ref, obj)
        for ref in self.cluster.refs(SERVICE):
            service = self.cluster.find(ref)
            if (
                service is not None
                and service["spec"].get("selector")
                and "deletionTimestamp" not in service["metadata"]
            ):
                self._set_slice(ref, service)
        return self.cluster.version - before

    def _roll(self, ref: Ref, obj: Obj) -> None:
        """Pods of the newest template, as many as asked for; old ones stay until as many new ones are ready."""
        now_s = self.cluster.clock.monotonic()
        template = obj["spec"]["template"]
        current = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
        wanted = int(obj["spec"].get("replicas", 1))
        pods = self.pods.get(ref, [])
        fresh = [pod for pod in pods if pod.template == current][:wanted]
        while len(fresh) < wanted:
            fresh.append(self._pod(ref, template, current, now_s))
        for pod in fresh:
            pod.ready = pod.ready or (ref.name not in self.never_ready and now_s - pod.born_s >= self.ready_after_s)
        ready = sum(pod.ready for pod in fresh)
        old = [pod for pod in pods if pod.template != current][: max(0, wanted - ready)]
        self.pods[ref] = [*old, *fresh]

    def _pod(self, ref: Ref, template: Obj, version: str, now_s: float) -> Pod:
        self._made += 1
        ports = {
            port.get("name", str(port["containerPort"])): int(port["containerPort"])
            for container in template["spec"]["containers"]
            for port in container.get("ports", ())
        }
        return Pod(
            name=f"{ref.name}-{version}-{self._made:05d}",
            address=f"10.80.{self._made // 250}.{self._made % 250 + 1}",
            template=version,
            labels=template.get("metadata", {}).get("labels", {}),
            ports=ports,
            born_s=now_s,
        )

    def _set_status(self, ref: Ref, obj: Obj) -> None:
        pods = self.pods[ref]
        newest = pods[-1].template if pods else ""
        ready = sum(pod.ready for pod in pods)
        wanted = int(obj["spec"].get("replicas", 1))
        status: dict[str, Any] = {
            "observedGeneration": obj["metadata"]["generation"],
            "replicas": len(pods),
            "updatedReplicas": sum(pod.template == newest for pod in pods),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "unavailableReplicas": len(pods) - ready,
        }
        status = {name: value for name, value in status.items() if value}
        before = obj.get("status", {})
        status["conditions"] = [
            self._condition(before, "Available", ready >= wanted, "MinimumReplicasAvailable"),
            self._condition(before, "Progressing", ref.name not in self.never_ready, "ProgressDeadlineExceeded"),
        ]
        self.cluster.set_status(ref, status, user=DEPLOYMENT_USER)

    def _condition(self, before: Obj, kind: str, holds: bool, reason: str) -> Obj:
        old = next((one for one in before.get("conditions", ()) if one["type"] == kind), {})
        now = timestamp(self.cluster.clock.time())
        status = "True" if holds else "False"
        return {
            "type": kind,
            "status": status,
            "reason": reason if holds == (kind == "Available") else f"No{reason}",
            "message": "",
            "lastUpdateTime": old["lastUpdateTime"] if old.get("status") == status else now,
            "lastTransitionTime": old["lastTransitionTime"] if old.get("status") == status else now,
        }

    def _set_slice(self, ref: Ref, service: Obj) -> None:
        selector = service["spec"]["selector"]
        pods = [
            pod
            for owner, found in self.pods.items()
            if owner.namespace == ref.namespace
            for pod in found
            if all(pod.labels.get(name) == value for name, value in selector.items())
        ]
        publish = bool(service["spec"].get("publishNotReadyAddresses"))
        endpoints = [
            {
                "addresses": [pod.address],
                "conditions": {"ready": pod.ready or publish, "serving": pod.ready, "terminating": False},
                "targetRef": {"kind": "Pod", "name": pod.name, "namespace": ref.namespace},
            }
            for pod in pods
        ]
        ports = [
            {"name": port.get("name", ""), "port": number, "protocol": port.get("protocol", "TCP")}
            for port in service["spec"].get("ports", ())
            if (number := _number(port, pods)) is not None
        ]
        meta = service["metadata"]
        owner = {
            "apiVersion": "v1",
            "blockOwnerDeletion": True,
            "controller": True,
            "kind": "Service",
            "name": ref.name,
            "uid": meta["uid"],
        }
        labels = {
            **meta.get("labels", {}),
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": ref.name,
        }
        wanted = {
            "metadata": {"labels": labels, "ownerReferences": [owner]},
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": ports,
        }
        suffix = hashlib.sha256(meta["uid"].encode()).hexdigest()[:5]
        slice_ref = Ref(ENDPOINT_SLICE, ref.namespace, f"{ref.name}-{suffix}")
        if self.cluster.find(slice_ref) is None:
            self.cluster.create(slice_ref, wanted, user=ENDPOINTS_USER)
        else:
            self.cluster.replace(slice_ref, wanted, user=ENDPOINTS_USER)


def _number(port: Obj, pods: list[Pod]) -> int | None:
    """The port of the pods that a Service's port leads to."""
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return target
    return next((pod.ports[target] for pod in pods if target in pod.ports), None)
