"""Every setting of each process's configuration file, from the types that read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from moe_cli.reference_text import code, sentence, table
from moe_core.config import GatewayConfig, OperatorConfig, ServingConfig, TunerConfig, TunersConfig

Schema = dict[str, Any]

_FILES = (
    (OperatorConfig, "the operator", "`python -m moe_operator --config FILE`; the chart writes it."),
    (GatewayConfig, "a gateway", "`python -m moe_gateway --config FILE`; the operator or `moectl up` writes it."),
    (TunerConfig, "a tuner of one deployment", "`python -m moe_tuner --config FILE`."),
    (TunersConfig, "a tuner of many", "The same command, with a list; each entry is a TunerConfig."),
    (ServingConfig, "a replica's application", "Carried by serveConfigV2, and by `moectl up`."),
)
_LIMITS = (
    *(("minimum", "≥ {}"), ("exclusiveMinimum", "> {}"), ("maximum", "≤ {}"), ("exclusiveMaximum", "< {}")),
    *(("minLength", "{} characters or more"), ("maxLength", "at most {} characters")),
    *(("minItems", "{} items or more"), ("maxItems", "at most {} items"), ("maxProperties", "at most {} entries")),
)


def page() -> str:
    """The page, Markdown."""
    lines = [
        "# Configuration files",
        "",
        "What each process reads: one JSON document, and nothing else but secrets from files. In a cluster the "
        "operator writes them, on one machine `moectl up`; a person writes none of them by hand.",
        "",
    ]
    for model, who, how in _FILES:
        lines += [f"## {model.__name__}: {who}", "", how, ""]
        lines += table(("setting", "type", "default", "bounds", "meaning"), rows(model))
    return "\n".join(lines)


def rows(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """(path, type, default, bounds, meaning) of every field of a model, groups and lists of groups opened."""
    whole = model.model_json_schema(by_alias=True)
    yield from _rows("", whole, whole.get("$defs", {}))


def _rows(path: str, group: Schema, definitions: dict[str, Schema]) -> Iterator[tuple[str, ...]]:
    for name, raw in group["properties"].items():
        node, here = _resolve(raw, definitions), f"{path}{name}"
        required = name in group.get("required", ())
        if "properties" in node and ("default" not in raw or raw["default"] is not None):
            yield from _rows(f"{here}.", node, definitions)
            continue
        shown = "*required*" if required else _default(raw)
        yield code(here), _kind(node, definitions), shown, _bounds(node), sentence(raw.get("description", ""))
        inner = node
        for key, mark in (("items", "[]"), ("additionalProperties", ".*")):
            if isinstance(node.get(key), dict):
                inner, here = _resolve(node[key], definitions), f"{here}{mark}"
        if "properties" in inner:
            yield from _rows(f"{here}.", inner, definitions)


def _resolve(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """References and `or null` folded in; a number that may be text too is what pydantic makes of a decimal."""
    own = {key: value for key, value in node.items() if key not in ("$ref", "anyOf")}
    if "$ref" in node:
        return {**_resolve(definitions[node["$ref"].removeprefix("#/$defs/")], definitions), **own}
    options = [option for option in node.get("anyOf", ()) if option != {"type": "null"}]
    if not options:
        return own
    if {option.get("type") for option in options} == {"number", "string"}:
        number = next(option for option in options if option["type"] == "number")
        return {**number, **own, "type": "number, or text"}
    if len(options) > 1:
        return {**own, "type": " or ".join(str(option.get("type")) for option in options)}
    return {**_resolve(options[0], definitions), **own}


def _kind(node: Schema, definitions: dict[str, Schema]) -> str:
    if "enum" in node or "const" in node:
        return " ".join(code(str(value)) for value in node.get("enum", [node.get("const")]))
    found = str(node.get("type", "any"))
    if found == "array":
        return f"list of {_kind(_resolve(node.get('items', {}), definitions), definitions)}"
    if found == "object" and "properties" not in node:
        return "map"
    return found


def _bounds(node: Schema) -> str:
    return "; ".join(text.format(_number(node[key])) for key, text in _LIMITS if key in node)


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _default(node: Schema) -> str:
    value = node.get("default")
    return "" if value is None or value in ([], {}) else code(json.dumps(value, ensure_ascii=False).strip('"'))
