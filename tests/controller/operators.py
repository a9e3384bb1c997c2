"""Whole operators on the API server in memory, for tests of the process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.faults import WRITES, Call, Journal, Rule
from moe_kube.faulty import FaultyApi
from moe_kube.objects import Obj, Ref
from moe_operator.requests import AskGateways, Gateways, SendWeights
from moe_operator.server import LEASE_NAME, OperatorServer
from tests.world.world import World

DIGEST = "sha256:" + "a" * 64
SPEC: Obj = {
    "model": {"id": "Qwen/Qwen3-235B-A22B-FP8"},
    "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    "slo": {"ttftP95": "800ms", "itlP95": "50ms"},
}
LEASES = frozenset({k.LEASE})
APART = (k.LEASE, k.EVENT)
LEASE = Ref(k.LEASE, "moestack-system", LEASE_NAME)


class NoGateways:
    async def ask(self, request: AskGateways) -> Gateways:
        return Gateways(silent=len(request.pods))

    async def send(self, request: SendWeights) -> int:
        return 0


class Bench:
    """A cluster with its other controllers, and whole operators on it that share a clock and a journal."""

    def __init__(self) -> None:
        self.world = World()
        self.clock, self.cluster = self.world.clock, self.world.cluster
        self.journal = Journal()
        self.apis: dict[str, FaultyApi] = {}

    def put(self, name: str, spec: Obj = SPEC) -> None:
        ref = Ref(k.MOE_DEPLOYMENT, "serving", name)
        self.cluster.apply(ref, {"metadata": {}, "spec": spec}, manager="person")

    @asynccontextmanager
    async def operator(self, name: str = "one", *rules: Rule, **config: Any) -> AsyncIterator[OperatorServer]:
        made = OperatorConfig(
            identity=name,
            engine_image=f"registry.example.com/engine@{DIGEST}",
            gateway_image=f"registry.example.com/gateway@{DIGEST}",
            **config,
        )
        api = self.apis[name] = FaultyApi(
            self.cluster.client("operator"), journal=self.journal, rules=rules, clock=self.clock, client=name
        )
        server = OperatorServer(made, api, clock=self.clock, fleet=NoGateways())
        await server.start()
        try:
            yield server
        finally:
            await server.stop()

    async def pass_time(self, seconds: float, step: float = 0.25, *, others: bool = False) -> None:
        """Let the operators run; with `others`, KubeRay, the deployment controller and garbage collection as well."""
        for _ in range(round(seconds / step)):
            await self.clock.advance(step)
            if others:
                self.world.settle()

    def writes(self, client: str) -> list[str]:
        """What an operator wrote for MoEDeployments: neither its lease nor Events."""
        return [str(call) for call in self.journal.calls if call.client == client and ours(call)]


def ours(call: Call) -> bool:
    return call.verb in WRITES and call.kind not in APART and call.committed


async def get(server: OperatorServer, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{server.port}{path}") as answer_:
        return answer_.status, await answer_.text()
