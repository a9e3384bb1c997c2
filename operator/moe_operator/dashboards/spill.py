"""What leaves for closed APIs, why, whether the forecast was right, and what all of it costs."""

from __future__ import annotations

from moe_core import metrics as m
from moe_operator.dashboards.model import DEPLOYMENT, WINDOW, Dashboard, Kind, Panel, Query, Row, Unit
from moe_operator.promql import gauge, increase, over, quantile, rate, select

_D = DEPLOYMENT
_TARGET = ("target",)
_DAY_S = 86400
_SPILL = Row(
    "Spill",
    (
        Panel(
            "Spilled by reason",
            "slo_predicted: it would probably have been late; local_down, local_failed, local_overloaded: no revision "
            "took it; no_weight: an upgrade drains; stream_broken: taken over in mid-stream.",
            Unit.REQUESTS_S,
            (Query(rate(m.GATEWAY_SPILLED, WINDOW, ("target", "reason"), deployment=_D), "{{target}}: {{reason}}"),),
            stacked=True,
        ),
        Panel(
            "Shed by reason",
            "Answered by 529 or 503, and why: no target might have it either.",
            Unit.REQUESTS_S,
            (Query(rate(m.GATEWAY_SHED, WINDOW, ("reason",), deployment=_D), "{{reason}}"),),
            stacked=True,
        ),
        Panel(
            "Attempts at closed APIs by region and policy",
            "Each is a request whose data left, or was kept here at the last moment (refused).",
            Unit.REQUESTS_S,
            (
                Query(
                    rate(m.GATEWAY_EGRESS, WINDOW, ("target", "region", "policy", "result"), deployment=_D),
                    "{{target}} {{region}} {{policy}} {{result}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Retries",
            "Attempts beyond a request's first: sent, or refused by the budget of retries.",
            Unit.REQUESTS_S,
            (Query(rate(m.GATEWAY_RETRIES, WINDOW, ("target", "result"), deployment=_D), "{{target}} {{result}}"),),
        ),
        Panel(
            "Streams that broke",
            "After their first token, and how they went on: continue, splice, or stop; and why.",
            Unit.REQUESTS_S,
            (
                Query(
                    rate(m.GATEWAY_BROKEN, WINDOW, ("target", "how", "why"), deployment=_D),
                    "{{target}} {{how}}: {{why}}",
                ),
            ),
        ),
        Panel(
            "Duration by target, 95th percentile",
            "Arrival at the gateway to the last byte.",
            Unit.SECONDS,
            (Query(quantile(0.95, m.GATEWAY_DURATION, WINDOW, _TARGET, deployment=_D), "{{target}}"),),
        ),
    ),
)
_RENT = over("max", f"rate({select(m.LOCAL_RENT, deployment=_D)}[{WINDOW}])", ("deployment", "target", "phase"))
"""Each gateway tells all of it."""
_MONEY = Row(
    "Money",
    (
        Panel(
            "Spent in 24 hours",
            "Dollars owed to closed APIs.",
            Unit.USD,
            (Query(increase(m.GATEWAY_SPEND, "24h", deployment=_D), "24 hours"),),
            Kind.NUMBER,
            width=6,
        ),
        Panel(
            "Pace of a day",
            "What a day costs at the pace of the last hour: beside fallback.budget.usdPerDay it says whether it lasts.",
            Unit.USD,
            (Query(f"{rate(m.GATEWAY_SPEND, '1h', deployment=_D)} * {_DAY_S}", "a day"),),
            Kind.NUMBER,
            width=6,
        ),
        Panel(
            "Output tokens of closed APIs",
            "Share of the output tokens that each closed API made; own replicas made the rest.",
            Unit.SHARE,
            (
                Query(
                    f"({rate(m.GATEWAY_OUTPUT_TOKENS, WINDOW, _TARGET, deployment=_D)}"
                    f" and on (target) {gauge('sum', m.GATEWAY_SPEND, _TARGET, deployment=_D)})"
                    f" / on () group_left () {rate(m.GATEWAY_OUTPUT_TOKENS, WINDOW, deployment=_D)}",
                    "{{target}}",
                ),
            ),
            Kind.NUMBER,
            width=12,
        ),
        Panel(
            "Spend by target",
            "Dollars an hour.",
            Unit.USD,
            (Query(f"{rate(m.GATEWAY_SPEND, WINDOW, _TARGET, deployment=_D)} * 3600", "{{target}}"),),
            stacked=True,
        ),
        Panel(
            "Dollars for a million tokens",
            "What a closed API took for a million tokens, prompt and output together.",
            Unit.USD,
            (
                Query(
                    f"1e6 * {rate(m.GATEWAY_SPEND, WINDOW, _TARGET, deployment=_D)}"
                    f" / ({rate(m.GATEWAY_PROMPT_TOKENS, WINDOW, _TARGET, deployment=_D)}"
                    f" + {rate(m.GATEWAY_OUTPUT_TOKENS, WINDOW, _TARGET, deployment=_D)})",
                    "{{target}}",
                ),
            ),
        ),
        Panel(
            "Rent of own GPUs by what they did",
            "Dollars an hour in prefill, decode and idle. There with gpuUsdPerHour in the gateway's configuration.",
            Unit.USD,
            (
                Query(
                    f"sum by (phase) ({_RENT}) * 3600",
                    "{{phase}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Tokens by target",
            "Output tokens a second.",
            Unit.PER_SECOND,
            (Query(rate(m.GATEWAY_OUTPUT_TOKENS, WINDOW, _TARGET, deployment=_D), "{{target}}"),),
            stacked=True,
        ),
    ),
)
_FORECAST = Row(
    "How well P(miss) comes true",
    (
        Panel(
            "What was foretold and what came",
            "Requests by result: met or missed the SLO here, spilled (nobody knows), unknown.",
            Unit.REQUESTS_S,
            (Query(rate(m.GATEWAY_FORECASTS, WINDOW, ("result",), deployment=_D), "{{result}}"),),
            stacked=True,
        ),
        Panel(
            "Foretold beside seen",
            "Mean P(miss) of requests that stayed, and the share of them that missed. The two should lie together.",
            Unit.SHARE,
            (
                Query(
                    f"{rate(m.GATEWAY_FORECAST_PROBABILITY, WINDOW, deployment=_D)}"
                    f" / {rate(m.GATEWAY_FORECASTS, WINDOW, deployment=_D, result='~met|missed')}",
                    "foretold",
                ),
                Query(
                    f"({rate(m.GATEWAY_FORECASTS, WINDOW, deployment=_D, result='missed')} or vector(0))"
                    f" / {rate(m.GATEWAY_FORECASTS, WINDOW, deployment=_D, result='~met|missed')}",
                    "seen",
                ),
            ),
            top=1,
        ),
        Panel(
            "Brier score",
            "Mean square of the forecast's error over the last minutes: 0 is perfect, 0.25 is a coin.",
            Unit.NUMBER,
            (Query(gauge("avg", m.GATEWAY_FORECAST_BRIER, _TARGET, deployment=_D), "{{target}}"),),
            steps=((0.25, "red"),),
        ),
        Panel(
            "Shadow mode: what would have been spilled",
            "Requests that an active gateway would have sent away. There where spill.mode is Shadow.",
            Unit.REQUESTS_S,
            (
                Query(
                    rate(m.GATEWAY_SHADOW_SPILLED, WINDOW, ("target", "reason"), deployment=_D),
                    "{{target}}: {{reason}}",
                ),
            ),
            width=12,
        ),
        Panel(
            "Shadow mode: what that would have cost",
            "Dollars an hour, by the tokens of the own model. There where spill.mode is Shadow.",
            Unit.USD,
            (Query(f"{rate(m.GATEWAY_SHADOW_SPEND, WINDOW, _TARGET, deployment=_D)} * 3600", "{{target}}"),),
            width=12,
        ),
    ),
)
PAGE = Dashboard(
    "spill",
    "spill and cost",
    "What leaves for closed APIs, why, whether the forecast was right, and what all of it costs.",
    (_SPILL, _MONEY, _FORECAST),
)
