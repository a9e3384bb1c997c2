"""Under which names and ports the parts of one MoEDeployment find one another in a cluster."""

from __future__ import annotations

BOARD_PORT = 8100
GATEWAY_ADMIN_PORT = 8001


def board_name(revision: str) -> str:
    """Name of the Service on the board of a revision."""
    return f"{revision}-board"


def board_url(namespace: str, revision: str) -> str:
    return f"http://{board_name(revision)}.{namespace}.svc:{BOARD_PORT}"


def gateway_admin_name(deployment: str) -> str:
    """Name of the headless Service whose EndpointSlices name every pod of the gateway."""
    return f"{deployment}-gateway-admin"
