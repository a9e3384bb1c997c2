"""The fallback budget in an object of the cluster: made with the operator's rights, raced for with gateways'."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest

from moe_api.annotations import API_VERSION, KIND, OPERATOR_MANAGER
from moe_core.config import GatewayConfig
from moe_core.prices import PICO
from moe_gateway.money import DEPLOYMENT, Book, total
from moe_gateway.money_object import KEY
from moe_kube import objects as k
from moe_kube.connect import connect
from moe_kube.errors import Forbidden
from moe_kube.objects import MOE_DEPLOYMENT, Ref
from moe_operator.names import Owner, gateway_budget_name, gateway_name
from moe_operator.render import books
from tests.cluster.control_plane import ControlPlane, eventually
from tests.cluster.operators import config as operator_config
from tests.cluster.operators import grant
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import chat, config, running

pytestmark = pytest.mark.cluster
PRICE = ("5", "30")
CALL_USD = Decimal("0.0095")  # 100 prompt tokens and 300 of output
DAY_USD = Decimal("0.2")


async def made(plane: ControlPlane, namespace: str) -> Owner:
    """A MoEDeployment, and its books by the operator's own account: the API server checks what that may grant."""
    spec = {"model": {"id": "x"}, "hardware": {"accelerator": "cpu", "gpusPerReplica": 1}}
    plane.apply(
        {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "race"}, "spec": spec}, namespace=namespace
    )
    found = plane.ask("GET", MOE_DEPLOYMENT.path(namespace, "race")).json()
    owner = Owner(namespace, "race", found["metadata"]["uid"])
    api = await connect(grant(plane, operator_config()))
    try:
        for each in books.objects(owner):
            await api.apply(each.ref, each.body, manager=OPERATOR_MANAGER, force=True)
    finally:
        await api.close()
    return owner


def book(plane: ControlPlane, owner: Owner) -> Book:
    path = k.CONFIG_MAP.path(owner.namespace, gateway_budget_name(owner.name))
    return Book.read(plane.ask("GET", path).json().get("data", {}).get(KEY, "").encode())


def settings(owner: Owner, local: FakeUpstream, closed: FakeUpstream, folder: Path) -> GatewayConfig:
    store = {"kind": "Object", "object": f"{owner.namespace}/{gateway_budget_name(owner.name)}", "pods": 2}
    spill = {"usdPerDay": str(DAY_USD)}
    # No revision has a weight: every request is for the closed API, as far as the money goes.
    return config(local, closed, price=PRICE, stateDir=str(folder), spill=spill, budgetStore=store, weights={"r0": 0})


async def test_gateways_race_for_one_object_and_pass_no_budget(
    moestack_crd: ControlPlane, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = moestack_crd
    owner = await made(plane, namespace)
    account = plane.service_account(namespace, gateway_name(owner.name))
    monkeypatch.setenv("KUBECONFIG", str(account))
    async with FakeUpstream() as local, FakeUpstream(Behaviour(tokens=300, prompt_tokens=100)) as closed:

        async def some(folder: str, calls: int) -> list[int]:
            async with running(settings(owner, local, closed, tmp_path / folder)) as client:
                answers = await asyncio.gather(*(client.post(chat(False, max_tokens=300)) for _ in range(calls)))
                return [answer.status for answer in answers]

        first = await some("a", 4)
        assert first == [200] * 4
        # Pods that take its place know what it spent; they race for the rest.
        rest = [status for found in await asyncio.gather(some("b", 30), some("c", 30)) for status in found]
        assert set(rest) == {200, 503}
        paid = 4 + rest.count(200)
        assert paid == len(closed.requests)
        ((_, day),) = book(plane, owner).days.items()
        assert total(day.known()) / PICO == paid * CALL_USD <= DAY_USD
        assert total(day.known()) == day.used(DEPLOYMENT), "something is still held"
        assert paid * CALL_USD > DAY_USD - 2 * CALL_USD, "what is left is less than a call may cost"
    await _may_touch_nothing_else(owner, account)
    managers = _managers(plane, owner)
    assert "f:data" not in str(managers[OPERATOR_MANAGER]), "the operator owns no money"

    plane.ask("DELETE", MOE_DEPLOYMENT.path(namespace, "race"))
    path = k.CONFIG_MAP.path(namespace, gateway_budget_name(owner.name))
    eventually("the books are gone", lambda: plane.ask("GET", path).status_code == 404, timeout_s=120)


def _managers(plane: ControlPlane, owner: Owner) -> dict[str, Any]:
    path = k.CONFIG_MAP.path(owner.namespace, gateway_budget_name(owner.name))
    fields = plane.ask("GET", path).json()["metadata"]["managedFields"]
    return {entry["manager"]: orjson.loads(orjson.dumps(entry["fieldsV1"])) for entry in fields}


async def _may_touch_nothing_else(owner: Owner, kubeconfig: Path) -> None:
    api = await connect(kubeconfig)
    own = Ref(k.CONFIG_MAP, owner.namespace, gateway_budget_name(owner.name))
    other = Ref(k.CONFIG_MAP, owner.namespace, "kube-root-ca.crt")
    try:
        assert (await api.get(own))["metadata"]["name"] == own.name
        for refused in (
            lambda: api.get(other),
            lambda: api.list(k.CONFIG_MAP, namespace=owner.namespace),
            lambda: api.delete(own),
            lambda: api.create(Ref(k.CONFIG_MAP, owner.namespace, "mine"), {}),
            lambda: api.get(Ref(k.ROLE, owner.namespace, gateway_name(owner.name))),
        ):
            with pytest.raises(Forbidden):
                await refused()
    finally:
        await api.close()
