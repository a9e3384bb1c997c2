"""Each alert fires where it should and is silent elsewhere, by Prometheus' own rule tests; and is explained."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_operator import chart
from moe_operator.render.alerts import RUNBOOK, Alert, alerts
from tests.render.cases import ROOT, example, put

RESOURCE = example(
    "laptop",
    put("experts", {"overflow": "Reroute", "capacityFactor": {"prefill": "1.5"}}),
    put("replicas.min", 2),
).resource
KEY = RESOURCE.key
EVERY = {alert.name: alert for alert in (*alerts(RESOURCE), *chart.ALERTS)}
Series = dict[str, str]
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: tools/system-packages installs it"
)


def of(name: str, **labels: str) -> str:
    """A series of the deployment under test, as an exporter names it."""
    pairs = {"deployment": KEY, **labels}
    found = ", ".join(f'{label}="{value}"' for label, value in pairs.items())
    return f"{name}{{{found}}}"


def rising(a_minute: float) -> str:
    """A counter that rises so much a minute for two days."""
    return f"0+{a_minute:g}x2880"


def still(value: float) -> str:
    return f"{value:g}x2880"


def slo(missed: float) -> Series:
    """A hundred requests a minute."""
    name = "moestack_gateway_slo_requests_total"
    return {of(name, result="met"): rising(100 - missed), of(name, result="missed"): rising(missed)}


def spilled(share: float, reason: str) -> Series:
    name = "moestack_gateway_requests_total"
    return {
        of("moestack_gateway_spilled_requests_total", target="gpt", reason=reason): rising(100 * share),
        of(name, target="r0", outcome="ok"): rising(100 * (1 - share)),
        of(name, target="gpt", outcome="ok"): rising(100 * share),
    }


def spend(usd_a_day: float) -> Series:
    return {of("moestack_gateway_spend_usd_total", target="gpt"): rising(usd_a_day / 1440)}


def knobs(*versions: int) -> Series:
    return {of("moestack_knobs_version", replica=f"r{i}"): still(one) for i, one in enumerate(versions)}


def lost(share: float) -> Series:
    tokens = {of("moestack_expert_tokens_total", layer="0"): rising(1000)}
    return {of("moestack_expert_lost_gate_mass_total", layer="0"): rising(1000 * share), **tokens}


def imbalance(by: str, value: float) -> Series:
    return {of("moestack_expert_imbalance_ratio", layer="3", by=by): still(value)}


def trials(text: str) -> Series:
    return {of("moestack_tuner_trials_total", state="rolled_back"): text}


def failed(result: str) -> Series:
    return {f'moestack_operator_reconcile_seconds_count{{result="{result}"}}': rising(1)}


LOADED = "moestack_gateway_config_loaded"
EXPLORING = "moestack_tuner_exploring"
GONE = "1x900 _x1980"
"""A series that ends after 15 hours."""
TABLE: dict[str, tuple[Series, Series]] = {
    "MoEStackGatewayAbsent": ({of(LOADED): GONE}, {of(LOADED): still(1)}),
    "MoEStackGatewayConfigRefused": (
        {of(LOADED, pod="a"): still(1), of(LOADED, pod="b"): still(0)},
        {of(LOADED, pod="a"): still(1)},
    ),
    "MoEStackGatewayBreakerOpen": (
        {of("moestack_gateway_breaker_open", target="gpt"): still(1)},
        {of("moestack_gateway_breaker_open", target="gpt"): "0x1400 1 1 0x1400"},
    ),
    "MoEStackSLOFastBurn": (slo(31), slo(29)),
    "MoEStackSLOSlowBurn": (slo(11), slo(9)),
    "MoEStackShedding": (
        {of("moestack_gateway_shed_requests_total", reason="budget"): rising(1)},
        {of("moestack_gateway_shed_requests_total", reason="budget"): still(7)},
    ),
    "MoEStackOwnPoolDown": (spilled(0.95, "local_down"), spilled(0.95, "slo_predicted")),
    "MoEStackFallbackBudgetNearlySpent": (spend(190), spend(170)),
    "MoEStackFallbackSpendForecast": (spend(210), spend(190)),
    "MoEStackKVCacheFull": (
        {of("moestack_engine_kv_cache_usage_ratio", replica="a"): still(0.98)},
        {of("moestack_engine_kv_cache_usage_ratio", replica="a"): still(0.96)},
    ),
    "MoEStackLostGateMass": (lost(0.5), lost(0.001)),
    "MoEStackExpertImbalance": (imbalance("rank", 2.1), {**imbalance("rank", 1.9), **imbalance("expert", 5.0)}),
    "MoEStackKnobsNotInForce": (knobs(4, 4, 3), knobs(4, 4, 4)),
    "MoEStackReplicasMissing": (
        {of("moestack_board_replicas", revision="a"): still(1)},
        {of("moestack_board_replicas", revision="a"): still(1), of("moestack_board_replicas", revision="b"): still(1)},
    ),
    "MoEStackLayersBypassed": (
        {
            of("moestack_expert_layers", state="bypassed"): still(1),
            of("moestack_expert_layers", state="hooked"): still(3),
        },
        {
            of("moestack_expert_layers", state="bypassed"): still(0),
            of("moestack_expert_layers", state="hooked"): still(4),
        },
    ),
    "MoEStackTunerGone": ({of(EXPLORING): GONE}, {of(EXPLORING): still(0)}),
    "MoEStackTunerNotExploring": ({of(EXPLORING): still(0)}, {of(EXPLORING): "0x600 1x5 0x2275"}),
    "MoEStackTunerRolledBack": (trials("0x1420 1x1460"), trials("1x2880")),
    "MoEStackOperatorAbsent": ({"moestack_operator_leader": still(0)}, {"moestack_operator_leader": still(1)}),
    "MoEStackOperatorFailing": (failed("failed"), failed("retried")),
    "MoEStackOperatorBehind": (
        {'moestack_operator_cache_behind{kind="Service"}': still(1)},
        {
            'moestack_operator_cache_behind{kind="Service"}': still(0),
            "moestack_operator_queue_oldest_seconds": still(20),
        },
    ),
}
"""Alert → series under which it fires, and under which it does not, after a day."""
AT = "24h"


@dataclass(frozen=True)
class Said:
    """What promtool says of rules under series."""

    ok: bool
    text: str


def tried(alert: Alert, series: Series, fires: bool, folder: Path) -> Said:
    """The alert alone under series, at the end of a day."""
    made = alert.to_json(KEY)
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": [made]}]}))
    expected: list[dict[str, Any]] = [{"exp_labels": {}, "exp_annotations": {}}] if fires else []
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": AT, "alertname": alert.name, "exp_alerts": expected}],
    }
    (folder / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [case]})
    )
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yaml"], cwd=folder, capture_output=True, text=True, check=False
    )
    return Said(done.returncode == 0, done.stdout + done.stderr)


def got(said: Said) -> str:
    """What promtool found in place of what was expected of labels and texts."""
    return said.text.split("got:", 1)[-1]


def test_the_table_names_every_alert() -> None:
    assert TABLE.keys() == EVERY.keys()


@needs_promtool
@pytest.mark.parametrize("name", TABLE)
def test_it_fires_where_it_should_and_nowhere_else(name: str, tmp_path: Path) -> None:
    alert, (bad, good) = EVERY[name], TABLE[name]
    assert tried(alert, good, False, tmp_path).ok, f"{name} fires where all is well"
    # promtool compares whole alerts; which ones fire, with their texts, is read from what it says.
    said = tried(alert, bad, True, tmp_path)
    assert not said.ok
    assert f'alertname="{name}"' in got(said), said.text
    assert f'severity="{alert.severity}"' in got(said)
    assert "<no value>" not in got(said)
    assert "error" not in got(said).lower().replace("in an error", "")


@pytest.mark.parametrize("alert", EVERY.values(), ids=EVERY)
def test_it_has_all_that_a_person_needs(alert: Alert) -> None:
    made = alert.to_json(KEY)
    assert made["labels"]["severity"] in {"critical", "warning", "info"}
    assert made["annotations"]["runbook"] == f"docs/runbook.md#{alert.anchor}"
    assert made["annotations"]["summary"] == f"{KEY}: {alert.summary}"
    assert alert.description.endswith(".")
    assert alert.description.removesuffix(".").lower() != alert.summary.lower()


def sections() -> dict[str, str]:
    """Text of each alert in the runbook, by its anchor."""
    parts = re.split(r"^## +(.+)\n", (ROOT / RUNBOOK).read_text(), flags=re.MULTILINE)
    return {head.strip().lower(): text for head, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_runbook_has_every_alert_and_nothing_else() -> None:
    assert sections().keys() == {alert.anchor for alert in EVERY.values()}


@pytest.mark.parametrize("alert", EVERY.values(), ids=EVERY)
def test_the_runbook_says_what_it_means_where_to_look_and_what_to_do(alert: Alert) -> None:
    text = sections()[alert.anchor]
    parts = dict(re.findall(r"^\*\*(\w+):\*\*\s+(.*?)(?=^\*\*|^# |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    assert list(parts) == ["Means", "Look", "Do"]
    assert all(len(words.split()) >= 6 for words in parts.values())
    assert "`" in parts["Look"] or "dashboard" in parts["Look"], "it names something to look at"


@pytest.mark.parametrize(
    ("edits", "missing"),
    [
        ([put("tuning.mode", "Off")], {"MoEStackTunerGone", "MoEStackTunerRolledBack", "MoEStackTunerNotExploring"}),
        ([put("tuning.mode", "Recommend")], {"MoEStackTunerRolledBack", "MoEStackTunerNotExploring"}),
        ([put("tuning.paused", True)], {"MoEStackTunerRolledBack", "MoEStackTunerNotExploring"}),
        ([put("tuning.changeBudget", {"trialsPerDay": 0})], {"MoEStackTunerNotExploring"}),
        (
            [put("fallback", None)],
            {"MoEStackOwnPoolDown", "MoEStackFallbackBudgetNearlySpent", "MoEStackFallbackSpendForecast"},
        ),
    ],
)
def test_what_means_nothing_for_a_resource_is_not_there(edits: list[Any], missing: set[str]) -> None:
    whole = {alert.name for alert in alerts(example("laptop", put("replicas.min", 2)).resource)}
    less = {alert.name for alert in alerts(example("laptop", put("replicas.min", 2), *edits).resource)}
    assert whole - less == missing
