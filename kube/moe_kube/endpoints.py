"""Pods behind a Service, from its EndpointSlices."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EndpointFacts:
    """Addresses of pods, ready or not."""

    addresses: tuple[str, ...] = ()
    port: int = 0


def endpoint_facts(obj: Mapping[str, Any]) -> EndpointFacts:
    """What one EndpointSlice says."""
    addresses = [
        str(address) for endpoint in obj.get("endpoints") or () for address in (endpoint.get("addresses") or ())[:1]
    ]
    ports = obj.get("ports") or ()
    return EndpointFacts(tuple(sorted(addresses)), int((ports[0].get("port") if ports else 0) or 0))


def at_port(slices: Iterable[EndpointFacts], port: int) -> tuple[str, ...]:
    """host:port of each address of IP that listens at that port, sorted: what is asked over HTTP."""
    found = {
        f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        for facts in slices
        if facts.port == port
        for address in facts.addresses
        if _is_ip(address)
    }
    return tuple(sorted(found))


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True
