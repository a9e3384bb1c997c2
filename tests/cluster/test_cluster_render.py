"""The real API server takes what we render, and gives it back as we rendered it: so a settled object has no drift."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from moe_api.annotations import OPERATOR_MANAGER
from moe_kube import objects as k
from moe_kube.managed import content, digest, owned
from moe_operator.render.objects import NotRenderable, Rendered
from moe_operator.render.quantity import canonical
from tests.cluster.control_plane import ControlPlane, eventually
from tests.cluster.kuberay import install_crds
from tests.render.cases import CASES, Case

pytestmark = pytest.mark.cluster
ABSENT = {k.POD_MONITOR, k.PROMETHEUS_RULE, k.HTTP_ROUTE}
"""Kinds whose CRDs this control plane does not have."""
PATCH = "application/apply-patch+yaml"


def rendered(case: Case) -> list[Rendered]:
    try:
        return [made for made in case.render() if made.ref.kind not in ABSENT]
    except NotRenderable:
        return []


def settled_in(plane: ControlPlane, made: Rendered, namespace: str) -> dict[str, Any]:
    """The body in the test's own namespace, owned by something that lives there.

    The owner that the cases name is nowhere: once the garbage collector has heard of MoEDeployments, which takes it
    half a minute after their CRD, it deletes what such an owner has.
    """
    body = copy.deepcopy(made.body)
    body["metadata"]["namespace"] = namespace
    account = plane.ask("GET", f"/api/v1/namespaces/{namespace}/serviceaccounts/default").json()["metadata"]
    for owner in body["metadata"]["ownerReferences"]:
        owner |= {"apiVersion": "v1", "kind": "ServiceAccount", "name": account["name"], "uid": account["uid"]}
    return body


def applied(plane: ControlPlane, made: Rendered, body: dict[str, Any], *, dry: bool = False) -> dict[str, Any]:
    """Apply as the operator does; returns the live object, or what it would be."""
    path = made.ref.kind.path(body["metadata"]["namespace"], made.ref.name)
    asked = {"fieldManager": OPERATOR_MANAGER, "fieldValidation": "Strict"}
    if dry:
        asked["dryRun"] = "All"
    answer = plane.ask("PATCH", path, body, content_type=PATCH, **asked)
    assert answer.ok, f"{made.ref}: {answer.text}"
    live: dict[str, Any] = answer.json()
    return live


def version(live: dict[str, Any]) -> tuple[str, Any]:
    """What a write of ours would move: controllers write status meanwhile, which moves the resource version too."""
    mine = [entry for entry in live["metadata"]["managedFields"] if entry["manager"] == OPERATOR_MANAGER]
    return live["metadata"].get("generation", live["metadata"]["resourceVersion"]), mine


@pytest.mark.parametrize("name", CASES)
def test_a_rendered_object_is_taken_and_reads_back_the_same(
    control_plane: ControlPlane, namespace: str, name: str
) -> None:
    install_crds(control_plane)
    for made in rendered(CASES[name]):
        # A KubeRay that another test has started would act on it at once.
        dry = made.ref.kind == k.RAY_SERVICE
        body = settled_in(control_plane, made, namespace)
        live = applied(control_plane, made, body, dry=dry)
        assert owned(live, OPERATOR_MANAGER) == content(body), made.ref
        assert digest(owned(live, OPERATOR_MANAGER)) == digest(content(body)), made.ref
        if not dry:
            again = applied(control_plane, made, body)
            assert version(again) == version(live), made.ref


BINARY = ("1024Mi", "1.5Gi", "0.5Ki", "1000Ki", "1.3Ki", "7.5Ti", "1Ei")
DECIMAL = ("1536", "1048576", "0.5", "500m", "1500m", "1000m", "1000", "100000", "1.5G", "0", "0.0", "12.000")
EXTREME = ("0.0001", "0.000000001", "999999999999999999")


@pytest.mark.parametrize("text", [*BINARY, *DECIMAL, *EXTREME])
def test_quantities_are_written_as_the_api_server_writes_them(
    control_plane: ControlPlane, namespace: str, text: str
) -> None:
    container = {"name": "c", "image": "i", "resources": {"requests": {"memory": text}}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [container]}}
    answer = control_plane.ask("POST", k.POD.path(namespace), pod, dryRun="All")
    assert answer.ok, answer.text
    assert answer.json()["spec"]["containers"][0]["resources"]["requests"]["memory"] == canonical(text)


def pods(plane: ControlPlane, namespace: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = plane.ask("GET", f"/api/v1/namespaces/{namespace}/pods").json()["items"]
    return found


@pytest.mark.parametrize(("name", "workers", "gpus"), [("laptop", 1, "4"), ("two-nodes", 2, "8")])
def test_kuberay_makes_pods_that_a_restricted_namespace_admits(
    kuberay: ControlPlane, namespace: str, name: str, workers: int, gpus: str
) -> None:
    level = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    where = f"/api/v1/namespaces/{namespace}"
    assert kuberay.ask("PATCH", where, level, content_type="application/merge-patch+json").ok
    for made in rendered(CASES[name]):
        if made.ref.kind in (k.RAY_SERVICE, k.DEPLOYMENT, k.SERVICE, k.SERVICE_ACCOUNT):
            applied(kuberay, made, settled_in(kuberay, made, namespace))
    service = k.RAY_SERVICE.path(namespace, CASES[name].revision)

    def ready() -> bool:
        conditions = kuberay.ask("GET", service).json().get("status", {}).get("conditions", [])
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    eventually("the RayService is ready", ready)
    running = pods(kuberay, namespace)
    engines = [pod for pod in running if pod["metadata"]["labels"].get("ray.io/node-type") == "worker"]
    limits = [pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for pod in engines]
    assert limits == [gpus] * workers
    (head,) = (pod for pod in running if pod["metadata"]["labels"].get("ray.io/node-type") == "head")
    assert [container["name"] for container in head["spec"]["containers"]] == ["ray-head", "autoscaler"]
    tokens = {
        container["name"]
        for pod in running
        for container in pod["spec"]["containers"]
        for mount in container["volumeMounts"]
        if mount["mountPath"].startswith("/var/run/secrets/kubernetes.io")
    }
    assert tokens == {"autoscaler", "gateway"}, "no engine speaks to the API server; gateways keep their books there"
    assert any(pod["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway" for pod in running)


def addresses(plane: ControlPlane, namespace: str, service: str) -> int:
    """Addresses behind a Service, ready or not."""
    chosen = f"kubernetes.io/service-name={service}"
    slices = plane.ask("GET", k.ENDPOINT_SLICE.path(namespace), labelSelector=chosen).json()["items"]
    return sum(len(one["endpoints"] or ()) for one in slices)


def test_services_find_the_board_and_the_gateways(kuberay: ControlPlane, namespace: str) -> None:
    case = CASES["laptop"]
    for made in rendered(case):
        applied(kuberay, made, settled_in(kuberay, made, namespace))
    board, admin = f"{case.revision}-board", f"{case.owner.name}-gateway-admin"
    eventually("the board is one pod, the head", lambda: addresses(kuberay, namespace, board) == 1)
    eventually("a gateway is behind its admin Service", lambda: addresses(kuberay, namespace, admin) == 1)
