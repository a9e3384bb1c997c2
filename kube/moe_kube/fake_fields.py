"""Field sets and merges of server-side apply, as the API server makes them.

A field set is a `fieldsV1` document: `f:name` for a field, `k:{…}` for an item of a list of maps, `v:…` for an item of
a set, `.` for the node itself. An empty node is a member; so an empty set is None, never `{}`.
https://kubernetes.io/docs/reference/using-api/server-side-apply/ describes it.
Values are shared between versions of an object and never changed in place; what did not change stays the same object.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from moe_kube.errors import Invalid
from moe_kube.fake_shapes import Shape

Fields = dict[str, Any]
_SELF: Fields = {".": {}}


@lru_cache(maxsize=16384)
def _element(mark: str, content: tuple[tuple[str, Any], ...] | str) -> str:
    value: Any = dict(content) if isinstance(content, tuple) else json.loads(content)
    return mark + json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def item_key(item: Any, shape: Shape) -> str:
    """The path element of a list item. Raises Invalid where a key field is missing."""
    if shape.form == "set":
        return _element("v:", json.dumps(item))
    if not isinstance(item, dict):
        raise Invalid(f": an element must be a map with {', '.join(name for name, _ in shape.keys)}", status=422)
    found = []
    for name, default in shape.keys:
        value = item.get(name, default)
        if value is None:
            raise Invalid(f": element {json.dumps(item)[:80]} omits key field {name!r}", status=422)
        found.append((name, value))
    return _element("k:", tuple(found))


def keyed(items: Sequence[Any], shape: Shape) -> dict[str, Any]:
    """Items by path element, in order. Raises Invalid for duplicates."""
    out = {item_key(item, shape): item for item in items}
    if len(out) != len(items):
        raise Invalid(": duplicate entries in a list that is a map or a set", status=422)
    return out


def relation(value: Any, shape: Shape | None) -> str:
    """How a value is taken apart: map, list, set or whole. What no table knows: maps by field, the rest whole."""
    if isinstance(value, dict):
        return "map" if shape is None or shape.form == "map" else "whole"
    if isinstance(value, list) and shape is not None and shape.form in ("list", "set"):
        return shape.form
    return "whole"


def field_set(value: Any, shape: Shape | None, *, every: bool = False) -> Fields | None:
    """The fields that a value holds. `every` makes each inner node a member too, as a change of it does.

    Raises Invalid, which begins with the path, for an item without its key and for duplicates.
    """
    form = relation(value, shape)
    if form == "whole" or (form == "map" and not value):
        return {}
    out: Fields = {}
    if form == "map":
        for name, item in value.items():
            try:
                sub = field_set(item, shape.child(name) if shape else None, every=every)
            except Invalid as error:
                raise Invalid(f".{name}{error}", status=422) from None
            if sub is not None:
                inner = sub and ((shape is not None and shape.open) or every) and "." not in sub
                out[f"f:{name}"] = {**_SELF, **sub} if inner else sub
    elif shape is not None:
        for key, item in keyed(value, shape).items():
            sub = field_set(item, shape.rest, every=every) if form == "list" else {}
            out[key] = {**_SELF, **sub} if sub else {}
    if every:
        return {**_SELF, **out} if out else {}
    return out or None


def merge(live: Any, wanted: Any, shape: Shape | None) -> Any:
    """`wanted` laid over `live`; what it does not name stays."""
    form = relation(wanted, shape)
    if form != relation(live, shape) or form == "whole":
        return live if live == wanted and type(live) is type(wanted) else wanted
    if form == "map":
        out = None
        for name, item in wanted.items():
            fresh = merge(live[name], item, shape.child(name) if shape else None) if name in live else item
            if name not in live or fresh is not live[name]:
                out = dict(live) if out is None else out
                out[name] = fresh
        return live if out is None else out
    if shape is None:
        return wanted
    merged = _merge_items(live, wanted, shape)
    same = len(merged) == len(live) and all(new is old for new, old in zip(merged, live, strict=True))
    return live if same else merged


def _merge_items(live: list[Any], wanted: list[Any], shape: Shape) -> list[Any]:
    """Items of both: those of `wanted` in its order, the others where they stood between them."""
    left, right = keyed(live, shape), keyed(wanted, shape)
    left_keys, right_keys = list(left), list(right)
    shared = [key for key in right_keys if key in left]
    out: list[Any] = []
    done: set[str] = set()
    at_left = at_right = at_shared = 0
    while at_left < len(left_keys) or at_right < len(right_keys):
        key = left_keys[at_left] if at_left < len(left_keys) else None
        if key is not None and key not in right:
            out.append(left[key])
            at_left += 1
            continue
        if key is not None and key in done:
            at_left += 1
            continue
        ours = right_keys[at_right]
        if key is not None and key != ours and at_shared < len(shared) and shared[at_shared] != key:
            at_left += 1
            continue
        out.append(merge(left[ours], right[ours], shape.rest) if ours in left else right[ours])
        done.add(ours)
        at_right += 1
        if at_shared < len(shared) and shared[at_shared] == ours:
            at_shared += 1
    return out


def prune(value: Any, last: Fields, keepers: Sequence[Fields], shape: Shape | None) -> Any:
    """The value without the fields of `last` that none of `keepers` holds: what a manager no longer sends.

    What is emptied by it is null, as the API server makes it; what comes of that is for its kind to say.
    """
    form = relation(value, shape)
    if form == "map":
        out = None
        for element, sub in last.items():
            name = element[2:]
            if element == "." or name not in value:
                continue
            holding = [fields[element] for fields in keepers if element in fields]
            if shape is not None and shape.open:
                holding = _holding(holding)
            fresh = prune(value[name], sub, holding, shape.child(name) if shape else None) if holding else None
            if holding and fresh is value[name]:
                continue
            out = dict(value) if out is None else out
            if holding:
                out[name] = fresh
            else:
                del out[name]
        return value if out is None else out or None
    if form == "whole" or shape is None:
        return value
    kept: list[Any] = []
    for item in value:
        key = item_key(item, shape)
        if key not in last:
            kept.append(item)
            continue
        holding = _holding([fields[key] for fields in keepers if key in fields])
        if holding:
            # An item without its keys could not be told from others.
            inside = {name: sub for name, sub in last[key].items() if name[2:] not in dict(shape.keys)}
            kept.append(prune(item, inside, holding, shape.rest) if form == "list" else item)
    same = len(kept) == len(value) and all(new is old for new, old in zip(kept, value, strict=True))
    return value if same else kept or None


def _holding(fields: list[Fields]) -> list[Fields]:
    """Who keeps an item: one of the owners must hold the item itself. A field in it alone does not keep it."""
    return fields if any(_member(each) for each in fields) else []


def conflicts(live: Any, new: Any, mine: Fields, others: Fields, shape: Shape | None) -> Fields | None:
    """The fields of `others` whose value `mine` changes or adds."""
    if live is new or new is None:
        return None
    form = relation(new, shape)
    if form == "whole" or form != relation(live, shape):
        return None if mine or others or live == new else {}
    out: Fields = {}
    old_of, new_of = children(live, shape), children(new, shape)
    for element, sub in mine.items():
        if element not in others or element not in new_of:
            continue
        child = _child_shape(shape, element)
        if element in old_of:
            found = conflicts(old_of[element], new_of[element], sub, others[element], child)
        else:
            found = intersect(others[element], field_set(new_of[element], child, every=True))
        if found is not None:
            out[element] = found
    return out or None


def diff(old: Any, new: Any, shape: Shape | None) -> tuple[Fields | None, Fields | None]:
    """(changed or added, removed) fields between two values."""
    if old is new:
        return None, None
    if new is None and isinstance(old, dict | list):
        new = type(old)()  # Emptied, but there.
    form = relation(new, shape)
    if form == "whole" or form != relation(old, shape):
        return (None, None) if old == new else (field_set(new, shape, every=True), None)
    changed: Fields = {}
    removed: Fields = {}
    old_of, new_of = children(old, shape), children(new, shape)
    for element, item in new_of.items():
        child = _child_shape(shape, element)
        if element not in old_of:
            changed[element] = field_set(item, child, every=True) or {}
            continue
        more, less = diff(old_of[element], item, child)
        if more is not None:
            changed[element] = more
        if less is not None:
            removed[element] = less
    for element, item in old_of.items():
        if element not in new_of:
            removed[element] = field_set(item, _child_shape(shape, element), every=True) or {}
    return changed or None, removed or None


def children(value: Any, shape: Shape | None) -> dict[str, Any]:
    """The parts of a value by path element; nothing where it is whole."""
    form = relation(value, shape)
    if form == "map":
        return {f"f:{name}": item for name, item in value.items()}
    return keyed(value, shape) if form in ("list", "set") and shape is not None else {}


def _child_shape(shape: Shape | None, element: str) -> Shape | None:
    if shape is None:
        return None
    return shape.child(element[2:]) if element[0] == "f" else shape.rest


def _member(fields: Fields) -> bool:
    """Whether the node itself is in the set, and not only what is below it."""
    return not fields or "." in fields


def _node(inner: Fields, *, member: bool) -> Fields | None:
    """A node with these parts, as `fieldsV1` writes it; None where nothing is left."""
    if not inner:
        return {} if member else None
    return {**_SELF, **inner} if member else inner


def subtract(fields: Fields | None, cut: Fields | None) -> Fields | None:
    """`fields` without `cut`."""
    if fields is None or cut is None:
        return fields
    inner = {name: sub for name, sub in fields.items() if name != "."}
    for element, sub in cut.items():
        if element in inner:
            rest = subtract(inner[element], sub)
            if rest is None:
                del inner[element]
            else:
                inner[element] = rest
    return _node(inner, member=_member(fields) and not _member(cut))


def intersect(one: Fields | None, other: Fields | None) -> Fields | None:
    """The fields that are in both."""
    if one is None or other is None:
        return None
    inner = {}
    for element, sub in one.items():
        both = intersect(sub, other[element]) if element != "." and element in other else None
        if both is not None:
            inner[element] = both
    return _node(inner, member=_member(one) and _member(other))


def union(one: Fields | None, other: Fields | None) -> Fields | None:
    """The fields of both."""
    if one is None or other is None:
        return other if one is None else one
    inner = {name: sub for name, sub in one.items() if name != "."}
    for element, sub in other.items():
        if element != ".":
            inner[element] = union(inner[element], sub) if element in inner else sub
    return _node(inner, member=_member(one) or _member(other))


def paths(fields: Fields, prefix: str = "") -> Iterator[str]:
    """The members as the API server writes them in a message: `.spec.ports[port=80,protocol="TCP"].name`."""
    for element, sub in fields.items():
        if element == ".":
            yield prefix
            continue
        mark, _, text = element.partition(":")
        if mark == "f":
            path = f"{prefix}.{text}"
        elif mark == "k":
            pairs = ",".join(f"{name}={json.dumps(value)}" for name, value in json.loads(text).items())
            path = f"{prefix}[{pairs}]"
        else:
            path = f"{prefix}[={text}]"
        if sub:
            yield from paths(sub, path)
        else:
            yield path
