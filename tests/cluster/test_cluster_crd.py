"""MoEDeployments on the real API server: it takes the CRD, explains it, and refuses what the types refuse, by field."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from moe_api.load import load_object
from tests.api.documents import file_with
from tests.api.test_api_rules import BAD, COUNTS, GAMMAS, gamma_file
from tests.cluster.control_plane import ROOT, ControlPlane

pytestmark = pytest.mark.cluster

CRD = ROOT / "manifests" / "crd"
EXAMPLES = sorted((ROOT / "manifests" / "examples").glob("*.yaml"))
# Wrong before any schema is looked at: the client itself refuses them.
NOT_OURS = {"another kind", "another version", "no kind"}
REFUSED = {
    **{name: (text, path) for name, (text, path, *_) in BAD.items() if name not in NOT_OURS},
    **{f"{g} × {k} < 1": (gamma_file(g, k, 4), f"spec.{g}") for g in GAMMAS for k in COUNTS},
}
TAKEN = {
    **{f"{g} × {k} = 1": gamma_file(g, k, 5) for g in GAMMAS for k in COUNTS},
    **{path.name: path.read_text() for path in EXAMPLES},
}


def create(plane: ControlPlane, text: str) -> tuple[int, dict[str, Any]]:
    """Status and answer of the API server to a new object, as strict as kubectl is."""
    path = "/apis/moestack.dev/v1alpha1/namespaces/default/moedeployments"
    resource = yaml.safe_load(text)
    resource["metadata"].pop("namespace", None)  # of one example; namespaces are not what is asked here
    answer = plane.ask("POST", path, resource, dryRun="All", fieldValidation="Strict")
    return answer.status_code, answer.json()


def test_kubectl_applies_and_explains_it(moestack_crd: ControlPlane) -> None:
    said = moestack_crd.kubectl("apply", "-f", CRD)
    assert "moedeployments.moestack.dev" in said.stdout
    spec = moestack_crd.kubectl("explain", "moed.spec").stdout
    assert all(f"  {name}\t" in spec for name in ("model", "hardware", "slo", "fallback", "tuning"))
    assert "p95" in moestack_crd.kubectl("explain", "moed.spec.slo.ttftP95").stdout.lower()


@pytest.mark.parametrize("case", REFUSED)
def test_the_server_refuses_what_the_types_refuse(case: str, moestack_crd: ControlPlane) -> None:
    text, path = REFUSED[case]
    status, answer = create(moestack_crd, text)
    assert status in {400, 422}, answer
    # A rule over a map names the map; which key of it is wrong only our own check can say.
    assert re.sub(r"(extraArgs)\..*", r"\1", path) in answer["message"]


@pytest.mark.parametrize("case", TAKEN)
def test_the_server_takes_what_the_types_take_with_the_same_defaults(case: str, moestack_crd: ControlPlane) -> None:
    status, answer = create(moestack_crd, TAKEN[case])
    assert status == 201, answer
    mine = load_object(yaml.safe_load(TAKEN[case]))
    assert load_object({**answer, "metadata": {"name": mine.metadata.name}}).spec == mine.spec


def test_kubectl_says_which_field_and_what_to_do(moestack_crd: ControlPlane) -> None:
    def refused(text: str) -> str:
        said = moestack_crd.kubectl("apply", "-f", "-", stdin=text, check=False)
        assert said.returncode != 0
        return said.stderr

    crossed = refused(file_with("replicas: {min: 3, max: 2}"))
    assert "spec.replicas.max" in crossed
    assert "must be at least replicas.min" in crossed
    assert 'unknown field "spec.replica"' in refused(file_with("replica: {min: 1}"))
    for case in NOT_OURS:
        assert refused(BAD[case][0]), case


def test_get_reads_well(moestack_crd: ControlPlane, namespace: str) -> None:
    moestack_crd.kubectl("apply", "-n", namespace, "-f", "-", stdin=file_with())
    header, row = moestack_crd.kubectl("get", "moed", "-n", namespace).stdout.splitlines()
    assert header.split()[:2] == ["NAME", "MODEL"]
    assert row.split()[:2] == ["m", "org/m"]
