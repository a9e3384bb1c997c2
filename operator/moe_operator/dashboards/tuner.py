"""What the tuner decided, what is in force since, and how the system fared under it."""

from __future__ import annotations

from moe_core import metrics as m
from moe_operator.dashboards.model import DEPLOYMENT, WINDOW, Dashboard, Kind, Panel, Query, Row, Unit
from moe_operator.promql import gauge, increase, over, quantile, rate, select

_D = DEPLOYMENT
_BY = ("deployment",)
_DECISIONS = Row(
    "Decisions",
    (
        Panel(
            "May try",
            "1: a trial of the slow loop may run. 0: paused, a spike, no measurement: moectl tune status says which.",
            Unit.NUMBER,
            (Query(gauge("max", m.TUNER_EXPLORING, _BY, deployment=_D), "{{deployment}}"),),
            Kind.NUMBER,
            width=6,
            top=1,
        ),
        Panel(
            "Version of the knobs",
            "That the tuner sent last.",
            Unit.NUMBER,
            (Query(gauge("max", m.TUNER_KNOBS_VERSION, _BY, deployment=_D), "{{deployment}}"),),
            Kind.NUMBER,
            width=6,
        ),
        Panel(
            "Trials of a day by how they ended",
            "promoted; no_gain; rolled_back: broke a promise; censored: not measured; simulated: refused beforehand.",
            Unit.NUMBER,
            (Query(increase(m.TUNER_TRIALS, "24h", ("state",), deployment=_D), "{{state}}"),),
            Kind.BARS,
            width=12,
        ),
        Panel(
            "Decisions of an hour",
            "By loop and action. Fast: Move answers a spike, Undo goes home after it, Guard keeps quality. Slow: Try, "
            "Promote, RollBack.",
            Unit.NUMBER,
            (Query(increase(m.TUNER_DECISIONS, "1h", ("loop", "action"), deployment=_D), "{{loop}} {{action}}"),),
            width=12,
            stacked=True,
        ),
        Panel(
            "From decision to the last rank",
            "Until every rank had acknowledged a version: median and 95th percentile.",
            Unit.SECONDS,
            tuple(Query(quantile(q, m.TUNER_ACK_SECONDS, "1h", deployment=_D), f"p{q * 100:g}") for q in (0.5, 0.95)),
            width=6,
        ),
        Panel(
            "Time of a tick",
            "Of the fast loop, 95th percentile: it ticks each second.",
            Unit.SECONDS,
            (Query(quantile(0.95, m.TUNER_TICK_SECONDS, WINDOW, _BY, deployment=_D), "{{deployment}}"),),
            width=6,
        ),
    ),
)
_KNOBS = Row(
    "Knobs in force",
    (
        Panel(
            "Capacity factor",
            "γ by phase, the tightest of the replicas. No line: uncapped.",
            Unit.NUMBER,
            (Query(gauge("min", m.CAPACITY_FACTOR, ("phase",), deployment=_D), "{{phase}}"),),
        ),
        Panel(
            "Active sequences",
            "engine.maxActiveSeqs in force, the lowest of the replicas.",
            Unit.NUMBER,
            (Query(gauge("min", m.ENGINE_ACTIVE_LIMIT, _BY, deployment=_D), "{{deployment}}"),),
        ),
        Panel(
            "Batched tokens",
            "engine.maxBatchedTokens in force, the lowest of the replicas.",
            Unit.NUMBER,
            (Query(gauge("min", m.ENGINE_BATCHED_LIMIT, _BY, deployment=_D), "{{deployment}}"),),
        ),
    ),
)
_EFFECT = Row(
    "How it fared",
    (
        Panel(
            "SLO missed",
            "Share of finished requests. The promise allows 5 %.",
            Unit.SHARE,
            (
                Query(
                    f"{rate(m.GATEWAY_SLO, WINDOW, _BY, deployment=_D, result='missed')}"
                    f" / {rate(m.GATEWAY_SLO, WINDOW, _BY, deployment=_D)}",
                    "{{deployment}}",
                ),
            ),
            steps=((0.05, "red"),),
        ),
        Panel(
            "Engine seconds for a thousand tokens",
            "What the slow loop makes small: seconds in forward passes over tokens, prompt and output together.",
            Unit.SECONDS,
            (
                Query(
                    f"1000 * {rate(m.ENGINE_BUSY, WINDOW, _BY, deployment=_D)}"
                    f" / ({rate(m.ENGINE_PROMPT_TOKENS, WINDOW, _BY, deployment=_D)}"
                    f" + {rate(m.ENGINE_OUTPUT_TOKENS, WINDOW, _BY, deployment=_D)})",
                    "{{deployment}}",
                ),
            ),
        ),
        Panel(
            "Lost gate mass",
            "Share of a token's gate mass that capacity costs: the guard holds it below quality.maxLostGateMass.",
            Unit.SHARE,
            (
                Query(
                    f"{rate(m.EXPERT_LOST_GATE_MASS, WINDOW, _BY, deployment=_D)}"
                    f" / {rate(m.EXPERT_TOKENS, WINDOW, _BY, deployment=_D)}",
                    "{{deployment}}",
                ),
            ),
        ),
    ),
)
PAGE = Dashboard(
    "tuner",
    "tuner",
    "What the tuner decided, what is in force since, and how the system fared under it.",
    (_DECISIONS, _KNOBS, _EFFECT),
    marks=(
        (
            "Knobs",
            Query(
                over("max", f"changes({select(m.TUNER_KNOBS_VERSION, deployment=_D)}[1m])", _BY) + " > 0",
                "{{deployment}}: new knobs",
            ),
        ),
    ),
)
