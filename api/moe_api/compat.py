"""Which changes of a CRD break objects that are stored, or clients that write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_LOWER = ("minimum", "minLength", "minItems", "minProperties")
_UPPER = ("maximum", "maxLength", "maxItems", "maxProperties")
_FLAGS = ("exclusiveMinimum", "exclusiveMaximum", "uniqueItems")
_IDENTITY = ("group", "scope", "names.kind", "names.plural", "names.singular")


def breaking_changes(old: Schema, new: Schema) -> list[str]:
    """Every change from one CRD to the next that an object or a client of the old one would not survive.

    A new rule is no break where it speaks only of a field that is new, since no stored object has it.
    """
    return [
        *_identity(old.get("spec", {}), new.get("spec", {})),
        *_versions(old.get("spec", {}), new.get("spec", {})),
    ]


def _identity(old: Schema, new: Schema) -> Iterator[str]:
    for name in _IDENTITY:
        before, after = _dig(old, name), _dig(new, name)
        if before != after:
            yield f"spec.{name} changed from {before!r} to {after!r}"
    for short in sorted(set(_dig(old, "names.shortNames") or ()) - set(_dig(new, "names.shortNames") or ())):
        yield f"short name {short!r} was removed"


def _dig(values: Schema, dotted: str) -> Any:
    found: Any = values
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _versions(old: Schema, new: Schema) -> Iterator[str]:
    after = {version["name"]: version for version in new.get("versions", ())}
    for version in old.get("versions", ()):
        name = version["name"]
        if name not in after:
            yield f"version {name} was removed"
            continue
        if version.get("served") and not after[name].get("served"):
            yield f"version {name} is no longer served"
        for sub in version.get("subresources", {}):
            if sub not in after[name].get("subresources", {}):
                yield f"version {name} lost its {sub} subresource"
        yield from _node(
            "", version.get("schema", {}).get("openAPIV3Schema", {}), after[name]["schema"]["openAPIV3Schema"]
        )


def _same_default(old: Schema, new: Schema) -> bool:
    """A group that is born whole may gain fields that it did not have: no stored object says otherwise."""
    before, after = old.get("default"), new.get("default")
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return bool(before == after)
    known = old.get("properties", {})
    return {name: value for name, value in after.items() if name in before or name in known} == before


def _node(path: str, old: Schema, new: Schema) -> Iterator[str]:
    """Changes at one node of the schema and below."""
    where = path.lstrip(".") or "the object"
    before, after = _type(old), _type(new)
    if before != after:
        yield f"{where}: type changed from {before} to {after}"
        return
    yield from _values(where, old, new)
    yield from _lists(where, old, new)
    yield from _rules(where, old, new)
    yield from _properties(path, old, new)
    for key, suffix in (("items", "[]"), ("additionalProperties", "{}")):
        below, now = old.get(key), new.get(key)
        if isinstance(below, dict) and isinstance(now, dict):
            yield from _node(path + suffix, below, now)
        elif isinstance(below, dict) or (below is True and now is not True):
            yield f"{where}: free keys are no longer allowed"
    if old.get("x-kubernetes-preserve-unknown-fields") and not new.get("x-kubernetes-preserve-unknown-fields"):
        yield f"{where}: unknown fields are no longer kept"
    if old.get("nullable") and not new.get("nullable"):
        yield f"{where}: null is no longer allowed"


def _type(node: Schema) -> str:
    return "integer or string" if node.get("x-kubernetes-int-or-string") else str(node.get("type"))


def _values(where: str, old: Schema, new: Schema) -> Iterator[str]:
    for word in old.get("enum", ()):
        if word not in new.get("enum", [word]):
            yield f"{where}: value {word!r} was removed"
    if "enum" in new and "enum" not in old:
        yield f"{where}: only {', '.join(map(str, new['enum']))} are allowed now"
    for keys, sign in ((_LOWER, 1), (_UPPER, -1)):
        for key in keys:
            if key in new and (key not in old or sign * new[key] > sign * old[key]):
                yield f"{where}: {key} was tightened from {old.get(key, 'none')} to {new[key]}"
    for key in ("pattern", "format", "multipleOf", *_FLAGS):
        if new.get(key) and old.get(key) != new[key]:
            yield f"{where}: {key} changed from {old.get(key, 'none')} to {new[key]}"
    if not _same_default(old, new):
        yield f"{where}: default changed from {old.get('default', 'none')!r} to {new.get('default', 'none')!r}"


def _lists(where: str, old: Schema, new: Schema) -> Iterator[str]:
    before, after = old.get("x-kubernetes-list-type", "atomic"), new.get("x-kubernetes-list-type", "atomic")
    if before != after:
        yield f"{where}: list type changed from {before} to {after}"
    elif old.get("x-kubernetes-list-map-keys") != new.get("x-kubernetes-list-map-keys"):
        yield (
            f"{where}: list keys changed from {old.get('x-kubernetes-list-map-keys')}"
            f" to {new.get('x-kubernetes-list-map-keys')}"
        )


def _rules(where: str, old: Schema, new: Schema) -> Iterator[str]:
    known = {rule["rule"] for rule in old.get("x-kubernetes-validations", ())}
    for rule in new.get("x-kubernetes-validations", ()):
        if rule["rule"] not in known and not _only_of_new_field(rule["rule"], old, new):
            yield f"{where}: new rule: {rule['rule']}"


def _only_of_new_field(rule: str, old: Schema, new: Schema) -> bool:
    """Whether the rule begins by letting every object through that lacks a field which the old schema did not know."""
    return any(
        rule.startswith(f"!has(self.{name}) || ") and "default" not in child
        for name, child in new.get("properties", {}).items()
        if name not in old.get("properties", {})
    )


def _properties(path: str, old: Schema, new: Schema) -> Iterator[str]:
    before, after = old.get("properties", {}), new.get("properties", {})
    for name, child in before.items():
        if name in after:
            yield from _node(f"{path}.{name}", child, after[name])
        else:
            yield f"{f'{path}.{name}'.lstrip('.')}: field was removed"
    for name in new.get("required", ()):
        if name not in old.get("required", ()) and "default" not in after.get(name, {}):
            yield f"{f'{path}.{name}'.lstrip('.')}: is required now"
