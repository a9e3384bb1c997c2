"""The tuner on a real API server, as the account that the chart makes: what it may, what it writes, who takes over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_api.annotations import DEPLOYMENT_LABEL, OPERATOR_MANAGER, PAUSE_REASON, PAUSED, TUNER_MANAGER
from moe_core.addresses import BOARD_PORT, GATEWAY_ADMIN_PORT, gateway_admin_name
from moe_core.signing import Signer
from moe_kube.managed import owned
from moe_kube.objects import LEASE, MOE_DEPLOYMENT, SERVICE, Ref
from tests.cluster import tuners
from tests.cluster.control_plane import APPLY, ControlPlane
from tests.cluster.test_cluster_chart import IMAGES, one, rendered
from tests.tuner.fakes import FakeBoard, FakeGateway, served
from tests.tuner.tuner_cluster import until
from tests.tuner.tuner_fleet import burst

pytestmark = pytest.mark.cluster

NETWORK = "127.201"
NAME, REVISION = "qwen3", "qwen3-0123456789"
POD = "10.80.0.7"
MANIFEST = {
    "apiVersion": "moestack.dev/v1alpha1",
    "kind": "MoEDeployment",
    "metadata": {"name": NAME},
    "spec": {
        "model": {"id": "Qwen/Qwen3-235B-A22B-FP8"},
        "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
        "tuning": {"mode": "Auto"},
    },
}


class Story:
    """One namespace with one MoEDeployment, as the operator leaves it behind."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.plane = plane
        self.namespace = namespace
        self.ref = Ref(MOE_DEPLOYMENT, namespace, NAME)

    async def ask(self, method: str, path: str, body: Any = None, **more: str) -> Any:
        answer = await asyncio.to_thread(self.plane.ask, method, path, body, **more)
        assert answer.status_code < 300, answer.text
        return answer.json()

    async def apply(self, **annotations: str) -> None:
        body = {**MANIFEST, "metadata": {"name": NAME, "annotations": annotations}}
        await self.ask("PATCH", self.ref.path, body, content_type=APPLY, fieldManager="person", force="true")

    async def make_ready(self) -> None:
        status = {"observedGeneration": 1, "revisions": [{"name": REVISION, "phase": "Serving", "weight": 100}]}
        body = {"apiVersion": MANIFEST["apiVersion"], "kind": MANIFEST["kind"], "metadata": {"name": NAME}}
        await self.ask(
            "PATCH",
            f"{self.ref.path}/status",
            {**body, "status": status},
            content_type=APPLY,
            fieldManager=OPERATOR_MANAGER,
        )
        admin, labels = gateway_admin_name(NAME), {DEPLOYMENT_LABEL: NAME}
        labels["app.kubernetes.io/managed-by"] = OPERATOR_MANAGER
        ports = [{"name": "admin", "port": GATEWAY_ADMIN_PORT, "protocol": "TCP"}]
        service = await self.ask(
            "POST",
            SERVICE.path(self.namespace),
            {"metadata": {"name": admin, "labels": labels}, "spec": {"clusterIP": "None", "ports": ports}},
        )
        owner = {"apiVersion": "v1", "kind": "Service", "name": admin, "uid": service["metadata"]["uid"]}
        owner["controller"] = True
        await self.ask(
            "POST",
            f"/apis/discovery.k8s.io/v1/namespaces/{self.namespace}/endpointslices",
            {
                "metadata": {
                    "name": f"{admin}-x",
                    "labels": labels,
                    "ownerReferences": [{**owner, "controller": True}],
                },
                "addressType": "IPv4",
                "ports": ports,
                "endpoints": [{"addresses": [POD]}],
            },
        )

    async def resource(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.ask("GET", self.ref.path)
        return found

    async def tuning(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.resource()).get("status", {}).get("tuning", {})
        return found

    async def reasons(self) -> set[str]:
        listed = await self.ask("GET", f"/apis/events.k8s.io/v1/namespaces/{self.namespace}/events")
        return {e["reason"] for e in listed["items"] if e.get("reportingController") == "moestack.dev/tuner"}

    async def until(self, what: str, found: Callable[[dict[str, Any]], Any], limit_s: float = 40.0) -> dict[str, Any]:
        """`status.tuning` once it is as said."""
        end = time.monotonic() + limit_s
        while not found(tuning := await self.tuning()):
            assert time.monotonic() < end, f"{what}: {tuning}"
            await asyncio.sleep(0.1)
        return tuning


async def test_a_life_of_the_tuner(moestack_crd: ControlPlane, namespace: str, tmp_path: Path) -> None:
    plane, story = moestack_crd, Story(moestack_crd, namespace)
    objects = rendered(plane, namespace, *IMAGES, "--set", f"namespaces={{{namespace}}}")
    mine = [each for each in objects if each["metadata"]["name"].startswith("moestack-tuner")]
    rights = [each for each in mine if each["kind"] in {"ServiceAccount", "Role", "RoleBinding"}]
    plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(rights))
    account = plane.service_account(namespace, "moestack-tuner")
    signer = Signer.generate()
    signer.save(tmp_path / "tuner.key")
    document = yaml.safe_load(one(mine, "ConfigMap", "moestack-tuner")["data"]["tuner.json"])
    document |= {"signingKeyFile": str(tmp_path / "tuner.key"), "host": "127.0.0.1", "port": 0}
    document |= {"tickS": 0.1, "leaseS": 3.0, "recordEveryS": 1.0, "prometheusUrl": "http://127.0.0.1:9"}

    board, gateway = FakeBoard(signer), FakeGateway()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(served(board.routes(), BOARD_PORT, f"{NETWORK}.255.254"))
        await stack.enter_async_context(
            served(gateway.routes(), GATEWAY_ADMIN_PORT, f"{NETWORK}.{POD.removeprefix('10.80.')}")
        )
        await story.apply()
        first = await stack.enter_async_context(tuners.running(tmp_path, document, account, NETWORK, "pod-1"))
        await asyncio.sleep(1.0)
        assert not await story.tuning(), "the operator has made nothing ready"
        await story.make_ready()
        await story.until("it is recorded", lambda t: t.get("safe") and t["writtenBy"] == "pod-1")
        burst(board, gateway)
        said = await story.until("a move is recorded", lambda t: t.get("lastDecision", {}).get("action") == "Move")
        said = await story.until("it is in force", lambda t: t.get("acknowledged") == t["knobs"]["version"] > 0)
        assert said["notExploringBecause"]
        end = time.monotonic() + 20
        while "KnobsMoved" not in await story.reasons():
            assert time.monotonic() < end
            await asyncio.sleep(0.1)

        # A pause is obeyed within a tick or two, and shows.
        began = time.monotonic()
        await story.apply(**{PAUSED: "true", PAUSE_REASON: "a launch"})
        while not (await first.get(f"/v1/status?deployment={namespace}/{NAME}"))["paused"]:
            assert time.monotonic() - began < 2.0
            await asyncio.sleep(0.05)
        version = board.version
        await story.until(
            "the pause shows", lambda t: t.get("pauses") == [{"source": "Annotation", "reason": "a launch"}]
        )
        board.waiting, board.running, gateway.ttft_p95_s = 60, 16, 5.0
        seen = board.seq
        await until("it ticks on", lambda: board.seq >= seen + 30, 30.0)
        assert board.version == version

        # It writes its part of the status, its Lease and Events, and nothing else; and nothing when nothing is new.
        obj = await story.resource()
        assert set(owned(obj, TUNER_MANAGER, "status")["status"]) == {"tuning"}
        managers = {(e["manager"], e["operation"], e.get("subresource", "")) for e in obj["metadata"]["managedFields"]}
        assert managers == {
            ("person", "Apply", ""),
            (OPERATOR_MANAGER, "Apply", "status"),
            (TUNER_MANAGER, "Apply", "status"),
        }
        await asyncio.sleep(2.5)
        before = (await story.resource())["metadata"]["resourceVersion"]
        await asyncio.sleep(4.0)
        assert (await story.resource())["metadata"]["resourceVersion"] == before
        user = f"system:serviceaccount:{namespace}:moestack-tuner"
        for verb, kind in (
            *(("get", "secrets"), ("list", "pods"), ("patch", "moedeployments"), ("delete", "moedeployments")),
            *(("update", "moedeployments/status"), ("create", "configmaps"), ("delete", "events"), ("list", "leases")),
        ):
            said_ = plane.kubectl("auth", "can-i", verb, kind, "-n", namespace, user=user, check=False).stdout.strip()
            assert said_ == "no", f"{verb} {kind}"

        # Another one stands by; when the first is killed it goes on from the record, with the safe setting of before.
        second = await stack.enter_async_context(tuners.running(tmp_path, document, account, NETWORK, "pod-2"))
        assert (await second.get("/readyz"))["leader"] is False
        safe = (await story.tuning())["safe"]
        await first.kill()
        taken = await story.until("the second signs the record", lambda t: t.get("writtenBy") == "pod-2")
        assert taken["safe"]["experts"] == safe["experts"]
        assert taken["pauses"], "it holds the pause"
        assert board.version == version
        await story.apply()
        await story.until("the pause is lifted", lambda t: not t.get("pauses"))
        await until("it acts again", lambda: board.version > version)
        lease = await story.ask("GET", Ref(LEASE, namespace, "moestack-tuner").path)
        assert lease["spec"]["holderIdentity"].startswith("pod-2_")
        assert lease["spec"]["leaseTransitions"] == 1

        # Gone is gone.
        await story.ask("DELETE", story.ref.path)
        end = time.monotonic() + 10
        while (await second.get("/v1/deployments"))["deployments"]:
            assert time.monotonic() < end
            await asyncio.sleep(0.1)
        assert await second.stop() == 0
        text = "".join(each.log.read_text() for each in (first, second))
        assert "PRIVATE KEY" not in text
        assert not [line for each in (first, second) for line in each.lines() if line.get("level") == "error"]
