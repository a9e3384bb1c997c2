"""Stories of `kubectl apply`: the examples come to life, read well, and what is wrong is refused by its field."""

from __future__ import annotations

import re

import yaml

from tests.cluster.control_plane import ROOT
from tests.cluster.edge import IMBALANCE, MODEL
from tests.cluster.life import NAME, Life, story

EXAMPLES = ROOT / "manifests" / "examples"
WORKERS = {"qwen3": (1, "4"), "qwen3-chat": (1, "4"), "v4-pro": (2, "8"), "mixtral": (1, "2")}
"""Pods and GPUs of each that the example leads to."""
READY = {"Accepted": "True", "Fits": "True", "ClusterReady": "True", "ServingReady": "True", "GatewayReady": "True"}
REFUSED = {
    "replicas: {min: 3, max: 2}": ("spec.replicas", "must be at least replicas.min"),
    "slo: {ttftP95: soon}": ("spec.slo.ttftP95", ""),
    "replica: {min: 1}": ('unknown field "spec.replica"', ""),
    "upgrade: {steps: [50, 20]}": ("spec.upgrade.steps", "must"),
    "experts: {overflow: Explode}": ("spec.experts.overflow", "Unsupported value"),
}


@story
def every_example_comes_to_life(life: Life) -> None:
    life.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(claim("models")))
    for path in sorted(EXAMPLES.glob("*.yaml")):
        resource = yaml.safe_load(path.read_text())
        resource["metadata"].pop("namespace", None)  # of one example: here they share one
        if path.stem == "full":
            resource["spec"].pop("cluster")  # there is no Redis here, and KubeRay empties it before it lets go
        life.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(resource))
    for name, (count, gpus) in WORKERS.items():
        revision = life.until_ready(name)
        pods = life.list("pods", labelSelector=f"moestack.dev/revision={revision},ray.io/node-type=worker")
        limits = [pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for pod in pods]
        assert limits == [gpus] * count, name
        assert {kind: life.condition(kind, name)[0] for kind in READY} == READY
        assert life.condition("Degraded", name)[:2] == ("False", "AsExpected")
    assert not [line for line in life.warnings() if "Invalid" in line], "KubeRay has nothing against them"

    # Those that run no engine of ours: asleep, somebody else's, and the reference of every field.
    life.until("the gateways are there", lambda: life.condition("GatewayReady", "assistant")[0] == "True")
    assert life.condition("ClusterReady", "assistant")[:2] == ("False", "Suspended")
    life.until("the gateway is there", lambda: life.condition("GatewayReady", "sglang")[0] == "True")
    assert life.condition("ClusterReady", "sglang")[:2] == ("True", "External")
    # Its nodes are not here, so its pods wait; all that it asks for is taken and rendered.
    life.until("full has its cluster", lambda: len(life.names("rayservices")) == len(WORKERS) + 1)
    assert life.condition("Accepted", "full")[0] == "True"
    assert life.condition("Degraded", "full")[:2] == ("False", "AsExpected")


@story
def it_reads_well(life: Life) -> None:
    life.stage.pods.run(life.namespace)
    life.apply()
    revision = life.until_ready()
    with life.stage.edge.trickle(life.stage.pods.address(life.namespace, NAME), per_s=4):
        life.until("its totals are in status", lambda: "rps" in life.status().get("live", {}))
        life.until("its SLO is judged", lambda: life.condition("SLOMet")[0] == "True")
        header, row = life.kubectl("get", "moed").splitlines()
    assert header.split() == ["NAME", "MODEL", "REPLICAS", "READY", "SLO", "IMBALANCE", "SPILL", "$/MTOK", "AGE"]
    columns = [header.index(title) for title in header.split()]
    cells = [row[start:end].strip() for start, end in zip(columns, [*columns[1:], None], strict=True)]
    assert cells[:7] == [NAME, MODEL, "1", "1", "True", str(IMBALANCE), "0"]
    assert re.fullmatch(r"\d+m?\d*s", cells[8])

    explained = life.kubectl("explain", "moed.spec")
    fields = dict(re.findall(r"^  (\w+)\t<(\w+)>", explained, re.MULTILINE))
    assert {"model": "Object", "hardware": "Object", "slo": "Object", "suspend": "boolean"}.items() <= fields.items()
    assert max(map(len, explained.splitlines())) <= 120
    steps = life.kubectl("explain", "moed.spec.upgrade.steps")
    assert "Traffic of the new revision at each step" in steps
    events = life.kubectl("events", "--for", f"moed/{NAME}")
    assert f"{revision} is coming up" in events
    assert f"{revision} takes 100 % of the traffic" in events


@story
def what_is_wrong_is_refused_by_its_field(life: Life) -> None:
    life.apply()
    life.until_ready()
    before = life.get("moedeployments", NAME)
    for wrong, (path, why) in REFUSED.items():
        document = life.document()
        document["spec"] |= yaml.safe_load(wrong)
        said = life.plane.kubectl("-n", life.namespace, "apply", "-f", "-", stdin=yaml.safe_dump(document), check=False)
        assert said.returncode != 0, wrong
        assert path in said.stderr, wrong
        assert why in said.stderr, wrong
    after = life.get("moedeployments", NAME)
    assert before is not None
    assert after is not None
    assert after["spec"] == before["spec"]


def claim(name: str) -> dict[str, object]:
    """A claim that kwok binds."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "kwok-volume",
            "resources": {"requests": {"storage": "1Ti"}},
        },
    }
