"""Grafana dashboards over the metric table, made by `python -m moe_operator.chart` for the chart to ship."""

from __future__ import annotations

from moe_operator.dashboards import engine, experts, overview, spill, tuner
from moe_operator.dashboards.model import Dashboard

ALL: tuple[Dashboard, ...] = (overview.PAGE, experts.PAGE, spill.PAGE, tuner.PAGE, engine.PAGE)
