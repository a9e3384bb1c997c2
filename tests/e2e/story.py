"""What the story of `make e2e` starts and asks: chart, KubeRay, a MoEDeployment, and clients before its gateway."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from moe_serving.tiny import cached_checkpoint
from tests.cluster.control_plane import ROOT, ControlPlane
from tests.cluster.kuberay import install_crds, start_kuberay
from tests.e2e.node import Node
from tests.e2e.pods import pod
from tools import image_contents

SYSTEM = "moestack-system"
CONTROL_IMAGE, ENGINE_IMAGE = "moestack.test/moestack:0.1.0", "moestack.test/engine:0.1.0"
MODEL = "Qwen/Qwen3-235B-A22B-FP8"
SMALL = "100m"
ADMISSION = "admissionregistration.k8s.io/v1"


def small_requests() -> tuple[dict[str, Any], ...]:
    """Admission that lets every container ask for a tenth of a core: nothing that we render, only this machine's size.

    Requests for cores decide where pods fit, and this node has two cores; memory is asked for as it is.
    """
    name = "small-requests"
    parts = [
        f"object.spec.?{kind}.orValue([]).map(c, Object.spec.{kind}{{name: c.name, "
        f"resources: Object.spec.{kind}.resources{{requests: {{'cpu': '{SMALL}'}}}}}})"
        for kind in ("containers", "initContainers")
    ]
    expression = f"Object{{spec: Object.spec{{containers: {parts[0]}, initContainers: {parts[1]}}}}}"
    pods = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    policy = {
        "apiVersion": ADMISSION,
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {"resourceRules": [pods]},
            "failurePolicy": "Fail",
            "reinvocationPolicy": "IfNeeded",
            "mutations": [
                {"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": expression}},
            ],
        },
    }
    binding = {
        "apiVersion": ADMISSION,
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name},
    }
    return policy, binding


def helm(plane: ControlPlane, *arguments: str | Path, timeout_s: float = 300) -> str:
    """What helm printed. AssertionError with it where it failed."""
    done = subprocess.run(
        [plane.assets / "bin" / "helm", "--kubeconfig", plane.kubeconfigs["admin"], *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={
            **os.environ,
            "HELM_CACHE_HOME": str(plane.folder / "helm"),
            "HELM_CONFIG_HOME": str(plane.folder / "helm"),
        },
    )
    assert done.returncode == 0, f"helm {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
    return done.stdout


def prepare(plane: ControlPlane, node: Node) -> None:
    """What a cluster has before moestack comes: KubeRay, room on its node, and images."""
    plane.apply(*small_requests())
    install_crds(plane)
    start_kuberay(plane, plane.url)
    node.load(image_contents.control(CONTROL_IMAGE))
    node.load(image_contents.engine(ENGINE_IMAGE, cached_checkpoint("qwen3_moe")))


def install(plane: ControlPlane, *more: str) -> str:
    """The chart as its page says, in a namespace of the restricted standard."""
    plane.kubectl("create", "namespace", SYSTEM)
    plane.kubectl("label", "namespace", SYSTEM, "pod-security.kubernetes.io/enforce=restricted")
    repository = CONTROL_IMAGE.split(":", maxsplit=1)[0]
    values = ("--set", f"image.repository={repository}", "--set", f"engineImage={ENGINE_IMAGE}", *more)
    chart = ROOT / "charts" / "moestack"
    return helm(plane, "install", "moestack", chart, "--namespace", SYSTEM, *values, "--wait", "--timeout", "240s")


def deployment(name: str, fallback_url: str, max_active_seqs: int) -> dict[str, Any]:
    """A MoEDeployment of the tiny checkpoint on this node's cores, with a closed API to spill to."""
    target = {
        "name": "elsewhere",
        "provider": "openai-compatible",
        "model": "elsewhere",
        "baseUrl": fallback_url,
        "price": {"inputUsdPerMTokens": 1, "outputUsdPerMTokens": 2},
    }
    return {
        "apiVersion": "moestack.dev/v1alpha1",
        "kind": "MoEDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"id": MODEL, "source": f"file://{image_contents.MODEL}"},
            "hardware": {"accelerator": "cpu", "gpusPerReplica": 1},
            "replicas": {"min": 1, "max": 1},
            "engine": {
                "maxModelLen": 2048,
                "maxActiveSeqs": max_active_seqs,
                "extraArgs": {"enforce-eager": "true"},
            },
            "slo": {"ttftP95": "800ms", "itlP95": "500ms"},
            "gateway": {"replicas": {"min": 1, "max": 1}},
            "tuning": {"mode": "Auto"},
            # Two engines on two cores keep no SLO: that is no reason to go back.
            "upgrade": {"steps": [50, 100], "stepDuration": "10s", "rollbackOnSloMiss": False},
            "fallback": {"targets": [target], "budget": {"usdPerDay": "10"}},
        },
    }


def run_client(plane: ControlPlane, namespace: str, command: str) -> None:
    """A pod `client` that runs a shell command to its end, again until it succeeds."""
    plane.apply(pod("client", "sh", "-c", f"until {command}; do sleep 0.5; done"), namespace=namespace)


def client_said(plane: ControlPlane, namespace: str) -> str:
    """What it printed; nothing while it runs."""
    found = plane.ask("GET", f"/api/v1/namespaces/{namespace}/pods/client").json()
    if found["status"].get("phase") != "Succeeded":
        return ""
    return plane.kubectl("logs", "-n", namespace, "client").stdout
