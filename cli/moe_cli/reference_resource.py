"""Every field of a MoEDeployment: type, default, bounds, what its change costs, meaning. From the types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moe_api.crd import Schema, resolve
from moe_api.fields import ALLOWED, DISRUPTION, LOWERED, UNIT
from moe_api.resource import MoEDeployment
from moe_cli.reference_text import code, sentence, table

LONGEST_RULE = 100
"""Characters of an expression that is told."""
_INTRO = """# MoEDeployment

Every field of `moestack.dev/v1alpha1`. `moectl validate FILE` checks a file by these types, the API server by the
CustomResourceDefinition that is written from them (`moectl crd`).

**Change** is what a change costs while traffic flows; `moectl diff FILE` says it for a file.

| class | also called | what happens |
| --- | --- | --- |
| `hot` | hot | it acts on what runs; no request notices |
| `rolling` | warm | replicas are replaced, gang by gang |
| `revision` | cold | a new revision comes up beside the old one, and traffic moves by `spec.upgrade.strategy` |

A field without a default may be left out, unless it is *required*. `[]` is an item of a list, `.*` a value of a map.
"""


@dataclass(frozen=True)
class Leaf:
    """One field: where, and its schema with references folded in."""

    path: str
    node: Schema
    required: bool
    disruption: str | None
    optional_group: bool = False
    """Whether it is required only where its group is there, which may be left out."""


def page() -> str:
    """The page, Markdown."""
    whole = MoEDeployment.model_json_schema(by_alias=True)
    definitions: dict[str, Schema] = whole["$defs"]
    lines = [_INTRO]
    spec = resolve(whole["properties"]["spec"], definitions)
    lines += ["## spec", "", sentence(spec["description"]), ""]
    plain = {name for name, node in spec["properties"].items() if not _children(resolve(node, definitions))}
    lines += _fields([leaf for leaf in leaves("spec", spec, definitions) if leaf.path.split(".")[1] in plain])
    lines += _rules([("spec", spec)])
    for name, node in spec["properties"].items():
        if name in plain:
            continue
        group = resolve(node, definitions)
        lines += [f"## spec.{name}", "", sentence(group.get("description", "")), ""]
        lines += _fields(list(leaves(f"spec.{name}", group, definitions)))
        lines += _rules(_groups(f"spec.{name}", group, definitions))
    status = resolve(whole["properties"]["status"], definitions)
    lines += ["## status", "", "Written by the operator and the tuner; a person only reads it.", ""]
    lines += table(
        ("field", "type", "meaning"),
        ((code(leaf.path), kind(leaf.node), meaning(leaf.node)) for leaf in leaves("status", status, definitions)),
    )
    return "\n".join(lines)


def _children(node: Schema) -> Schema | None:
    """The object that a node is, or that it lists or maps to; None for a scalar or a list of them. Not resolved."""
    found: Schema | None = node if "properties" in node else None
    return found or node.get("items") or None


def leaves(
    path: str,
    node: Schema,
    definitions: dict[str, Schema],
    inherited: str | None = None,
    required: bool = False,
    optional_group: bool = False,
) -> Iterator[Leaf]:
    """Every field below a resolved node that holds a value of its own; lists of objects are told too."""
    own = inherited or node.get(DISRUPTION)
    if "properties" in node:
        for name, raw in node["properties"].items():
            needed = name in node.get("required", ())
            child = resolve(raw, definitions)
            optional = optional_group or ("properties" in child and not needed and child.get("default") is None)
            yield from leaves(f"{path}.{name}", child, definitions, own, needed, optional)
        return
    if isinstance(node.get("items"), dict):
        node = {**node, "items": resolve(node["items"], definitions)}
    yield Leaf(path, node, required, own, optional_group)
    for key, mark in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(node.get(key), dict):
            inner = resolve(node[key], definitions)
            if "properties" in inner:
                yield from leaves(f"{path}{mark}", inner, definitions, own)


def _groups(path: str, node: Schema, definitions: dict[str, Schema]) -> Iterator[tuple[str, Schema]]:
    """A resolved node and every group below it."""
    if "properties" in node:
        yield path, node
        for name, child in node["properties"].items():
            yield from _groups(f"{path}.{name}", resolve(child, definitions), definitions)
    elif isinstance(node.get("items"), dict):
        yield from _groups(f"{path}[]", resolve(node["items"], definitions), definitions)


def _fields(found: list[Leaf]) -> list[str]:
    return table(
        ("field", "type", "default", "bounds", "change", "meaning"),
        (
            (
                code(leaf.path),
                kind(leaf.node),
                needed(leaf) or default(leaf.node),
                bounds(leaf.node),
                change(leaf),
                meaning(leaf.node),
            )
            for leaf in found
        ),
    )


def kind(node: Schema) -> str:
    """Type in words."""
    if "const" in node:
        return code(str(node["const"]))
    if "enum" in node:
        return " ".join(code(str(value)) for value in node["enum"])
    if node.get("x-kubernetes-int-or-string"):
        return "number, or text"
    found = node.get("type", "object")
    if found == "array":
        item = node.get("items", {})
        inner = "object" if "properties" in item else kind(item)
        keys = node.get("x-kubernetes-list-map-keys")
        return f"list of {inner}" + (f" by {code(keys[0])}" if keys else "")
    return "map" if found == "object" else str(found)


def needed(leaf: Leaf) -> str:
    """Whether a value must be given."""
    if not leaf.required:
        return ""
    return "*required* with its group" if leaf.optional_group else "*required*"


def default(node: Schema) -> str:
    """The default as JSON; a dash where there is none."""
    value = node.get("default")
    return "" if value is None else code(json.dumps(value, ensure_ascii=False).strip('"'))


def bounds(node: Schema) -> str:
    """What limits the value: in words where the type has them, else numbers, else its pattern."""
    parts = [sentence_less(rule["message"]) for rule in node.get("x-kubernetes-validations", ())]
    if "minimum" in node or "maximum" in node:
        parts.append(
            " ".join(f"{sign} {node[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in node)
        )
    if node.get("exclusiveMinimum") is not None:
        parts.append(f"> {node['exclusiveMinimum']}")
    if allowed := node.get(ALLOWED):
        parts.append(allowed)
    elif "pattern" in node and not parts:
        parts.append(code(node["pattern"]))
    if "maxLength" in node:
        parts.append(f"at most {node['maxLength']} characters")
    if "maxItems" in node:
        parts.append(f"at most {node['maxItems']} items")
    if "maxProperties" in node:
        parts.append(f"at most {node['maxProperties']} entries")
    return "; ".join(parts)


def sentence_less(text: str) -> str:
    """A rule's message as a bound: without `must be`."""
    return text.removeprefix("must be ")


def change(leaf: Leaf) -> str:
    """Disruption class."""
    lowered = leaf.node.get(LOWERED)
    return f"{leaf.disruption or ''}{f' ({lowered} when lowered)' if lowered else ''}"


def meaning(node: Schema) -> str:
    """Description and unit."""
    unit = node.get(UNIT)
    return sentence(node.get("description", "")) + (f" Unit: {unit}." if unit else "")


def _rules(groups: Iterable[tuple[str, Schema]]) -> list[str]:
    """Rules that span several fields of a group, each with the expression that the API server checks."""
    found = [
        (f"{path}{rule['fieldPath']}", rule["message"], rule["rule"])
        for path, group in groups
        for rule in group.get("x-kubernetes-validations", ())
        if "fieldPath" in rule
    ]
    if not found:
        return []
    told = (f"- `{path}` {message}.{_expression(rule)}" for path, message, rule in found)
    return ["Rules, where `self` is the group:", "", *told, ""]


def _expression(rule: str) -> str:
    """A rule that can be read in a line; longer ones are in the CRD."""
    return f" `{rule}`" if len(rule) <= LONGEST_RULE else ""
