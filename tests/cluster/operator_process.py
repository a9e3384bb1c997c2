"""The operator as a process, by its real command line, on a test control plane.

with operator_running(plane, edge.network) as operator:   # until its caches are filled and it leads
    operator.metric("moestack_operator_api_calls_total", verb="apply", code="200")
    operator.stop(), operator.kill(), operator.log
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from moe_core.signing import Signer
from tests.cluster.component import Component, start, start_on_free_ports
from tests.cluster.control_plane import ROOT, ControlPlane, eventually

NAMESPACE = "moestack-system"
ENGINE_IMAGE = "registry.example.com/moestack/engine@sha256:" + "a" * 64
GATEWAY_IMAGE = "registry.example.com/moestack/gateway@sha256:" + "b" * 64
PARTS = ("api", "core", "planner", "kube", "operator", "serving", "gateway", "tuner", "cli")
POD_NETWORK = Path(__file__).parent / "pod_network"


def python_path(*first: Path) -> str:
    """PYTHONPATH of this checkout's own code, whatever is installed."""
    return os.pathsep.join(str(path) for path in (*first, *(ROOT / part for part in PARTS), ROOT))


def pod_environment(network: str) -> dict[str, str]:
    """Environment of a process that reaches pods and Services (pod_network/sitecustomize.py)."""
    return {**os.environ, "PYTHONPATH": python_path(POD_NETWORK), "POD_NETWORK": network}


def make_namespace(plane: ControlPlane) -> None:
    """The operator's own namespace, and what its user may do."""
    plane.ask("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "test-operator"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "operator"}],
    }
    plane.ask("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding)


@dataclass
class Operator:
    """A running operator."""

    component: Component
    port: int
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return self.component.log.read_text()

    def get(self, path: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=10)

    def leads(self) -> bool:
        try:
            return bool(self.get("/readyz").json().get("leader"))
        except requests.RequestException:
            return False

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of that name whose labels include these."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            if line.split("{")[0].split(" ")[0] == name and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def stop(self) -> None:
        self.component.stop()

    def kill(self) -> None:
        self.component.kill()


def start_operator(
    plane: ControlPlane, network: str, *, program: tuple[str, ...] = ("-m", "moe_operator"), **changes: Any
) -> Operator:
    """Starts it and waits until it leads. `changes` are fields of its configuration."""
    folder = plane.folder / "operator"
    folder.mkdir(exist_ok=True)
    key = folder / "operator.pem"
    if not key.exists():
        Signer.generate().save(key)
    config: dict[str, Any] = {
        "namespace": NAMESPACE,
        "engineImage": ENGINE_IMAGE,
        "gatewayImage": GATEWAY_IMAGE,
        "trustedKeys": [Signer.load(key).public_pem()],
        "signingKeyFile": str(key),
        "leaseS": 5,
        "logLevel": "DEBUG",
        **changes,
    }

    def start_with(ports: list[int]) -> Component:
        file = folder / "operator.json"
        file.write_text(json.dumps({**config, "port": ports[0]}))
        kubeconfig = plane.kubeconfigs["operator"]
        command = [sys.executable, *program, "--config", file, "--kubeconfig", kubeconfig]
        url = f"http://127.0.0.1:{ports[0]}/readyz"

        def ready() -> bool:
            try:
                return requests.get(url, timeout=5).ok
            except requests.RequestException:
                return False

        return start("operator", command, plane.logs / "operator.log", ready, environment=pod_environment(network))

    component, ports = start_on_free_ports(1, start_with)
    operator = Operator(component, ports[0], folder, config)
    eventually("the operator leads", operator.leads)
    return operator


@contextmanager
def operator_running(plane: ControlPlane, network: str, **changes: Any) -> Iterator[Operator]:
    """An operator for a while, with RBAC, stopped in the end."""
    make_namespace(plane)
    operator = start_operator(plane, network, **changes)
    try:
        yield operator
    finally:
        operator.stop()
