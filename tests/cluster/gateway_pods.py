"""The kubelet of gateway pods: a real `python -m moe_gateway` for each, fed from the ConfigMap as that changes.

    with gateway_pods_running(plane, edge) as pods:
        pods.run(namespace)                  # from now on its gateway pods are processes
        pods.address(namespace, "moe")       # host:port of one that answers, waited for

kwok has given the pod its address by then, and called it ready; a process comes to life behind that address
(pod_network/sitecustomize.py) at the pod's own ports. What a pod has of the network is written into its configuration:
which address to bind, and where the names of Services and of the closed API lead.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from moe_api.annotations import DEPLOYMENT_LABEL
from moe_cli.processes import die_with_parent
from moe_core.addresses import GATEWAY_ADMIN_PORT
from moe_operator.names import GATEWAY_PORT, gateway_name
from tests.cluster.control_plane import ControlPlane, eventually
from tests.cluster.edge import CLOSED, Edge
from tests.cluster.operators import pod_environment
from tests.cluster.pod_network.sitecustomize import PODS

SYNC_S = 0.3
FILE_S = 10.0
"""A changed ConfigMap reaches its pods this late or later in a real cluster too: weights must come by command."""
SELECTOR = "app.kubernetes.io/component=gateway"


@dataclass
class Pod:
    """A gateway's process."""

    namespace: str
    deployment: str
    address: str
    folder: Path
    written: str
    process: subprocess.Popen[bytes]
    written_at: float

    def answers(self) -> bool:
        try:
            return requests.get(f"http://{self.address}:{GATEWAY_ADMIN_PORT}/readyz", timeout=2).ok
        except requests.RequestException:
            return False


class GatewayPods:
    """Follows the gateway pods of some namespaces, in a thread of its own."""

    def __init__(self, plane: ControlPlane, edge: Edge) -> None:
        self._plane = plane
        self._edge = edge
        self._folder = plane.folder / "gateways"
        self._folder.mkdir(exist_ok=True)
        self._namespaces: set[str] = set()
        self._pods: dict[str, Pod] = {}
        self._ending: list[subprocess.Popen[bytes]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="gateway-pods", daemon=True)

    def run(self, namespace: str) -> None:
        self._namespaces.add(namespace)

    def leave(self, namespace: str) -> None:
        """No more processes for that namespace."""
        self._namespaces.discard(namespace)

    def address(self, namespace: str, deployment: str) -> str:
        """host:port for clients of a gateway that answers."""

        def found() -> Pod | None:
            ours = [
                pod for pod in list(self._pods.values()) if (pod.namespace, pod.deployment) == (namespace, deployment)
            ]
            return next((pod for pod in ours if pod.answers()), None)

        pod: Pod = eventually(f"a gateway of {namespace}/{deployment} answers", found, timeout_s=60)
        return f"{pod.address}:{GATEWAY_PORT}"

    def logs(self, namespace: str) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob(f"{namespace}-*/log")))

    # -- the kubelet

    def _follow(self) -> None:
        while not self._stop.wait(SYNC_S):
            wanted: dict[str, dict[str, Any]] = {}
            for namespace in sorted(self._namespaces):
                path = f"/api/v1/namespaces/{namespace}/pods"
                answer = self._plane.ask("GET", path, labelSelector=SELECTOR)
                for pod in answer.json().get("items", ()):
                    if pod.get("status", {}).get("podIP") and not pod["metadata"].get("deletionTimestamp"):
                        wanted[pod["metadata"]["uid"]] = pod
            for uid in self._pods.keys() - wanted.keys():
                self._end(self._pods.pop(uid))
            for uid, pod in wanted.items():
                self._sync(uid, pod)
            self._ending = [process for process in self._ending if process.poll() is None]

    def _sync(self, uid: str, pod: dict[str, Any]) -> None:
        namespace, deployment = pod["metadata"]["namespace"], pod["metadata"]["labels"][DEPLOYMENT_LABEL]
        path = f"/api/v1/namespaces/{namespace}/configmaps/{gateway_name(deployment)}"
        found = self._plane.ask("GET", path)
        if not found.ok:
            return
        (text,) = found.json()["data"].values()
        known = self._pods.get(uid)
        if known is None:
            self._pods[uid] = self._start(namespace, deployment, pod, text)
        elif known.written != text and time.monotonic() - known.written_at >= FILE_S:
            self._write(known.folder, namespace, known.address, text)
            known.written, known.written_at = text, time.monotonic()

    def _start(self, namespace: str, deployment: str, pod: dict[str, Any], text: str) -> Pod:
        address = f"{self._edge.network}.{pod['status']['podIP'].removeprefix(PODS)}"
        folder = self._folder / f"{namespace}-{pod['metadata']['name']}"
        folder.mkdir()
        self._write(folder, namespace, address, text)
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "moe_gateway", "--config", str(folder / "gateway.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=pod_environment(self._edge.network) | self._account(pod),
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  it makes one system call and takes no lock
            )
        return Pod(namespace, deployment, address, folder, text, process, time.monotonic())

    def _account(self, pod: dict[str, Any]) -> dict[str, str]:
        """The credentials of a pod that has any: those of its own service account."""
        if not pod["spec"].get("automountServiceAccountToken", True):
            return {}
        account = self._plane.service_account(pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"])
        return {"KUBECONFIG": str(account)}

    def _write(self, folder: Path, namespace: str, address: str, text: str) -> None:
        """Its configuration, as that pod sees it; replaced at once, as kubelets do."""
        config = json.loads(text)
        key = folder / "key"
        key.write_text("sk-test")
        config |= {"host": address, "adminHost": address, "stateDir": str(folder)}
        if config.get("siblings"):
            config["siblings"] |= {"host": address, "peers": []}  # a name server is not there
        for revision in config["revisions"]:
            revision["url"] = self._edge.engine_url(namespace, revision["name"])
            revision.pop("boardUrl", None)
        for target in config.get("targets", ()):
            target["baseUrl"] = self._edge.engine_url(namespace, CLOSED)
            if target.get("apiKeyFile"):
                target["apiKeyFile"] = str(key)
        fresh = folder / "gateway.json.new"
        fresh.write_text(json.dumps(config))
        fresh.rename(folder / "gateway.json")

    def _end(self, pod: Pod) -> None:
        pod.process.terminate()
        self._ending.append(pod.process)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        for pod in self._pods.values():
            self._end(pod)
        for process in self._ending:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def gateway_pods_running(plane: ControlPlane, edge: Edge) -> Iterator[GatewayPods]:
    """Gateways for a while, all stopped in the end."""
    pods = GatewayPods(plane, edge)
    pods.start()
    try:
        yield pods
    finally:
        pods.stop()
