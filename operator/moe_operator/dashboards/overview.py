"""The first page: is the promise kept, where do requests go, is every part there?"""

from __future__ import annotations

from moe_core import metrics as m
from moe_operator.dashboards.model import DEPLOYMENT, WINDOW, Dashboard, Kind, Panel, Query, Row, Unit
from moe_operator.promql import gauge, quantile, rate

_D = DEPLOYMENT
_MET = (
    f"{rate(m.GATEWAY_SLO, WINDOW, deployment=_D, result='met')} / {rate(m.GATEWAY_SLO, WINDOW, deployment=_D)}",
    "SLO met",
)


def _conditions(status: str, kind: str) -> str:
    return gauge("max", m.OPERATOR_CONDITIONS, ("type", "status"), status=status, type=kind)


_NOW = Row(
    "Now",
    (
        Panel(
            "SLO met",
            "Share of requests that ended within the SLO of their tier. What the client broke off does not count.",
            Unit.SHARE,
            (Query(*_MET),),
            Kind.NUMBER,
            width=4,
            top=1,
        ),
        Panel(
            "Requests",
            "Requests that ended, a second, whatever became of them.",
            Unit.REQUESTS_S,
            (Query(rate(m.GATEWAY_REQUESTS, WINDOW, deployment=_D), "all"),),
            Kind.NUMBER,
            width=4,
        ),
        Panel(
            "TTFT, 95th percentile",
            "Arrival at the gateway to the first content token, own and closed together.",
            Unit.SECONDS,
            (Query(quantile(0.95, m.GATEWAY_TTFT, WINDOW, deployment=_D), "TTFT"),),
            Kind.NUMBER,
            width=4,
        ),
        Panel(
            "Spilled",
            "Share of requests that a closed API answered.",
            Unit.SHARE,
            (
                Query(
                    f"({rate(m.GATEWAY_SPILLED, WINDOW, deployment=_D)} or vector(0))"
                    f" / {rate(m.GATEWAY_REQUESTS, WINDOW, deployment=_D)}",
                    "spilled",
                ),
            ),
            Kind.NUMBER,
            width=4,
            steps=((0.05, "yellow"), (0.25, "orange")),
        ),
        Panel(
            "Shed",
            "Requests a second that got 529 or 503.",
            Unit.REQUESTS_S,
            (Query(f"{rate(m.GATEWAY_SHED, WINDOW, deployment=_D)} or vector(0)", "shed"),),
            Kind.NUMBER,
            width=4,
            steps=((0.001, "red"),),
        ),
        Panel(
            "Replicas",
            "Replicas that report to the board of their revision. An external engine has no board.",
            Unit.NUMBER,
            (Query(gauge("sum", m.BOARD_REPLICAS, deployment=_D), "replicas"),),
            Kind.NUMBER,
            width=4,
        ),
    ),
)
_PROMISE = Row(
    "The promise",
    (
        Panel(
            "SLO missed by tier",
            "Share of finished requests that missed the SLO of their tier. The promise allows 5 %.",
            Unit.SHARE,
            (
                Query(
                    f"{rate(m.GATEWAY_SLO, WINDOW, ('deployment', 'tier'), deployment=_D, result='missed')}"
                    f" / {rate(m.GATEWAY_SLO, WINDOW, ('deployment', 'tier'), deployment=_D)}",
                    "{{deployment}} {{tier}}",
                ),
            ),
            steps=((0.05, "red"),),
        ),
        Panel(
            "TTFT",
            "Arrival at the gateway to the first content token: median, 95th and 99th percentile.",
            Unit.SECONDS,
            tuple(
                Query(quantile(q, m.GATEWAY_TTFT, WINDOW, deployment=_D), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)
            ),
        ),
        Panel(
            "ITL by target, 95th percentile",
            "A request's mean time between output tokens.",
            Unit.SECONDS,
            (Query(quantile(0.95, m.GATEWAY_ITL, WINDOW, ("target",), deployment=_D), "{{target}}"),),
        ),
    ),
)
_TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "Requests by outcome",
            "ok; client_error: the client's mistake; error; cut: broke in mid-stream; cancelled by the client; shed.",
            Unit.REQUESTS_S,
            (Query(rate(m.GATEWAY_REQUESTS, WINDOW, ("outcome",), deployment=_D), "{{outcome}}"),),
            stacked=True,
        ),
        Panel(
            "Requests by target",
            "Where requests ended: revisions of our own and closed APIs; none: never sent.",
            Unit.REQUESTS_S,
            (Query(rate(m.GATEWAY_REQUESTS, WINDOW, ("target",), deployment=_D), "{{target}}"),),
            stacked=True,
        ),
        Panel(
            "In flight",
            "Requests now at each target.",
            Unit.NUMBER,
            (Query(gauge("sum", m.GATEWAY_IN_FLIGHT, ("target",), deployment=_D), "{{target}}"),),
            stacked=True,
        ),
    ),
)
_PARTS = Row(
    "Parts",
    (
        Panel(
            "Breakers",
            "1: the upstream failed again and again and is given probes alone.",
            Unit.NUMBER,
            (Query(gauge("max", m.GATEWAY_BREAKER_OPEN, ("deployment", "target"), deployment=_D), "{{target}}"),),
            top=1,
            steps=((1, "red"),),
        ),
        Panel(
            "Configuration in force",
            "1: every gateway has its newest configuration; 0: one refuses it and goes on with the one before.",
            Unit.NUMBER,
            (Query(gauge("min", m.GATEWAY_CONFIG_LOADED, ("deployment",), deployment=_D), "{{deployment}}"),),
            top=1,
        ),
        Panel(
            "Version of the knobs",
            "What the tuner sent last, and the oldest version in force at replicas and gateways. They lie together.",
            Unit.NUMBER,
            (
                Query(gauge("max", m.TUNER_KNOBS_VERSION, ("deployment",), deployment=_D), "{{deployment}} sent"),
                Query(gauge("min", m.KNOBS_VERSION, ("deployment",), deployment=_D), "{{deployment}} replicas"),
                Query(gauge("min", m.GATEWAY_KNOBS_VERSION, ("deployment",), deployment=_D), "{{deployment}} gateways"),
            ),
        ),
    ),
)
_OPERATOR = Row(
    "The operator, for all MoEDeployments",
    (
        Panel(
            "Leads",
            "Processes that hold the lease: one.",
            Unit.NUMBER,
            (Query(gauge("sum", m.OPERATOR_LEADER), "leaders"),),
            Kind.NUMBER,
            width=4,
        ),
        Panel(
            "MoEDeployments",
            "Those that the operator looks after.",
            Unit.NUMBER,
            (Query(gauge("max", m.OPERATOR_OBJECTS), "MoEDeployments"),),
            Kind.NUMBER,
            width=4,
        ),
        Panel(
            "Queue",
            "How long the one that waits longest for a worker has waited.",
            Unit.SECONDS,
            (Query(gauge("max", m.OPERATOR_QUEUE_AGE), "oldest"),),
            Kind.NUMBER,
            width=4,
            steps=((60, "yellow"), (300, "red")),
        ),
        Panel(
            "Behind",
            "Kinds whose list or watch fails, so that the operator may see them late.",
            Unit.NUMBER,
            (Query(gauge("sum", m.OPERATOR_CACHE_BEHIND), "kinds"),),
            Kind.NUMBER,
            width=4,
            steps=((1, "red"),),
        ),
        Panel(
            "Conditions that are not True",
            "MoEDeployments by condition and its status; Degraded is shown where it is True.",
            Unit.NUMBER,
            (
                Query(
                    f"{_conditions('~False|Unknown', '~Accepted|Fits|.*Ready|SLOMet')}"
                    f" or {_conditions('True', 'Degraded')}",
                    "{{type}} {{status}}",
                ),
            ),
            width=8,
        ),
        Panel(
            "Reconciles",
            "By result: settled, changed, retried (lost a race), failed, fenced (no longer the leader).",
            Unit.PER_SECOND,
            (Query(rate(m.OPERATOR_RECONCILE_SECONDS, WINDOW, ("result",), "_count"), "{{result}}"),),
            stacked=True,
        ),
        Panel(
            "Time of a reconcile",
            "Median and 95th percentile.",
            Unit.SECONDS,
            tuple(Query(quantile(q, m.OPERATOR_RECONCILE_SECONDS, WINDOW), f"p{q * 100:g}") for q in (0.5, 0.95)),
        ),
        Panel(
            "Calls on the API server",
            "By HTTP status; 0: no answer, 429: it is busy, 403: a right is missing.",
            Unit.PER_SECOND,
            (Query(rate(m.OPERATOR_API_CALLS, WINDOW, ("code",)), "{{code}}"),),
            stacked=True,
        ),
    ),
)
PAGE = Dashboard(
    "overview",
    "overview",
    "Is the promise kept, where do requests go, is every part there?",
    (_NOW, _PROMISE, _TRAFFIC, _PARTS, _OPERATOR),
)
