"""Cases on what the server makes of what it is given: defaults, forms, rules."""

from __future__ import annotations

import pytest

from moe_kube.errors import Invalid
from moe_kube.managed import owned
from moe_kube.objects import (
    CONFIG_MAP,
    CONTROLLER_REVISION,
    DEPLOYMENT,
    MOE_DEPLOYMENT,
    NETWORK_POLICY,
    RAY_SERVICE,
    Obj,
)
from tests.kube.bodies import CONTENTS, LABELS, MOE_SPEC, RAY_SPEC, body
from tests.kube.server import OPERATOR, PERSON, Server, case, gone


@case
async def quantities_of_built_in_kinds_have_one_form(server: Server) -> None:
    forms = {
        "0.5": "500m",
        "1000m": "1",
        "2000": "2k",
        "1024Mi": "1Gi",
        "1.5Gi": "1536Mi",
        "1500Mi": "1500Mi",
        "0": "0",
    }
    for written, stored in forms.items():
        resources = {"limits": {"memory": written}, "requests": {"memory": written}}
        pods = {"containers": [{"name": "main", "image": "i", "resources": resources}]}
        spec = {
            **CONTENTS[DEPLOYMENT]["spec"],
            "replicas": 0,
            "template": {"metadata": {"labels": LABELS}, "spec": pods},
        }
        live = await server.api.apply(server.ref(DEPLOYMENT), {"spec": spec}, manager=OPERATOR)
        (found,) = live["spec"]["template"]["spec"]["containers"]
        assert found["resources"] == {"limits": {"memory": stored}, "requests": {"memory": stored}}, written


@case
async def defaults_inside_what_is_whole_become_the_owners(server: Server) -> None:
    """Whoever compares what it applied with what it owns must write these out."""
    reference = {"fieldPath": "metadata.name"}
    token = {"serviceAccountToken": {"path": "token"}}
    pods = {
        "containers": [{"name": "main", "image": "i", "env": [{"name": "N", "valueFrom": {"fieldRef": reference}}]}],
        "volumes": [{"name": "token", "projected": {"sources": [token]}}],
    }
    spec = {**CONTENTS[DEPLOYMENT]["spec"], "replicas": 0, "template": {"metadata": {"labels": LABELS}, "spec": pods}}
    live = await server.api.apply(server.ref(DEPLOYMENT), {"spec": spec}, manager=OPERATOR)
    found = owned(live, OPERATOR)["spec"]["template"]["spec"]
    assert found["containers"][0]["env"][0]["valueFrom"] == {"fieldRef": {**reference, "apiVersion": "v1"}}
    (source,) = found["volumes"][0]["projected"]["sources"]
    assert source == {"serviceAccountToken": {"expirationSeconds": 3600, "path": "token"}}
    rules = [{"ports": [{"port": 80}]}]
    live = await server.api.apply(
        server.ref(NETWORK_POLICY), {"spec": {"podSelector": {}, "ingress": rules}}, manager=OPERATOR
    )
    assert owned(live, OPERATOR)["spec"]["ingress"] == [{"ports": [{"port": 80, "protocol": "TCP"}]}]
    if RAY_SERVICE in server.kinds:
        cluster = RAY_SPEC["rayClusterConfig"]
        groups = [{"groupName": "g", "rayStartParams": {}, "template": {"spec": {"containers": []}}}]
        ray = {**RAY_SPEC, "rayClusterConfig": {**cluster, "workerGroupSpecs": groups}}
        live = await server.api.apply(server.ref(RAY_SERVICE), {"spec": ray}, manager=OPERATOR)
        filled = {"maxReplicas": 2147483647, "minReplicas": 0, "numOfHosts": 1, "replicas": 0}
        assert owned(live, OPERATOR)["spec"]["rayClusterConfig"]["workerGroupSpecs"] == [{**groups[0], **filled}]


@case
async def what_is_empty_in_a_built_in_kind_is_left_out(server: Server) -> None:
    """It is owned, but not there: so what is applied to such kinds must not hold it."""
    live = await server.api.apply(server.ref(CONFIG_MAP), {"data": {}}, manager=OPERATOR)
    assert "data" not in live
    assert owned(live, OPERATOR) == {}
    pods = {"containers": [{"name": "main", "image": "i", "args": [], "env": []}], "volumes": []}
    spec = {**CONTENTS[DEPLOYMENT]["spec"], "replicas": 0, "template": {"metadata": {"labels": LABELS}, "spec": pods}}
    live = await server.api.apply(server.ref(DEPLOYMENT), {"spec": spec}, manager=OPERATOR)
    found = live["spec"]["template"]["spec"]
    assert "volumes" not in found
    assert not {"args", "env"} & found["containers"][0].keys()


@case
async def a_document_that_is_carried_stays_as_it_is(server: Server) -> None:
    data = {"spec": {"limits": {"cpu": "1000m"}, "env": [], "labels": {}, "ports": [{"port": 1}], "n": 1.5}}
    wanted = {"data": data, "revision": 3}
    ref = server.ref(CONTROLLER_REVISION)
    live = await server.api.apply(ref, wanted, manager=OPERATOR)
    assert live["data"] == data
    assert owned(live, OPERATOR) == wanted


@case
async def some_fields_cannot_change(server: Server) -> None:
    revision = server.ref(CONTROLLER_REVISION)
    await server.api.apply(revision, body(CONTROLLER_REVISION), manager=OPERATOR)
    with pytest.raises(Invalid, match="immutable"):
        await server.api.apply(revision, {"data": {"other": 1}, "revision": 1}, manager=OPERATOR)
    deployment = server.ref(DEPLOYMENT)
    await server.api.apply(deployment, body(DEPLOYMENT), manager=OPERATOR)
    spec = CONTENTS[DEPLOYMENT]["spec"]
    labels = {"app.kubernetes.io/name": "moestack"}
    with pytest.raises(Invalid, match="immutable"):
        await server.api.apply(deployment, {"spec": {**spec, "selector": {"matchLabels": labels}}}, manager=OPERATOR)
    later = await server.api.apply(revision, {**body(CONTROLLER_REVISION), "revision": 2}, manager=OPERATOR)
    assert later["revision"] == 2


# Our own rules


@case
async def defaults_are_filled_in_and_owned_by_nobody(server: Server) -> None:
    ref = server.ref(MOE_DEPLOYMENT)
    live = await server.api.apply(ref, {"spec": MOE_SPEC}, manager=PERSON)
    assert live["spec"]["replicas"]["min"] >= 1
    assert live["spec"]["experts"]["overflow"] == "Unlimited"
    assert live["spec"]["fallback"]["budget"]["usdPerDay"] == "200"
    assert owned(live, PERSON) == {"spec": MOE_SPEC}


@case
async def a_bad_resource_is_invalid_and_the_field_is_named(server: Server) -> None:
    bad: dict[str, Obj] = {
        "gpusPerReplica": {**MOE_SPEC, "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 0}},
        "spec.model": {key: value for key, value in MOE_SPEC.items() if key != "model"},
        "overflow": {**MOE_SPEC, "experts": {"overflow": "Sometimes"}},
    }
    for field, spec in bad.items():
        for write in (
            server.api.apply(server.ref(MOE_DEPLOYMENT, "bad"), {"spec": spec}, manager=PERSON),
            server.api.create(server.ref(MOE_DEPLOYMENT, "bad"), {"spec": spec}),
        ):
            with pytest.raises(Invalid) as caught:
                await write
            assert field in str(caught.value)
            assert caught.value.status == 422
    assert await gone(server, server.ref(MOE_DEPLOYMENT, "bad"))
