"""The Ray cluster of a revision: a head without GPUs, and one group of workers in which each replica has its own pods.

What KubeRay adds by itself, and we leave to it (v1.6, controllers/ray/common/pod.go): the `ray start` command, liveness
and readiness probes (a worker is ready once its Serve proxy answers), an init container that waits for the head, the
autoscaler's container with its service account and role (only where the head names none), and the cluster's token.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_api.annotations import DEPLOYMENT_LABEL
from moe_api.enums import CacheKind, GcsFaultTolerance
from moe_api.v1alpha1 import MoEDeployment, MoEDeploymentSpec
from moe_core.addresses import BOARD_PORT
from moe_core.process_config import ENGINE_ENV
from moe_operator.names import SERVE_PORT, Owner, labels
from moe_operator.render import accelerators
from moe_operator.render.pods import (
    Container,
    Env,
    Json,
    Port,
    Resources,
    Volume,
    filled,
    pod_security,
    secret_key,
    spread,
    toleration,
    unprivileged,
)
from moe_operator.render.quantity import canonical, size
from moe_planner.plan import Plan

RAY_VERSION = "2.60.0"
"""Of the images that we build. KubeRay asks for it where token authentication is on."""
WORKERS = "workers"
ENGINE = "engine"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
HOME = "/var/lib/moestack"
"""Folder of the engine's pods that is ours: nothing of a person's is mounted there."""
CACHE_PATH = f"{HOME}/cache"
CLAIMS_PATH = f"{HOME}/claims"
GIB = 2**30
MIB = 2**20
DASHBOARD_PORT, _GCS_PORT, METRICS_PORT = 8265, 6379, 8080
_IDLE_S = 300
"""An idle worker keeps its pod for this long: reading a checkpoint again costs minutes."""


@dataclass(frozen=True)
class Engine:
    """What the pods of one revision have in common."""

    resource: MoEDeployment
    plan: Plan
    image: str
    pull_policy: str
    owner: Owner
    revision: str

    @property
    def spec(self) -> MoEDeploymentSpec:
        return self.resource.spec

    @property
    def accelerator(self) -> str:
        return self.spec.hardware.accelerator if self.spec.hardware is not None else accelerators.CPU


def service_spec(engine: Engine) -> Json:
    """Spec of the RayService but its serveConfigV2."""
    return {
        # An operator of ours moves traffic between RayServices; KubeRay never makes a second cluster behind its back.
        "upgradeStrategy": {"type": "None"},
        # Requests go straight to pods with replicas. A deployment that may scale to zero keeps the head as its door.
        **({"excludeHeadPodFromServeSvc": True} if engine.spec.replicas.min > 0 else {}),
        "rayClusterConfig": _cluster(engine),
    }


def _cluster(engine: Engine) -> Json:
    gcs = engine.spec.cluster.gcs_fault_tolerance
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": _IDLE_S,
            "imagePullPolicy": engine.pull_policy,
            "resources": _AUTOSCALER.to_json(),
            "securityContext": unprivileged(),
            "volumeMounts": [_TOKEN.mount()],
        },
        **({"gcsFaultToleranceOptions": _redis(engine.spec)} if gcs.kind is GcsFaultTolerance.REDIS else {}),
        "headGroupSpec": {
            # No CPU and no GPU in Ray's own books: nothing but Serve's controller, the board and proxies runs here.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0", **_object_store(256 * MIB)},  # noqa: S104
            "template": _head(engine),
        },
        "workerGroupSpecs": [
            {
                "groupName": WORKERS,
                "replicas": engine.spec.replicas.min,
                "minReplicas": engine.spec.replicas.min,
                "maxReplicas": engine.spec.replicas.ceiling,
                "numOfHosts": engine.plan.nodes_per_replica,
                "rayStartParams": {"num-cpus": str(_slots(engine.plan)), **_object_store(GIB)},
                "template": _worker(engine),
            }
        ],
    }


def _slots(plan: Plan) -> int:
    """CPUs of one pod in Ray's own books, which say nothing about cores: one for each rank, one for each engine that
    begins here (one for each data-parallel rank), and one for what prepares them."""
    return plan.gpus_per_node + max(1, plan.gpus_per_node // plan.tensor) + 1


def _object_store(number: int) -> Json:
    """Ray would take a third of the memory for objects; the engine passes none through it that are large."""
    return {"object-store-memory": str(number)}


def _redis(spec: MoEDeploymentSpec) -> Json:
    gcs = spec.cluster.gcs_fault_tolerance
    reference = gcs.password_secret_ref
    password = None if reference is None else {"valueFrom": {"secretKeyRef": secret_key(reference)}}
    return filled(redisAddress=gcs.address, redisPassword=password)


_AUTOSCALER = Resources({"cpu": "100m", "memory": "512Mi"}, {"cpu": "500m", "memory": "1Gi"})
_HEAD = Resources({"cpu": "1", "memory": "4Gi"}, {"memory": "8Gi"})
_TOKEN = Volume(
    "autoscaler-token",
    "/var/run/secrets/kubernetes.io/serviceaccount",
    {
        "projected": {
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            ]
        }
    },
    read_only=True,
)
"""The autoscaler's token, mounted into its container alone: no code of a model or of the board can read it."""


def _head(engine: Engine) -> Json:
    memory = Volume("shared-mem", "/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": size(GIB)}})  # noqa: S108
    container = Container(
        name="ray-head",
        image=engine.image,
        pull_policy=engine.pull_policy,
        ports=(
            Port("gcs-server", _GCS_PORT),
            Port("dashboard", DASHBOARD_PORT),
            Port("serve", SERVE_PORT),
            Port("metrics", METRICS_PORT),
            Port("board", BOARD_PORT),
        ),
        env=_environment(engine, secrets=False),
        volumes=(memory,),
        resources=_HEAD,
    )
    volumes = [memory.volume(), _TOKEN.volume()]
    # No service account of the spec's: KubeRay makes one for the autoscaler only where the head names none.
    return _pod(engine, container, volumes, {})


def _worker(engine: Engine) -> Json:
    pods, volumes = engine.spec.pod_template, _worker_volumes(engine)
    container = Container(
        name="ray-worker",
        image=engine.image,
        pull_policy=engine.pull_policy,
        ports=(Port("serve", SERVE_PORT), Port("metrics", METRICS_PORT)),
        env=_environment(engine, secrets=True),
        volumes=volumes,
        resources=_worker_resources(engine),
    )
    selector = {DEPLOYMENT_LABEL: engine.owner.name, "app.kubernetes.io/component": ENGINE}
    gpus = accelerators.resource(engine.accelerator)
    own = [] if gpus is None else [{"key": gpus, "operator": "Exists", "effect": "NoSchedule"}]
    given = [toleration(one) for one in pods.tolerations]
    scheduling = filled(
        # Labels that a person chose know the cluster better than ours.
        affinity={} if pods.node_selector else accelerators.affinity(engine.accelerator),
        nodeSelector=dict(pods.node_selector),
        tolerations=[*given, *(one for one in own if one not in given)],
        topologySpreadConstraints=[spread(one, selector) for one in pods.topology_spread],
        serviceAccountName=pods.service_account_name,
        terminationGracePeriodSeconds=60,
    )
    return _pod(engine, container, [volume.volume() for volume in volumes], scheduling)


def _pod(engine: Engine, container: Container, volumes: list[Json], more: Json) -> Json:
    pods, cluster = engine.spec.pod_template, engine.spec.cluster
    own = labels(engine.owner, ENGINE, engine.revision)
    # KubeRay finds its pods by this label's own value of it.
    del own["app.kubernetes.io/name"]
    queue = {} if cluster.queue is None else {QUEUE_LABEL: cluster.queue}
    metadata = filled(labels={**pods.labels, **queue, **own}, annotations=dict(pods.annotations))
    security = pods.security
    return {
        "metadata": metadata,
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": pod_security(security.run_as_user, security.run_as_group, security.fs_group),
            "containers": [container.to_json()],
            "volumes": volumes,
            **filled(
                imagePullSecrets=[{"name": name} for name in pods.image_pull_secrets],
                priorityClassName=cluster.priority,
            ),
            **more,
        },
    }


def _environment(engine: Engine, *, secrets: bool) -> tuple[Env, ...]:
    """Ours, then the spec's own. Secrets go where the engine runs, and nowhere else."""
    found = {name: Env(name, value) for name, value in ENGINE_ENV.items()}
    if engine.accelerator != accelerators.CPU:
        # Serve's own proxy costs ten times as much of a core for each request. On a cpu the engine is what costs.
        found |= {name: Env(name, "1") for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")}
    if secrets:
        places = {"HF_HOME": f"{CACHE_PATH}/huggingface", "VLLM_CACHE_ROOT": f"{CACHE_PATH}/vllm"}
        found |= {name: Env(name, value) for name, value in places.items()}
        if engine.spec.model.token_secret_ref is not None:
            found["HF_TOKEN"] = Env("HF_TOKEN", secret=engine.spec.model.token_secret_ref)
    for given in engine.spec.pod_template.env:
        if secrets or given.secret_ref is None:
            found[given.name] = Env(given.name, given.value, given.secret_ref)
    return tuple(found[name] for name in sorted(found))


def _worker_volumes(engine: Engine) -> tuple[Volume, ...]:
    model, pods = engine.spec.model, engine.spec.pod_template
    shared = size(engine.plan.shared_memory_bytes) if pods.shared_memory is None else canonical(pods.shared_memory)
    found = [
        Volume("shared-mem", "/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": shared}}),  # noqa: S108
        Volume("model-cache", CACHE_PATH, _cache(engine.spec)),
    ]
    claims = {claim.name: claim.path for claim in pods.claims}
    if model.source is not None and model.source.startswith("pvc://"):
        claims.setdefault(claim_of(model.source), f"{CLAIMS_PATH}/{claim_of(model.source)}")
    for number, (name, path) in enumerate(sorted(claims.items())):
        source = {"persistentVolumeClaim": {"claimName": name, "readOnly": True}}
        found.append(Volume(f"claim-{number}", path, source, read_only=True))
    return tuple(found)


def claim_of(source: str) -> str:
    """Claim of a pvc:// address."""
    return source.removeprefix("pvc://").split("/", 1)[0]


def _cache(spec: MoEDeploymentSpec) -> Json:
    cache = spec.model.cache
    match cache.kind:
        case CacheKind.CLAIM:
            return {"persistentVolumeClaim": {"claimName": cache.claim_name}}
        case CacheKind.NODE_PATH:
            return {"hostPath": {"path": cache.path, "type": "Directory"}}
        case CacheKind.EPHEMERAL:
            return {"emptyDir": {} if cache.size is None else {"sizeLimit": canonical(cache.size)}}


def _worker_resources(engine: Engine) -> Resources:
    """What the spec asks for, over defaults for a pod of this many ranks."""
    ranks, given = engine.plan.gpus_per_node, engine.spec.pod_template.resources
    gpus = accelerators.resource(engine.accelerator)
    requests: dict[str, str] = dict(given.requests)
    limits: dict[str, str] = dict(given.limits)
    if gpus is not None:
        limits = {**limits, gpus: str(ranks)}
        requests.pop(gpus, None)  # the API server has it equal to the limit
        own = {"cpu": str(4 * ranks), "memory": size(16 * GIB * ranks)}
    else:
        own = {"cpu": str(ranks), "memory": size(4 * GIB * ranks)}
    # A limit without a request is a request of that size; a default must not pass it.
    requests = {**{name: value for name, value in own.items() if name not in limits}, **requests}
    return Resources(requests, limits)
