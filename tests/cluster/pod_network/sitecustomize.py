"""The network of pods for one process of a test: addresses of pods, and names of Services, lead to loopback.

kwok gives pods addresses that nobody answers at, and the API server takes no loopback address as an endpoint. So
processes run by their real command lines, and Python imports this before them (its name and PYTHONPATH see to that).
10.80.X.Y leads to 127.N.X.Y and NAME.NAMESPACE.svc to 127.N.255.254, at the same port; $POD_NETWORK is 127.N.
"""

from __future__ import annotations

import os
import socket
from typing import Any

PODS = "10.80."
"""kwok's (control_plane.py)."""
SERVICES = ".255.254"
"""Where every Service answers: who is meant says the Host header."""


def lead_to(network: str) -> None:
    """Patches the socket module of this process."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def to_pod(sock: socket.socket, address: Any) -> None:
        if sock.family == socket.AF_INET and str(address[0]).startswith(PODS):
            address = (f"{network}.{address[0].removeprefix(PODS)}", address[1])
        connect(sock, address)

    def to_service(host: Any, *arguments: Any, **more: Any) -> Any:
        named = isinstance(host, str) and host.endswith(".svc")
        return resolve(f"{network}{SERVICES}" if named else host, *arguments, **more)

    socket.socket.connect = to_pod  # type: ignore[method-assign,assignment]
    socket.getaddrinfo = to_service


if os.environ.get("POD_NETWORK"):
    lead_to(os.environ["POD_NETWORK"])
