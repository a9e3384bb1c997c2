"""The engines under load: queues, cache, passes, and how much of the hardware is used. External engines too, by what
they tell."""

from __future__ import annotations

from moe_core import metrics as m
from moe_core.metrics import Metric
from moe_operator.dashboards.model import DEPLOYMENT, WINDOW, Dashboard, Panel, Query, Row, Unit
from moe_operator.promql import gauge, over, quantile, rate, select

_OF = {"deployment": DEPLOYMENT, "replica": "~$replica"}
_BY = ("revision", "replica")


def _level(title: str, description: str, metric: Metric, unit: Unit = Unit.NUMBER, top: float | None = None) -> Panel:
    return Panel(
        title, description, unit, (Query(gauge("max", metric, _BY, **_OF), "{{replica}} ({{revision}})"),), top=top
    )


def _pace(title: str, description: str, metric: Metric, unit: Unit = Unit.PER_SECOND) -> Panel:
    # Not a sum: of an external engine each gateway tells the same.
    query = over("max", f"rate({select(metric, **_OF)}[{WINDOW}])", _BY)
    return Panel(title, description, unit, (Query(query, "{{replica}} ({{revision}})"),))


def _ratio(title: str, description: str, of: Metric, by: Metric, unit: Unit) -> Panel:
    query = f"{rate(of, WINDOW, _BY, **_OF)} / {rate(by, WINDOW, _BY, **_OF)}"
    return Panel(title, description, unit, (Query(query, "{{replica}} ({{revision}})"),))


_LOAD = Row(
    "Load",
    (
        _level("Running", "Requests in the engine's batch.", m.ENGINE_RUNNING),
        _level("Waiting", "Requests that the engine has not begun.", m.ENGINE_WAITING),
        _level("Limit of active sequences", "engine.maxActiveSeqs in force.", m.ENGINE_ACTIVE_LIMIT),
        Panel(
            "KV cache",
            "Share of the blocks in use. Near 1, requests wait or are pushed out.",
            Unit.SHARE,
            (Query(gauge("max", m.ENGINE_KV_USAGE, _BY, **_OF), "{{replica}} ({{revision}})"),),
            top=1,
            steps=((0.97, "red"),),
        ),
        _pace("Pushed out", "Requests a second that lost their KV cache and are computed again.", m.ENGINE_PREEMPTIONS),
        _level("Limit of batched tokens", "engine.maxBatchedTokens in force.", m.ENGINE_BATCHED_LIMIT),
    ),
)
_WORK = Row(
    "Work",
    (
        _pace("Prompt tokens", "Prompt tokens a second.", m.ENGINE_PROMPT_TOKENS),
        _pace("Output tokens", "Tokens generated a second.", m.ENGINE_OUTPUT_TOKENS),
        _pace("Busy", "Share of the time in forward passes, the slowest rank.", m.ENGINE_BUSY, Unit.SHARE),
        _ratio("Time of a pass", "Mean of all forward passes.", m.ENGINE_BUSY, m.ENGINE_STEPS, Unit.SECONDS),
        _ratio(
            "Time of a decode pass",
            "Mean of passes without a prefill token: what ITL is made of.",
            m.ENGINE_DECODE_BUSY,
            m.ENGINE_DECODE_STEPS,
            Unit.SECONDS,
        ),
        _level(
            "Experts touched",
            "Distinct experts in a layer and decode step: each is read from memory.",
            m.ENGINE_TOUCHED,
        ),
    ),
)
_USE = Row(
    "Use of the hardware",
    (
        _level(
            "S-MBU",
            "Bytes that decode passes had to read over peak bandwidth. None where the peak is not known, as on a CPU.",
            m.ENGINE_SMBU,
            Unit.SHARE,
            top=1,
        ),
        _level(
            "S-MFU",
            "Operations that all passes asked for over peak arithmetic. None where the peak is not known.",
            m.ENGINE_SMFU,
            Unit.SHARE,
            top=1,
        ),
        _ratio(
            "Read in decode",
            "Bytes of weights and KV cache a second of decode passes.",
            m.ENGINE_DECODE_BYTES,
            m.ENGINE_DECODE_BUSY,
            Unit.BYTES_S,
        ),
        _pace("Operations", "Floating-point operations a second of the clock.", m.ENGINE_FLOPS, Unit.FLOPS),
        Panel(
            "Up since",
            "Seconds since the counters of a replica began: a fall is a restart.",
            Unit.SECONDS,
            (Query(f"time() - {gauge('min', m.REPLICA_STARTED, _BY, **_OF)}", "{{replica}} ({{revision}})"),),
        ),
        _level("Knobs in force", "Lowest version on any rank of a replica.", m.KNOBS_VERSION),
    ),
)
_EXTERNAL = Row(
    "External engines, as they measure themselves",
    (
        Panel(
            "TTFT, 95th percentile",
            "By the engine's own histogram: without the gateway's part.",
            Unit.SECONDS,
            (Query(quantile(0.95, m.ENGINE_TTFT, WINDOW, ("revision",), **_OF), "{{revision}}"),),
            width=12,
        ),
        Panel(
            "ITL, 95th percentile",
            "By the engine's own histogram.",
            Unit.SECONDS,
            (Query(quantile(0.95, m.ENGINE_ITL, WINDOW, ("revision",), **_OF), "{{revision}}"),),
            width=12,
        ),
    ),
)
PAGE = Dashboard(
    "engine",
    "engine",
    "The engines under load: queues, cache, passes, and how much of the hardware is used.",
    (_LOAD, _WORK, _USE, _EXTERNAL),
    by_replica=True,
)
