"""The node itself: a pod runs on a real kubelet, and another reaches it by the name of its Service."""

from __future__ import annotations

import ipaddress

import pytest

from tests.cluster.control_plane import ControlPlane, eventually
from tests.cluster.namespaces import fresh_namespace
from tests.e2e.node import PODS, Node
from tests.e2e.pods import IMAGE, pod
from tools import image_contents

pytestmark = [pytest.mark.full, pytest.mark.e2e]


def test_a_pod_reaches_another_by_the_name_of_its_service(plane: ControlPlane, node: Node) -> None:
    node.load(image_contents.base(IMAGE))
    with fresh_namespace(plane) as namespace:
        plane.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "page"},
            "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]},
        }
        serve = "mkdir /tmp/www; echo from $(id -u) > /tmp/www/index.html; exec python3 -m http.server 8080 -d /tmp/www"
        ask = "until wget -T 2 -q -O - http://page; do sleep 0.2; done"
        plane.apply(service, pod("server", "sh", "-c", serve), pod("client", "sh", "-c", ask), namespace=namespace)
        path = f"/api/v1/namespaces/{namespace}/pods"

        def phase(name: str) -> str:
            return str(plane.ask("GET", f"{path}/{name}").json()["status"].get("phase"))

        eventually("the client has its answer", lambda: phase("client") == "Succeeded", 60)
        assert plane.kubectl("logs", "-n", namespace, "client").stdout == "from 65532\n"
        address = plane.ask("GET", f"{path}/server").json()["status"]["podIP"]
        assert ipaddress.ip_address(address) in ipaddress.ip_network(PODS)
