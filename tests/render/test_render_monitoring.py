"""Alerts are PromQL that Prometheus reads, over metrics that exist, each with a text in the runbook."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_kube import objects as k
from moe_kube.objects import Kind
from moe_operator.render import monitoring
from moe_operator.render.alerts import alerts
from tests.render.cases import CASES, Case, example, put

BOTH = {k.POD_MONITOR, k.PROMETHEUS_RULE}
LIMITED = example(
    "laptop", put("experts", {"overflow": "Reroute", "capacityFactor": {"prefill": "1.5"}}), put("replicas.min", 2)
)


def kinds(case: Case, present: set[Kind]) -> list[str]:
    made = monitoring.objects(
        case.resource, present=present, config=case.config, owner=case.owner, revisions=[case.revision]
    )
    return [f"{one.ref.kind.kind} {one.ref.name}" for one in made]


@pytest.mark.parametrize(
    ("monitors", "alerts", "present", "expected"),
    [
        ("Auto", "Auto", BOTH, {"PodMonitor qwen3-gateway", "PodMonitor qwen3-engine", "PrometheusRule qwen3"}),
        ("Auto", "Auto", set(), set()),
        ("Enabled", "Enabled", set(), set()),
        ("Disabled", "Auto", BOTH, {"PrometheusRule qwen3"}),
        ("Auto", "Disabled", BOTH, {"PodMonitor qwen3-gateway", "PodMonitor qwen3-engine"}),
        ("Auto", "Auto", {k.PROMETHEUS_RULE}, {"PrometheusRule qwen3"}),
    ],
)
def test_what_is_asked_for_and_served_is_made(
    monitors: str, alerts: str, present: set[Kind], expected: set[str]
) -> None:
    case = example("laptop", put("monitoring", {"monitors": monitors, "alerts": alerts}))
    assert set(kinds(case, present)) == expected


def test_monitors_name_ports_that_pods_have() -> None:
    case = CASES["laptop"]
    made = case.render()
    ports = {port["name"] for one in made for port in found_ports(one.body)}
    wanted = {
        endpoint["port"]
        for one in made
        if one.ref.kind == k.POD_MONITOR
        for endpoint in one.body["spec"]["podMetricsEndpoints"]
    }
    assert wanted == {"admin", "board", "metrics"}
    assert wanted <= ports


def found_ports(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        here = [port for port in value.get("ports", ()) if "containerPort" in port]
        return here + [port for item in value.values() for port in found_ports(item)]
    return [port for item in value for port in found_ports(item)] if isinstance(value, list) else []


def test_an_external_engine_has_no_alert_on_its_replicas() -> None:
    names = {alert.name for alert in alerts(CASES["external-sglang"].resource)}
    assert "MoEStackSLOFastBurn" in names
    assert "MoEStackReplicasMissing" not in names


def test_alerts_are_rules_that_prometheus_reads(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: tools/system-packages installs it")
    groups = [one.body["spec"] for one in LIMITED.render() if one.ref.kind == k.PROMETHEUS_RULE]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(groups[0]))
    done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
