"""Fixtures on a real control plane; control_plane.py says what each gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.control_plane import ROOT, ControlPlane, eventually, running
from tests.cluster.fake_ray import FakeRay, fake_ray_before
from tests.cluster.kuberay import install_crds, start_kuberay
from tests.cluster.namespaces import TEST_LABEL, fresh_namespace
from tests.cluster.nodes import gpu_node

STORIES = [f"tests.cluster.{path.stem}" for path in Path(__file__).parent.glob("stories_*.py")]
pytest.register_assert_rewrite(*STORIES)


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
    with fresh_namespace(control_plane) as name:
        yield name


@pytest.fixture(scope="session")
def moestack_crd(control_plane: ControlPlane) -> ControlPlane:
    """The control plane that knows MoEDeployments."""
    control_plane.install_crds(ROOT / "manifests" / "crd" / "moestack.dev_moedeployments.yaml")
    return control_plane


@pytest.fixture(scope="session")
def crds(moestack_crd: ControlPlane) -> ControlPlane:
    """The control plane that knows MoEDeployments, RayServices and RayClusters, and runs no operator of them."""
    install_crds(moestack_crd)
    return moestack_crd


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
