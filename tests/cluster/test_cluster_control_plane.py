"""What the test control plane promises to the tests that use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.component import ComponentFailed, start
from tests.cluster.control_plane import ROOT, ControlPlane, eventually, running

pytestmark = pytest.mark.cluster

CONFIG_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner"}}


def deployment(name: str, gpus: int = 0) -> dict[str, Any]:
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    container = {"name": "c", "image": "i", "resources": {"limits": limits}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container]}},
        },
    }


def test_a_user_may_do_what_rbac_grants_and_no_more(control_plane: ControlPlane, namespace: str) -> None:
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    assert control_plane.ask("GET", maps, user="person").status_code == 403
    control_plane.kubectl("create", "role", "reader", "--verb=list", "--resource=configmaps", "-n", namespace)
    control_plane.kubectl("create", "rolebinding", "r", "--role=reader", "--user=person", "-n", namespace)
    eventually("the binding holds", lambda: control_plane.ask("GET", maps, user="person").ok)
    refused = control_plane.kubectl("delete", "configmap", "x", "-n", namespace, user="person", check=False)
    assert refused.returncode != 0
    assert 'User "person" cannot delete resource "configmaps"' in refused.stderr


def test_a_service_account_has_a_token_of_its_own(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.kubectl("create", "serviceaccount", "robot", "-n", namespace)
    control_plane.service_account(namespace, "robot")
    name = f"system:serviceaccount:{namespace}:robot"
    said = control_plane.kubectl("auth", "whoami", "-o", "jsonpath={.status.userInfo.username}", user=name)
    assert said.stdout == name


def test_what_an_object_owns_goes_with_it(control_plane: ControlPlane, namespace: str) -> None:
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    uid = control_plane.ask("POST", maps, CONFIG_MAP).json()["metadata"]["uid"]
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}
    owned = {"metadata": {"name": "owned", "ownerReferences": [owner]}}
    assert control_plane.ask("POST", maps, owned).status_code == 201
    control_plane.ask("DELETE", f"{maps}/owner", {"propagationPolicy": "Background"})
    eventually("the owned object is gone", lambda: control_plane.ask("GET", f"{maps}/owned").status_code == 404)


def test_pods_become_ready_on_nodes_with_gpus(kwok: ControlPlane, namespace: str) -> None:
    kwok.apply(deployment("fits", gpus=8), deployment("does-not-fit", gpus=9), namespace=namespace)
    kwok.kubectl("rollout", "status", "deployment/fits", "--timeout=30s", "-n", namespace)
    path = f"/api/v1/namespaces/{namespace}/pods"
    pods = kwok.ask("GET", path, labelSelector="app=fits").json()["items"]
    assert all(pod["status"]["podIP"] for pod in pods)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2, "eight GPUs fill a node"
    pending = kwok.ask("GET", path, labelSelector="app=does-not-fit").json()["items"]
    assert {pod["status"]["phase"] for pod in pending} == {"Pending"}
    kwok.kubectl("delete", "deployment", "fits", "does-not-fit", "-n", namespace)
    eventually("its pods are gone", lambda: not kwok.ask("GET", path).json()["items"] or None)


def test_a_second_control_plane_runs_beside_the_first(control_plane: ControlPlane, tmp_path: Path) -> None:
    with running(tmp_path / "second") as second:
        assert second.url != control_plane.url
        assert second.ask("POST", "/api/v1/namespaces/default/configmaps", CONFIG_MAP).status_code == 201
        assert control_plane.ask("GET", "/api/v1/namespaces/default/configmaps/owner").status_code == 404
        pids = [component.pid for component in second.components.values()]
    assert control_plane.ask("GET", "/readyz").ok
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("name", "script", "deadline_s", "says"),
    [
        ("it ends", "echo why it failed; exit 3", 5.0, "ended with status 3"),
        ("it is never ready", "echo why it failed; exec sleep 60", 0.5, "was not ready after 0 s"),
    ],
)
def test_a_component_that_fails_shows_its_log(
    name: str, script: str, deadline_s: float, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ComponentFailed) as caught:
        start("part", ["sh", "-c", script], tmp_path / "part.log", lambda: False, deadline_s)
    assert f"part {says}" in str(caught.value)
    assert str(caught.value).endswith("why it failed"), name


def test_nothing_outlives_a_killed_test_run(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal; from tests.cluster.control_plane import running\n"
        f"with running(pathlib.Path({str(tmp_path / 'plane')!r})) as plane:\n"
        "    print(*[part.pid for part in plane.components.values()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    pids = done.stdout.split()
    assert len(pids) == 3, done.stderr
    eventually("every part is gone", lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), 10)
