"""`moectl tune pause|resume|pin|unpin NAME` on a real API server: what it writes is what the tuner reads."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_api.annotations import PAUSE_REASON, PAUSED, PINS
from moe_core.config import ClusterTunerConfig
from moe_kube.objects import MOE_DEPLOYMENT, Ref
from moe_tuner import resource
from tests.cluster.control_plane import ControlPlane

pytestmark = pytest.mark.cluster

NAME = "qwen3"
SPEC = {
    "model": {"id": "Qwen/Qwen3-235B-A22B-FP8"},
    "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    "tuning": {"mode": "Auto"},
}
OTHERS = {"team.example/owner": "serving"}
PROCESS = ClusterTunerConfig(prometheus_url="http://prometheus", signing_key_file="/keys/tuner.key")


@dataclass(frozen=True)
class Bench:
    """One MoEDeployment of a person, and moectl for it."""

    plane: ControlPlane
    namespace: str
    account: Path

    def tune(self, *words: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "moe_cli.main", "tune", *words, "-n", self.namespace]
        ran = subprocess.run(
            [*command, "--kubeconfig", str(self.account)], capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    @property
    def obj(self) -> Any:
        answer = self.plane.ask("GET", Ref(MOE_DEPLOYMENT, self.namespace, NAME).path)
        assert answer.ok, answer.text
        return answer.json()

    @property
    def annotations(self) -> dict[str, str]:
        found: dict[str, str] = self.obj["metadata"].get("annotations", {})
        return found

    @property
    def read(self) -> resource.Wanted:
        """As the tuner reads it."""
        return resource.read(self.obj, (), PROCESS, None, 1.8e9)


def document(**annotations: str) -> str:
    body = {"apiVersion": "moestack.dev/v1alpha1", "kind": "MoEDeployment"}
    return yaml.safe_dump({**body, "metadata": {"name": NAME, "annotations": annotations}, "spec": SPEC})


@pytest.fixture
def bench(moestack_crd: ControlPlane, namespace: str) -> Bench:
    plane = moestack_crd
    plane.kubectl("apply", "--server-side", "-n", namespace, "-f", "-", stdin=document(**OTHERS))
    return Bench(plane, namespace, plane.kubeconfigs["admin"])


def test_a_pause_is_written_shown_and_taken_back(bench: Bench) -> None:
    assert f"{bench.namespace}/{NAME}: paused" in bench.tune("pause", NAME, "--reason", "a launch")
    assert bench.annotations == {**OTHERS, PAUSED: "true", PAUSE_REASON: "a launch"}
    assert [(pause.source, pause.reason) for pause in bench.read.pauses] == [("Annotation", "a launch")]
    version = bench.obj["metadata"]["resourceVersion"]
    bench.tune("pause", NAME, "--reason", "a launch")
    assert bench.obj["metadata"]["resourceVersion"] == version, "what is so already is not written again"
    # What GitOps applies names none of ours, and takes none away.
    bench.plane.kubectl("apply", "--server-side", "-n", bench.namespace, "-f", "-", stdin=document(**OTHERS))
    assert bench.annotations[PAUSED] == "true"
    assert "not paused" in bench.tune("resume", NAME)
    assert bench.annotations == OTHERS
    assert bench.read.pauses == ()


def test_a_pause_by_kubectl_is_taken_back_too(bench: Bench) -> None:
    bench.plane.kubectl("annotate", "moed", NAME, "-n", bench.namespace, f"{PAUSED}=2030-01-01T00:00:00Z")
    bench.tune("resume", NAME)
    assert bench.annotations == OTHERS


def test_pins_are_written_one_beside_the_other(bench: Bench) -> None:
    bench.tune("pin", NAME, "experts.capacityFactor.prefill=1.25", "fallback.shareCap")
    out = json.loads(bench.tune("pin", NAME, "engine.maxActiveSeqs=32", "--json"))
    pins = {"experts.capacityFactor.prefill": "1.25", "fallback.shareCap": None, "engine.maxActiveSeqs": 32}
    assert out == {"deployment": f"{bench.namespace}/{NAME}", "paused": None, "pins": pins}
    assert json.loads(bench.annotations[PINS]) == pins
    assert (bench.read.problem, bench.read.pauses) == ("", ())
    assert {pin.knob for pin in bench.read.pins} == pins.keys()
    bench.tune("unpin", NAME, "fallback.shareCap", "engine.maxActiveSeqs")
    assert json.loads(bench.annotations[PINS]) == {"experts.capacityFactor.prefill": "1.25"}
    bench.tune("unpin", NAME, "experts.capacityFactor.prefill")
    assert bench.annotations == OTHERS


def test_on_an_object_without_annotations(bench: Bench) -> None:
    bench.plane.kubectl("annotate", "moed", NAME, "-n", bench.namespace, "team.example/owner-")
    assert bench.annotations == {}
    bench.tune("pause", NAME)
    assert bench.annotations == {PAUSED: "true"}


REFUSED: list[tuple[str, tuple[str, ...], int, str]] = [
    ("no such object", ("pause", "none"), 3, "there is none"),
    ("no such knob", ("pin", NAME, "experts.capacity=1"), 2, "is not known"),
    ("a value that no resource may have", ("pin", NAME, "experts.capacityFactor.prefill=0.5"), 2, "capacityFactor"),
    ("a name and no knob", ("pin", NAME), 2, "none is named"),
    ("no name", ("pause",), 2, "no MoEDeployment of it"),
]


@pytest.mark.parametrize(("words", "code", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_refused_changes_nothing(bench: Bench, words: tuple[str, ...], code: int, says: str) -> None:
    assert says in bench.tune(*words, code=code)
    assert bench.annotations == OTHERS


def test_pins_that_cannot_be_read_are_left_to_who_wrote_them(bench: Bench) -> None:
    bench.plane.kubectl("annotate", "moed", NAME, "-n", bench.namespace, f"{PINS}=[1]")
    assert "is no object" in bench.tune("pin", NAME, "engine.maxActiveSeqs=8", code=2)
    assert bench.annotations == {**OTHERS, PINS: "[1]"}
    bench.tune("pause", NAME)
    assert bench.annotations[PAUSED] == "true"


@pytest.mark.parametrize(("verbs", "says"), [([], "cannot get resource"), (["get"], "cannot patch resource")])
def test_who_lacks_the_right_is_told_which(bench: Bench, verbs: list[str], says: str) -> None:
    plane, name = bench.plane, f"reader{len(verbs)}"
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}
    api = "rbac.authorization.k8s.io"
    role = {"apiVersion": f"{api}/v1", "kind": "Role", "metadata": {"name": name}}
    role["rules"] = [{"apiGroups": ["moestack.dev"], "resources": ["moedeployments"], "verbs": verbs or ["watch"]}]
    binding = {"apiVersion": f"{api}/v1", "kind": "RoleBinding", "metadata": {"name": name}}
    binding |= {"roleRef": {"apiGroup": api, "kind": "Role", "name": name}}
    binding |= {"subjects": [{"kind": "ServiceAccount", "name": name, "namespace": bench.namespace}]}
    plane.kubectl("apply", "-n", bench.namespace, "-f", "-", stdin=yaml.safe_dump_all([account, role, binding]))
    person = replace(bench, account=plane.service_account(bench.namespace, name))
    out = person.tune("pause", NAME, code=3)
    assert says in out
    assert "get and patch moedeployments" in out
    assert bench.annotations == OTHERS
