"""A Prometheus on the node, outside its pods. What the PodMonitors would have it read, it is told by HTTP: Debian's
Prometheus is built without Kubernetes' own discovery."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests
import yaml

from tests.cluster.component import ComponentFailed, start
from tests.cluster.control_plane import ControlPlane
from tests.e2e.node import NODE, Node

URL = f"http://{NODE}:9090"
PORTS = {"board", "metrics", "admin"}
"""Names of the ports that the PodMonitors of engine and gateway name."""


def targets(plane: ControlPlane) -> list[dict[str, Any]]:
    """Each such port of a pod of ours that runs, with its labels."""
    found = []
    parts = "app.kubernetes.io/part-of=moestack"
    for pod in plane.ask("GET", "/api/v1/pods", labelSelector=parts).json()["items"]:
        address = pod["status"].get("podIP")
        for port in [port for one in pod["spec"]["containers"] for port in one.get("ports", [])]:
            if address and port.get("name") in PORTS and pod["status"]["phase"] == "Running":
                names = {"namespace": pod["metadata"]["namespace"], "pod": pod["metadata"]["name"]}
                labels = {**names, "port": port["name"]}
                found.append({"targets": [f"{address}:{port['containerPort']}"], "labels": labels})
    return found


@contextmanager
def prometheus_running(node: Node) -> Iterator[None]:
    """Prometheus at URL for the block; ComponentFailed where it is not installed."""
    program = shutil.which("prometheus")
    if program is None:
        raise ComponentFailed("prometheus is not there: run `tools/system-packages`")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(targets(node.plane)).encode())

        def log_message(self, *_: object) -> None:
            pass

    def ready() -> bool:
        try:
            return requests.get(f"{URL}/-/ready", timeout=5).ok
        except requests.RequestException:
            return False

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = {"url": f"http://127.0.0.1:{server.server_port}", "refresh_interval": "2s"}
        config = {
            "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
            "scrape_configs": [{"job_name": "pods", "http_sd_configs": [found]}],
        }
        path = node.config / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        command = [
            program,
            f"--config.file={path}",
            f"--storage.tsdb.path={node.folder / 'prometheus'}",
            f"--web.listen-address={NODE}:9090",
        ]
        component = start("prometheus", command, node.folder / "logs" / "prometheus.log", ready)
        try:
            yield
        finally:
            component.stop()
            server.shutdown()


def series(query: str) -> list[dict[str, Any]]:
    """What an instant query finds."""
    answer = requests.get(f"{URL}/api/v1/query", params={"query": query}, timeout=10)
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found
