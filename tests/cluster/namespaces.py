"""Namespaces of tests: made fresh, and emptied of what would go on working before they are deleted."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.control_plane import ControlPlane, eventually

TEST_LABEL = "moestack.dev/test-namespace"
# What a controller would go on working on while its namespace is being deleted, which takes seconds.
WORK = (
    "/apis/moestack.dev/v1alpha1/namespaces/{}/moedeployments",
    "/apis/ray.io/v1/namespaces/{}/rayservices",
    "/apis/ray.io/v1/namespaces/{}/rayclusters",
    "/apis/apps/v1/namespaces/{}/deployments",
)


@contextmanager
def fresh_namespace(plane: ControlPlane, name: str = "") -> Iterator[str]:
    """A namespace, ready for pods. Its workloads go when the block ends, the rest soon after."""
    name = name or f"t-{secrets.token_hex(4)}"
    made = plane.ask("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": {TEST_LABEL: "true"}}})
    assert made.ok, made.text
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    eventually(f"{account} is there", lambda: plane.ask("GET", account).ok)
    try:
        yield name
    finally:
        for path in WORK:
            plane.ask("DELETE", path.format(name), {"propagationPolicy": "Background"})
        plane.ask("DELETE", f"/api/v1/namespaces/{name}")
