"""Who may reach which port: clients the gateway, the gateway the engine, the operator and the tuner what they command.

Everything else of a deployment's pods is closed, Ray's dashboard above all. Where the cluster's network plugin enforces
no policies these change nothing; Ray's token and the signatures of commands hold all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_api.annotations import DEPLOYMENT_LABEL
from moe_api.enums import EngineKind
from moe_api.v1alpha1 import MoEDeployment
from moe_core.addresses import BOARD_PORT, GATEWAY_ADMIN_PORT
from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_operator.names import (
    GATEWAY_PORT,
    GATEWAY_TELL_PORT,
    SERVE_PORT,
    Owner,
    engine_policy_name,
    gateway_name,
    labels,
)
from moe_operator.render.cluster import DASHBOARD_PORT, ENGINE, METRICS_PORT
from moe_operator.render.objects import Rendered, rendered

_COMPONENT = "app.kubernetes.io/component"
Peer = dict[str, Any]


def selector(owner: Owner, component: str) -> dict[str, str]:
    """Labels that find the pods of one part of a deployment, whatever their revision."""
    return {DEPLOYMENT_LABEL: owner.name, _COMPONENT: component}


def policies(resource: MoEDeployment, config: OperatorConfig, owner: Owner) -> tuple[Rendered, ...]:
    """A policy for the gateway's pods, and one for the engine's where we run it."""
    commanders = [_namespace(name) for name in sorted({config.namespace, config.tuner_namespace})]
    prometheus = _anywhere({"app.kubernetes.io/name": "prometheus"})
    gateways = {"podSelector": {"matchLabels": selector(owner, "gateway")}}
    gateway = [
        {"ports": [_port(GATEWAY_PORT)]},  # from everywhere: who may ask is the gateway's own business
        _rule((GATEWAY_ADMIN_PORT,), *commanders, prometheus),
        {"ports": [_told(resource.spec.gateway.workers)], "from": [gateways]},
    ]
    made = [_policy(owner, gateway_name(owner.name), "gateway", gateway)]
    if resource.spec.engine.kind is EngineKind.VLLM:
        kuberay = _anywhere({_COMPONENT: "kuberay-operator"})
        engine = [
            {"from": [{"podSelector": {"matchLabels": selector(owner, ENGINE)}}]},  # its own cluster, on every port
            _rule((SERVE_PORT,), gateways, kuberay),
            _rule((BOARD_PORT,), gateways, *commanders, prometheus),
            _rule((DASHBOARD_PORT,), kuberay),
            _rule((METRICS_PORT,), prometheus),
        ]
        made.append(_policy(owner, engine_policy_name(owner.name), ENGINE, engine))
    return tuple(made)


def _policy(owner: Owner, name: str, component: str, ingress: Sequence[Mapping[str, Any]]) -> Rendered:
    spec = {
        "podSelector": {"matchLabels": selector(owner, component)},
        "policyTypes": ["Ingress"],
        "ingress": list(ingress),
    }
    return rendered(k.NETWORK_POLICY, owner, name, labels(owner, component), {"spec": spec})


def _rule(ports: Sequence[int], *peers: Peer) -> dict[str, Any]:
    return {"ports": [_port(number) for number in ports], "from": list(peers)}


def _port(number: int) -> dict[str, Any]:
    return {"protocol": "TCP", "port": number}


def _told(workers: int) -> dict[str, Any]:
    """Ports on which the workers of a gateway pod hear the others."""
    last = GATEWAY_TELL_PORT + workers - 1
    port = {"protocol": "UDP", "port": GATEWAY_TELL_PORT}
    return port if last == GATEWAY_TELL_PORT else {**port, "endPort": last}


def _namespace(name: str) -> Peer:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _anywhere(pod_labels: Mapping[str, str]) -> Peer:
    """Pods with these labels in any namespace: where KubeRay and Prometheus live is the cluster's choice."""
    return {"namespaceSelector": {}, "podSelector": {"matchLabels": dict(pod_labels)}}
