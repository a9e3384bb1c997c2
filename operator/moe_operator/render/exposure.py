"""The ways from clients to a gateway: its Service, and an Ingress or an HTTPRoute where one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_api.enums import ExposureKind
from moe_api.v1alpha1 import MoEDeployment
from moe_core.process_config import Problem
from moe_kube import objects as k
from moe_operator.names import Owner, gateway_name, labels
from moe_operator.render.objects import Rendered, rendered
from moe_operator.render.pods import filled

PUBLIC_PORT = 80
"""Of the Service: clients in the cluster ask http://NAME-gateway/v1."""


def problems_of(resource: MoEDeployment) -> tuple[Problem, ...]:
    """Why clients could not reach the gateway as asked."""
    spec = resource.spec.gateway.exposure
    if spec.kind is ExposureKind.HTTP_ROUTE and spec.class_name is None:
        message = "HTTPRoute joins no Gateway"
        return (Problem("spec.gateway.exposure.className", message, "name the Gateway that it joins"),)
    return ()


def service(resource: MoEDeployment, owner: Owner, selector: Mapping[str, str]) -> Rendered:
    """The Service of clients."""
    spec = resource.spec.gateway.exposure
    balanced = spec.kind is ExposureKind.LOAD_BALANCER
    content = {
        "spec": {
            "type": "LoadBalancer" if balanced else "ClusterIP",
            "selector": dict(selector),
            "ports": [{"name": "http", "port": PUBLIC_PORT, "targetPort": "http", "protocol": "TCP"}],
        }
    }
    annotations = dict(spec.annotations) if spec.kind in (ExposureKind.LOAD_BALANCER, ExposureKind.CLUSTER_IP) else {}
    return rendered(k.SERVICE, owner, gateway_name(owner.name), labels(owner, "gateway"), content, annotations)


def routes(resource: MoEDeployment, owner: Owner) -> tuple[Rendered, ...]:
    """The Ingress or the HTTPRoute, where there is to be one."""
    spec = resource.spec.gateway.exposure
    match spec.kind:
        case ExposureKind.INGRESS:
            return (_object(k.INGRESS, resource, owner, _ingress(resource, owner)),)
        case ExposureKind.HTTP_ROUTE:
            return (_object(k.HTTP_ROUTE, resource, owner, _route(resource, owner)),)
        case _:
            return ()


def _object(kind: k.Kind, resource: MoEDeployment, owner: Owner, spec: dict[str, Any]) -> Rendered:
    annotations = dict(resource.spec.gateway.exposure.annotations)
    return rendered(kind, owner, gateway_name(owner.name), labels(owner, "gateway"), {"spec": spec}, annotations)


def _ingress(resource: MoEDeployment, owner: Owner) -> dict[str, Any]:
    spec = resource.spec.gateway.exposure
    backend = {"service": {"name": gateway_name(owner.name), "port": {"name": "http"}}}
    return {
        "rules": [{"host": spec.host, "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}],
        **filled(
            ingressClassName=spec.class_name,
            tls=[] if spec.tls_secret_name is None else [{"hosts": [spec.host], "secretName": spec.tls_secret_name}],
        ),
    }


def _route(resource: MoEDeployment, owner: Owner) -> dict[str, Any]:
    spec = resource.spec.gateway.exposure
    parent = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": spec.class_name}
    backend = {"group": "", "kind": "Service", "name": gateway_name(owner.name), "port": PUBLIC_PORT, "weight": 1}
    return {
        "parentRefs": [parent],
        "hostnames": [spec.host],
        "rules": [{"matches": [{"path": {"type": "PathPrefix", "value": "/"}}], "backendRefs": [backend]}],
    }
