"""The only reader of Prometheus: PromQL built from the metric table, typed answers, and missing known as missing.

A series that is absent, NaN, infinite, negative or too old is missing. Prometheus compensates counter resets inside a
window, but not what an engine did between two scrapes, so a window with a reset is no measurement either.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import requests
from prometheus_api_client import PrometheusConnect
from prometheus_api_client.exceptions import PrometheusApiClientException
from urllib3.util.retry import Retry

from moe_core import metrics
from moe_core.metrics import Metric
from moe_tuner.measure import MIN_REQUESTS, Measurement, Unmeasured
from moe_tuner.workers import Workers, run_in

QUERY_S = 3.0
STALE_S = 15.0
"""Age of the newest sample from which Prometheus no longer speaks of the present (or a window, if that is longer)."""

logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


class Source(Protocol):
    """What the slow loop asks."""

    async def health(self) -> Unmeasured | None:
        """None while Prometheus answers with fresh samples."""
        ...

    async def measure(self, window_s: float) -> Measurement | Unmeasured:
        """The window that ends now."""
        ...


class Unusable(Exception):
    """Prometheus gave no usable answer; the message is for a person."""


def selector(metric: Metric, deployment: str, **labels: str) -> str:
    """`name{deployment="…",…}` with label values escaped. Every label must be one of the metric's own."""
    unknown = set(labels) - set(metric.labels)
    if unknown:
        raise ValueError(f"{metric.name} has no label {', '.join(sorted(unknown))}")
    pairs = {"deployment": deployment, **labels}
    inner = ",".join(f'{name}="{_escape(value)}"' for name, value in pairs.items())
    return f"{metric.name}{{{inner}}}"


def queries(deployment: str, window_s: float) -> dict[str, str]:
    """Every query of one window, by the name of what it answers."""
    span = f"[{max(1, round(window_s))}s]"

    def increase(metric: Metric, **labels: str) -> str:
        return f"sum(increase({selector(metric, deployment, **labels)}{span}))"

    def p95(metric: Metric) -> str:
        bucket = selector(metric, deployment).replace(metric.name, f"{metric.name}_bucket", 1)
        return f"histogram_quantile(0.95, sum by (le) (rate({bucket}{span})))"

    failed = " + ".join(
        f"({increase(metrics.GATEWAY_REQUESTS, outcome=outcome)} or vector(0))" for outcome in ("error", "cut", "shed")
    )
    return {
        "age_s": f"time() - max(timestamp({selector(metrics.ENGINE_RUNNING, deployment)}))",
        "resets": f"sum(resets({selector(metrics.ENGINE_STEPS, deployment)}{span}))",
        "requests": increase(metrics.GATEWAY_REQUESTS),
        "failed": failed,
        "spilled": f"({increase(metrics.GATEWAY_SPILLED)} or vector(0))",
        "prompt_tokens": increase(metrics.GATEWAY_PROMPT_TOKENS),
        "output_tokens": increase(metrics.GATEWAY_OUTPUT_TOKENS),
        "engine_tokens": f"{increase(metrics.ENGINE_PROMPT_TOKENS)} + {increase(metrics.ENGINE_OUTPUT_TOKENS)}",
        "busy_s": increase(metrics.ENGINE_BUSY),
        "decode_busy_s": increase(metrics.ENGINE_DECODE_BUSY),
        "decode_steps": increase(metrics.ENGINE_DECODE_STEPS),
        "engine_prompt_tokens": increase(metrics.ENGINE_PROMPT_TOKENS),
        "engine_output_tokens": increase(metrics.ENGINE_OUTPUT_TOKENS),
        "ttft_p95_s": p95(metrics.GATEWAY_TTFT),
        "itl_p95_s": p95(metrics.GATEWAY_ITL),
        "request_p95_s": p95(metrics.GATEWAY_DURATION),
        "lost_gate_mass": f"{increase(metrics.EXPERT_LOST_GATE_MASS)} / {increase(metrics.EXPERT_TOKENS)}",
        "imbalance": f"avg(avg_over_time({selector(metrics.EXPERT_IMBALANCE, deployment, by='rank_demand')}{span}))",
    }


def measurement(values: Mapping[str, float | None], window_s: float) -> Measurement | Unmeasured:
    """Turn answers into a measurement, or say what is missing."""
    resets = values["resets"]
    if resets is not None and resets > 0:
        return Unmeasured(reason="an engine's counters were reset in the window (it restarted)")
    requests_seen = values["requests"]
    if requests_seen is None:
        return Unmeasured(reason=f"no series of {metrics.GATEWAY_REQUESTS.name} in the window")
    if requests_seen < MIN_REQUESTS:
        return Unmeasured(
            reason=f"too little traffic: {requests_seen:.0f} requests in {window_s:g} s, {MIN_REQUESTS} needed"
        )
    ttft, busy, tokens = values["ttft_p95_s"], values["busy_s"], values["engine_tokens"]
    if ttft is None:
        return Unmeasured(reason=f"no samples of {metrics.GATEWAY_TTFT.name} in the window")
    if not tokens:
        return Unmeasured(reason=f"no tokens counted by {metrics.ENGINE_OUTPUT_TOKENS.name} in the window")
    if not busy:
        return Unmeasured(
            reason=f"no engine time counted by {metrics.ENGINE_BUSY.name} in the window: no cost to compare"
        )
    prompt, output = values["prompt_tokens"], values["output_tokens"]
    return Measurement(
        requests=requests_seen,
        requests_per_s=requests_seen / window_s,
        prompt_tokens=None if prompt is None else prompt / requests_seen,
        output_tokens=None if output is None else output / requests_seen,
        busy_s_per_ktoken=1000.0 * busy / tokens,
        ttft_p95_s=ttft,
        itl_p95_s=values["itl_p95_s"],
        request_p95_s=values["request_p95_s"],
        failed_share=min(1.0, (values["failed"] or 0.0) / requests_seen),
        spill_share=min(1.0, (values["spilled"] or 0.0) / requests_seen),
        lost_gate_mass=values["lost_gate_mass"],
        imbalance=values["imbalance"],
        **_passes(values, busy),
    )


def _passes(values: Mapping[str, float | None], busy_s: float) -> dict[str, float]:
    """What the simulator needs of the engine's passes; nothing where its counters do not say."""
    decode_s, steps = values["decode_busy_s"], values["decode_steps"]
    prompt, output = values["engine_prompt_tokens"], values["engine_output_tokens"]
    if not decode_s or not steps or not prompt or not output or busy_s <= decode_s:
        return {}
    return {
        "decode_step_s": decode_s / steps,
        "decode_batch": output / steps,
        "prefill_s_per_token": (busy_s - decode_s) / prompt,
    }


def scalar(result: object) -> float | None:
    """The one value of an instant vector; None where it is empty, NaN, infinite or negative. Raises Unusable."""
    if not isinstance(result, list):
        raise Unusable("its answer is no instant vector")
    if not result:
        return None
    try:
        value = float(result[0]["value"][1])
    except (KeyError, IndexError, TypeError, ValueError):
        raise Unusable("its answer is no instant vector") from None
    return value if math.isfinite(value) and value >= 0 else None


class Prometheus:
    """A Prometheus server as a Source. Queries run in a thread: the client blocks, the loops must not."""

    def __init__(self, url: str, deployment: str, workers: Workers | None = None) -> None:
        self.url = public_url(url)
        self._deployment = deployment
        self._pool = (workers or Workers()).prometheus(url)
        session = requests.Session()
        session.trust_env = False  # as our own HTTP client: no proxy between processes of one installation
        # Retries are the loop's own business: the next window asks again.
        self._client = PrometheusConnect(url=url.rstrip("/"), session=session, retry=Retry(total=0), timeout=QUERY_S)

    def close(self) -> None:
        self._client.close()

    async def health(self) -> Unmeasured | None:
        try:
            asked = {"age_s": queries(self._deployment, STALE_S)["age_s"]}
            age_s = (await run_in(self._pool, lambda: self._ask(asked)))["age_s"]
        except Unusable as error:
            return Unmeasured(reason=str(error), source_down=True)
        return self._stale(age_s, STALE_S)

    async def measure(self, window_s: float) -> Measurement | Unmeasured:
        try:
            values = await run_in(self._pool, lambda: self._ask(queries(self._deployment, window_s)))
        except Unusable as error:
            return Unmeasured(reason=str(error), source_down=True)
        return self._stale(values["age_s"], max(STALE_S, window_s)) or measurement(values, window_s)

    def _stale(self, age_s: float | None, limit_s: float) -> Unmeasured | None:
        if age_s is None:
            name = metrics.ENGINE_RUNNING.name
            return Unmeasured(reason=f"Prometheus at {self.url} has no present sample of {name}", source_down=True)
        if age_s > limit_s:
            reason = f"Prometheus at {self.url} is stale: its newest sample is {age_s:.0f} s old"
            return Unmeasured(reason=reason, source_down=True)
        return None

    def _ask(self, asked: Mapping[str, str]) -> dict[str, float | None]:
        answers = dict[str, float | None]()
        for name, query in asked.items():
            try:
                result: Any = self._client.custom_query(query)
                answers[name] = scalar(result)
            except requests.exceptions.InvalidJSONError:
                raise Unusable(f"Prometheus at {self.url} answers with an error to the query for {name}") from None
            except (requests.RequestException, OSError):
                raise Unusable(f"Prometheus at {self.url} does not answer") from None
            except (PrometheusApiClientException, ValueError, KeyError, TypeError):
                raise Unusable(f"Prometheus at {self.url} answers with an error to the query for {name}") from None
            except Unusable as error:
                raise Unusable(f"Prometheus at {self.url} cannot be read ({name}): {error}") from None
        return answers


def public_url(url: str) -> str:
    """The address without user, password and query: what may be logged."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
