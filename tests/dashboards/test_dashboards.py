"""Dashboards and alerts name what processes really export, and no panel is empty on a system that has traffic."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
from collections.abc import Iterator

import pytest
import yaml

from moe_core import metrics
from moe_operator import chart, promql
from moe_operator.dashboards import ALL
from moe_operator.dashboards.model import COLUMNS, Dashboard, Kind, Panel, Query, Row, Unit, to_json
from moe_operator.render.alerts import Alert, alerts
from tests.dashboards.exporters import Sample, everything
from tests.dashboards.history import Prometheus, prometheus
from tests.dashboards.terms import Matcher, Series, grouped, series
from tests.render.cases import ROOT, example, put

FILES = ROOT / "charts" / "moestack" / "files"
VARIABLES = {"$deployment": ".*", "$replica": ".*", "$__rate_interval": "1m"}
"""As Grafana fills them in, with All chosen."""
PANELS = {f"{page.name}: {panel.title}": panel for page in ALL for row in page.rows for panel in row.panels}
RESOURCE = example(
    "laptop", put("experts", {"overflow": "Reroute", "capacityFactor": {"prefill": "1.5"}}), put("replicas.min", 2)
).resource
Exported = dict[str, list[dict[str, str]]]
"""Name of a sample → labels of each that was told."""


def expressions() -> dict[str, str]:
    """Every expression of the files that the chart ships and of a MoEDeployment's alerts, by where it stands."""
    found = {f"alert {alert.name}": alert.expr for alert in alerts(RESOURCE)}
    found |= {f"alert {rule['alert']}": rule["expr"] for rule in yaml.safe_load((FILES / "alerts.yaml").read_text())}
    for path in sorted((FILES / chart.DASHBOARDS).glob("*.json")):
        page = json.loads(path.read_text())
        for panel in page["panels"]:
            for target in panel.get("targets", ()):
                found[f"{path.stem}: {panel['title']}: {target['refId']}"] = target["expr"]
        found |= {f"{path.stem}: mark {mark['name']}": mark["expr"] for mark in page["annotations"]["list"]}
        for variable in page["templating"]["list"]:
            if variable["type"] == "query":
                text = variable["definition"].removeprefix("label_values(").removesuffix(f", {variable['name']})")
                found[f"{path.stem}: variable {variable['name']}"] = f"max by ({variable['name']}) ({text})"
    return found


def filled_in(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return asyncio.run(everything(tmp_path_factory.mktemp("exporters")))


@pytest.fixture(scope="module")
def exported(told: list[Sample]) -> Exported:
    found: Exported = {}
    for sample in told:
        found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


@pytest.fixture(scope="module")
def server(told: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        pytest.skip("Prometheus is not installed: tools/system-packages installs it")
    with prometheus(told, tmp_path_factory.mktemp("prometheus")) as running:
        yield running


def problems(expr: str, exported: Exported) -> list[str]:
    """What an expression names that nobody exports."""
    found, selected = [], series(expr)
    if not selected:
        return ["it reads no series"]
    for one in selected:
        rows = exported.get(one.name)
        if rows is None:
            found.append(f"no exporter has {one.name}")
            continue
        labels = {label for row in rows for label in row}
        found += [f"{one.name} has no label {label}" for label in grouped(expr) - labels]
        for matcher in one.matchers:
            if matcher.label not in labels:
                found.append(f"{one.name} has no label {matcher.label}")
            elif matcher.label != "deployment" and not any(matcher.takes(row.get(matcher.label, "")) for row in rows):
                found.append(f"no {one.name} has {matcher.label}{matcher.operator}{matcher.value}")
    return found


@pytest.mark.parametrize(("where", "expr"), expressions().items(), ids=expressions())
def test_it_names_series_and_labels_that_are_exported(where: str, expr: str, exported: Exported) -> None:
    assert problems(filled_in(expr), exported) == [], where


@pytest.mark.parametrize("name", PANELS)
def test_no_panel_is_without_data(name: str, server: Prometheus) -> None:
    for query in PANELS[name].queries:
        values = [float(sample["value"][1]) for sample in server.ask(filled_in(query.expr))]
        assert any(math.isfinite(value) for value in values), f"{query.expr}: {values}"


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_marks_are_understood_and_drawn_where_something_changes(page: Dashboard, server: Prometheus) -> None:
    for _, query in page.marks:
        assert server.ask(filled_in(query.expr)) == [], "nothing changed in this past"
        assert server.ask(filled_in(query.expr).replace(" > 0", " >= 0")), "the series is there"


@pytest.mark.parametrize("alert", [*alerts(RESOURCE), *chart.ALERTS], ids=lambda alert: alert.name)
def test_alerts_are_understood(alert: Alert, server: Prometheus) -> None:
    server.ask(alert.expr)


def test_layers_are_in_the_order_of_their_numbers(server: Prometheus) -> None:
    (panel,) = (panel for name, panel in PANELS.items() if name.startswith("experts: Demand"))
    shown = [sample["metric"]["layer"] for sample in server.ask(filled_in(panel.queries[0].expr))]
    assert shown == ["000", "001"]


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_explains_itself(name: str) -> None:
    panel = PANELS[name]
    assert panel.title
    assert panel.description.endswith(".")
    assert panel.unit in Unit
    assert panel.queries
    for query in panel.queries:
        asked = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
        assert asked <= grouped(query.expr), "its legend names labels that its series have"
        operator_wide = "moestack_operator_" in query.expr
        assert operator_wide or all(_of_the_variable(one) for one in series(query.expr)), query.expr


def _of_the_variable(one: Series) -> bool:
    return Matcher("deployment", "=~", "$deployment") in one.matchers


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_a_page_is_a_document_that_grafana_reads(page: Dashboard) -> None:
    document = to_json(page)
    assert re.fullmatch(r"[a-z0-9-]{1,40}", document["uid"])
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in document["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(panels)))
    assert used == variables
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert [target["refId"] for target in panel["targets"]] == list("ABC"[: len(panel["targets"])])


def test_pages_have_names_of_their_own() -> None:
    assert len({page.name for page in ALL}) == len(ALL) == 5
    shipped = {path.stem for path in (FILES / chart.DASHBOARDS).glob("*.json")}
    assert shipped == {page.name for page in ALL}


def test_the_guide_names_every_page() -> None:
    named = re.findall(r"^\| moestack: (.+?) \|", (ROOT / "docs" / "dashboards.md").read_text(), flags=re.MULTILINE)
    assert named == [page.title for page in ALL]


RENAMED = {
    "a metric that is gone": ("max(moestack_gateway_breakers_open)", "no exporter has"),
    "a label in a matcher": ('sum(rate(moestack_gateway_spend_usd_total{tenant="a"}[5m]))', "has no label tenant"),
    "a label in a group": ("sum by (tenant) (rate(moestack_gateway_spend_usd_total[5m]))", "has no label tenant"),
    "a value that nobody has": ('max(moestack_expert_imbalance_ratio{by="node"})', "has by=node"),
    "a suffix of a histogram": ("sum(rate(moestack_gateway_ttft_seconds[5m]))", "no exporter has"),
    "no series at all": ("vector(0)", "it reads no series"),
    "one of two": ("sum(moestack_board_replicas) / sum(moestack_boards)", "no exporter has moestack_boards"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_what_is_renamed_is_found(case: str, exported: Exported) -> None:
    expr, says = RENAMED[case]
    assert any(says in problem for problem in problems(expr, exported))


def test_a_label_that_a_metric_has_not_is_refused_where_the_query_is_written() -> None:
    with pytest.raises(ValueError, match="has no label tenant"):
        promql.rate(metrics.GATEWAY_SPEND, "5m", ("tenant",))
    with pytest.raises(ValueError, match="has no label tenant"):
        promql.select(metrics.GATEWAY_SPEND, tenant="a")


def test_panels_flow_from_left_to_right_and_break_where_the_line_is_full() -> None:
    def panel(width: int, kind: Kind = Kind.LINES) -> Panel:
        return Panel("t", "d.", Unit.NUMBER, (Query("vector(1)"),), kind, width=width)

    page = Dashboard(
        "p", "p", "", (Row("one", (panel(12, Kind.NUMBER), panel(12), panel(8))), Row("two", (panel(24),)))
    )
    places = [tuple(found["gridPos"][key] for key in ("x", "y", "w", "h")) for found in to_json(page)["panels"]]
    assert places == [(0, 0, 24, 1), (0, 1, 12, 4), (12, 1, 12, 8), (0, 9, 8, 8), (0, 17, 24, 1), (0, 18, 24, 8)]
