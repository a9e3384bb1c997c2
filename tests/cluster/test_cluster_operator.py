"""The operator's process on the real API server, as a service account with the rights of the manifest and no others."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_api.annotations import DEPLOYMENT_LABEL
from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.objects import Kind, Obj, Ref
from moe_operator import rbac
from moe_operator.children import NOT_OURS, WATCHED
from moe_operator.names import MANAGED_BY
from tests.cluster.control_plane import ControlPlane, eventually
from tests.cluster.kuberay import install_crds
from tests.cluster.operators import Operator, config, grant, running

pytestmark = pytest.mark.cluster

SPEC: Obj = {
    "model": {"id": "Qwen/Qwen3-235B-A22B-FP8"},
    "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    "slo": {"ttftP95": "800ms", "itlP95": "50ms"},
    "upgrade": {"drainTimeout": "2s"},
}
LATER = (k.POD_MONITOR, k.PROMETHEUS_RULE, k.HTTP_ROUTE)
NOT_ASKED_FOR = {k.INGRESS, k.HTTP_ROUTE, k.SERVICE_ACCOUNT, k.ROLE, k.ROLE_BINDING}
"""Kinds that `SPEC` has no object of: nobody exposes its gateway, and no paid fallback needs books."""
MANIFESTS = Path(__file__).parents[2] / "manifests" / "operator"
LEASE_S = 4.0
"""Short, so that a takeover does not take long."""


def definition(kind: Kind) -> Obj:
    """A CRD of that kind that takes anything."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{kind.plural}.{kind.group}",
            # The API server asks for it of CRDs in Kubernetes' own groups.
            "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
        },
        "spec": {
            "group": kind.group,
            "scope": "Namespaced",
            "names": {"plural": kind.plural, "singular": kind.kind.lower(), "kind": kind.kind},
            "versions": [
                {"name": kind.version, "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}
            ],
        },
    }


@pytest.fixture(scope="module")
def plane(moestack_crd: ControlPlane) -> Iterator[ControlPlane]:
    """With KubeRay's CRDs, and later, for a while, those that a cluster may have or not."""
    install_crds(moestack_crd)
    yield moestack_crd
    for kind in LATER:
        moestack_crd.ask("DELETE", k.CUSTOM_RESOURCE_DEFINITION.path(None, f"{kind.plural}.{kind.group}"))


@pytest.fixture
def home(namespace: str, plane: ControlPlane) -> OperatorConfig:
    """An operator that looks after one namespace; its lease lies there as well."""
    return config(namespaces=[namespace], namespace=namespace, lease_s=LEASE_S)


def put(plane: ControlPlane, namespace: str, name: str, **spec: Any) -> None:
    body = {"apiVersion": "moestack.dev/v1alpha1", "kind": "MoEDeployment", "metadata": {"name": name}}
    plane.apply({**body, "spec": {**SPEC, **spec}}, namespace=namespace)


def listed(plane: ControlPlane, kind: Kind, namespace: str) -> list[Obj]:
    """Objects of that kind that carry our label."""
    labels = ",".join(f"{name}={value}" for name, value in MANAGED_BY.items())
    answer = plane.ask("GET", kind.path(namespace), labelSelector=labels)
    return list(answer.json().get("items", ())) if answer.ok else []


def condition(plane: ControlPlane, namespace: str, name: str, type_: str) -> tuple[str, str] | None:
    """Status and reason."""
    live = plane.ask("GET", k.MOE_DEPLOYMENT.path(namespace, name)).json()
    found = (c for c in live.get("status", {}).get("conditions", ()) if c["type"] == type_)
    return next(((c["status"], c["reason"]) for c in found), None)


def writes(operator: Operator) -> dict[tuple[str, str, str], float]:
    """Calls that write, but for the lease and Events."""
    verbs = ("create", "patch", "update", "delete")
    return {c: n for c, n in operator.calls().items() if c[0] in verbs and c[1] not in ("Lease", "Event")}


def written(plane: ControlPlane, namespace: str) -> dict[str, Any]:
    """What the resource says and its ConfigMaps hold."""
    resource = plane.ask("GET", k.MOE_DEPLOYMENT.path(namespace, "moe")).json()
    return {
        "status": resource.get("status"),
        **{c["metadata"]["name"]: c.get("data") for c in listed(plane, k.CONFIG_MAP, namespace)},
    }


def settle(operator: Operator) -> None:
    """Wait until nothing was written for five seconds. An operator looks again after one, but on a busy machine pods on
    the simulated nodes of other tests take longer to become ready."""
    seen: list[Any] = [None, time.monotonic()]

    def still() -> bool:
        now = writes(operator)
        if now != seen[0]:
            seen[:] = [now, time.monotonic()]
        return time.monotonic() - seen[1] > 5.0

    eventually("the operator rests", still)


def test_it_makes_everything_ends_cleanly_and_its_successor_writes_nothing(
    plane: ControlPlane, home: OperatorConfig, tmp_path: Path
) -> None:
    access, namespace = grant(plane, home), home.namespace
    put(plane, namespace, "moe")
    with running(tmp_path, home, access) as operator:
        eventually("it is ready", lambda: operator.get("/readyz").ok)
        eventually("a RayService is there", lambda: listed(plane, k.RAY_SERVICE, namespace))
        settle(operator)
        assert condition(plane, namespace, "moe", "Fits") == ("True", "Fits")
        assert condition(plane, namespace, "moe", "Degraded") == ("False", "AsExpected")
        assert operator.metrics()["moestack_operator_leader"] == {(): 1.0}
        reasons = {event["reason"] for event in plane.ask("GET", k.EVENT.path(namespace)).json()["items"]}
        assert "RevisionStarting" in reasons
        began, before = time.monotonic(), written(plane, namespace)
        assert operator.stop() == 0
        assert time.monotonic() - began < 5.0
    lease = plane.ask("GET", k.LEASE.path(namespace, "moestack-operator")).json()
    assert not lease["spec"].get("holderIdentity")
    lines = operator.lines()
    assert lines[-1]["msg"] == "stopped"
    assert [line for line in lines if line["level"] == "error"] == []
    assert plane.tokens[f"system:serviceaccount:{namespace}:{rbac.NAME}"] not in operator.log.read_text()

    with running(tmp_path, home, access, "successor") as operator:
        eventually("it leads", lambda: operator.metrics()["moestack_operator_leader"] == {(): 1.0})
        eventually("it looked", lambda: operator.metrics()["moestack_operator_objects"] == {(): 1.0})
        settle(operator)
        assert (writes(operator), written(plane, namespace)) == ({}, before)


def test_when_the_leader_is_killed_another_one_goes_on(
    plane: ControlPlane, home: OperatorConfig, tmp_path: Path
) -> None:
    access, namespace = grant(plane, home), home.namespace
    first_config, second_config = (home.model_copy(update={"identity": name}) for name in ("first", "second"))
    with running(tmp_path, first_config, access, "first") as first:
        eventually("the first leads", lambda: first.metrics()["moestack_operator_leader"] == {(): 1.0})
        with running(tmp_path, second_config, access, "second") as second:
            eventually("the second is ready", lambda: second.get("/readyz").ok)
            put(plane, namespace, "moe")
            eventually("a RayService is there", lambda: listed(plane, k.RAY_SERVICE, namespace))
            assert writes(second) == {}
            assert first.stop(signal.SIGKILL) == -signal.SIGKILL
            put(plane, namespace, "next")
            eventually("another RayService", lambda: len(listed(plane, k.RAY_SERVICE, namespace)) == 2)
            settle(second)
            assert len(listed(plane, k.DEPLOYMENT, namespace)) == 2


def left_over(plane: ControlPlane, kind: Kind, namespace: str) -> Ref | None:
    """Makes a child that should not be, like one that is there."""
    like = next(
        (o for o in listed(plane, kind, namespace) if o["metadata"]["ownerReferences"][0]["kind"] == "MoEDeployment"),
        None,
    )
    if like is None:
        return None
    meta = {"name": "left-over", **{key: like["metadata"][key] for key in ("labels", "ownerReferences")}}
    body = {key: value for key, value in like.items() if key not in ("metadata", "status")}
    if kind == k.SERVICE:
        body["spec"] = {"ports": body["spec"]["ports"], "selector": {}}
    made = plane.ask("POST", kind.path(namespace), {**body, "metadata": meta})
    assert made.ok, made.text
    return Ref(kind, namespace, "left-over")


def cluster_of(service: Obj) -> Obj:
    """The RayCluster that KubeRay would make, with the labels that it copies."""
    meta = service["metadata"]
    labels = {**meta["labels"], "ray.io/originated-from-cr-name": meta["name"]}
    spec = service["spec"]["rayClusterConfig"]
    owner = {"apiVersion": "ray.io/v1", "kind": "RayService", "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": f"{meta['name']}-abcde",
            "labels": labels,
            "ownerReferences": [{**owner, "controller": True}],
        },
        "spec": spec,
    }


def test_every_call_of_a_life_is_allowed_and_nothing_else_is(
    plane: ControlPlane, home: OperatorConfig, tmp_path: Path
) -> None:
    access, namespace = grant(plane, home), home.namespace
    put(plane, namespace, "moe")
    with running(tmp_path, home, access) as operator:
        service = eventually("a RayService is there", lambda: listed(plane, k.RAY_SERVICE, namespace))[0]
        settle(operator)
        made = plane.ask("POST", k.RAY_CLUSTER.path(namespace), cluster_of(service))
        assert made.ok, made.text
        put(plane, namespace, "moe", replicas={"min": 1, "max": 3})
        cluster = k.RAY_CLUSTER.path(namespace, made.json()["metadata"]["name"])

        def ceiling() -> int:
            return int(plane.ask("GET", cluster).json()["spec"]["workerGroupSpecs"][0]["maxReplicas"])

        before = made.json()["spec"]["workerGroupSpecs"][0]["maxReplicas"]
        eventually("the ceiling reaches the live cluster", lambda: ceiling() > before)
        plane.apply(*(definition(kind) for kind in LATER))
        for kind in LATER[:2]:
            eventually(f"{kind.kind} is made once it can be", lambda kind=kind: listed(plane, kind, namespace), 90.0)
        settle(operator)
        # A RayService of ours is never surplus at once: it may be what serves.
        surplus = [kind for kind in WATCHED if kind not in NOT_OURS and kind != k.RAY_SERVICE]
        left = [ref for kind in surplus if (ref := left_over(plane, kind, namespace))]
        assert {ref.kind for ref in left} == set(surplus) - NOT_ASKED_FOR
        for ref in left:
            eventually(f"{ref} is gone", lambda ref=ref: plane.ask("GET", ref.path).status_code == 404)
        put(plane, namespace, "moe", suspend=True)
        eventually("nothing runs", lambda: not listed(plane, k.RAY_SERVICE, namespace))
        settle(operator)
        calls = operator.calls()
    assert [call for call in calls if call[2] in ("401", "403")] == []
    asked = {(verb, kind) for verb, kind, _ in calls}
    named = lambda right: right.kind.kind + (f"/{right.subresource}" if right.subresource else "")  # noqa: E731
    allowed = {(verb, named(right)) for right in (*rbac.OBJECTS, *rbac.OWN) for verb in right.verbs}
    assert asked - allowed == set()

    # And the other side: what the API server says that this account may do.
    assert may(plane, namespace, rbac.NAME) - may(plane, namespace, "default") == granted()


def may(plane: ControlPlane, namespace: str, account: str) -> set[tuple[str, str, str, tuple[str, ...]]]:
    """(group, resource, verb, names) of everything that a service account may do in a namespace."""
    user = f"system:serviceaccount:{namespace}:{account}"
    if user not in plane.tokens:
        plane.service_account(namespace, account)
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
    answer = plane.ask(
        "POST",
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        {**review, "spec": {"namespace": namespace}},
        user=user,
    ).json()["status"]
    assert not answer["incomplete"]
    return {
        (group, resource, verb, tuple(rule.get("resourceNames", ())))
        for rule in answer["resourceRules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def granted() -> set[tuple[str, str, str, tuple[str, ...]]]:
    rights = (*rbac.OBJECTS, *rbac.OWN)
    return {(right.kind.group, right.resource, verb, right.names) for right in rights for verb in right.verbs}


def test_the_manifest_binds_the_same_rights_in_the_whole_cluster(plane: ControlPlane) -> None:
    plane.kubectl("apply", "-f", MANIFESTS)
    plane.service_account("moestack-system", rbac.NAME)
    objects = {right for right in granted() if right[1] != "leases"}
    assert may(plane, "moestack-system", rbac.NAME) - may(plane, "moestack-system", "default") == granted()
    account = f"system:serviceaccount:moestack-system:{rbac.NAME}"
    for verb, resource in (("list", "secrets"), ("get", "pods"), ("delete", "namespaces"), ("create", "leases")):
        said = plane.kubectl("auth", "can-i", verb, resource, "-n", "default", "--as", account, check=False)
        assert said.stdout.strip() == "no", (verb, resource)
    elsewhere = may(plane, "moestack-system", rbac.NAME)
    assert objects <= elsewhere
    assert plane.ask("GET", k.MOE_DEPLOYMENT.path("default"), user=account).ok  # and in a namespace that is not its own


def test_endpoint_slices_and_ray_clusters_carry_our_labels(plane: ControlPlane, namespace: str) -> None:
    """The first by Kubernetes' own controller, from the Service; KubeRay's copies are seen in its own tests."""
    labels = {**MANAGED_BY, DEPLOYMENT_LABEL: "moe"}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "moe-gateway-admin", "labels": labels},
        "spec": {"clusterIP": "None", "selector": {"app": "x"}, "ports": [{"port": 8001}]},
    }
    plane.apply(service, namespace=namespace)
    slices = eventually("a slice is made", lambda: listed(plane, k.ENDPOINT_SLICE, namespace))
    assert labels.items() <= slices[0]["metadata"]["labels"].items()
