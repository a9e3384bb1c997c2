"""Every leaf of the CRD with values that its own schema takes and refuses: what the schema suite changes.

A leaf is what one writer sets at once: a scalar, a map, or a list of scalars. Values come from the schema: words of an
enum, ends of a range, and of a pool of plausible texts those that its pattern, length and rules take.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from moe_api.crd import schema
from moe_api.scalars import parse_duration
from moe_api.spec_engine import EXTRA_ARGS
from moe_kube.objects import Obj

UNSET = object()
"""Stands for a field that is left out."""

_TEXTS = (
    *(
        "main",
        "v2.1",
        "gold",
        "eu-north-1",
        "us-east-1",
        "GPT-x",
        "org/model",
        "pvc://weights/qwen",
        "s3://bucket/qwen",
    ),
    *("https://a.example.com/v1", "http://b.example.com", "/srv/a", "/srv/b", "redis-a:6379", "redis-b:6380"),
    *("moe_running", "Running:x"),
)
_BAD_TEXTS = ("", "two words", "-", "ü!", "https://user:pass@host/", "\x00", "y" * 5000)
_QUANTITIES: tuple[Any, ...] = ("2Gi", "3500M", 7, "1.5Gi")
_DURATIONS = ("1s", "3s", "1m30s", "250ms", "1ms")
_DECIMALS: tuple[Any, ...] = ("0.25", "0.75", "1.5", "2", 3, "250", 4000)
_MAP_KEYS = ("a", "example.com/team", "nvidia.com/gpu-class")


@dataclass(frozen=True)
class Leaf:
    """One leaf: `path` from the spec on, with `[]` where a list of groups is gone through."""

    path: str
    schema: Mapping[str, Any]
    required: bool

    @property
    def disruption(self) -> str:
        """The class of a change, as its description tells people."""
        found = re.search(r"Disruption: (\w+)( \(hot when lowered\))?\.$", self.schema["description"])
        assert found, f"{self.path} tells no disruption class"
        return found[1]

    @property
    def lowered(self) -> bool:
        """Whether a smaller number costs less."""
        return str(self.schema["description"]).endswith("(hot when lowered).")

    def good(self) -> Iterator[Any]:
        """Values that the leaf's own schema takes; rules over several fields may refuse some."""
        yield from (value for value in _good(self.schema) if admits(self.schema, value))
        if not self.required:
            yield UNSET

    def bad(self) -> Iterator[Any]:
        """Values that the leaf's own schema or its own rules refuse."""
        yield from (value for value in _bad(self.schema) if not admits(self.schema, value))
        if self.required:
            yield UNSET


def leaves() -> tuple[Leaf, ...]:
    """Every leaf of the spec, in the order of the schema."""
    return tuple(_leaves("", schema()["properties"]["spec"], required=True))


def _leaves(path: str, node: Mapping[str, Any], *, required: bool) -> Iterator[Leaf]:
    items = node.get("items", {})
    group, suffix = (items, "[]") if "properties" in items else (node, "")
    if "properties" not in group:
        yield Leaf(path, node, required)
        return
    for name, child in group["properties"].items():
        own = name in group.get("required", ())
        yield from _leaves(f"{path}{suffix}.{name}".lstrip("."), child, required=own)


# Values


def _good(node: Mapping[str, Any]) -> Iterator[Any]:
    if "enum" in node:
        yield from node["enum"]
    elif node.get("type") == "boolean":
        yield from (True, False)
    elif node.get("type") == "integer":
        low, high = node["minimum"], node["maximum"]
        yield from dict.fromkeys([low + 1, 2, 8, low, 4, 64, 4096, 32768, high // 2, high])
    elif node.get("type") == "array":
        values = [value for value in dict.fromkeys(_good(node["items"])) if admits(node["items"], value)]
        most = int(node["maxItems"])
        yield from ([value] for value in values[: most + 1])
        yield values[:2]
        yield values[:most]
        yield [100] if node["items"].get("type") == "integer" else []
        yield [3, 50, 100]
    elif "additionalProperties" in node:
        values = list(dict.fromkeys(_good(node["additionalProperties"])))
        yield from ({key: values[0]} for key in (*_MAP_KEYS, "memory", "seed"))
        yield dict(zip(_MAP_KEYS, values[1:], strict=False))
        yield from (
            {"seed": "7"},
            {"enforce-eager": "true", "dtype": "bfloat16"},
            {"gpu-memory-utilization": "0.8"},
            {},
        )
    else:
        yield from _words(node)


def _words(node: Mapping[str, Any]) -> Iterator[Any]:
    pattern = node.get("pattern", "")
    if "ms|s|m|h" in pattern:
        yield from _DURATIONS
        yield from re.findall(r"duration\('([^']+)'\)", _rules(node))
    elif node.get("x-kubernetes-int-or-string"):
        yield from _QUANTITIES if "Ki|Mi" in pattern else _DECIMALS
        yield from (bound.removesuffix(".0") for bound in re.findall(r"<= ([0-9.]+)", _rules(node)))
    else:
        yield from _TEXTS
        yield "z" * node["maxLength"]


def _bad(node: Mapping[str, Any]) -> Iterator[Any]:
    """What is of the wrong type, form, or just outside the range."""
    if node.get("type") == "boolean":
        yield from ("yes", "true")
    elif node.get("type") == "integer":
        yield from (node["minimum"] - 1, node["maximum"] + 1, "2", 1.5)
    elif node.get("type") == "array":
        first = next(value for value in _good(node["items"]) if admits(node["items"], value))
        if node["x-kubernetes-list-type"] == "set":
            yield [first, first]
        yield from ("text", [next(_bad(node["items"]))], [first] * (node["maxItems"] + 1))
    elif "additionalProperties" in node:
        value = next(iter(_good(node["additionalProperties"])))
        yield from ({"no such key!": value}, {"a": []}, {f"k{n}": value for n in range(node["maxProperties"] + 1)})
    elif "enum" in node:
        yield from ("NoSuchWord", 3, "")
    elif "ms|s|m|h" in node.get("pattern", ""):
        yield from ("5", "fast", "0s", "9000h", -1)
    elif node.get("x-kubernetes-int-or-string"):
        yield from ("-1", "many", "1e3", 0.5, "1" * 21, "2000000000", "1.5")
    else:
        yield from (*_BAD_TEXTS, 12)


def _rules(node: Mapping[str, Any]) -> str:
    return " ".join(rule["rule"] for rule in node.get("x-kubernetes-validations", ()))


def admits(node: Mapping[str, Any], value: Any) -> bool:
    """Whether a leaf's schema takes a value, its own rules included: a small second reading of the CRD."""
    kind = node.get("type")
    if kind == "array":
        items = node["items"]
        return (
            isinstance(value, list)
            and len(value) <= node["maxItems"]
            and all(admits(items, item) for item in value)
            and (node["x-kubernetes-list-type"] != "set" or len(value) == len(set(map(str, value))))
        )
    if kind == "object":
        return (
            isinstance(value, dict)
            and len(value) <= node["maxProperties"]
            and all(admits(node["additionalProperties"], item) for item in value.values())
            and all(_key_fits(_rules(node), key, item) for key, item in value.items())
        )
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "integer":
        return type(value) is int and node["minimum"] <= value <= node["maximum"]
    if node.get("x-kubernetes-int-or-string"):
        return type(value) in (int, str) and _text_fits(node, str(value)) and _in_range(node, str(value))
    return isinstance(value, str) and _text_fits(node, value) and _in_range(node, value)


def _text_fits(node: Mapping[str, Any], text: str) -> bool:
    return (
        node.get("minLength", 0) <= len(text) <= node.get("maxLength", len(text))
        and text in node.get("enum", (text,))
        and bool(re.search(node.get("pattern", ""), text))
        and not text.endswith("\n")
    )


def _in_range(node: Mapping[str, Any], text: str) -> bool:
    rules = _rules(node)
    if ends := re.findall(r"duration\('([^']+)'\)", rules):
        return parse_duration(ends[0]) <= parse_duration(text) <= parse_duration(ends[1])
    for sign, bound in re.findall(r"double\(self\) (>=|>|<=) ([0-9.]+)", rules):
        value, limit = Decimal(text), Decimal(bound)
        if not {">=": value >= limit, ">": value > limit, "<=": value <= limit}[sign]:
            return False
    return True


def _key_fits(rules: str, key: str, value: Any) -> bool:
    if "enforce-eager" in rules:  # the allow-list of the engine's arguments
        form = {"flag": r"true|false", "int": r"\d+", "decimal": r"[\d.]+", "word": r"[\w.-]+"}
        return key in EXTRA_ARGS and bool(re.fullmatch(form[EXTRA_ARGS[key]], str(value)))
    found = re.search(r"size\(k\) <= (\d+) && k\.matches\(r'(.*)'\)\)", rules)
    return found is None or (len(key) <= int(found[1]) and bool(re.search(found[2], key)))


# Places in a spec


def changed(spec: Obj, path: str, value: Any) -> Obj:
    """A copy of the spec with one leaf set, or left out."""
    spec = copy.deepcopy(spec)
    place = concrete(spec, path)
    node: Any = spec
    for step in place[:-1]:
        node = node.setdefault(step, {}) if isinstance(step, str) else node[step]
    if value is UNSET:
        node.pop(place[-1], None)
    else:
        node[place[-1]] = value
    return spec


def value_at(spec: Obj, path: str) -> Any:
    """What stands at a path, or UNSET."""
    node: Any = spec
    for step in concrete(spec, path):
        if isinstance(step, str) and step not in node:
            return UNSET
        node = node[step]
    return node


def concrete(spec: Obj, path: str) -> list[str | int]:
    """The steps to a leaf; of a list the first item that has the group or field that comes next, else the first."""
    place: list[str | int] = []
    node: Any = spec
    steps = path.split(".")
    for number, step in enumerate(steps):
        name = step.removesuffix("[]")
        place.append(name)
        node = node.get(name) if isinstance(node, dict) else None
        if step.endswith("[]"):
            assert node, f"no item for {path}"
            index = next((at for at, item in enumerate(node) if steps[number + 1] in item), 0)
            place.append(index)
            node = node[index]
    return place


def told(place: list[str | int]) -> str:
    """The place as errors name it."""
    return "spec" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
