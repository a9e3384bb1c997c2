"""The life of a MoEDeployment on the real API server, as a person sees it: a namespace, kubectl, what comes of it.

A story is a function of a `Life`. Stories share the control plane, KubeRay and the operator, have a namespace each, and
are played at the same time: most of their time they wait.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from moe_api.load import load_object
from moe_kube.objects import Obj
from moe_operator.revision import name_of
from tests.cluster.control_plane import ControlPlane, eventually
from tests.cluster.edge import MODEL, Edge
from tests.cluster.fake_ray import FakeRay
from tests.cluster.gateway_pods import GatewayPods
from tests.cluster.namespaces import fresh_namespace
from tests.cluster.operators import Operator

NAME = "moe"
READY_S = 120.0
"""How long anything may take on two busy cores."""
KINDS = (
    "moedeployments,rayservices,rayclusters,pods,deployments,replicasets,services,endpointslices,configmaps,"
    "controllerrevisions,horizontalpodautoscalers,poddisruptionbudgets,networkpolicies,ingresses,jobs,secrets,"
    "serviceaccounts,roles,rolebindings"
)
"""Everything that a MoEDeployment may lead to in its namespace."""
SPEC: Obj = {
    "model": {"id": MODEL},
    "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    "slo": {"ttftP95": "1s", "itlP95": "1s"},
    "gateway": {"replicas": {"min": 1, "max": 2}},
    "upgrade": {"steps": [50, 100], "stepDuration": "4s", "drainTimeout": "20s", "progressDeadline": "60s"},
}


def spec_with(changes: dict[str, Any], base: Obj = SPEC) -> Obj:
    """A spec with fields set, by their paths: `{"upgrade.strategy": "Bridge"}`."""
    spec = copy.deepcopy(base)
    for path, value in changes.items():
        *groups, last = path.split(".")
        node = spec
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return spec


@dataclass
class Stage:
    """What all stories share."""

    plane: ControlPlane
    fake_ray: FakeRay
    edge: Edge
    pods: GatewayPods
    operator: Operator


@dataclass
class Life:
    """One namespace."""

    stage: Stage
    namespace: str
    notes: list[str] = field(default_factory=list)

    @property
    def plane(self) -> ControlPlane:
        return self.stage.plane

    # -- what a person does

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, user: str = "admin") -> str:
        """What kubectl says in this namespace."""
        done = self.plane.kubectl("-n", self.namespace, *arguments, stdin=stdin, check=check, user=user)
        return done.stdout + done.stderr

    def apply(self, changes: dict[str, Any] | None = None, name: str = NAME, *arguments: str) -> Obj:
        """`kubectl apply` of a MoEDeployment; the object that was applied."""
        resource = self.document(changes, name)
        self.kubectl("apply", *arguments, "-f", "-", stdin=yaml.safe_dump(resource))
        return resource

    def document(self, changes: dict[str, Any] | None = None, name: str = NAME) -> Obj:
        return {
            "apiVersion": "moestack.dev/v1alpha1",
            "kind": "MoEDeployment",
            "metadata": {"name": name},
            "spec": spec_with(changes or {}),
        }

    def revision_of(self, changes: dict[str, Any] | None = None, name: str = NAME) -> str:
        """Name of the revision that this spec leads to."""
        return name_of(load_object(self.document(changes, name)))

    # -- what is there

    def path(self, kind: str, name: str = "") -> str:
        groups = {
            "moedeployments": "/apis/moestack.dev/v1alpha1",
            "rayservices": "/apis/ray.io/v1",
            "rayclusters": "/apis/ray.io/v1",
            "deployments": "/apis/apps/v1",
            "replicasets": "/apis/apps/v1",
            "controllerrevisions": "/apis/apps/v1",
            "endpointslices": "/apis/discovery.k8s.io/v1",
            "horizontalpodautoscalers": "/apis/autoscaling/v2",
            "poddisruptionbudgets": "/apis/policy/v1",
            "networkpolicies": "/apis/networking.k8s.io/v1",
        }
        return f"{groups.get(kind, '/api/v1')}/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")

    def list(self, kind: str, **parameters: str) -> list[Obj]:
        """Objects of a kind, by name."""
        answer = self.plane.ask("GET", self.path(kind), **parameters)
        assert answer.ok, answer.text
        found: list[Obj] = answer.json()["items"]
        return sorted(found, key=lambda obj: str(obj["metadata"]["name"]))

    def names(self, kind: str, **parameters: str) -> list[str]:
        return [obj["metadata"]["name"] for obj in self.list(kind, **parameters)]

    def get(self, kind: str, name: str) -> Obj | None:
        """One object; None where it is not there."""
        answer = self.plane.ask("GET", self.path(kind, name))
        assert answer.ok or answer.status_code == 404, answer.text
        found: Obj | None = answer.json() if answer.ok else None
        return found

    def status(self, name: str = NAME) -> Obj:
        found: Obj = (self.get("moedeployments", name) or {}).get("status") or {}
        return found

    def condition(self, kind: str, name: str = NAME) -> tuple[str, str, str]:
        """Status, reason and message; empty where it does not exist. Of the newest generation only."""
        resource = self.get("moedeployments", name) or {}
        for one in (resource.get("status") or {}).get("conditions", ()):
            if one["type"] == kind and one["observedGeneration"] == resource["metadata"]["generation"]:
                return one["status"], one["reason"], one["message"]
        return "", "", ""

    def conditions(self, name: str = NAME) -> dict[str, str]:
        return {one["type"]: f"{one['status']} {one['reason']}" for one in self.status(name).get("conditions", ())}

    def revisions(self, name: str = NAME) -> dict[str, tuple[str, int]]:
        """Phase and weight of each revision in status."""
        return {one["name"]: (one["phase"], one.get("weight", 0)) for one in self.status(name).get("revisions", ())}

    def serving(self, name: str = NAME) -> str:
        """The revision that has all the traffic."""
        return next((revision for revision, at in self.revisions(name).items() if at == ("Serving", 100)), "")

    def all_objects(self) -> dict[str, str]:
        """resourceVersion of every object of the kinds that a MoEDeployment leads to, but Kubernetes' own."""
        text = self.kubectl("get", KINDS, "-o", "json")
        return {
            f"{obj['kind']}/{obj['metadata']['name']}": obj["metadata"]["resourceVersion"]
            for obj in json.loads(text)["items"]
            if obj["metadata"]["name"] not in ("default", "kube-root-ca.crt")
        }

    def warnings(self) -> list[str]:
        """Warning events of this namespace, those of Kubernetes' own components too."""
        events = self.list("events", fieldSelector="type=Warning")
        return [f"{one['involvedObject']['kind']} {one['reason']}: {one['message']}" for one in events]

    # -- waiting

    def until(self, what: str, found: Callable[[], Any], timeout_s: float = READY_S) -> Any:
        return eventually(f"{self.namespace}: {what}", found, timeout_s=timeout_s, poll_s=0.3)

    def until_ready(self, name: str = NAME) -> str:
        """Waits until one revision has all the traffic and nothing else is left; its name."""

        def settled() -> str:
            ready = all(
                self.condition(kind, name)[0] == "True" for kind in ("ClusterReady", "ServingReady", "GatewayReady")
            )
            alone = len(self.revisions(name)) == 1
            return self.serving(name) if ready and alone else ""

        revision: str = self.until(f"{name} is ready", settled)
        return revision

    # -- for whom a story fails

    def describe(self) -> str:
        resources = [(obj["metadata"]["name"], obj.get("status")) for obj in self.list("moedeployments")]
        lines = [line for line in self.stage.operator.log.read_text().splitlines() if self.namespace in line][-25:]
        return "\n".join(
            [
                f"namespace {self.namespace}",
                *(f"{name}: {json.dumps(status, indent=1)}" for name, status in resources),
                "objects: " + " ".join(sorted(self.all_objects())),
                "warnings: " + "\n  ".join(self.warnings()),
                "the operator's log:",
                *lines,
                "the gateways' logs:",
                *self.stage.pods.logs(self.namespace).splitlines()[-15:],
            ]
        )


Tale = Callable[[Life], None]
TALES: dict[str, Tale] = {}


def story(tale: Tale) -> Tale:
    """Registers a story by the name of its function."""
    TALES[tale.__name__.replace("_", " ")] = tale
    return tale


@contextmanager
def living(stage: Stage) -> Iterator[Life]:
    """A namespace for one story; what was there goes into the error of one that fails."""
    with fresh_namespace(stage.plane) as namespace:
        life = Life(stage, namespace)
        try:
            yield life
        except BaseException as error:
            error.add_note(life.describe())
            raise
        finally:
            stage.pods.leave(namespace)


def play(stage: Stage, name: str) -> float:
    """Plays one story; its seconds."""
    began = time.monotonic()
    with living(stage) as life:
        TALES[name](life)
    return time.monotonic() - began
