"""Load of experts: which layers and experts are hot, what capacity does about it, and what that costs."""

from __future__ import annotations

from moe_core import metrics as m
from moe_core.metrics import Metric
from moe_operator.dashboards.model import DEPLOYMENT, WINDOW, Dashboard, Kind, Panel, Query, Row, Unit
from moe_operator.promql import gauge, over, rate, select

_OF = {"deployment": DEPLOYMENT, "replica": "~$replica"}
_LAYER = ("layer",)


def _in_order(expr: str) -> str:
    """Number the layers 000, 001, …, for Prometheus sorts labels as text."""
    two = f'label_replace({expr}, "layer", "00$1", "layer", "(.)")'
    return f'label_replace({two}, "layer", "0$1", "layer", "(..)")'


def _share(of: Metric, whole: Metric) -> str:
    return f"{rate(of, WINDOW, _LAYER, **_OF)} / {rate(whole, WINDOW, _LAYER, **_OF)}"


def _grid(title: str, description: str, expr: str, floor: float = 1.0, top: float = 4.0) -> Panel:
    query = Query(_in_order(expr), "{{layer}}")
    return Panel(title, description, Unit.NUMBER, (query,), Kind.GRID, width=12, floor=floor, top=top)


_HEAT = Row(
    "Heat",
    (
        _grid(
            "Demand: the hottest expert of each layer",
            "Load of the hottest expert over the mean, as the router asked for it: 1 is even. The worst replica's.",
            gauge("max", m.EXPERT_IMBALANCE, _LAYER, by="expert", **_OF),
        ),
        _grid(
            "After capacity: the busiest rank of each layer",
            "Load of the busiest expert-parallel rank over the mean, of what is computed: a step waits for it.",
            gauge("max", m.EXPERT_IMBALANCE, _LAYER, by="rank", **_OF),
            top=2.0,
        ),
        Panel(
            "The hottest experts",
            "Slots a second of the twelve hottest, of the few that each layer tells. All of them: moectl experts.",
            Unit.PER_SECOND,
            (
                Query(
                    over("topk", f"12, {rate(m.EXPERT_HOT, WINDOW, ('layer', 'expert'), **_OF)}"),
                    "layer {{layer}}, expert {{expert}}",
                ),
            ),
            Kind.BARS,
            width=12,
        ),
        Panel(
            "Ranks: demand and what is computed",
            "Busiest rank over the mean, mean of the layers: before capacity, and after. Between lies what it won.",
            Unit.NUMBER,
            (
                Query(gauge("avg", m.EXPERT_IMBALANCE, by="rank_demand", **_OF), "before"),
                Query(gauge("avg", m.EXPERT_IMBALANCE, by="rank", **_OF), "after"),
            ),
            width=12,
            floor=1,
        ),
    ),
)
_CAPACITY = Row(
    "Capacity, and what it costs",
    (
        Panel(
            "Capacity factor in force",
            "γ by phase, the tightest of the replicas. No line: uncapped.",
            Unit.NUMBER,
            (Query(gauge("min", m.CAPACITY_FACTOR, ("phase",), **_OF), "{{phase}}"),),
        ),
        Panel(
            "Lost gate mass",
            "Share of a token's gate mass that capacity costs, mean of the layers: quality.maxLostGateMass bounds it.",
            Unit.SHARE,
            (
                Query(
                    f"{rate(m.EXPERT_LOST_GATE_MASS, WINDOW, **_OF)} / {rate(m.EXPERT_TOKENS, WINDOW, **_OF)}",
                    "lost",
                ),
            ),
        ),
        Panel(
            "Slots by fate",
            "Of what the router asked for: left empty, moved to another expert, kept above capacity by a group limit.",
            Unit.SHARE,
            tuple(
                Query(f"{rate(fate, WINDOW, **_OF)} / {rate(m.EXPERT_SLOTS, WINDOW, **_OF)}", name)
                for fate, name in (
                    (m.EXPERT_DROPPED, "left empty"),
                    (m.EXPERT_REROUTED, "moved"),
                    (m.EXPERT_OVERFLOW_KEPT, "kept above"),
                )
            ),
        ),
        _grid(
            "Lost gate mass by layer",
            "Share of a token's gate mass that capacity costs in each layer.",
            _share(m.EXPERT_LOST_GATE_MASS, m.EXPERT_TOKENS),
            floor=0.0,
            top=0.1,
        ),
        _grid(
            "Spread of demand by layer",
            "Coefficient of variation of the load over experts: 0 is even.",
            gauge("max", m.EXPERT_CV, _LAYER, **_OF),
            floor=0.0,
            top=2.0,
        ),
    ),
)
_RANKS = Row(
    "Ranks and layers",
    (
        Panel(
            "Time in expert kernels by rank",
            "Share of the time, by expert-parallel rank. Ranks that lie apart wait for one another.",
            Unit.SHARE,
            (Query(rate(m.RANK_MOE_SECONDS, WINDOW, ("replica", "rank"), **_OF), "{{replica}} rank {{rank}}"),),
        ),
        Panel(
            "Most slots of an expert in one prefill step",
            "In the last second, the worst layer: what an expert's buffers must hold.",
            Unit.NUMBER,
            (Query(gauge("max", m.EXPERT_MAX_PREFILL, ("replica",), **_OF), "{{replica}}"),),
        ),
        Panel(
            "Layers",
            "Hooked: counted, and held to capacity. Bypassed: they route past the plugin.",
            Unit.NUMBER,
            (Query(over("max", select(m.LAYERS_HOOKED, **_OF), ("state",)), "{{state}}"),),
        ),
    ),
)
PAGE = Dashboard(
    "experts",
    "experts",
    "Which layers and experts are hot, what capacity does about it, and what that costs.",
    (_HEAT, _CAPACITY, _RANKS),
    by_replica=True,
)
