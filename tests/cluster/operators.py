"""Operator processes on a test control plane, with exactly the rights of the manifest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from moe_core.config import OperatorConfig
from moe_operator import rbac
from tests.cluster.control_plane import ROOT, ControlPlane

PARTS = ("api", "core", "planner", "kube", "operator", "serving", "gateway", "tuner", "cli")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in PARTS)}
POD_NETWORK = Path(__file__).parent / "pod_network"
DIGEST = "sha256:" + "a" * 64
STOP_S = 30.0


def pod_environment(network: str) -> dict[str, str]:
    """Environment of a process that reaches pods and Services (pod_network/sitecustomize.py)."""
    path = os.pathsep.join([str(POD_NETWORK), ENVIRONMENT["PYTHONPATH"]])
    return {**ENVIRONMENT, "PYTHONPATH": path, "POD_NETWORK": network}


def config(**fields: Any) -> OperatorConfig:
    """A configuration for tests: images that nobody pulls, a pace that no test waits for."""
    images = {
        "engine_image": f"registry.example.com/engine@{DIGEST}",
        "gateway_image": f"registry.example.com/gateway@{DIGEST}",
    }
    return OperatorConfig.model_validate({**images, "qps": 500.0, "burst": 500, **fields})


def grant(plane: ControlPlane, made: OperatorConfig) -> Path:
    """The service account and the roles of the manifest; a kubeconfig of that account."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": made.namespace}}
    plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all([namespace, *rbac.documents(made)]))
    return plane.service_account(made.namespace, rbac.NAME)


@dataclass
class Operator:
    """A running operator process."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=10)

    def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """Samples of /metrics: name → sorted labels → value."""
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return found

    def calls(self) -> dict[tuple[str, str, str], float]:
        """Calls on the API server: (verb, kind, code) → how many."""
        counted = self.metrics().get("moestack_operator_api_calls_total", {})
        return {
            (labels["verb"], labels["kind"], labels["code"]): value
            for labels, value in ((dict(key), value) for key, value in counted.items())
        }

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Exit status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


@contextlib.contextmanager
def running(
    folder: Path,
    made: OperatorConfig,
    kubeconfig: Path,
    name: str = "operator",
    *,
    environment: Mapping[str, str] = ENVIRONMENT,
    program: Sequence[str] = ("-m", "moe_operator"),
) -> Iterator[Operator]:
    """`python -m moe_operator`, ready; ended with the block."""
    path, log = folder / f"{name}.json", folder / f"{name}.log"
    path.write_text(made.model_dump_json(by_alias=True))
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *program, "--config", str(path), "--kubeconfig", str(kubeconfig)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Operator(process, f"http://127.0.0.1:{json.loads(line)['port']}", log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
