"""What a Grafana dashboard is here: rows of panels, each with its queries; and the JSON that Grafana reads.

Every dashboard has the variables `datasource` (a Prometheus) and `deployment`; queries use both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from moe_core import metrics

Json = dict[str, Any]

SCHEMA_VERSION = 39
"""Of Grafana 10.4 and 11: newer ones read it and move it on."""
COLUMNS = 24
GRID_POINTS = 100
"""Cells of a row: Grafana draws no grid with more than 200."""
TAG = "moestack"
DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
DEPLOYMENT = "~$deployment"
"""Matcher of label `deployment`, for promql.select."""
WINDOW = "$__rate_interval"


class Kind(StrEnum):
    """How a panel shows its series, by Grafana's names."""

    LINES = "timeseries"
    NUMBER = "stat"
    BARS = "bargauge"
    GRID = "status-history"
    """A row of coloured cells for each series: a heat map whose rows have names."""


class Unit(StrEnum):
    """Units by Grafana's names."""

    SECONDS = "s"
    SHARE = "percentunit"
    NUMBER = "short"
    REQUESTS_S = "reqps"
    PER_SECOND = "ops"
    USD = "currencyUSD"
    BYTES_S = "Bps"
    FLOPS = "flops"


@dataclass(frozen=True)
class Query:
    """One PromQL expression; `legend` names its series, with {{label}}."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One picture. `width` of 24 columns."""

    title: str
    description: str
    unit: Unit
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    width: int = 8
    stacked: bool = False
    steps: tuple[tuple[float, str], ...] = ()
    """(value from which on, colour), above green."""
    floor: float = 0
    """Where the scale of colours or the axis begins."""
    top: float | None = None
    """Where it ends; by default at the largest value."""

    @property
    def height(self) -> int:
        return {Kind.NUMBER: 4, Kind.GRID: 12}.get(self.kind, 8)


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """A page. `name` is that of its file and part of its uid."""

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]
    marks: tuple[tuple[str, Query], ...] = ()
    """Named queries whose samples are drawn as marks through every panel."""
    by_replica: bool = False
    """Whether a variable chooses replicas too."""


def to_json(page: Dashboard) -> Json:
    """The document that Grafana imports."""
    return {
        "uid": f"moestack-{page.name}",
        "title": f"moestack: {page.title}",
        "description": page.description,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "links": [{"type": "dashboards", "title": "moestack", "tags": [TAG], "asDropdown": True, "keepTime": True}],
        "templating": {"list": _variables(page)},
        "annotations": {"list": [_mark(name, query) for name, query in page.marks]},
        "panels": _panels(page.rows),
    }


def _variables(page: Dashboard) -> list[Json]:
    found: list[Json] = [
        {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
            "hide": 0,
        },
        _labels("deployment", metrics.GATEWAY_CONFIG_LOADED.name),
    ]
    if page.by_replica:
        found.append(_labels("replica", f'{metrics.ENGINE_RUNNING.name}{{deployment=~"$deployment"}}'))
    return found


def _labels(label: str, series: str) -> Json:
    return {
        "name": label,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({series}, {label})", "refId": label},
        "definition": f"label_values({series}, {label})",
        "refresh": 2,  # with every change of the time range
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
    }


def _mark(name: str, query: Query) -> Json:
    return {
        "name": name,
        "enable": True,
        "hide": False,
        "datasource": DATASOURCE,
        "expr": query.expr,
        "titleFormat": query.legend,
        "iconColor": "purple",
        "step": "15s",
    }


def _panels(rows: Sequence[Row]) -> list[Json]:
    """Panels from left to right; one that does not fit begins a new line."""
    found: list[Json] = []
    top = 0
    for row in rows:
        found.append(_heading(row.title, len(found) + 1, top))
        top, left, tallest = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, tallest = top + tallest, 0, 0
            place = {"h": panel.height, "w": panel.width, "x": left, "y": top}
            found.append(_panel(panel, len(found) + 1, place))
            left, tallest = left + panel.width, max(tallest, panel.height)
        top += tallest
    return found


def _heading(title: str, number: int, top: int) -> Json:
    place = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel, number: int, place: Json) -> Json:
    instant = panel.kind in {Kind.NUMBER, Kind.BARS}
    return {
        "id": number,
        "type": panel.kind.value,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                "instant": instant,
                "range": not instant,
            }
            for index, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
        **({"maxDataPoints": GRID_POINTS} if panel.kind is Kind.GRID else {}),
    }


_COLOURS = {Kind.LINES: "palette-classic", Kind.GRID: "continuous-YlRd"}


def _field(panel: Panel) -> Json:
    steps = [{"color": "green", "value": None}, *({"color": color, "value": at} for at, color in panel.steps)]
    grid = panel.kind is Kind.GRID
    found: Json = {
        "unit": panel.unit.value,
        "min": panel.floor,
        "color": {"mode": _COLOURS.get(panel.kind, "thresholds")},
        "thresholds": {"mode": "absolute", "steps": steps},
        "noValue": "none",
        "custom": {},
    }
    if panel.top is not None:
        found["max"] = panel.top
    if panel.kind is Kind.LINES:
        found["custom"] = {
            "fillOpacity": 20 if panel.stacked else 0,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "showPoints": "never",
            "spanNulls": False,
            "thresholdsStyle": {"mode": "line" if panel.steps else "off"},
        }
    elif grid:
        found["custom"] = {"fillOpacity": 80, "lineWidth": 0}
    return found


def _options(panel: Panel) -> Json:
    reduced = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    match panel.kind:
        case Kind.LINES:
            legend = {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]}
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
        case Kind.NUMBER:
            return {**reduced, "colorMode": "value", "graphMode": "none", "textMode": "auto"}
        case Kind.BARS:
            return {**reduced, "orientation": "horizontal", "displayMode": "gradient"}
        case Kind.GRID:
            return {"showValue": "never", "rowHeight": 0.9, "legend": {"showLegend": False}}
