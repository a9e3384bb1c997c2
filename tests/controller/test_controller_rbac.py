"""The table of rights against what the operator calls in its life: no call without a right, no right without a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.faults import Call, Journal, Rule, answer
from moe_kube.objects import MOE_DEPLOYMENT, Kind, Obj, Ref
from moe_operator import rbac
from moe_operator.children import NOT_OURS, WATCHED
from moe_operator.names import Owner
from moe_operator.render import books
from moe_operator.server import LEASE_NAME
from tests.controller.operators import LEASE, SPEC, Bench

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "manifests" / "operator" / "rbac.yaml"
FALLBACK = {
    "targets": [
        {"name": "gpt", "provider": "openai", "model": "gpt-5.5", "secretRef": {"name": "openai", "key": "apiKey"}}
    ],
    "budget": {"usdPerDay": "200"},
}
Used = tuple[str, str, str]
"""API group, resource with its subresource, verb."""


def used_by(call: Call) -> set[Used]:
    """The rights that one call needs. An apply is a patch, and a create as well where it made the object."""
    resource = f"{call.kind.plural}/{call.subresource}" if call.subresource else call.kind.plural
    verbs = {"apply": ["patch"], "json_patch": ["patch"], "replace": ["update"]}.get(call.verb, [call.verb])
    if call.created and call.verb == "apply":
        verbs = [*verbs, "create"]
    return {(call.kind.group, resource, verb) for verb in verbs}


def used(journal: Journal) -> set[Used]:
    return {right for call in journal.calls for right in used_by(call)}


def granted() -> set[Used]:
    return {(right.kind.group, right.resource, verb) for right in (*rbac.OBJECTS, *rbac.OWN) for verb in right.verbs}


def plant(bench: Bench, kind: Kind) -> None:
    """A child of that kind that should not be: of an operator of before."""
    like = next(
        obj for obj in bench.cluster.peek(kind) if obj["metadata"].get("ownerReferences", [{}])[0].get("controller")
    )
    meta = {key: like["metadata"][key] for key in ("labels", "ownerReferences")}
    body = {key: value for key, value in like.items() if key not in ("metadata", "status")}
    bench.cluster.create(Ref(kind, like["metadata"]["namespace"], "left-over"), {**body, "metadata": meta})


async def life(bench: Bench) -> None:
    """A life in which everything happens that the operator does about a MoEDeployment."""
    auth = {"mode": "APIKeys", "secretName": "keys"}
    exposed = {"auth": auth, "exposure": {"kind": "Ingress", "host": "moe.example.com"}}
    routed = {"auth": auth, "exposure": {"kind": "HTTPRoute", "host": "moe.example.com", "className": "public"}}
    bench.put("one", {**SPEC, "gateway": exposed, "fallback": FALLBACK})
    bench.put("two", {**SPEC, "gateway": routed})
    failure = Rule(answer(503), verbs=frozenset({"apply"}), kinds=frozenset({k.RAY_SERVICE}), times=3)
    async with bench.operator("one", failure) as operator:
        await bench.pass_time(90.0, step=1.0, others=True)
        for kind in WATCHED:
            if kind not in NOT_OURS:
                plant(bench, kind)
        # A RayService that nobody remembers is drained like any other before it goes.
        bench.put("one", {**SPEC, "replicas": {"min": 1, "max": 3}, "upgrade": {"drainTimeout": "30s"}})
        for _ in range(2):
            meta = bench.cluster.get(Ref(MOE_DEPLOYMENT, "serving", "one"))["metadata"]
            operator._recorder.record(Ref(MOE_DEPLOYMENT, "serving", "one"), meta["uid"], reason="Again", note="it is")
            await bench.pass_time(70.0, step=1.0, others=True)


async def test_every_call_of_a_life_has_a_right_and_every_right_a_call() -> None:
    bench = Bench()
    await life(bench)
    assert [kind for kind in WATCHED if bench.cluster.find(Ref(kind, "serving", "left-over"))] == []
    calls = bench.journal.calls
    # Admission asks for this one: of whoever makes an object that holds up the deletion of its owner.
    admission = {("moestack.dev", "moedeployments/finalizers", "update")}
    # And for this one: of whoever grants it, as gateways get it on their books.
    admission |= {("", "configmaps", "update")}
    applied = [call.body for call in calls if call.verb == "apply" and not call.subresource]
    owners = [owner for body in applied for owner in body["metadata"].get("ownerReferences", ())]
    assert any(owner.get("blockOwnerDeletion") and owner["kind"] == "MoEDeployment" for owner in owners)
    assert used(bench.journal) | admission == granted()
    # Of leases it touches its own alone.
    assert {call.ref for call in calls if call.kind == k.LEASE} == {LEASE}
    assert all(right.names == (LEASE_NAME,) for right in rbac.OWN if right.verbs != {"create"})


def test_a_gateway_may_touch_its_books_and_nothing_else() -> None:
    owner = Owner("team", "one", "uid")
    role, binding = (
        next(made for made in books.objects(owner) if made.ref.kind == kind) for kind in (k.ROLE, k.ROLE_BINDING)
    )
    (rule,) = role.body["rules"]
    assert rule == {
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": ["one-gateway-budget"],
        "verbs": ["get", "update"],
    }
    assert binding.body["roleRef"]["name"] == role.ref.name
    assert binding.body["subjects"] == [{"kind": "ServiceAccount", "name": role.ref.name, "namespace": "team"}]
    held = {verb for right in rbac.OBJECTS if right.kind == k.CONFIG_MAP for verb in right.verbs}
    assert held >= set(rule["verbs"]), "nobody grants a right that they lack"


def documents(**config: Any) -> list[Obj]:
    return rbac.documents(OperatorConfig(**config))


@pytest.mark.parametrize(
    "config", [{}, {"namespaces": ("a", "b")}, {"namespace": "elsewhere"}], ids=["cluster", "namespaces", "elsewhere"]
)
def test_no_secret_no_wildcard_no_more_rights_than_its_own_can_be_had_from_it(config: dict[str, Any]) -> None:
    """It makes roles; without `escalate` and `bind` the API server lets none of them hold a right that it lacks."""
    for document in documents(**config):
        for rule in document.get("rules", ()):
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert not {"escalate", "bind", "impersonate", "deletecollection"} & set(rule["verbs"])
            assert not {r.partition("/")[0] for r in rule["resources"]} & {
                "secrets",
                "pods",
                "clusterroles",
                "clusterrolebindings",
            }


def test_cluster_wide_it_gets_one_cluster_role_and_its_lease_at_home() -> None:
    kinds = [(d["kind"], d["metadata"].get("namespace")) for d in documents(namespace="home")]
    assert kinds == [
        ("ServiceAccount", "home"),
        ("ClusterRole", None),
        ("ClusterRoleBinding", None),
        ("Role", "home"),
        ("RoleBinding", "home"),
    ]


def test_in_namespaces_it_gets_nothing_outside_of_them() -> None:
    made = documents(namespaces=("a", "b"), namespace="home")
    assert not [d["kind"] for d in made if d["kind"].startswith("Cluster")]
    assert sorted({d["metadata"]["namespace"] for d in made}) == ["a", "b", "home"]
    home = next(d for d in made if d["kind"] == "Role" and d["metadata"]["namespace"] == "home")
    assert {resource for rule in home["rules"] for resource in rule["resources"]} == {"leases"}


def test_the_manifest_is_what_the_code_calls(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert rbac.main(["--check", str(MANIFEST)]) == 0
    assert list(yaml.safe_load_all(MANIFEST.read_text())) == documents()
    other = tmp_path / "rbac.yaml"
    assert rbac.main(["--check", str(other)]) == 1
    assert rbac.main(["--write", str(other), "--namespaces", "a,b", "--namespace", "home"]) == 0
    assert rbac.main(["--check", str(other), "--namespaces", "a,b", "--namespace", "home"]) == 0
    assert rbac.main(["--check", str(other)]) == 1
    assert "--write" in capsys.readouterr().err
    assert rbac.main([]) == 0
    assert capsys.readouterr().out == MANIFEST.read_text()
