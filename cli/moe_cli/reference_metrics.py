"""Every metric and every knob, from the tables that exporters, tuner and gateway are built on."""

from __future__ import annotations

from moe_api.crd import resolve
from moe_api.resource import MoEDeployment
from moe_api.spec_tuning import PIN_KNOBS
from moe_cli.reference_config import rows
from moe_cli.reference_resource import Leaf, bounds, change, default, kind, leaves, meaning
from moe_cli.reference_text import code, sentence, table
from moe_core import metrics
from moe_core.setting import KNOBS
from moe_core.wire import Knobs

_EXPORTERS = (
    (
        "Board",
        (
            "moestack_expert_",
            "moestack_replica_",
            "moestack_knobs_",
            "moestack_engine_",
            "moestack_rank_",
            "moestack_board_",
        ),
        "One a revision, for every replica of it. `moestack_engine_…` of an engine that is not ours comes from the "
        'gateway instead, with `replica="external"`.',
    ),
    ("Gateway", ("moestack_gateway_", "gen_ai_"), "On its admin port; one page for all workers of a pod."),
    ("Tuner", ("moestack_tuner_",), "On its port, with a label for each deployment."),
    ("Operator", ("moestack_operator_",), "On its port. No label names an object."),
)


def metrics_page() -> str:
    """The page of metrics, Markdown. Raises ValueError for a metric that no exporter's prefix covers."""
    buckets = ", ".join(f"{edge:g}" for edge in metrics.LATENCY_BUCKETS_S)
    lines = [
        "# Metrics",
        "",
        "Every metric that our processes export, at `/metrics` in Prometheus' text form. What they mean and where "
        "their formulas come from: [telemetry](../telemetry.md). What to do about them: [runbook](../runbook.md).",
        "",
        f"Histograms have the buckets {buckets} (seconds), but for those of an external engine, which keeps its own.",
        "",
    ]
    left = list(metrics.ALL)
    for who, prefixes, note in _EXPORTERS:
        found = [row for row in left if row.name.startswith(prefixes)]
        left = [row for row in left if row not in found]
        lines += [f"## {who}", "", note, ""]
        lines += table(
            ("metric", "type", "labels", "meaning"),
            ((code(row.name), row.kind, " ".join(map(code, row.labels)), sentence(row.help)) for row in found),
        )
    if left:
        raise ValueError(f"nobody is known to export {', '.join(row.name for row in left)}")
    return "\n".join(lines)


def knobs_page() -> str:
    """The page of knobs, Markdown. Raises ValueError for a knob without a field of the resource."""
    schema = MoEDeployment.model_json_schema(by_alias=True)
    spec = resolve(schema["properties"]["spec"], schema["$defs"])
    fields = {leaf.path: leaf for leaf in leaves("spec", spec, schema["$defs"])}
    pins = {knob: field for field, knob in PIN_KNOBS.items()}
    lines = [
        "# Knobs",
        "",
        "What may be turned while traffic flows, by the names that `moectl tune pin` and decisions use. A pin may also "
        "name a group (`experts`, `experts.capacityFactor`). *Resource* is where the value comes from at the start. "
        "The engine's two limits are turned below the ceiling that it was launched with; *change* says what a change "
        "of that ceiling costs.",
        "",
    ]
    lines += table(
        ("knob", "resource", "type", "default", "bounds", "change", "pinned by", "meaning"),
        (
            (
                code(knob),
                " ".join(code(leaf.path) for leaf in found),
                kind(found[0].node),
                " ".join(filter(None, (default(leaf.node) for leaf in found))),
                bounds(found[0].node),
                " ".join(dict.fromkeys(change(leaf) for leaf in found)),
                code(f"spec.tuning.pins.{_camel(pins[knob])}") if knob in pins else "the name alone",
                " ".join(meaning(leaf.node) for leaf in found),
            )
            for knob in KNOBS
            for found in [_fields(knob, fields)]
        ),
    )
    lines += [
        "## As they travel",
        "",
        "Knobs are one signed document with one version, whole: a later version replaces an earlier one. Tuner → "
        "board → replicas, and tuner → gateway.",
        "",
    ]
    lines += table(("field", "type", "default", "bounds", "meaning"), rows(Knobs))
    return "\n".join(lines)


def _fields(knob: str, fields: dict[str, Leaf]) -> list[Leaf]:
    """Leaves of the resource that a knob starts from: of its own name, or below spec.fallback.trigger."""
    last = knob.rpartition(".")[2]
    for path in (f"spec.{knob}", f"spec.fallback.trigger.{last}"):
        found = [leaf for name, leaf in fields.items() if name == path or name.startswith(f"{path}.")]
        if found:
            return found
    raise ValueError(f"the knob {knob} has no field in the resource")


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)
