"""A cluster in memory with MoEDeployments, their boards and gateways on real sockets, and tuners that may die."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from moe_api.annotations import API_VERSION, DEPLOYMENT_LABEL, KIND, OPERATOR_MANAGER
from moe_core.addresses import BOARD_PORT, GATEWAY_ADMIN_PORT, gateway_admin_name
from moe_core.clock import SystemClock
from moe_core.config import ClusterTunerConfig
from moe_core.signing import Signer
from moe_kube.fake import FakeCluster
from moe_kube.faults import Journal
from moe_kube.faulty import FaultyApi
from moe_kube.objects import ENDPOINT_SLICE, EVENT, MOE_DEPLOYMENT, SERVICE, Obj, Ref
from moe_tuner.cluster import ClusterTuner
from tests.tuner.fakes import FakeBoard, FakeGateway, served

NAMESPACE = "serving"
SPEC: Obj = {
    "model": {"id": "Qwen/Qwen3-235B-A22B-FP8"},
    "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    "tuning": {"mode": "Auto"},
}
_HOSTS = itertools.count(1)
NETWORK = "127.93"
"""Addresses of boards and gateways: both have ports that are settled, so each has a host of its own."""


def revision(name: str, weight: int = 100) -> Obj:
    return {"name": name, "weight": weight, "phase": "Serving" if weight == 100 else "Promoting"}


class Names(AbstractResolver):
    """Services of boards, by name."""

    def __init__(self) -> None:
        self.hosts: dict[str, str] = {}

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[ResolveResult]:
        if host not in self.hosts:
            raise OSError(f"no such name: {host}")
        address = self.hosts[host]
        return [
            {"hostname": host, "host": address, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}  # type: ignore[list-item]
        ]

    async def close(self) -> None:
        return


@dataclass
class Served:
    """One MoEDeployment's board and gateway."""

    name: str
    board: FakeBoard
    gateway: FakeGateway
    address: str


@dataclass
class World:
    """The cluster, and who runs in it."""

    tmp_path: Path
    signer: Signer
    stack: AsyncExitStack
    cluster: FakeCluster = field(default_factory=lambda: FakeCluster(clock=SystemClock()))
    journal: Journal = field(default_factory=Journal)
    names: Names = field(default_factory=Names)
    tuners: list[ClusterTuner] = field(default_factory=list)
    apis: list[FaultyApi] = field(default_factory=list)

    # -- what people and the operator write

    def put(self, name: str, annotations: dict[str, str] | None = None, **spec: Any) -> None:
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"annotations": annotations or {}}}
        whole = {key: value for key, value in {**SPEC, **spec}.items() if value}
        self.cluster.apply(self.ref(name), {**body, "spec": whole}, manager="person")

    def ready(self, name: str, *revisions: Obj, address: str = "") -> None:
        """As the operator tells it: what serves, and where the gateway's pods are."""
        status = {"revisions": list(revisions) or [revision(f"{name}-0123456789")], "observedGeneration": 1}
        body = {"apiVersion": API_VERSION, "kind": KIND, "status": status}
        self.cluster.apply(self.ref(name), body, manager=OPERATOR_MANAGER, subresource="status")
        if address:
            self.slice(name, address)

    def slice(self, name: str, *addresses: str) -> None:
        admin = gateway_admin_name(name)
        owner = Ref(SERVICE, NAMESPACE, admin)
        labels = {DEPLOYMENT_LABEL: name, "app.kubernetes.io/managed-by": OPERATOR_MANAGER}
        service = self.cluster.find(owner) or self.cluster.create(
            owner, {"metadata": {"labels": labels}, "spec": {"clusterIP": "None", "ports": [{"port": 8001}]}}
        )
        reference = {"apiVersion": "v1", "kind": "Service", "name": admin, "controller": True}
        meta = {"labels": labels, "ownerReferences": [{**reference, "uid": service["metadata"]["uid"]}]}
        body = {
            "metadata": meta,
            "addressType": "IPv4",
            "ports": [{"name": "admin", "port": GATEWAY_ADMIN_PORT, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address]} for address in addresses],
        }
        self.cluster.apply(Ref(ENDPOINT_SLICE, NAMESPACE, f"{admin}-x"), body, manager="endpointslice-controller")

    async def serve(self, name: str, revision_name: str = "") -> Served:
        """A board and a gateway pod, on a host of their own."""
        host = f"{NETWORK}.0.{next(_HOSTS)}"
        board, gateway = FakeBoard(self.signer), FakeGateway()
        await self.stack.enter_async_context(served(board.routes(), BOARD_PORT, host))
        await self.stack.enter_async_context(served(gateway.routes(), GATEWAY_ADMIN_PORT, host))
        self.names.hosts[f"{revision_name or f'{name}-0123456789'}-board.{NAMESPACE}.svc"] = host
        return Served(name, board, gateway, host)

    async def whole(self, name: str, annotations: dict[str, str] | None = None, **spec: Any) -> Served:
        """A MoEDeployment that the operator has made ready."""
        made = await self.serve(name)
        self.put(name, annotations, **spec)
        self.ready(name, address=made.address)
        return made

    # -- tuners

    async def tuner(self, pod: str = "one", **changes: Any) -> ClusterTuner:
        """A tuner of its own pod, which has a disk of its own."""
        config = ClusterTunerConfig(
            **{
                "namespace": "moestack-system",
                "identity": pod,
                "prometheus_url": "http://127.0.0.1:9",
                "signing_key_file": str(self.tmp_path / "key.pem"),
                "state_dir": str(self.tmp_path / pod),
                "tick_s": 0.05,
                "record_every_s": 0.3,
                "lease_s": 2.0,
                "qps": 500.0,
                "burst": 500,
                **changes,
            }
        )
        client = await self.stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=self.names))
        )
        clock = SystemClock()
        api = FaultyApi(self.cluster.client("tuner"), journal=self.journal, clock=clock, client=pod)
        made = ClusterTuner(config, api, client, clock=clock)
        self.apis.append(api)
        self.tuners.append(made)
        await made.start()
        return made

    # -- what is seen

    @staticmethod
    def ref(name: str) -> Ref:
        return Ref(MOE_DEPLOYMENT, NAMESPACE, name)

    def tuning(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = (self.cluster.get(self.ref(name)).get("status") or {}).get("tuning") or {}
        return found

    def reasons(self, name: str) -> list[str]:
        return [event["reason"] for event in self.cluster.peek(EVENT) if event["regarding"]["name"] == name]

    def knob_writes(self) -> int:
        return sum(1 for call in self.journal.calls if call.subresource == "status")


@asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[World]:
    signer = Signer.generate()
    signer.save(tmp_path / "key.pem")
    async with AsyncExitStack() as stack:
        made = World(tmp_path, signer, stack)
        try:
            yield made
        finally:
            for tuner in made.tuners:
                await tuner.stop()


async def until(what: str, done: Callable[[], Any], limit_s: float = 20.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (answer := done()):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)
    return answer
