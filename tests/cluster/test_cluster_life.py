"""A MoEDeployment's life on the real API server with the real KubeRay, the operator and gateways as processes.

The stories are in stories_*.py; life.py says how they are told. All are played at once, each in its own namespace.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from moe_core.signing import Signer
from tests.cluster import stories_apply, stories_end, stories_scale, stories_settled, stories_upgrade  # noqa: F401  (they register stories)
from tests.cluster.control_plane import ControlPlane
from tests.cluster.edge import edge_running
from tests.cluster.fake_ray import FakeRay
from tests.cluster.gateway_pods import gateway_pods_running
from tests.cluster.life import TALES, Stage, play
from tests.cluster.nodes import gpu_node
from tests.cluster.operators import config, grant, pod_environment, running

pytestmark = pytest.mark.cluster

AT_ONCE = 12
"""Stories that are played at the same time."""
NODES = {"nvidia-h100": "NVIDIA-H100-80GB-HBM3", "nvidia-h200": "NVIDIA-H200", "rtx": "NVIDIA-GeForce-RTX-4090"}


@pytest.fixture(scope="module")
def stage(
    kuberay: ControlPlane, moestack_crd: ControlPlane, ray_front: FakeRay, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """A cluster with room for all of them."""
    nodes = [gpu_node(f"life-{name}", gpus=512) for name in NODES]
    for node, product in zip(nodes, NODES.values(), strict=True):
        node["metadata"]["labels"]["nvidia.com/gpu.product"] = product
        for amounts in (node["status"]["capacity"], node["status"]["allocatable"]):
            amounts |= {"cpu": "4000", "memory": "64Ti", "pods": "2000"}
    kuberay.apply(*nodes)
    folder = tmp_path_factory.mktemp("operator")
    key = folder / "key.pem"
    Signer.generate().save(key)
    made = config(
        trusted_keys=(Signer.load(key).public_pem(),), signing_key_file=str(key), lease_s=5.0, log_level="DEBUG"
    )
    account = grant(kuberay, made)
    with (
        edge_running() as edge,
        gateway_pods_running(kuberay, edge) as pods,
        running(folder, made, account, environment=pod_environment(edge.network)) as operator,
    ):
        yield Stage(kuberay, ray_front, edge, pods, operator)


@pytest.fixture(scope="module")
def playing(stage: Stage, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[float]]]:
    """Every story that this run asks for, begun."""
    asked = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_story.__name__
    ]
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="story") as pool:
        try:
            yield {name: pool.submit(play, stage, name) for name in asked}
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", TALES)
def test_story(name: str, playing: dict[str, Future[float]]) -> None:
    print(f"{name}: {playing[name].result():.0f} s")
