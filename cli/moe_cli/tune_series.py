"""What Prometheus holds of a deployment over hours, for the tuner's page; nothing where it is gone."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from moe_core import metrics
from moe_core.http import HttpError, call_json
from moe_core.metrics import Metric

ASK_S = 10.0
POINTS = 240

Points = tuple[tuple[float, float], ...]
"""(unix seconds, value), without gaps filled."""


@dataclass(frozen=True)
class Series:
    """Each empty where Prometheus has nothing to say."""

    attained: Points = ()
    ttft_p95_s: Points = ()
    spend_usd: Points = ()
    busy_s_per_ktoken: Points = ()


async def from_prometheus(client: aiohttp.ClientSession, url: str | None, deployment: str, hours: float) -> Series:
    if url is None:
        return Series()
    end = time.time()
    span = max(60.0, hours * 3600.0)
    step = max(5.0, span / POINTS)
    window = f"[{max(60, round(2 * step))}s]"

    def rate(metric: Metric, more: str = "", suffix: str = "") -> str:
        return f'rate({metric.name}{suffix}{{deployment="{_escaped(deployment)}"{more}}}{window})'

    tokens = f"(sum({rate(metrics.ENGINE_PROMPT_TOKENS)}) + sum({rate(metrics.ENGINE_OUTPUT_TOKENS)}))"
    met = ',result="met"'
    queries = {
        "attained": f"sum({rate(metrics.GATEWAY_SLO, met)}) / sum({rate(metrics.GATEWAY_SLO)})",
        "ttft_p95_s": f"histogram_quantile(0.95, sum by (le) ({rate(metrics.GATEWAY_TTFT, suffix='_bucket')}))",
        "spend_usd": f'sum({metrics.GATEWAY_SPEND.name}{{deployment="{_escaped(deployment)}"}})',
        "busy_s_per_ktoken": f"1000 * sum({rate(metrics.ENGINE_BUSY)}) / {tokens}",
    }
    found = {}
    for name, query in queries.items():
        asked = {"query": query, "start": str(end - span), "end": str(end), "step": str(step)}
        try:
            answer = await call_json(
                client, "GET", str(URL(f"{url.rstrip('/')}/api/v1/query_range").with_query(asked)), total_s=ASK_S
            )
        except HttpError:
            return Series()
        found[name] = points(answer)
    return Series(**found)


def points(answer: Any) -> Points:
    """The one series of a range query; what is no finite number is a gap."""
    try:
        rows = answer["data"]["result"][0]["values"]
        pairs = [(float(at), float(value)) for at, value in rows]
    except (KeyError, IndexError, TypeError, ValueError):
        return ()
    return tuple((at, value) for at, value in pairs if math.isfinite(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
