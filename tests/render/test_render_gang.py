"""Ray's own builder and schema on what is rendered: gangs of the right size, whole bounds, bundles that fit the pods.

Nothing is started: a dry run of the half of a plan that a Kubernetes API server cannot judge.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from moe_kube import objects as k
from moe_serving import builder
from tests.render.cases import CASES

ray = pytest.importorskip("ray")
pytest.importorskip("vllm")

FORMS = {
    # case: (gang size or None, bundles of one engine, least and most Serve replicas)
    "laptop": (None, [{"CPU": 1, "GPU": 1}, *[{"GPU": 1}] * 3], (1, 1)),
    "two-nodes": (None, [{"CPU": 1, "GPU": 1}, *[{"GPU": 1}] * 15], (1, 1)),
    "data-parallel": (8, [{"CPU": 1, "GPU": 1}], (8, 8)),
    "parallel-auto": (2, [{"CPU": 1, "GPU": 1}, *[{"GPU": 1}] * 3], (2, 2)),
    "data-parallel-tensor": (2, [{"CPU": 1, "GPU": 1}, *[{"GPU": 1}] * 3], (2, 2)),
    "data-parallel-nodes": (8, [{"CPU": 1, "GPU": 1}, {"GPU": 1}], (8, 16)),
    "data-parallel-cpu": (2, [{"CPU": 2, "GPU": 0}], (2, 2)),
}


def rendered(name: str) -> dict[str, Any]:
    (service,) = (made for made in CASES[name].render() if made.ref.kind == k.RAY_SERVICE)
    spec: dict[str, Any] = service.body["spec"]
    return spec


def deployment(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Ray makes of the application of a case, without a board and without starting a Ray."""
    (application,) = json.loads(rendered(name)["serveConfigV2"])["applications"]
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    made = builder.build_app({**application["args"], "boardPort": 0})
    assert not ray.is_initialized()
    return made._bound_deployment


@pytest.mark.parametrize("name", FORMS)
def test_ray_makes_the_gang_that_is_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gang, bundles, _ = FORMS[name]
    made = deployment(name, monkeypatch)
    config = made._deployment_config
    assert made._replica_config.placement_group_bundles == bundles
    if gang is None:
        assert config.gang_scheduling_config is None
        return
    assert (config.gang_scheduling_config.gang_size, config.gang_scheduling_config.gang_placement_strategy) == (
        gang,
        "PACK",
    )
    assert config.gang_scheduling_config.runtime_failure_policy == "RESTART_GANG"
    assert config.autoscaling_config.min_replicas % gang == 0


@pytest.mark.parametrize("name", FORMS)
def test_serve_takes_the_rendered_configuration(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate_json(rendered(name)["serveConfigV2"])
    (override,) = schema.applications[0].deployments
    bounds = override.autoscaling_config
    assert (bounds["min_replicas"], bounds["max_replicas"]) == FORMS[name][2]


@pytest.mark.parametrize("name", FORMS)
def test_the_gangs_of_the_ceiling_fit_their_pods(name: str) -> None:
    """In Ray's books: engines are placed whole on a pod where its GPUs allow it, else they fill pods."""
    gang, engine, (_, most) = FORMS[name]
    (group,) = rendered(name)["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    slots = float(group["rayStartParams"]["num-cpus"])
    gpus = float(container["resources"].get("limits", {}).get("nvidia.com/gpu", 0))
    free = [[slots, gpus] for _ in range(group["maxReplicas"] * group["numOfHosts"])]
    for _ in range(most):
        for bundle in engine:
            pod = next(pod for pod in free if pod[0] >= bundle.get("CPU", 0) and pod[1] >= bundle.get("GPU", 0))
            pod[0] -= bundle.get("CPU", 0)
            pod[1] -= bundle.get("GPU", 0)
    assert most == group["maxReplicas"] * (gang or 1)
    assert all(pod[0] >= 1 for pod in free), "each pod keeps a slot for what prepares its engines"
    assert all(pod[1] == 0 for pod in free), "no GPU is paid for and left idle"
