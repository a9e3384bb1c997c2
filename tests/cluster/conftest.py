"""Fixtures on a real control plane; control_plane.py says what each gives."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.control_plane import ROOT, ControlPlane, eventually, running
from tests.cluster.fake_ray import FakeRay, fake_ray_before
from tests.cluster.kuberay import install_crds, start_kuberay
from tests.cluster.nodes import gpu_node

TEST_LABEL = "moestack.dev/test-namespace"
# What a controller would go on working on while its namespace is being deleted, which takes seconds.
WORK = (
    "/apis/moestack.dev/v1alpha1/namespaces/{}/moedeployments",
    "/apis/ray.io/v1/namespaces/{}/rayservices",
    "/apis/ray.io/v1/namespaces/{}/rayclusters",
    "/apis/apps/v1/namespaces/{}/deployments",
)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One control plane for the session. At its end no namespace of a test may be left, or something holds it."""
    with running(tmp_path_factory.mktemp("control-plane") / "plane") as plane:
        yield plane
        names = f"{TEST_LABEL}=true"

        def left() -> list[str]:
            listed = plane.ask("GET", "/api/v1/namespaces", labelSelector=names).json()["items"]
            return [f"{one['metadata']['name']}: {one['status'].get('conditions')}" for one in listed]

        eventually("every test's namespace is gone", lambda: not left() or None)


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A fresh namespace, ready for pods. Its workloads go when the test ends, the rest soon after."""
    name = f"t-{secrets.token_hex(4)}"
    metadata = {"name": name, "labels": {TEST_LABEL: "true"}}
    made = control_plane.ask("POST", "/api/v1/namespaces", {"metadata": metadata})
    assert made.ok, made.text
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    eventually(f"{account} is there", lambda: control_plane.ask("GET", account).ok)
    yield name
    for path in WORK:
        control_plane.ask("DELETE", path.format(name), {"propagationPolicy": "Background"})
    control_plane.ask("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="session")
def moestack_crd(control_plane: ControlPlane) -> ControlPlane:
    """The control plane that knows MoEDeployments."""
    control_plane.install_crds(ROOT / "manifests" / "crd" / "moestack.dev_moedeployments.yaml")
    return control_plane


@pytest.fixture(scope="session")
def kwok(control_plane: ControlPlane) -> ControlPlane:
    """The control plane with four nodes of eight GPUs, a scheduler, and pods that become Ready."""
    control_plane.start_scheduler()
    control_plane.start_kwok()
    control_plane.apply(*(gpu_node(f"gpu-{number}", gpus=8) for number in range(4)))
    return control_plane


@pytest.fixture(scope="session")
def ray_front(control_plane: ControlPlane) -> Iterator[FakeRay]:
    """The fake Ray itself; tests ask for `fake_ray`."""
    with fake_ray_before(control_plane.url, control_plane.certificates) as fake:
        yield fake


@pytest.fixture
def fake_ray(ray_front: FakeRay) -> Iterator[FakeRay]:
    """Ray's dashboard and proxies for every RayCluster, with failures on demand, which end with the test."""
    yield ray_front
    ray_front.recover()


@pytest.fixture(scope="session")
def kuberay(kwok: ControlPlane, ray_front: FakeRay) -> Iterator[ControlPlane]:
    """The control plane with kwok and the real KubeRay, to which every Ray cluster is the fake one."""
    install_crds(kwok)
    start_kuberay(kwok, ray_front.url)
    yield kwok

    def left() -> list[Any]:
        found: list[Any] = kwok.ask("GET", "/apis/ray.io/v1/rayservices").json()["items"]
        return found

    eventually("KubeRay has let every RayService go", lambda: not left() or None)  # nobody else removes its finalizer
    kwok.stop_component("kuberay")  # before the fake, through which it speaks
