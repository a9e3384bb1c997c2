"""What one field manager owns of an object, and a digest of it: drift is seen without keeping whole objects.

An object that we applied carries, in `metadata.managedFields`, the set of fields that are ours (fieldsV1, as
https://kubernetes.io/docs/reference/using-api/server-side-apply/ describes it). Extracting them from the live object
gives back what we applied, if nobody changed it: so what we apply must be in the server's own form (canonical
quantities, defaults of list items spelled out).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

_META_KEPT = ("annotations", "labels", "ownerReferences", "finalizers")


def owned(obj: Mapping[str, Any], manager: str, subresource: str = "") -> dict[str, Any]:
    """The part of a live object that `manager` owns by server-side apply; empty where it owns nothing."""
    for entry in obj.get("metadata", {}).get("managedFields", ()):
        if (
            entry.get("manager") == manager
            and entry.get("operation") == "Apply"
            and entry.get("subresource", "") == subresource
        ):
            part = _pick(obj, entry.get("fieldsV1", {}))
            return part if isinstance(part, dict) else {}
    return {}


def content(body: Mapping[str, Any]) -> dict[str, Any]:
    """What of a body for apply can be owned: all but its identity."""
    kept = {key: value for key, value in body.items() if key not in ("apiVersion", "kind", "metadata", "status")}
    meta = {key: value for key, value in body.get("metadata", {}).items() if key in _META_KEPT and value}
    return {**kept, "metadata": meta} if meta else kept


def digest(part: Mapping[str, Any]) -> str:
    """A digest of JSON content that does not depend on the order of keys."""
    return hashlib.sha256(orjson.dumps(part, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def _pick(value: Any, fields: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return _pick_items(value, fields) if any(key != "." for key in fields) else value
    if not isinstance(value, dict):
        return value
    picked, whole = {}, True
    for key, sub in fields.items():
        if key == ".":
            continue
        whole = False
        name = key[2:]
        if key.startswith("f:") and name in value:
            picked[name] = _pick(value[name], sub) if sub else value[name]
    return value if whole else picked


def _pick_items(items: list[Any], fields: Mapping[str, Any]) -> list[Any]:
    """Items of a list by key (k:), by value (v:) or by index (i:), in the order of the live list."""
    picked = []
    for index, item in enumerate(items):
        for key, sub in fields.items():
            mark, text = key[:2], key[2:]
            if mark == "k:" and isinstance(item, dict):
                wanted = _read(text)
                if all(item.get(name) == want for name, want in wanted.items()):
                    picked.append({**wanted, **_pick(item, sub)})
                    break
            elif (mark == "v:" and _read(text) == item) or (mark == "i:" and int(text) == index):
                picked.append(_pick(item, sub))
                break
    return picked


@lru_cache(maxsize=4096)
def _read(text: str) -> Any:
    """The key of a list item. There are few of them: names of containers, ports and variables."""
    return json.loads(text)
