"""The real KubeRay with a fake Ray: RayServices become ready without engines, and fail when told to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.control_plane import ControlPlane, eventually
from tests.cluster.fake_ray import FakeRay
from tests.cluster.kuberay import SERVE_CONFIG, ray_service
from tests.cluster.nodes import set_ready

pytestmark = pytest.mark.cluster


def status_of(plane: ControlPlane, namespace: str, name: str = "llm") -> dict[str, Any]:
    found = plane.ask("GET", f"/apis/ray.io/v1/namespaces/{namespace}/rayservices/{name}").json()
    status: dict[str, Any] = found.get("status", {})
    return status


def ready(plane: ControlPlane, namespace: str, name: str = "llm") -> dict[str, Any]:
    """Its Ready condition, {} before there is one."""
    conditions = status_of(plane, namespace, name).get("conditions", [])
    return next((one for one in conditions if one["type"] == "Ready"), {})


def is_ready(plane: ControlPlane, namespace: str, name: str = "llm") -> bool:
    return ready(plane, namespace, name).get("status") == "True"


def test_a_ray_service_becomes_ready_and_leaves_nothing(
    kuberay: ControlPlane, fake_ray: FakeRay, namespace: str
) -> None:
    kuberay.apply(ray_service("llm"), namespace=namespace)
    eventually("the RayService is ready", lambda: is_ready(kuberay, namespace))
    status = status_of(kuberay, namespace)
    assert status["serviceStatus"] == "Running"
    assert status["activeServiceStatus"]["applicationStatuses"]["llm"]["status"] == "RUNNING"
    assert status["numServeEndpoints"] == 3, "the head and two workers"
    pods = kuberay.ask("GET", f"/api/v1/namespaces/{namespace}/pods").json()["items"]
    gpus = [pod["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0") for pod in pods]
    assert sorted(gpus) == ["0", "8", "8"]
    assert [put.config for put in fake_ray.puts(namespace, "llm")] == [SERVE_CONFIG]

    kuberay.kubectl("delete", "rayservice", "llm", "-n", namespace, "--timeout=30s")
    kinds = "rayservices,rayclusters,pods,services,endpointslices,roles,rolebindings,jobs,secrets,configmaps"

    def left() -> str:
        return kuberay.kubectl("get", kinds, "-n", namespace, "-o", "name", "--ignore-not-found").stdout

    eventually("everything is gone", lambda: not left() or None)


@pytest.mark.parametrize(
    ("name", "failure", "shows"),
    [
        ("an application that deploys", {"application": "DEPLOYING"}, "DEPLOYING"),
        ("one that failed", {"application": "DEPLOY_FAILED", "message": "no such model"}, "no such model"),
        ("one that is unhealthy", {"application": "UNHEALTHY"}, "UNHEALTHY"),
        ("a dashboard that fails", {"dashboard": 500}, None),
        ("a dashboard that takes no configuration", {"put": 500}, None),
        ("a dashboard that does not answer", {"hangs": True}, None),
    ],
)
def test_it_is_not_ready_while_ray_is_not(
    name: str, failure: dict[str, Any], shows: str | None, kuberay: ControlPlane, fake_ray: FakeRay, namespace: str
) -> None:
    fake_ray.behave(namespace, "llm", **failure)
    kuberay.apply(ray_service("llm", gpus=1), namespace=namespace)

    def asked() -> bool:
        """KubeRay has met the failure."""
        cluster = status_of(kuberay, namespace).get("pendingServiceStatus", {})
        if shows is not None:
            return shows in str(cluster.get("applicationStatuses"))
        return fake_ray.asked(namespace, "llm") >= (1 if failure.get("hangs") else 3)

    eventually(f"KubeRay has met {name}", asked)
    assert not is_ready(kuberay, namespace), name
    fake_ray.behave(namespace, "llm", application="RUNNING", dashboard=200, put=200, hangs=False)
    eventually("it is ready once Ray is", lambda: is_ready(kuberay, namespace))


def test_a_ready_service_loses_its_endpoints(kuberay: ControlPlane, fake_ray: FakeRay, namespace: str) -> None:
    kuberay.apply(ray_service("llm", gpus=1), namespace=namespace)
    eventually("the RayService is ready", lambda: is_ready(kuberay, namespace))
    fake_ray.behave(namespace, "llm", proxy=503)  # KubeRay itself asks the head's proxy, kubelets ask the workers'
    set_ready(kuberay, namespace, "ray.io/node-type=worker", ready=False)
    eventually("it is not ready", lambda: ready(kuberay, namespace).get("status") == "False")
    assert ready(kuberay, namespace)["reason"] == "ZeroServeEndpoints"
    assert "serviceStatus" not in status_of(kuberay, namespace), "which is how KubeRay writes NotRunning"
    set_ready(kuberay, namespace, "ray.io/node-type=worker", ready=True)
    eventually("it is ready again", lambda: is_ready(kuberay, namespace))


def test_a_new_head_gets_the_configuration_again(kuberay: ControlPlane, fake_ray: FakeRay, namespace: str) -> None:
    kuberay.apply(ray_service("llm", gpus=1), namespace=namespace)
    eventually("the RayService is ready", lambda: is_ready(kuberay, namespace))
    fake_ray.forget(namespace, "llm")
    eventually("it was sent again", lambda: len(fake_ray.puts(namespace, "llm")) == 2)


def test_one_service_fails_and_its_neighbour_does_not(kuberay: ControlPlane, fake_ray: FakeRay, namespace: str) -> None:
    fake_ray.behave(namespace, "ill", application="UNHEALTHY")
    kuberay.apply(ray_service("ill", gpus=1), ray_service("well", gpus=1), namespace=namespace)
    eventually("the well one is ready", lambda: is_ready(kuberay, namespace, "well"))
    eventually("the ill one says so", lambda: "UNHEALTHY" in str(status_of(kuberay, namespace, "ill")))
    assert not is_ready(kuberay, namespace, "ill")


def test_the_token_of_ray_goes_with_each_request(kuberay: ControlPlane, fake_ray: FakeRay, namespace: str) -> None:
    service = ray_service("llm", gpus=1)
    service["spec"]["rayClusterConfig"]["authOptions"] = {"mode": "token"}
    kuberay.apply(service, namespace=namespace)
    eventually("the RayService is ready", lambda: is_ready(kuberay, namespace))
    assert fake_ray.puts(namespace, "llm")[0].token
