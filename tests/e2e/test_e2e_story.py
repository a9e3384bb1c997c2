"""From `helm install` to the last deletion on a cluster with a real node: the chart's images, KubeRay, Ray, vLLM.

The tests are one story, in this order; each begins where the one before it ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.cluster.control_plane import ControlPlane, eventually
from tests.e2e import story
from tests.e2e.clients import Answers, burst, trickle
from tests.e2e.clients import ask as ask_once
from tests.e2e.mock import Mock, mock_running
from tests.e2e.node import NODE, Node
from tests.e2e.pods import IMAGE
from tests.e2e.scrape import URL as PROMETHEUS
from tests.e2e.scrape import prometheus_running, series
from tools import image_contents

pytestmark = [pytest.mark.full, pytest.mark.e2e]

NAMESPACE, NAME = "default", "tiny"
SERVED_S = 900.0
MOED = f"/apis/moestack.dev/v1alpha1/namespaces/{NAMESPACE}/moedeployments/{NAME}"


@pytest.fixture(scope="module")
def cluster(plane: ControlPlane, node: Node) -> Iterator[ControlPlane]:
    """The cluster with KubeRay, Prometheus and the chart."""
    story.prepare(plane, node)
    node.load(image_contents.base(IMAGE))
    with prometheus_running(node):
        story.install(plane, "--set", f"tuner.prometheusUrl={PROMETHEUS}")
        yield plane


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    """The closed API, where pods reach it."""
    with mock_running(NODE) as made:
        yield made


def conditions(plane: ControlPlane) -> dict[str, str]:
    """Type → status and reason."""
    found = plane.ask("GET", MOED).json().get("status", {}).get("conditions", [])
    return {one["type"]: f"{one['status']} {one['reason']}" for one in found}


def gateway(plane: ControlPlane) -> str:
    """URL of the gateway's Service, by its address: this process is on the node, not in a pod."""
    service = plane.ask("GET", f"/api/v1/namespaces/{NAMESPACE}/services/{NAME}-gateway").json()
    return f"http://{service['spec']['clusterIP']}/v1"


def ask(plane: ControlPlane, **more: Any) -> requests.Response:
    """One chat through the gateway's Service, which says who answered."""
    body = {"model": story.MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **more}
    headers = {"x-moestack-explain": "1"}
    return requests.post(f"{gateway(plane)}/chat/completions", json=body, headers=headers, timeout=120)


def went(url: str) -> str:
    """Who answered one chat."""
    answers = Answers()
    ask_once(url, answers)
    (target,) = answers.by_target
    return target


def revisions(plane: ControlPlane) -> list[str]:
    listed = plane.ask("GET", f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices").json()["items"]
    return [one["metadata"]["name"] for one in listed]


def test_the_chart_is_installed_with_the_rights_that_it_asks_for(cluster: ControlPlane) -> None:
    """Pods under the restricted standard are Ready (helm waited), the Job made the keys, its own test passes."""
    pods = cluster.ask("GET", f"/api/v1/namespaces/{story.SYSTEM}/pods").json()["items"]
    parts = sorted(pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods)
    assert parts == ["operator", "operator", "tuner", "tuner"]
    assert [one["restartCount"] for pod in pods for one in pod["status"]["containerStatuses"]] == [0] * 4
    keys = cluster.ask("GET", f"/api/v1/namespaces/{story.SYSTEM}/secrets/moestack-keys").json()["data"]
    assert set(keys) == {"operator.key", "operator.pub", "tuner.key", "tuner.pub"}
    said = story.helm(cluster, "test", "moestack", "--namespace", story.SYSTEM, "--logs")
    assert "ok       RayService (ray.io/v1)" in said


def test_an_applied_model_answers_through_the_gateway(cluster: ControlPlane, mock: Mock) -> None:
    cluster.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    began = time.monotonic()
    cluster.apply(story.deployment(NAME, mock.url, max_active_seqs=4))
    eventually(
        "engine and gateway are ready",
        lambda: conditions(cluster).get("ServingReady", "").startswith("True"),
        SERVED_S,
        poll_s=1,
    )
    print(f"ServingReady after {time.monotonic() - began:.0f} s")
    (revision,) = revisions(cluster)

    def answered() -> requests.Response | None:  # the first ones of all may be foreseen to be late
        answer = ask(cluster, ignore_eos=True)
        return answer if answer.headers.get("x-moestack-target") == revision else None

    answer = eventually("the engine answers", answered, 60, poll_s=1)
    assert answer.ok, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8


def test_a_pod_finds_the_gateway_by_name(cluster: ControlPlane) -> None:
    address = f"http://{NAME}-gateway.{NAMESPACE}/v1/models"
    story.run_client(cluster, NAMESPACE, f"wget -q -O - {address}")
    assert story.MODEL in eventually("its answer", lambda: story.client_said(cluster, NAMESPACE), 60)


def test_prometheus_reads_engine_board_and_gateway(cluster: ControlPlane) -> None:
    ports = {"admin", "board", "metrics"}
    eventually(
        "all ports are read", lambda: {one["metric"]["port"] for one in series("up == 1")} >= ports or None, 60, 1
    )
    counted = eventually("requests are counted", lambda: series("moestack_gateway_requests_total > 0"), 30, 1)
    assert {one["metric"]["pod"].rsplit("-", 2)[0] for one in counted} == {f"{NAME}-gateway"}


def test_a_burst_spills_and_the_spill_ends(cluster: ControlPlane, mock: Mock) -> None:
    """More than the engine can begin in time: what is foreseen to be late is answered elsewhere, and paid for."""
    url, before = gateway(cluster), len(mock.asked)
    answers = burst(url, seconds=20, at_once=16, max_tokens=64)
    print(f"burst: {dict(answers.by_target)}")
    assert not answers.failed, answers.failed[:3]
    assert answers.by_target["elsewhere"] == len(mock.asked) - before > 0
    assert answers.by_target.total() > answers.by_target["elsewhere"]
    paid = f'moestack_gateway_spend_usd_total{{deployment="{NAMESPACE}/{NAME}"}} > 0'
    eventually("what was spent is counted", lambda: series(paid), 30, poll_s=1)
    eventually("the engine answers alone again", lambda: "elsewhere" not in {went(url) for _ in range(5)}, 60, poll_s=1)


def test_an_upgrade_fails_no_request(cluster: ControlPlane, mock: Mock) -> None:
    """A new revision beside the old one: traffic moves once it serves, and the old one goes."""
    (old,) = revisions(cluster)
    with trickle(gateway(cluster), per_s=1) as answers:
        cluster.apply(story.deployment(NAME, mock.url, max_active_seqs=6))
        eventually("the old revision is gone", lambda: old not in revisions(cluster), SERVED_S, poll_s=1)
    (new,) = revisions(cluster)
    print(f"upgrade: {dict(answers.by_target)}")
    assert not answers.failed, answers.failed[:3]
    assert answers.by_target[old] > 0
    assert answers.by_target[new] > 0


def test_deleting_it_leaves_nothing(cluster: ControlPlane) -> None:
    cluster.kubectl("delete", "-n", NAMESPACE, "moed", NAME, "--wait=false")

    def left() -> list[str]:
        kinds = "pods,services,deployments,configmaps,hpa,pdb,networkpolicies,secrets,rayservices,rayclusters,moed"
        listed = cluster.kubectl("get", kinds, "-n", NAMESPACE, "-o", "name").stdout.split()
        return [one for one in listed if one not in {"service/kubernetes", "configmap/kube-root-ca.crt", "pod/client"}]

    eventually("all that it owned is gone", lambda: not left() or None, 240, poll_s=1)


def test_uninstalling_leaves_what_the_chart_says(cluster: ControlPlane) -> None:
    story.helm(cluster, "uninstall", "moestack", "--namespace", story.SYSTEM, "--wait")

    def left() -> list[str]:
        kinds = "pods,services,deployments,roles,secrets"
        listed = json.loads(cluster.kubectl("get", kinds, "-n", story.SYSTEM, "-o", "json").stdout)["items"]
        return [one["metadata"]["name"] for one in listed]

    eventually("only the keys are left", lambda: left() == ["moestack-keys"], 120, poll_s=1)  # pods end by themselves
