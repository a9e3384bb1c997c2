"""The Helm chart on a real API server: taken by it, installed, upgraded, rolled back and gone, and enough to run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_core.config import OperatorConfig
from moe_core.signing import Signer
from moe_operator import chart
from moe_tuner.settings import load_cluster
from tests.cluster import operators
from tests.cluster.control_plane import ROOT, ControlPlane, eventually

pytestmark = pytest.mark.cluster

CHART = ROOT / "charts" / "moestack"
IMAGES = ("--set", "image.repository=registry.example.com/moestack")
EVERYTHING = (
    *IMAGES,
    *(
        "--set",
        f"image.digest={operators.DIGEST}",
        "--set",
        f"engineImage=registry.example.com/engine@{operators.DIGEST}",
    ),
    *("--set", "imagePullSecrets[0].name=pull", "--set", "monitoring.enabled=true"),
    *("--set", "monitoring.labels.team=serving", "--set", "operator.nodeSelector.pool=system"),
    *("--set", "dashboards.enabled=true", "--set", "dashboards.labels.team=serving"),
    *("--set", "tuner.console.enabled=true", "--set", "tuner.console.tokenSecret.name=console"),
    *(
        "--set",
        "tuner.console.hosts={tuner.example}",
        "--set",
        "tuner.console.from[0].podSelector.matchLabels.app=edge",
    ),
    *("--set", "tuner.studies.url=postgresql://u@h/d", "--set", "tuner.studies.passwordSecret.name=studies"),
)
CUSTOM = {"PodMonitor", "PrometheusRule"}
"""Kinds that this control plane does not serve."""


def helm(plane: ControlPlane, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [plane.assets / "bin" / "helm", "--kubeconfig", plane.kubeconfigs["admin"], *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={
            **operators.ENVIRONMENT,
            "HELM_CACHE_HOME": str(plane.folder / "helm"),
            "HELM_CONFIG_HOME": str(plane.folder / "helm"),
        },
    )
    assert not check or done.returncode == 0, f"helm {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
    return done


def rendered(plane: ControlPlane, namespace: str, *values: str) -> list[dict[str, Any]]:
    """What the chart makes, its hooks too."""
    text = helm(plane, "template", "moestack", CHART, "--namespace", namespace, *values).stdout
    return [one for one in yaml.safe_load_all(text) if one]


def one(objects: Sequence[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


@pytest.fixture
def restricted(moestack_crd: ControlPlane, namespace: str) -> Iterator[str]:
    """A namespace whose pods must keep the restricted Pod Security Standard."""
    moestack_crd.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    yield namespace
    for kind in ("clusterrole", "clusterrolebinding"):
        moestack_crd.kubectl("delete", kind, "-l", f"app.kubernetes.io/instance={namespace}", "--ignore-not-found")


@pytest.mark.parametrize(
    "values",
    [IMAGES, EVERYTHING, (*IMAGES, "--set", "namespaces={default}")],
    ids=["plain", "everything", "namespaced"],
)
def test_lint_and_the_api_server_take_it(values: tuple[str, ...], moestack_crd: ControlPlane, restricted: str) -> None:
    helm(moestack_crd, "lint", "--strict", CHART, *values)
    objects = rendered(moestack_crd, restricted, *values)
    taken = [each for each in objects if each["kind"] not in {*CUSTOM, "Pod"}]
    text = yaml.safe_dump_all(taken)
    moestack_crd.kubectl(
        "apply", "--dry-run=server", "--server-side", "--force-conflicts", "--validate=strict", "-f", "-", stdin=text
    )
    assert bool([each for each in objects if each["kind"] in CUSTOM]) == (values == EVERYTHING)
    # A Deployment of pods that admission would refuse is taken all the same: the pods themselves are asked for.
    moestack_crd.apply(*(each for each in objects if each["kind"] == "ServiceAccount"), namespace=restricted)
    for each in objects:
        if each["kind"] in {"Deployment", "Job", "Pod"}:
            template = each if each["kind"] == "Pod" else each["spec"]["template"]
            # Admission keeps the high priorities to namespaces that a cluster's owner names.
            spec = {name: value for name, value in template["spec"].items() if name != "priorityClassName"}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {}}, "spec": spec}
            path = f"/api/v1/namespaces/{restricted}/pods"
            answer = moestack_crd.ask("POST", path, pod, dryRun="All", fieldValidation="Strict")
            assert answer.status_code == 201, answer.text


BAD = {
    "no image": ((), "image.repository: name the image"),
    "a value that is none": ((*IMAGES, "--set", "operator.workrs=2"), "workrs"),
    "no such level": ((*IMAGES, "--set", "operator.logLevel=loud"), "logLevel"),
    "a dashboard that is none": ((*IMAGES, "--set", "dashboards.enable=true"), "enable"),
    "a tuner without Prometheus": ((*IMAGES, "--set", "tuner.prometheusUrl="), "prometheusUrl"),
    "studies in another database": ((*IMAGES, "--set", "tuner.studies.url=mysql://u@h/d"), "url"),
    "a console without tokens": ((*IMAGES, "--set", "tuner.console.enabled=true"), "tuner.console.tokenSecret.name"),
    "a console that takes orders": ((*IMAGES, "--set", "tuner.console.operateSecret=x"), "operateSecret"),
    "a digest that is none": ((*IMAGES, "--set", "image.digest=abc"), "digest"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_refused_by_name(case: str, control_plane: ControlPlane) -> None:
    values, says = BAD[case]
    refused = helm(control_plane, "template", "moestack", CHART, *values, check=False)
    assert refused.returncode != 0
    assert says in refused.stderr


def test_rights_have_no_wildcard_and_are_those_of_the_manifest(control_plane: ControlPlane) -> None:
    objects = rendered(control_plane, "moestack-system", *IMAGES)
    rules = [rule for each in objects for rule in each.get("rules", []) if each["kind"] in {"Role", "ClusterRole"}]
    assert "*" not in json.dumps(rules)
    manifest = list(yaml.safe_load_all((ROOT / "manifests" / "operator" / "rbac.yaml").read_text()))
    assert (
        one(objects, "ClusterRole", "moestack-system-operator")["rules"]
        == one(manifest, "ClusterRole", "moestack-operator")["rules"]
    )


def test_dashboards_are_shipped_byte_for_byte_where_grafana_looks(control_plane: ControlPlane) -> None:
    wanted = {
        f"moestack-{Path(name).name}": text for name, text in chart.files().items() if name.startswith(chart.DASHBOARDS)
    }
    at = ("--set", "dashboards.namespace=monitoring", "--set", "dashboards.folder=LLMs")
    made = [
        each for each in rendered(control_plane, "here", *EVERYTHING, *at) if "-dashboard-" in each["metadata"]["name"]
    ]
    assert {name: text for each in made for name, text in each["data"].items()} == wanted
    for each in made:
        assert each["metadata"]["namespace"] == "monitoring"
        assert {"grafana_dashboard": "1", "team": "serving"}.items() <= each["metadata"]["labels"].items()
        assert each["metadata"]["annotations"] == {"grafana_folder": "LLMs"}
    none = rendered(control_plane, "here", *IMAGES)
    assert not [each for each in none if "-dashboard-" in each["metadata"]["name"]]


def test_the_tuner_can_be_left_out_and_reads_no_key_but_its_own(control_plane: ControlPlane) -> None:
    for values, there in ((EVERYTHING, True), ((*EVERYTHING, "--set", "tuner.enabled=false"), False)):
        made = rendered(control_plane, "moestack-system", *values)
        assert (
            bool([each for each in made if each["metadata"]["name"] in {"moestack-tuner", "moestack-tuner-lease"}])
            == there
        )
    made = rendered(control_plane, "moestack-system", *EVERYTHING)
    volumes = one(made, "Deployment", "moestack-tuner")["spec"]["template"]["spec"]["volumes"]
    assert [[item["key"] for item in each["secret"]["items"]] for each in volumes if "secret" in each] == [
        ["tuner.key"],
        ["token"],
        ["password"],
    ]


def test_the_console_is_off_until_it_is_asked_for(control_plane: ControlPlane, tmp_path: Path) -> None:
    plain, asked = (rendered(control_plane, "moestack-system", *values) for values in (IMAGES, EVERYTHING))
    assert "console" not in yaml.safe_dump(one(plain, "Deployment", "moestack-tuner"))
    assert "console" not in one(plain, "ConfigMap", "moestack-tuner")["data"]["tuner.json"]
    path = tmp_path / "tuner.json"
    Signer.generate().save(tmp_path / "tuner.key")
    document = json.loads(one(asked, "ConfigMap", "moestack-tuner")["data"]["tuner.json"])
    path.write_text(json.dumps({**document, "signingKeyFile": str(tmp_path / "tuner.key")}))
    console = load_cluster(path).console
    assert console is not None
    assert (console.hosts, console.operate_token_file) == (("tuner.example",), None)
    (container,) = one(asked, "Deployment", "moestack-tuner")["spec"]["template"]["spec"]["containers"]
    assert str(Path(console.read_token_file).parent) in {each["mountPath"] for each in container["volumeMounts"]}
    peers = [len(one(made, "NetworkPolicy", "moestack-tuner")["spec"]["ingress"][0]["from"]) for made in (plain, asked)]
    assert peers == [1, 2]


def test_the_plain_manifest_is_the_chart(control_plane: ControlPlane) -> None:
    from tools import install

    assert (ROOT / "manifests" / "install.yaml").read_text() == install.render(control_plane.assets / "bin" / "helm")


def test_install_upgrade_roll_back_and_uninstall(
    kwok: ControlPlane, moestack_crd: ControlPlane, restricted: str
) -> None:
    plane, name = kwok, restricted
    options = ("--namespace", name, "--set", "crds.install=false", "--set", "operator.priorityClassName=", *IMAGES)

    def image() -> str:
        got = plane.ask("GET", f"/apis/apps/v1/namespaces/{name}/deployments/moestack-operator").json()
        return str(got["spec"]["template"]["spec"]["containers"][0]["image"])

    said = helm(plane, "install", name, CHART, *options, "--wait", "--timeout", "120s").stdout
    assert "helm test" in said
    assert image().endswith(":0.1.0")
    before = helm(
        plane, "upgrade", name, CHART, *options, "--set", "image.tag=next", "--set", "operator.workers=9", "--wait"
    )
    assert before.returncode == 0
    assert image().endswith(":next")
    refused = helm(plane, "upgrade", name, CHART, *options, "--set", "operator.workers=0", check=False)
    assert refused.returncode != 0
    assert image().endswith(":next")
    helm(plane, "rollback", name, "1", "--namespace", name, "--wait")
    assert image().endswith(":0.1.0")
    helm(plane, "uninstall", name, "--namespace", name, "--wait")

    def left() -> list[str]:
        listed = plane.kubectl(
            "get",
            "all,cm,sa,role,rolebinding,pdb,netpol,clusterrole,clusterrolebinding",
            "-A",
            "-o",
            "name",
            "-l",
            f"app.kubernetes.io/instance={name}",
        )
        return listed.stdout.split()

    eventually("nothing of the release is left", lambda: not left() or None)


def test_what_it_makes_is_enough_to_run(moestack_crd: ControlPlane, restricted: str, tmp_path: Path) -> None:
    """Its Job's account makes the keys and can do no more; with its configuration and account the operator runs."""
    plane = moestack_crd
    objects = rendered(plane, restricted, *EVERYTHING, "--set", f"namespaces={{{restricted}}}")
    wanted = {"ServiceAccount", "Role", "RoleBinding"}
    plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all([each for each in objects if each["kind"] in wanted]))

    maker = plane.service_account(restricted, "moestack-keys")
    job = one(objects, "Job", "moestack-keys")["spec"]["template"]["spec"]["containers"][0]["command"]
    for says in ("made", "is there, left as it is"):
        done = subprocess.run(
            [sys.executable, *job[1:], "--kubeconfig", maker],
            env=operators.ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert says in done.stdout
        assert "PRIVATE" not in done.stdout + done.stderr
    user = f"system:serviceaccount:{restricted}:moestack-keys"
    for verb in ("get", "list", "delete", "patch"):
        assert (
            plane.kubectl("auth", "can-i", verb, "secrets", "-n", restricted, user=user, check=False).stdout.strip()
            == "no"
        )

    secret = plane.ask("GET", f"/api/v1/namespaces/{restricted}/secrets/moestack-keys").json()["data"]
    (keys := tmp_path / "keys").mkdir()
    for item in one(objects, "Deployment", "moestack-operator")["spec"]["template"]["spec"]["volumes"][1]["secret"][
        "items"
    ]:
        plain = subprocess.run(
            ["base64", "-d"], input=secret[item["key"]], capture_output=True, text=True, check=True
        ).stdout
        (keys / item["path"]).write_text(plain)
    text = one(objects, "ConfigMap", "moestack-operator")["data"]["operator.json"]
    config = OperatorConfig.model_validate_json(text.replace("/etc/moestack/keys", str(keys)).replace("8080", "0"))
    assert config.gateway_image == f"registry.example.com/moestack@{operators.DIGEST}"
    account = plane.service_account(restricted, "moestack-operator")
    with operators.running(tmp_path, config, account) as operator:
        eventually("it leads", lambda: "moestack_operator_leader 1.0" in operator.get("/metrics").text or None)
        eventually("it is ready", lambda: operator.get("/readyz").ok or None)
        assert not [line for line in operator.lines() if line.get("level") == "error"]

    looks = ("-m", "moe_operator.prerequisites", "--config", tmp_path / "operator.json", "--monitoring")
    asked = subprocess.run(
        [sys.executable, *looks, "--kubeconfig", account],
        env=operators.ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ok       MoEDeployment" in asked.stdout, asked.stderr
    assert "MISSING  PodMonitor (monitoring.coreos.com/v1): not served by this cluster" in asked.stdout
    assert asked.returncode == 1
