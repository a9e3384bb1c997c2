"""The gateway of one MoEDeployment: its configuration, its pods, and the ways to it.

What a running gateway can take up (revisions, weights, targets, budget, SLO) goes into the ConfigMap and starts no
pod anew. What it cannot (ports, folders, the log level, which keys are mounted) is in the pod template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_api.enums import AuthMode, EngineKind, Provider
from moe_api.v1alpha1 import FallbackTarget, MoEDeployment
from moe_core import process_config
from moe_core.addresses import GATEWAY_ADMIN_PORT, board_url, gateway_admin_name
from moe_core.config import GatewayConfig, GatewayLimits, OperatorConfig, RevisionConfig, SiblingsConfig, TargetConfig
from moe_core.process_config import EXTERNAL, Problem
from moe_kube import objects as k
from moe_kube.managed import digest
from moe_operator.names import (
    GATEWAY_PORT,
    GATEWAY_TELL_PORT,
    Owner,
    engine_policy_name,
    gateway_budget_name,
    gateway_name,
    labels,
    serve_url,
)
from moe_operator.render import books, exposure, network
from moe_operator.render.objects import NotRenderable, Rendered, rendered
from moe_operator.render.pods import Container, Json, Port, Resources, Volume, filled, pod_security
from moe_operator.render.quantity import size

GATEWAY = "gateway"
CONFIG_FILE = "gateway.json"
START_FIELDS = (
    *("deployment", "host", "port", "admin_host", "admin_port", "state_dir", "log_level", "budget_store"),
    *("siblings", "workers"),
)
"""Fields of its configuration that a running gateway cannot change."""
ADDED_FIELDS = (
    "auth",
    "tracing",
    "log_ok_share",
    "log_prompts",
    "egress",
    "budget_store",
    "tenant_budgets",
    "price_file",
    "gpu_usd_per_hour",
    "siblings",
    "workers",
    "mid_stream",
    "sessions",
    "record",
)
"""Fields that gateways of the first release do not know: written only where they say something, so that an operator
that is upgraded changes nothing for a gateway that runs."""
START_ANNOTATION = "moestack.dev/start-config"
_CONFIG_DIR, _KEYS_DIR, _TENANTS_DIR, _SIBLINGS_DIR, _STATE_DIR = (
    "/etc/moestack/config",
    "/etc/moestack/keys",
    "/etc/moestack/tenants",
    "/etc/moestack/siblings",
    "/var/lib/moestack",
)
DRAIN_S = 120
"""A stream of a slow reader takes minutes; a pod that is being replaced lets it end."""
LEAVE_S = 5
"""From the pod's removal from Services to its last new request."""
_TARGET_CPU_PERCENT = 60


@dataclass(frozen=True)
class LeftOut:
    """A fallback target that the gateway is not told of, and why."""

    name: str
    field: str
    why: str


def objects(
    resource: MoEDeployment,
    *,
    revisions: Sequence[str],
    weights: Mapping[str, int],
    weights_version: int,
    config: OperatorConfig,
    owner: Owner,
) -> tuple[Rendered, ...]:
    """Everything of the gateway. Raises NotRenderable where it could not keep what is asked for."""
    problems = problems_of(resource, config)
    if problems:
        raise NotRenderable(*problems)
    made = gateway_config(
        resource, revisions=revisions, weights=weights, weights_version=weights_version, config=config, owner=owner
    )
    return (
        _config_map(made, owner),
        *(books.objects(owner) if books.in_object(resource, paid=_paid(resource)) else ()),
        _deployment(resource, made, config, owner),
        *_services(resource, owner),
        _autoscaler(resource, owner),
        _budget(owner),
        *exposure.routes(resource, owner),
        *network.policies(resource, config, owner),
    )


def problems_of(resource: MoEDeployment, config: OperatorConfig) -> tuple[Problem, ...]:
    """Why there can be no gateway for this resource."""
    found = [*process_config.unsupported(resource), *exposure.problems_of(resource)]
    found += books.problems_of(resource, paid=_paid(resource))
    if config.gateway_image is None:
        message = "the operator knows no image of the gateway"
        found.append(Problem("gatewayImage", message, "set it in the operator's configuration"))
    return tuple(found)


def names(owner: Owner) -> frozenset[str]:
    """Names of what `objects` makes."""
    own = (gateway_name, gateway_admin_name, gateway_budget_name, engine_policy_name)
    return frozenset(name(owner.name) for name in own)


def left_out(resource: MoEDeployment) -> tuple[LeftOut, ...]:
    """Fallback targets that the gateway may not or cannot use, with the reason of each."""
    found = []
    for index, target in enumerate(resource.spec.fallback.targets):
        where = f"spec.fallback.targets[{index}]"
        problem = process_config.unusable(target, where)
        why = process_config.forbidden(resource.spec, target)
        if why is not None:
            found.append(LeftOut(target.name, where, why))
        elif problem is not None:
            found.append(LeftOut(target.name, problem.field, f"{problem.message}; {problem.remedy}"))
    return tuple(found)


def used(resource: MoEDeployment) -> tuple[FallbackTarget, ...]:
    """Fallback targets that the gateway is told of."""
    out = {one.name for one in left_out(resource)}
    return tuple(target for target in resource.spec.fallback.targets if target.name not in out)


def gateway_config(
    resource: MoEDeployment,
    *,
    revisions: Sequence[str],
    weights: Mapping[str, int],
    weights_version: int,
    config: OperatorConfig,
    owner: Owner,
) -> GatewayConfig:
    """What each pod of the gateway is told."""
    known = [
        RevisionConfig(name=name, url=serve_url(owner.namespace, name), board_url=board_url(owner.namespace, name))
        for name in revisions
    ]
    engine = resource.spec.engine
    if engine.kind is EngineKind.EXTERNAL and engine.url is not None:
        known.append(RevisionConfig(name=EXTERNAL, url=engine.url, metrics=process_config.foreign_metrics(engine)))
        weights = {EXTERNAL: 100} if not any(weights.values()) else {EXTERNAL: 0, **weights}
    return GatewayConfig(
        deployment=resource.key,
        model=resource.spec.model.id,
        host="0.0.0.0",  # noqa: S104 - of its own pod
        port=GATEWAY_PORT,
        admin_host="0.0.0.0",  # noqa: S104
        admin_port=GATEWAY_ADMIN_PORT,
        revisions=tuple(known),
        weights={revision.name: weights.get(revision.name, 0) for revision in known},
        weights_version=weights_version,
        slo=process_config.slo(resource),
        tiers=process_config.tiers(resource.spec),
        targets=tuple(_target(target) for target in used(resource)),
        spill=process_config.spill(resource.spec.fallback),
        tenant_budgets=process_config.tenant_budgets(resource.spec.fallback),
        budget_store=books.config(resource, owner, paid=_paid(resource)),
        siblings=_siblings(resource, owner),
        workers=resource.spec.gateway.workers,
        egress=process_config.egress(resource.spec),
        mid_stream=process_config.mid_stream(resource.spec),
        limits=GatewayLimits(drain_s=DRAIN_S),
        trusted_keys=config.trusted_keys,
        state_dir=_STATE_DIR,
        log_level=config.log_level,
        auth=process_config.auth(resource, _TENANTS_DIR),
        sessions=resource.spec.gateway.sessions.by,
        record=process_config.record(resource.spec.gateway, _STATE_DIR),
    )


def _paid(resource: MoEDeployment) -> bool:
    """Whether anything can be spent: only a server of one's own may be free."""
    prices = ((target.provider, target.price) for target in used(resource))
    return any(
        provider is not Provider.OPENAI_COMPATIBLE or price.input_usd_per_m_tokens or price.output_usd_per_m_tokens
        for provider, price in prices
    )


def _siblings(resource: MoEDeployment, owner: Owner) -> SiblingsConfig:
    """How pods find one another: by the headless Service, whose name is looked up again as pods come and go."""
    spec = resource.spec.gateway
    return SiblingsConfig(
        port=GATEWAY_TELL_PORT,
        workers=spec.workers,
        peers=(f"{gateway_admin_name(owner.name)}.{owner.namespace}.svc",),
        key_file=None if spec.siblings_secret_ref is None else f"{_SIBLINGS_DIR}/key",
    )


def _resources(workers: int) -> Resources:
    requests = {"cpu": f"{500 * workers}m", "memory": f"{256 * workers}Mi"}
    return Resources(requests, {"memory": f"{workers}Gi"})


def _target(target: FallbackTarget) -> TargetConfig:
    return process_config.target_config(target, None if target.secret_ref is None else f"{_KEYS_DIR}/{target.name}")


def _config_map(made: GatewayConfig, owner: Owner) -> Rendered:
    document = made.to_json()
    for name in ADDED_FIELDS:
        field = GatewayConfig.model_fields[name]
        if getattr(made, name) == field.default:
            document.pop(field.alias or name, None)
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    return rendered(
        k.CONFIG_MAP, owner, gateway_name(owner.name), labels(owner, GATEWAY), {"data": {CONFIG_FILE: text}}
    )


def _deployment(resource: MoEDeployment, made: GatewayConfig, config: OperatorConfig, owner: Owner) -> Rendered:
    pods = resource.spec.pod_template
    volumes = _volumes(resource, owner)
    container = Container(
        name=GATEWAY,
        image=config.gateway_image or "",
        pull_policy=config.image_pull_policy,
        command=("python", "-m", "moe_gateway", "--config", f"{_CONFIG_DIR}/{CONFIG_FILE}"),
        ports=(Port("http", GATEWAY_PORT), Port("admin", GATEWAY_ADMIN_PORT)),
        volumes=volumes,
        resources=_resources(made.workers),
        read_only_root=True,
        more={
            "startupProbe": _probe("/healthz", period_s=1, failures=60),
            "livenessProbe": _probe("/healthz", period_s=10, failures=3),
            "readinessProbe": _probe("/readyz", period_s=2, failures=2),
            "lifecycle": {"preStop": {"sleep": {"seconds": LEAVE_S}}},
        },
    )
    start = made.model_dump(mode="json", include=set(START_FIELDS))
    for name in ("siblings", "workers"):  # as above: what says nothing starts no pod anew
        if getattr(made, name) == GatewayConfig.model_fields[name].default:
            del start[name]
    selector = network.selector(owner, GATEWAY)
    template = {
        "metadata": {"labels": labels(owner, GATEWAY), "annotations": {START_ANNOTATION: digest(start)[:16]}},
        "spec": {
            **_account(made, owner),
            "enableServiceLinks": False,
            "securityContext": pod_security(),
            "terminationGracePeriodSeconds": LEAVE_S + DRAIN_S + 15,
            "containers": [container.to_json()],
            "volumes": [volume.volume() for volume in volumes],
            "topologySpreadConstraints": [
                _apart(key, selector) for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
            ],
            **filled(imagePullSecrets=[{"name": name} for name in pods.image_pull_secrets]),
        },
    }
    spec = {
        # No replicas: they are the autoscaler's.
        "selector": {"matchLabels": selector},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": template,
    }
    return rendered(k.DEPLOYMENT, owner, gateway_name(owner.name), labels(owner, GATEWAY), {"spec": spec})


def _account(made: GatewayConfig, owner: Owner) -> Json:
    """Pods have the cluster's credentials only where their books are an object of it."""
    if made.budget_store.kind != "Object":
        return {"automountServiceAccountToken": False}
    return {"automountServiceAccountToken": True, "serviceAccountName": gateway_name(owner.name)}


def _volumes(resource: MoEDeployment, owner: Owner) -> tuple[Volume, ...]:
    """Keys are files of their own, never variables: one key of a Secret each, followed when it is rotated."""
    found = [
        Volume("config", _CONFIG_DIR, {"configMap": {"name": gateway_name(owner.name)}}, read_only=True),
        Volume("state", _STATE_DIR, {"emptyDir": {"sizeLimit": size(64 * 2**20)}}),
    ]
    keys = [
        {"secret": {"name": ref.name, "items": [{"key": ref.key, "path": target.name}]}}
        for target in used(resource)
        if (ref := target.secret_ref) is not None
    ]
    if keys:
        found.append(Volume("keys", _KEYS_DIR, {"projected": {"sources": keys}}, read_only=True))
    auth = resource.spec.gateway.auth
    if auth.mode is AuthMode.API_KEYS and auth.secret_name is not None:
        found.append(Volume("tenants", _TENANTS_DIR, {"secret": {"secretName": auth.secret_name}}, read_only=True))
    told = resource.spec.gateway.siblings_secret_ref
    if told is not None:
        source = {"secretName": told.name, "items": [{"key": told.key, "path": "key"}]}
        found.append(Volume("siblings", _SIBLINGS_DIR, {"secret": source}, read_only=True))
    return (*found, *books.volumes(resource, paid=_paid(resource)))


def _probe(path: str, *, period_s: int, failures: int) -> Json:
    return {
        "httpGet": {"path": path, "port": "admin", "scheme": "HTTP"},
        "periodSeconds": period_s,
        "timeoutSeconds": 2,
        "failureThreshold": failures,
    }


def _apart(topology_key: str, selector: Mapping[str, str]) -> Json:
    return {
        "topologyKey": topology_key,
        "maxSkew": 1,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": dict(selector)},
    }


def _services(resource: MoEDeployment, owner: Owner) -> tuple[Rendered, Rendered]:
    """The address of clients, and a headless one whose EndpointSlices name every pod, ready or not."""
    selector = network.selector(owner, GATEWAY)
    admin = {
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector,
            "ports": [{"name": "admin", "port": GATEWAY_ADMIN_PORT, "targetPort": "admin", "protocol": "TCP"}],
        }
    }
    return (
        exposure.service(resource, owner, selector),
        rendered(k.SERVICE, owner, gateway_admin_name(owner.name), labels(owner, GATEWAY), admin),
    )


def _autoscaler(resource: MoEDeployment, owner: Owner) -> Rendered:
    replicas = resource.spec.gateway.replicas
    target = {"type": "Utilization", "averageUtilization": _TARGET_CPU_PERCENT}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": gateway_name(owner.name)},
        "minReplicas": replicas.min,
        "maxReplicas": replicas.max,
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
    }
    return rendered(
        k.HORIZONTAL_POD_AUTOSCALER, owner, gateway_name(owner.name), labels(owner, GATEWAY), {"spec": spec}
    )


def _budget(owner: Owner) -> Rendered:
    spec = {
        "maxUnavailable": 1,
        "selector": {"matchLabels": network.selector(owner, GATEWAY)},
        # A pod that does not answer must not hold up the drain of its node.
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return rendered(k.POD_DISRUPTION_BUDGET, owner, gateway_name(owner.name), labels(owner, GATEWAY), {"spec": spec})
