"""Names, labels and owner references of what one MoEDeployment owns: deterministic, and within their length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_api.annotations import API_VERSION, DEPLOYMENT_LABEL, KIND, NAME_MAX, OPERATOR_MANAGER, REVISION_LABEL

HASH_CHARS = 10
SERVE_PORT = 8000
GATEWAY_PORT = 8000
GATEWAY_TELL_PORT = 8002
"""Of a pod's first worker (UDP); each further one takes the next."""
MANAGED_BY = {"app.kubernetes.io/managed-by": OPERATOR_MANAGER}


@dataclass(frozen=True, slots=True)
class Owner:
    """The MoEDeployment that owns what is made."""

    namespace: str
    name: str
    uid: str

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def reference(self) -> dict[str, Any]:
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def labels(owner: Owner, component: str, revision: str | None = None) -> dict[str, str]:
    """The recommended labels of a part: engine, gateway, board or monitoring."""
    found = {
        "app.kubernetes.io/name": "moestack",
        "app.kubernetes.io/instance": owner.name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "moestack",
        **MANAGED_BY,
        DEPLOYMENT_LABEL: owner.name,
    }
    if revision is not None:
        found[REVISION_LABEL] = revision
    return found


def revision_name(deployment: str, digest: str) -> str:
    """Name of a revision, its RayService and its ControllerRevision: 47 characters at most."""
    return f"{deployment[:NAME_MAX]}-{digest[:HASH_CHARS]}"


def gateway_name(deployment: str) -> str:
    """Name of the gateway's Deployment, its Service, ConfigMap, autoscaler and budget: the address of clients."""
    return f"{deployment}-gateway"


def gateway_budget_name(deployment: str) -> str:
    """Name of the ConfigMap in which gateways keep their books."""
    return f"{deployment}-gateway-budget"


def engine_policy_name(deployment: str) -> str:
    """Name of the NetworkPolicy, and of the PodMonitor, of a deployment's engines."""
    return f"{deployment}-engine"


def serve_url(namespace: str, revision: str) -> str:
    """OpenAI base of a revision: the Service that KubeRay keeps on the pods that serve."""
    return f"http://{revision}-serve-svc.{namespace}.svc:{SERVE_PORT}/v1"
