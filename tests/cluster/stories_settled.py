"""Stories of rest: nothing is written without a reason, and nobody takes a field from another writer."""

from __future__ import annotations

import json
import time
from typing import Any

import yaml

from moe_kube.objects import Obj
from tests.cluster.life import NAME, Life, story
from tests.cluster.stories_scale import sent

REST_S = 30.0
TUNER = "moestack-tuner"
TUNING: Obj = {"mode": "Auto", "acknowledged": 4, "replicas": {"min": 2, "max": 3}}


@story
def settled_it_is_left_alone(life: Life) -> None:
    life.apply()
    life.until_ready()
    life.until("it rests", lambda: at_rest(life, 3.0))
    before, seen = life.all_objects(), looks(life)
    life.kubectl("annotate", "moed", NAME, "example.com/look=again")  # a reconcile, for nothing
    begun = time.monotonic()
    life.until("it was looked at", lambda: looks(life) > seen)
    while time.monotonic() - begun < REST_S:
        time.sleep(1.0)
    after = life.all_objects()
    before.pop(f"MoEDeployment/{NAME}")
    after.pop(f"MoEDeployment/{NAME}")
    assert after == before
    resource = life.get("moedeployments", NAME) or {}
    operator = [entry for entry in resource["metadata"]["managedFields"] if entry["manager"] == "moestack-operator"]
    person = [entry for entry in resource["metadata"]["managedFields"] if entry["manager"] == "kubectl-annotate"]
    assert operator[0]["time"] < person[0]["time"], "its status was not written since"


def at_rest(life: Life, seconds: float) -> bool:
    before = life.all_objects()
    time.sleep(seconds)
    return life.all_objects() == before


def looks(life: Life) -> int:
    """Reconciles of this namespace in the operator's log that had nothing to do."""
    lines = life.stage.operator.log.read_text().splitlines()
    return sum('"result":"settled"' in line and life.namespace in line for line in lines)


def grant(life: Life) -> None:
    """What the tuner and a person may do here, and no more."""
    rules = {
        "tuner": [{"apiGroups": ["moestack.dev"], "resources": ["moedeployments/status"], "verbs": ["get", "patch"]}],
        "person": [
            {
                "apiGroups": ["moestack.dev"],
                "resources": ["moedeployments"],
                "verbs": ["get", "list", "create", "update", "patch"],
            }
        ],
    }
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role"}
    group = "rbac.authorization.k8s.io/v1"
    made: list[dict[str, Any]] = []
    for user, rule in rules.items():
        subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}
        meta = {"name": user}
        made.append({"apiVersion": group, "kind": "Role", "metadata": meta, "rules": rule})
        made.append(
            {
                "apiVersion": group,
                "kind": "RoleBinding",
                "metadata": meta,
                "roleRef": {**role, "name": user},
                "subjects": [subject],
            }
        )
    life.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(made))


def tune(life: Life, tuning: Obj) -> None:
    """The tuner's write, as it is: never forced."""
    body = {"apiVersion": "moestack.dev/v1alpha1", "kind": "MoEDeployment", "metadata": {"name": NAME}}
    answer = life.plane.ask(
        "PATCH",
        life.path("moedeployments", f"{NAME}/status"),
        {**body, "status": {"tuning": tuning}},
        user="tuner",
        content_type="application/apply-patch+yaml",
        fieldManager=TUNER,
    )
    assert answer.ok, answer.text


def fields(life: Life) -> dict[str, set[str]]:
    """Top fields of spec and status that each manager owns."""
    resource = life.get("moedeployments", NAME) or {}
    found: dict[str, set[str]] = {}
    for entry in resource["metadata"]["managedFields"]:
        owned = entry["fieldsV1"]
        found.setdefault(entry["manager"], set()).update(
            f"{part}.{name.removeprefix('f:')}" for part in ("spec", "status") for name in owned.get(f"f:{part}", ())
        )
    return found


@story
def nobody_takes_a_field_from_another(life: Life) -> None:
    grant(life)
    document = life.document({"replicas": {"min": 1, "max": 4}})

    def apply(*arguments: str, **changes: Any) -> None:
        document["spec"] |= changes
        life.kubectl("apply", *arguments, "-f", "-", stdin=yaml.safe_dump(document), user="person")

    apply()
    revision = life.until_ready()
    tune(life, TUNING)
    life.until("the tuner's bounds are in force", lambda: sent(life, revision)[-1:] == [(2, 3)])
    apply(slo={"ttftP95": "3s", "itlP95": "1s"})
    apply("--server-side", slo={"ttftP95": "2s", "itlP95": "1s"})
    tune(life, {**TUNING, "acknowledged": 5})
    apply("--server-side", replicas={"min": 1, "max": 5})
    life.until_ready()
    life.until("it rests", lambda: at_rest(life, 2.0))

    owned = fields(life)
    assert owned[TUNER] == {"status.tuning"}
    assert "status.conditions" in owned["moestack-operator"]
    assert "status.tuning" not in owned["moestack-operator"]
    assert not {name for name in owned["moestack-operator"] if name.startswith("spec.")}
    persons = set().union(*(names for manager, names in owned.items() if manager.startswith("kubectl")))
    assert persons == {f"spec.{name}" for name in document["spec"]}
    status = life.status()
    assert json.loads(json.dumps(status["tuning"]))["acknowledged"] == 5
    assert sent(life, revision)[-1] == (2, 3), "a person's wider bounds leave the tuner's as they are"
    assert life.names("rayservices") == [revision]
