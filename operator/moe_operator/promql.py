"""PromQL built from the metric table: a name or a label that no exporter has is an error here, not an empty panel."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from moe_core.metrics import Metric


def select(metric: Metric, suffix: str = "", /, **matchers: str) -> str:
    """`name{label="value", …}`; a value that begins with ~ is a regular expression. Raises ValueError for a label that
    the metric has not."""
    _known(metric, matchers)
    found = ", ".join(
        f"{label}=~{json.dumps(value[1:])}" if value.startswith("~") else f"{label}={json.dumps(value)}"
        for label, value in matchers.items()
    )
    return f"{metric.name}{suffix}{{{found}}}" if found else f"{metric.name}{suffix}"


def over(operator: str, expr: str, by: Sequence[str] = ()) -> str:
    """`sum by (a) (…)`, and the like."""
    return f"{operator} by ({', '.join(by)}) ({expr})" if by else f"{operator}({expr})"


def rate(metric: Metric, window: str, by: Sequence[str] = (), suffix: str = "", /, **matchers: str) -> str:
    """Increase a second of a counter, summed."""
    _known(metric, by)
    return over("sum", f"rate({select(metric, suffix, **matchers)}[{window}])", by)


def increase(metric: Metric, window: str, by: Sequence[str] = (), /, **matchers: str) -> str:
    """Increase of a counter, summed."""
    _known(metric, by)
    return over("sum", f"increase({select(metric, **matchers)}[{window}])", by)


def gauge(operator: str, metric: Metric, by: Sequence[str] = (), /, **matchers: str) -> str:
    """A gauge over all that export it, by `sum`, `max`, …"""
    _known(metric, by)
    return over(operator, select(metric, **matchers), by)


def quantile(q: float, metric: Metric, window: str, by: Sequence[str] = (), /, **matchers: str) -> str:
    """A quantile of a histogram over the requests of a window."""
    buckets = over("sum", f"rate({select(metric, '_bucket', **matchers)}[{window}])", ("le", *by))
    _known(metric, by)
    return f"histogram_quantile({q:g}, {buckets})"


def _known(metric: Metric, labels: Iterable[str]) -> None:
    unknown = set(labels) - set(metric.labels)
    if unknown:
        raise ValueError(f"{metric.name} has no label {', '.join(sorted(unknown))}")
