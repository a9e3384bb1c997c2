"""A revision: what is pinned when it is born, and the objects that it renders to for as long as it lives.

Three things reach a revision after its birth, and none of them rebuilds its cluster: fields of class rolling
(arguments of the Serve application), bounds of autoscaling (options of its deployment, which Serve changes in place),
and the floor and ceiling of its workers (which KubeRay does not carry to a live RayCluster: the operator patches that
itself). Hot knobs are not among them: the application boots with what it was born with, and the board says the rest.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from moe_api.enums import EngineKind
from moe_api.v1alpha1 import MoEDeployment
from moe_core import process_config
from moe_core.addresses import BOARD_PORT, board_name
from moe_core.config import OperatorConfig, ServingConfig
from moe_core.process_config import Problem
from moe_kube import objects as k
from moe_operator.names import SERVE_PORT, Owner, labels
from moe_operator.record import Bounds, RevisionRecord
from moe_operator.render import accelerators, cluster
from moe_operator.render.cluster import ENGINE, Engine
from moe_operator.render.objects import RENDERER_VERSION, NotRenderable, Rendered, rendered
from moe_planner.plan import Plan

__all__ = ["NotRenderable", "board_service", "controller_revision", "pin", "ray_service"]

_BOUNDS = ("replicasMin", "replicasMax")
"""Fields of a ServingConfig that bounds of the deployment replace."""


def pin(
    resource: MoEDeployment, plan: Plan, *, image: str, config: OperatorConfig, name: str, number: int
) -> RevisionRecord:
    """A new revision as it is born. Raises NotRenderable with every reason why it cannot be."""
    spec = resource.spec
    serving = process_config.serving_config(
        resource,
        revision=name,
        source=process_config.checkpoint_source(spec.model, cluster.CLAIMS_PATH),
        tensor=plan.tensor,
        data=plan.data,
        pipeline=plan.pipeline,
        expert_parallel=plan.expert > 1,
        max_model_len=spec.engine.max_model_len or plan.max_model_len,
        max_active_seqs=spec.engine.max_active_seqs or plan.max_active_seqs,
        max_batched_tokens=spec.engine.max_batched_tokens or plan.max_batched_tokens,
        trusted_keys=config.trusted_keys,
    ).model_copy(update={"board_host": "0.0.0.0", "board_port": BOARD_PORT})  # noqa: S104 - of its own pod
    problems = (*_unrenderable(resource), *process_config.unserved(serving))
    if problems:
        raise NotRenderable(*problems)
    owner = Owner(resource.metadata.namespace, resource.metadata.name, resource.metadata.uid or "")
    engine = Engine(resource, plan, image, config.image_pull_policy, owner, name)
    return RevisionRecord(
        name=name,
        number=number,
        renderer=RENDERER_VERSION,
        spec=resource.to_json()["spec"],
        image=image,
        plan=plan.to_status().to_json(),
        nodes_per_replica=plan.nodes_per_replica,
        serving=serving,
        cluster=cluster.service_spec(engine),
    )


def controller_revision(record: RevisionRecord, owner: Owner) -> Rendered:
    """What keeps the record in the cluster. The API server lets nobody change its data."""
    content = {"data": record.to_json(), "revision": record.number}
    return _rendered(k.CONTROLLER_REVISION, record, owner, record.name, content)


def ray_service(
    record: RevisionRecord,
    resource: MoEDeployment,
    bounds: Bounds,
    owner: Owner,
    *,
    kept: ServingConfig | None = None,
) -> Rendered:
    """The RayService of a revision, with what of today's resource reaches it. `kept`: arguments that stay instead."""
    spec = orjson.loads(orjson.dumps(record.cluster))  # a deep copy
    if bounds.min > 0:
        spec.setdefault("excludeHeadPodFromServeSvc", True)
    else:
        spec.pop("excludeHeadPodFromServeSvc", None)  # where no replica may be there, the head is the door
    for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
        group |= {"replicas": bounds.min, "minReplicas": bounds.min, "maxReplicas": bounds.max}
    serving = kept or record.serving.model_copy(update=process_config.rolling_arguments(resource.spec))
    spec["serveConfigV2"] = _serve_config(serving, bounds)
    return _rendered(k.RAY_SERVICE, record, owner, record.name, {"spec": spec})


def board_service(record: RevisionRecord, owner: Owner) -> Rendered:
    """Where the board of a revision answers: on its head pod, also while nothing is ready there yet."""
    content = {
        "spec": {
            "type": "ClusterIP",
            "publishNotReadyAddresses": True,
            "selector": {
                **{name: value for name, value in labels(owner, ENGINE, record.name).items() if "moestack" in name},
                "ray.io/node-type": "head",
            },
            "ports": [{"name": "board", "port": BOARD_PORT, "targetPort": "board", "protocol": "TCP"}],
        }
    }
    return _rendered(k.SERVICE, record, owner, board_name(record.name), content, component="board")


def _serve_config(serving: ServingConfig, bounds: Bounds) -> str:
    """serveConfigV2: JSON, which is YAML too, and the same text for the same content whatever library wrote it."""
    arguments = {name: value for name, value in serving.to_json().items() if name not in _BOUNDS}
    deployment = {
        "name": process_config.ENGINE_DEPLOYMENT,
        # Serve counts data-parallel ranks, each a replica of its own; bounds count their gangs.
        "autoscaling_config": process_config.autoscaling(
            bounds.min * serving.data_parallel, bounds.max * serving.data_parallel, serving.max_active_seqs
        ),
    }
    application = {
        "name": process_config.APPLICATION,
        "route_prefix": "/",
        "import_path": process_config.BUILDER,
        "args": arguments,
        "deployments": [deployment],
    }
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},  # noqa: S104 - of its own pod
        "applications": [application],
    }
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _rendered(
    kind: k.Kind,
    record: RevisionRecord,
    owner: Owner,
    name: str,
    content: dict[str, Any],
    component: str = ENGINE,
) -> Rendered:
    """An object of a revision carries the renderer that its record was born with, and stays as it was."""
    return rendered(kind, owner, name, labels(owner, component, record.name), content, renderer=record.renderer)


def _unrenderable(resource: MoEDeployment) -> tuple[Problem, ...]:
    spec = resource.spec
    found = list(process_config.unsupported(resource))
    if spec.engine.kind is EngineKind.EXTERNAL or spec.hardware is None:
        found.append(Problem("spec.engine.kind", "External: an engine that runs elsewhere has no revision", "use VLLM"))
        return tuple(found)
    found += _clashing(resource)
    accelerator = spec.hardware.accelerator
    if accelerator != accelerators.CPU and accelerators.resource(accelerator) is None:
        known = ", ".join(f"{prefix}…" for prefix in accelerators.RESOURCES)
        message = f"{accelerator}: which resource a pod asks for is known of {known} and cpu"
        found.append(Problem("spec.hardware.accelerator", message, "use a name that begins so"))
    if accelerator == accelerators.CPU and spec.experts.redundant:
        found.append(Problem("spec.experts.redundant", "redundant experts need GPUs", "set it to 0"))
    return tuple(found)


def _clashing(resource: MoEDeployment) -> list[Problem]:
    """Claims that lie over each other or over what is ours: such a pod could not start."""
    taken = {"/dev/shm": "the engine's shared memory", "/tmp/ray": "Ray's", cluster.HOME: "ours"}  # noqa: S108
    found = []
    for claim in resource.spec.pod_template.claims:
        path = claim.path.rstrip("/")
        whose = next((whose for other, whose in taken.items() if _over(path, other)), None)
        if whose is not None:
            where, message = (
                f"spec.podTemplate.claims[{claim.name}].path",
                f"{claim.path} lies over a folder that is {whose}",
            )
            found.append(Problem(where, message, "mount it somewhere else, such as /models"))
        taken[path] = f"claim {claim.name}'s"
    return found


def _over(path: str, other: str) -> bool:
    return path == other or f"{other}/".startswith(f"{path}/") or f"{path}/".startswith(f"{other}/")
