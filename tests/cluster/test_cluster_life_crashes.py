"""Crash matrix on the real API server: the operator dies at each write, before or after it, and a new one goes on.

KubeRay, the garbage collector and all else are real; the operator is in this process, where it can die between two
calls, and its gateways answer as told. Runs have a namespace each and go on side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from moe_api.annotations import MANAGED_SELECTOR, OPERATOR_MANAGER
from moe_core.clock import SystemClock
from moe_core.wire import GatewayDigest
from moe_kube import objects as k
from moe_kube.api import Api
from moe_kube.connect import connect
from moe_kube.errors import NotFound
from moe_kube.faults import CRASH_AFTER, CRASH_BEFORE, Action, Journal
from moe_kube.faulty import FaultyApi
from moe_kube.managed import owned
from moe_kube.objects import Obj, Ref
from moe_operator import rollout
from moe_operator.children import NOT_OURS, REQUIRED
from moe_operator.controller import Controller
from moe_operator.render.gateway import START_ANNOTATION
from moe_operator.requests import AskGateways, Gateways, SendWeights, Tell
from tests.cluster.control_plane import ControlPlane
from tests.cluster.life import NAME, spec_with
from tests.cluster.namespaces import fresh_namespace
from tests.cluster.nodes import gpu_node
from tests.cluster.operators import config
from tests.controller.world import _plain

pytestmark = pytest.mark.cluster

AT_ONCE = 12
LIMIT_S = 120.0
REST_S = 2.5
"""Without a write for so long, it rests: longer than anything that the operator waits for here."""
KINDS = (*(kind for kind in REQUIRED if kind not in NOT_OURS), k.RAY_SERVICE)
OF_A_REVISION = (k.RAY_SERVICE, k.CONTROLLER_REVISION)
QUICK = spec_with({"upgrade": {"steps": [100], "stepDuration": "1s", "drainTimeout": "20s"}})
LONGER = spec_with({"engine.maxModelLen": 16384}, QUICK)
POINTS = {"before": CRASH_BEFORE, "after": CRASH_AFTER}


@dataclass
class Fleet:
    """Gateways that take the weights they are sent and have nothing in flight."""

    version: int = 0

    async def ask(self, request: AskGateways) -> Gateways:
        digest = GatewayDigest(gateway="g", at_s=0, window_s=request.window_s, weights_version=self.version)
        return Gateways(digests=(digest,) * len(request.pods))

    async def send(self, request: SendWeights) -> int:
        self.version = max(self.version, request.weights.version)
        return len(request.pods)


class Silent:
    """Events are no part of the end state."""

    def tell(self, tell: Tell) -> None:
        pass


@dataclass
class Run:
    """One namespace with an operator that is started again whenever it dies."""

    api: Api
    namespace: str
    journal: Journal = field(default_factory=Journal)
    gateways: Fleet = field(default_factory=Fleet)
    deaths: int = 0

    def __post_init__(self) -> None:
        self.faulty = FaultyApi(self.api, journal=self.journal)

    @property
    def ref(self) -> Ref:
        return Ref(k.MOE_DEPLOYMENT, self.namespace, NAME)

    async def apply(self, spec: Obj) -> None:
        meta = {"name": NAME, "namespace": self.namespace}
        body = {"apiVersion": self.ref.kind.api_version, "kind": self.ref.kind.kind, "metadata": meta, "spec": spec}
        await self.api.apply(self.ref, body, manager="kubectl")

    async def live(self) -> None:
        """Operators, one after another, until cancelled."""
        made = config(
            namespaces=(self.namespace,), signing_key_file="/nowhere", trusted_keys=(), resync_s=30.0, workers=1
        )
        while True:
            operator = Controller(self.faulty, made, clock=SystemClock(), fleet=self.gateways, teller=Silent())
            follow = asyncio.create_task(operator.follow())
            try:
                await operator.start()
                while not operator.broken:  # noqa: ASYNC110  nothing else says so
                    await asyncio.sleep(0.1)
                self.deaths += 1
            finally:
                with contextlib.suppress(BaseException):
                    await operator.stop()
                follow.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await follow

    async def until(self, what: str, found: Callable[[], Awaitable[bool]]) -> None:
        """Waits until it is so and nothing has been written for a while."""
        written, since = -1, 0.0
        clock = asyncio.get_running_loop().time
        end = clock() + LIMIT_S
        while True:
            count = len(self.journal.calls) and len(self.journal.writes)
            if count != written or not await found():
                written, since = count, clock()
            if clock() - since >= REST_S:
                return
            assert clock() < end, f"{self.namespace}: not within {LIMIT_S:.0f} s: {what}: {await self.state()}"
            await asyncio.sleep(0.5)

    async def serves_alone(self) -> bool:
        status = (await self.api.get(self.ref)).get("status") or {}
        ready = {one["type"] for one in status.get("conditions", ()) if one["status"] == "True"}
        revisions = [(one["phase"], one.get("weight", 0)) for one in status.get("revisions", ())]
        left = [len((await self.api.list(kind, namespace=self.namespace)).items) for kind in OF_A_REVISION]
        return revisions == [("Serving", 100)] and {"ClusterReady", "GatewayReady"} <= ready and left == [1, 1]

    async def gone(self) -> bool:
        return not await self.state()

    async def state(self) -> dict[str, Any]:
        """What the operator owns of everything that there is, without what differs between two runs."""
        found: dict[str, Any] = {}
        for kind in KINDS:
            for obj in (await self.api.list(kind, namespace=self.namespace, labels=MANAGED_SELECTOR)).items:
                found[f"{kind.kind}/{obj['metadata']['name']}"] = self._plain(owned(obj, OPERATOR_MANAGER))
        with contextlib.suppress(NotFound):
            status = (await self.api.get(self.ref)).get("status") or {}
            found["status"] = self._plain({name: value for name, value in status.items() if name != "live"})
        return found

    def _plain(self, value: Any) -> Any:
        """Without times and versions, and without what the name of the namespace comes to."""
        text = re.sub(rf'("{START_ANNOTATION}"): "\w+"', r'\1: ""', json.dumps(value))
        return _plain(json.loads(text.replace(self.namespace, "NAMESPACE")))


async def create(run: Run) -> None:
    await run.apply(QUICK)
    await run.until("it serves", run.serves_alone)


async def upgrade(run: Run) -> None:
    await run.apply(LONGER)

    async def done() -> bool:
        spec = (await run.api.get(run.ref))["metadata"]["generation"]
        status = (await run.api.get(run.ref)).get("status") or {}
        return status.get("observedGeneration") == spec and await run.serves_alone()

    await run.until("it serves anew", done)


async def delete(run: Run) -> None:
    """In mid-upgrade: a settled one is deleted without a write of the operator's."""
    await run.apply(LONGER)

    async def two() -> bool:
        return len((await run.api.list(k.RAY_CLUSTER, namespace=run.namespace)).items) == 2

    async with asyncio.timeout(LIMIT_S):
        while not await two():  # noqa: ASYNC110  what is awaited lies in another process
            await asyncio.sleep(0.2)
    await run.api.delete(run.ref)
    await run.until("nothing is left", run.gone)


WORKLOADS: dict[str, tuple[Callable[[Run], Awaitable[None]], bool]] = {
    "create": (create, False),
    "upgrade by Surge": (upgrade, True),
    "delete": (delete, True),
}
"""What happens, and whether it begins with one that serves."""


@dataclass
class End:
    """What a run came to."""

    state: dict[str, Any]
    creates: Counter[str]
    deletes: Counter[str]
    writes: list[str]
    deaths: int


async def play(plane: ControlPlane, api: Api, workload: str, fault: tuple[int, Action] | None) -> End:
    """One run, with one fault or none."""
    act, begins_serving = WORKLOADS[workload]
    namespace = fresh_namespace(plane)
    run = Run(api, await asyncio.to_thread(namespace.__enter__))
    living = asyncio.create_task(run.live())
    try:
        if begins_serving:
            await create(run)
        run.journal.clear()
        if fault is not None:
            run.faulty.add(fault[1], write=fault[0])
        await act(run)
        state = await run.state()
        deletes = [call for call in run.journal.writes if call.verb == "delete" and call.committed]
        return End(
            state,
            run.journal.creates(),
            # By object: what is not gone yet may be deleted again, which changes nothing.
            Counter(ref.kind.kind for ref in {call.ref for call in deletes if call.ref is not None}),
            [str(call) for call in run.journal.writes],
            run.deaths,
        )
    finally:
        living.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await living
        await asyncio.to_thread(namespace.__exit__, None, None, None)


@pytest.fixture(scope="module")
def room(kuberay: ControlPlane, moestack_crd: ControlPlane) -> ControlPlane:
    """The control plane with room for all runs at once."""
    node = gpu_node("crashes", gpus=512, product="NVIDIA-H100-80GB-HBM3")
    for amounts in (node["status"]["capacity"], node["status"]["allocatable"]):
        amounts |= {"cpu": "4000", "memory": "64Ti", "pods": "2000"}
    kuberay.apply(node)
    return kuberay


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways are asked each second while traffic moves."""
    monkeypatch.setattr(rollout, "POLL_S", 1)


@contextlib.asynccontextmanager
async def client(plane: ControlPlane) -> AsyncIterator[Api]:
    async with await connect(plane.kubeconfigs["admin"]) as api:
        yield api


@pytest.mark.parametrize("workload", WORKLOADS)
async def test_a_crash_at_any_write_changes_nothing(workload: str, room: ControlPlane) -> None:
    async with client(room) as api:
        undisturbed = await play(room, api, workload, None)
        assert undisturbed.deaths == 0
        assert undisturbed.writes
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(write: int, point: str) -> tuple[str, End]:
            async with slots:
                return f"crash {point} write {write}", await play(room, api, workload, (write, POINTS[point]))

        runs = [one(write, point) for write in range(len(undisturbed.writes)) for point in POINTS]
        ends = await asyncio.gather(*runs)
    for name, end in ends:
        assert end.state == undisturbed.state, name
        assert (end.creates, end.deletes) == (undisturbed.creates, undisturbed.deletes), (name, end.writes)
    # How many writes there are depends on when others act: the last few may not come to pass in every run.
    deaths = sum(end.deaths for _, end in ends)
    assert 0.8 * len(ends) <= deaths <= len(ends)
    print(f"{workload}: {len(undisturbed.writes)} writes, {deaths} deaths in {len(ends)} runs")
