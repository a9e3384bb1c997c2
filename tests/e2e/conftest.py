"""Fixtures of a cluster with a real node; node.py says how it runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.control_plane import running as plane_running
from tests.e2e.node import CONTROLLERS, NODE, Node, alone
from tests.e2e.node import running as node_running


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    """A control plane with a scheduler, which pods reach at the node's address."""
    with plane_running(alone() / "plane", advertised=NODE, more_controllers=CONTROLLERS) as made:
        made.start_scheduler()
        yield made


@pytest.fixture(scope="session")
def node(plane: ControlPlane) -> Iterator[Node]:
    """A real node of that control plane."""
    with node_running(plane, alone()) as made:
        yield made
