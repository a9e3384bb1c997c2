"""Which changes of a CRD are breaking: one small change a case, and what is said about it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from moe_api import crd
from moe_api.compat import breaking_changes

Schema = dict[str, Any]


def _crd(**properties: Schema) -> Schema:
    schema = {"type": "object", "properties": properties}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
    }
    names = {"kind": "Thing", "plural": "things", "singular": "thing", "shortNames": ["th"]}
    return {"spec": {"group": "g.dev", "scope": "Namespaced", "names": names, "versions": [version]}}


BASE = _crd(
    name={"type": "string", "maxLength": 10, "enum": ["a", "b"], "default": "a"},
    size={"type": "integer", "minimum": 1, "maximum": 10},
    free={"type": "string"},
    labels={"type": "object", "additionalProperties": {"type": "string", "maxLength": 5}, "maxProperties": 3},
    group={"type": "object", "properties": {"x": {"type": "integer"}}},
    born={"type": "object", "properties": {"x": {"type": "integer", "default": 1}}, "default": {"x": 1}},
    items={
        "type": "array",
        "maxItems": 4,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["k"],
        "items": {"type": "object", "properties": {"k": {"type": "string"}, "v": {"type": "string"}}},
    },
)


def _schema(document: Schema) -> Schema:
    found: Schema = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def _at(*path: str) -> Callable[[Schema], Schema]:
    def find(document: Schema) -> Schema:
        node = _schema(document)
        for part in path:
            node = node[part]
        return node

    return find


def _set(find: Callable[[Schema], Schema], **values: Any) -> Callable[[Schema], None]:
    return lambda document: find(document).update(values)


def _drop(find: Callable[[Schema], Schema], key: str) -> Callable[[Schema], None]:
    return lambda document: find(document).pop(key) and None


PROPERTIES = _at("properties")
NAME, SIZE, FREE = _at("properties", "name"), _at("properties", "size"), _at("properties", "free")
LABELS, ITEMS = _at("properties", "labels"), _at("properties", "items")
RULE = [{"rule": "self.size > 2", "message": "m"}]


BREAKING: dict[str, tuple[Callable[[Schema], None], str]] = {
    "a field removed": (_drop(PROPERTIES, "free"), "free: field was removed"),
    "a field removed deeper": (_drop(_at("properties", "group", "properties"), "x"), "group.x: field was removed"),
    "a field of an item removed": (
        _drop(_at("properties", "items", "items", "properties"), "v"),
        "items[].v: field was removed",
    ),
    "a type changed": (_set(FREE, type="integer"), "free: type changed from string to integer"),
    "a type of a map's values changed": (
        _set(_at("properties", "labels", "additionalProperties"), type="integer"),
        "labels{}: type changed from string to integer",
    ),
    "an enum value removed": (_set(NAME, enum=["a"]), "name: value 'b' was removed"),
    "an enum begun": (_set(FREE, enum=["a"]), "free: only a are allowed now"),
    "a field required": (lambda d: _schema(d).update(required=["size"]), "size: is required now"),
    "a new field required": (
        lambda d: _schema(d).update(required=["new"], properties={**PROPERTIES(d), "new": {"type": "string"}}),
        "new: is required now",
    ),
    "a minimum raised": (_set(SIZE, minimum=2), "size: minimum was tightened from 1 to 2"),
    "a maximum lowered": (_set(SIZE, maximum=9), "size: maximum was tightened from 10 to 9"),
    "a length begun": (_set(FREE, maxLength=5), "free: maxLength was tightened from none to 5"),
    "fewer items": (_set(ITEMS, maxItems=3), "items: maxItems was tightened from 4 to 3"),
    "fewer entries": (_set(LABELS, maxProperties=2), "labels: maxProperties was tightened from 3 to 2"),
    "a pattern begun": (_set(FREE, pattern="^a$"), "free: pattern changed from none to ^a$"),
    "a default changed": (_set(NAME, default="b"), "name: default changed from 'a' to 'b'"),
    "a default begun": (_set(FREE, default="b"), "free: default changed from 'none' to 'b'"),
    "the default of a known field changed within its group": (
        _set(_at("properties", "born"), default={"x": 2}),
        "born: default changed from {'x': 1} to {'x': 2}",
    ),
    "a default dropped": (_drop(NAME, "default"), "name: default changed from 'a' to 'none'"),
    "a list key changed": (_set(ITEMS, **{"x-kubernetes-list-map-keys": ["v"]}), "items: list keys changed"),
    "a list type changed": (
        _set(ITEMS, **{"x-kubernetes-list-type": "atomic"}),
        "items: list type changed from map to atomic",
    ),
    "a rule added": (_set(_at(), **{"x-kubernetes-validations": RULE}), "the object: new rule: self.size > 2"),
    "a rule on a new field that others feel": (
        lambda d: (
            _set(PROPERTIES, new={"type": "integer", "default": 1})(d),
            _set(_at(), **{"x-kubernetes-validations": [{"rule": "!has(self.new) || self.size > 2"}]})(d),
            None,
        )[-1],
        "the object: new rule",
    ),
    "a map closed": (_drop(LABELS, "additionalProperties"), "labels: free keys are no longer allowed"),
    "a version removed": (lambda d: d["spec"].update(versions=[]), "version v1 was removed"),
    "a version no longer served": (
        lambda d: d["spec"]["versions"][0].update(served=False),
        "version v1 is no longer served",
    ),
    "the status gone": (
        lambda d: d["spec"]["versions"][0].update(subresources={}),
        "version v1 lost its status subresource",
    ),
    "a kind renamed": (lambda d: d["spec"]["names"].update(kind="Other"), "spec.names.kind changed"),
    "a short name removed": (lambda d: d["spec"]["names"].update(shortNames=[]), "short name 'th' was removed"),
    "the scope changed": (lambda d: d["spec"].update(scope="Cluster"), "spec.scope changed"),
}


@pytest.mark.parametrize("case", BREAKING, ids=list(BREAKING))
def test_breaking(case: str) -> None:
    change, said = BREAKING[case]
    new = copy.deepcopy(BASE)
    change(new)
    (told,) = breaking_changes(BASE, new)
    assert told.startswith(said)


HARMLESS: dict[str, Callable[[Schema], None]] = {
    "nothing": lambda d: None,
    "a new field": _set(PROPERTIES, new={"type": "string"}),
    "a new field with a default": _set(PROPERTIES, new={"type": "string", "default": "a"}),
    "a new required field with a default": lambda d: _schema(d).update(
        required=["new"], properties={**PROPERTIES(d), "new": {"type": "string", "default": "x"}}
    ),
    "a group born whole gains a field": lambda d: (
        _set(_at("properties", "born", "properties"), y={"type": "integer", "default": 2})(d),
        _set(_at("properties", "born"), default={"x": 1, "y": 2})(d),
    )[-1],
    "an enum value added": _set(NAME, enum=["a", "b", "c"]),
    "an enum ended": _drop(NAME, "enum"),
    "bounds loosened": _set(SIZE, minimum=0, maximum=11),
    "bounds dropped": _drop(SIZE, "maximum"),
    "a description changed": _set(NAME, description="other words"),
    "a rule on a new field alone": lambda d: (
        _set(PROPERTIES, new={"type": "integer"})(d),
        _set(_at(), **{"x-kubernetes-validations": [{"rule": "!has(self.new) || self.new < self.size"}]})(d),
        None,
    )[-1],
    "a new version": lambda d: d["spec"]["versions"].append({"name": "v2", "served": True, "schema": {}}),
}


@pytest.mark.parametrize("case", HARMLESS, ids=list(HARMLESS))
def test_harmless(case: str) -> None:
    new = copy.deepcopy(BASE)
    HARMLESS[case](new)
    assert breaking_changes(BASE, new) == []


def test_a_rule_dropped_is_harmless() -> None:
    old = copy.deepcopy(BASE)
    _schema(old)["x-kubernetes-validations"] = RULE
    assert breaking_changes(old, BASE) == []


def test_the_crd_does_not_break_itself() -> None:
    assert breaking_changes(crd.render(), crd.render()) == []
