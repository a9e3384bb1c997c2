"""Writes of the in-memory API server: apply, create, replace, patch, each with field ownership."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from moe_kube.errors import Conflict, Invalid, NotFound
from moe_kube.fake_fields import Fields, conflicts, diff, field_set, merge, paths, prune, subtract, union
from moe_kube.fake_kinds import Traits, check_metadata, invalid
from moe_kube.fake_patch import patched
from moe_kube.fake_store import Store, Stored, content_of, resource, timestamp
from moe_kube.objects import Obj, Ref


def apply(
    store: Store, ref: Ref, body: Mapping[str, Any], *, manager: str, force: bool, subresource: str, user: str
) -> Stored:
    """Server-side apply."""
    traits = store.traits(ref.kind)
    if not manager:
        raise Invalid("PatchOptions.meta.k8s.io is invalid: fieldManager: Required value", status=422)
    raw = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    live = store.find(ref)
    if live is not None and store.applied.get((ref, manager, subresource)) == (live.version, raw):
        return live
    wanted: Obj = orjson.loads(raw)
    _check_identity(ref, wanted)
    if wanted.get("metadata", {}).get("managedFields"):
        raise Invalid("metadata.managedFields must be nil", status=400, reason="BadRequest")
    _check_preconditions(ref, wanted, live)
    if live is None and subresource:
        raise NotFound(f'{resource(ref.kind)} "{ref.name}" not found')
    wanted = _scope(wanted, traits, subresource)
    try:
        mine = field_set(wanted, traits.shape) if wanted else None
    except Invalid as error:
        raise Invalid(f"failed to create typed patch object ({ref}): {error}", status=422) from None
    entries: list[Obj] = list(live.meta.get("managedFields", ())) if live else []
    if live is not None and not entries:
        entries = _before_first_apply(store, live, traits)
    key = _key(manager, "Apply", ref, subresource)
    last = next((entry for entry in entries if _key_of(entry) == key), None)
    others = [entry for entry in entries if entry is not last]
    old = live.content if live else {}
    new = merge(old, wanted, traits.shape)
    if last is not None and last["fieldsV1"] != mine:
        keepers = [mine or {}, *(entry["fieldsV1"] for entry in others)]
        new = prune(new, last["fieldsV1"], keepers, traits.shape) or {}
        others = _without_removed(others, old, new, traits)
    if live is not None and new is not old and mine:
        others = _settle_conflicts(others, old, new, mine, traits, force=force)
    fresh = _entry(store, key, mine, last)
    managers = [*others, fresh] if fresh else others
    if "metadata" in new and not all((new["metadata"] or {"": None}).values()):
        new = {**new, "metadata": {name: value for name, value in (new["metadata"] or {}).items() if value}}
    stored = _commit(store, ref, traits, new, managers, live, user=user, subresource=subresource)
    store.applied[ref, manager, subresource] = (stored.version, raw)
    return stored


def create(store: Store, ref: Ref, body: Mapping[str, Any], *, user: str) -> Stored:
    """POST."""
    traits = store.traits(ref.kind)
    copied: Obj = orjson.loads(orjson.dumps(body))
    _check_identity(ref, copied)
    if copied.get("metadata", {}).get("resourceVersion"):
        raise Invalid("resourceVersion should not be set on objects to be created", status=400, reason="BadRequest")
    content = traits.prepare(ref, _scope(copied, traits, ""), None)
    check_metadata(ref, content.get("metadata", {}))
    if store.find(ref) is not None:
        raise Conflict(f'{resource(ref.kind)} "{ref.name}" already exists', status=409, reason="AlreadyExists")
    return _update(store, ref, traits, content, None, user=user, subresource="")


def replace(store: Store, ref: Ref, body: Mapping[str, Any], *, user: str, subresource: str = "") -> Stored:
    """PUT, of the object or of its status."""
    traits = store.traits(ref.kind)
    copied: Obj = orjson.loads(orjson.dumps(body))
    return _replace(store, ref, traits, copied, store.get(ref), user=user, subresource=subresource)


def json_patch(store: Store, ref: Ref, operations: Sequence[Mapping[str, Any]], *, user: str) -> Stored:
    """PATCH with RFC 6902 operations, all or none."""
    traits = store.traits(ref.kind)
    live = store.get(ref)
    return _replace(store, ref, traits, patched(live.copy(), operations), live, user=user, subresource="")


def _replace(store: Store, ref: Ref, traits: Traits, body: Obj, live: Stored, *, user: str, subresource: str) -> Stored:
    _check_identity(ref, body)
    _check_preconditions(ref, body, live)
    if not body.get("metadata", {}).get("resourceVersion") and not traits.unconditional_update:
        raise invalid(ref, "metadata.resourceVersion: Invalid value: 0: must be specified for an update")
    scoped = _scope(body, traits, subresource)
    if subresource:
        kept = {name: value for name, value in live.content.items() if name != "status"}
    else:
        kept = {name: value for name, value in live.content.items() if name == "status" and traits.status}
    return _update(store, ref, traits, {**kept, **scoped}, live, user=user, subresource=subresource)


def _update(
    store: Store, ref: Ref, traits: Traits, new: Obj, live: Stored | None, *, user: str, subresource: str
) -> Stored:
    """Commit content that was written as a whole: the writer owns what changed, others lose it."""
    old = live.content if live else {}
    new = traits.prepare(ref, merge_same(old, new), live.content if live else None)
    entries: list[Obj] = list(live.meta.get("managedFields", ())) if live else []
    if live is not None and not entries:  # Nobody owns anything: that begins with an apply.
        return _commit(store, ref, traits, new, [], live, user=user, subresource=subresource, prepared=True)
    changed, removed = diff(old, new, traits.shape)
    changed, removed = _own(changed), _own(removed)
    key = _key(user, "Update", ref, subresource)
    managers = []
    last = None
    for entry in entries:
        fields: Fields | None = entry["fieldsV1"]
        if _key_of(entry) == key:
            last = entry
            continue
        left = subtract(subtract(fields, changed), removed)
        if left is not None:
            managers.append(entry if left is fields else {**entry, "fieldsV1": left})
    mine = union(subtract(last["fieldsV1"] if last else None, removed), changed)
    if fresh := _entry(store, key, mine, last):
        managers.append(fresh)
    return _commit(store, ref, traits, new, managers, live, user=user, subresource=subresource, prepared=True)


def _before_first_apply(store: Store, live: Stored, traits: Traits) -> list[Obj]:
    """An object without owners gets one of all its fields, so that an apply finds somebody to take them from."""
    fields = _own(diff({}, live.content, traits.shape)[0])
    entry = _entry(store, _key("before-first-apply", "Update", live.ref, ""), fields, None)
    return [entry] if entry else []


def merge_same(old: Any, new: Any) -> Any:
    """`new` with the parts that equal those of `old` taken from it, so that what did not change is the same object."""
    if old is new or (type(old) is type(new) and old == new):
        return old
    if isinstance(old, dict) and isinstance(new, dict):
        return {name: merge_same(old[name], value) if name in old else value for name, value in new.items()}
    return new


def _own(fields: Fields | None) -> Fields | None:
    """Without the membership of the object and of its metadata, which nobody owns."""
    if fields is None:
        return None
    out = {name: sub for name, sub in fields.items() if name != "."}
    if meta := out.get("f:metadata"):
        out["f:metadata"] = {name: sub for name, sub in meta.items() if name != "."}
    return out or None


def _commit(
    store: Store,
    ref: Ref,
    traits: Traits,
    new: Obj,
    managers: list[Obj],
    live: Stored | None,
    *,
    user: str,
    subresource: str,
    prepared: bool = False,
) -> Stored:
    """Defaults, rules, and the write itself, unless nothing changed."""
    old = live.content if live else {}
    if not prepared and (live is None or new is not old):
        new = traits.prepare(ref, new, old if live else None)
    meta = new.get("metadata", {})
    if live is None:
        check_metadata(ref, meta)
    else:
        if meta is not old.get("metadata"):
            check_metadata(ref, meta)
            _check_finalizers(ref, meta, live)
        if _same_managers(managers, live.meta.get("managedFields", [])) and (new is old or _same(new, old)):
            return live
    managers.sort(key=lambda entry: (entry["operation"], entry["manager"], entry.get("subresource", "")))
    return store.put(ref, new, managers, live, user=user, subresource=subresource)


def _same(new: Obj, old: Obj) -> bool:
    """Empty metadata is no metadata."""
    meta = {name: value for name, value in new.get("metadata", {}).items() if value}
    before = old.get("metadata", {})
    return meta == before and {**new, "metadata": None} == {**old, "metadata": None}


def _settle_conflicts(others: list[Obj], old: Obj, new: Obj, mine: Fields, traits: Traits, *, force: bool) -> list[Obj]:
    """The entries of the other managers after this apply. Raises Conflict without force."""
    found = [(entry, conflicts(old, new, mine, entry["fieldsV1"], traits.shape)) for entry in others]
    if not force and any(lost is not None for _, lost in found):
        raise _conflict([(entry, lost) for entry, lost in found if lost is not None])
    out = []
    for entry, lost in found:
        left = subtract(entry["fieldsV1"], lost)
        if left is not None:
            out.append(entry if lost is None else {**entry, "fieldsV1": left})
    return out


def _without_removed(others: list[Obj], old: Obj, new: Obj, traits: Traits) -> list[Obj]:
    """The entries of the other managers without what is gone from the object."""
    _, removed = diff(old, new, traits.shape)
    left = [(entry, subtract(entry["fieldsV1"], removed)) for entry in others]
    return [
        entry if fields == entry["fieldsV1"] else {**entry, "fieldsV1": fields}
        for entry, fields in left
        if fields is not None
    ]


def _conflict(found: Sequence[tuple[Obj, Fields]]) -> Conflict:
    """409, worded as the API server words it."""
    lost = [(_describe(entry), sorted(paths(fields))) for entry, fields in found]
    total = sum(len(names) for _, names in lost)
    if total == 1:
        ((who, (name,)),) = lost
        message = f"Apply failed with 1 conflict: conflict with {who}: {name}"
    else:
        told = (f"conflicts with {who}:\n" + "\n".join(f"- {name}" for name in names) for who, names in sorted(lost))
        message = f"Apply failed with {total} conflicts: " + "\n".join(told)
    return Conflict(message, status=409, reason="Conflict")


def _describe(entry: Obj) -> str:
    name = json_text(entry["manager"])
    where = f" with subresource {json_text(entry['subresource'])}" if entry.get("subresource") else ""
    how = f" using {entry['apiVersion']}" if entry["operation"] == "Update" else ""
    return f"{name}{where}{how}"


def json_text(value: str) -> str:
    return orjson.dumps(value).decode()


def _scope(body: Obj, traits: Traits, subresource: str) -> Obj:
    """What of a body this path of the API writes."""
    if subresource:
        return {"status": body["status"]} if "status" in body else {}
    content = content_of({**body, "metadata": body.get("metadata") or {}})
    if traits.status:
        content.pop("status", None)
    return content


def _check_identity(ref: Ref, body: Mapping[str, Any]) -> None:
    """A body without a name or kind takes those of the reference. Raises Invalid where it has others."""
    meta = body.get("metadata") or {}
    for field, given, wanted in (
        ("apiVersion", body.get("apiVersion"), ref.kind.api_version),
        ("kind", body.get("kind"), ref.kind.kind),
        ("metadata.name", meta.get("name"), ref.name),
        ("metadata.namespace", meta.get("namespace"), ref.namespace),
    ):
        if given and given != wanted:
            message = f"{field} in the body ({given}) does not match the URL ({wanted})"
            raise Invalid(message, status=400, reason="BadRequest")


def _check_preconditions(ref: Ref, body: Mapping[str, Any], live: Stored | None) -> None:
    """Raises Conflict where `metadata.uid` or `metadata.resourceVersion` of the body are not the live object's."""
    meta = body.get("metadata") or {}
    begin = f'Operation cannot be fulfilled on {resource(ref.kind)} "{ref.name}"'
    if uid := meta.get("uid"):
        if live is None:
            message = (
                f"{begin}: uid mismatch: the provided object specified uid {uid}, and no existing object was found"
            )
            raise Conflict(message, status=409, reason="Conflict")
        if live.uid != uid:
            raise uid_conflict(ref, uid, live.uid)
    version = meta.get("resourceVersion")
    if version and (live is None or str(live.version) != str(version)):
        if live is None:
            raise NotFound(f'{resource(ref.kind)} "{ref.name}" not found')
        message = (
            f"{begin}: the object has been modified; please apply your changes to the latest version and try again"
        )
        raise Conflict(message, status=409, reason="Conflict")


def uid_conflict(ref: Ref, wanted: str, found: str) -> Conflict:
    """409: another object has the name by now."""
    message = (
        f'Operation cannot be fulfilled on {resource(ref.kind)} "{ref.name}": Precondition failed: '
        f"UID in precondition: {wanted}, UID in object meta: {found}"
    )
    return Conflict(message, status=409, reason="Conflict")


def _check_finalizers(ref: Ref, meta: Mapping[str, Any], live: Stored) -> None:
    added = set(meta.get("finalizers", ())) - set(live.meta.get("finalizers", ()))
    if added and "deletionTimestamp" in live.meta:
        raise invalid(
            ref,
            "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted, "
            f"found new finalizers {sorted(added)}",
        )


_Key = tuple[str, str, str, str]


def _key(manager: str, operation: str, ref: Ref, subresource: str) -> _Key:
    return manager, operation, ref.kind.api_version, subresource


def _key_of(entry: Mapping[str, Any]) -> _Key:
    return entry["manager"], entry["operation"], entry["apiVersion"], entry.get("subresource", "")


def _entry(store: Store, key: _Key, fields: Fields | None, last: Obj | None) -> Obj | None:
    """The managedFields entry; the last one where it holds the same fields, so that its time stays."""
    if fields is None:
        return None
    if last is not None and last["fieldsV1"] == fields:
        return last
    manager, operation, api_version, subresource = key
    entry = {
        "manager": manager,
        "operation": operation,
        "apiVersion": api_version,
        "time": timestamp(store.clock.time()),
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
    }
    return {**entry, "subresource": subresource} if subresource else entry


def _same_managers(one: Sequence[Obj], other: Sequence[Obj]) -> bool:
    if len(one) != len(other):
        return False
    known = {_key_of(entry): entry["fieldsV1"] for entry in other}
    return all(known.get(_key_of(entry)) == entry["fieldsV1"] for entry in one)
