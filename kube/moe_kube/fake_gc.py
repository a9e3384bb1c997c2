"""Deletion on the in-memory API server, and the garbage collector of the controller manager."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from moe_kube.fake_store import Store, Stored
from moe_kube.fake_write import uid_conflict
from moe_kube.objects import Ref

Propagation = Literal["Background", "Foreground", "Orphan"]
FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"
COLLECTOR = "generic-garbage-collector"


def delete(store: Store, ref: Ref, *, uid: str = "", propagation: Propagation = "Background", user: str) -> None:
    """DELETE. An object with finalizers stays, marked, until they are gone. Raises NotFound or Conflict."""
    live = store.get(ref)
    if uid and uid != live.uid:
        raise uid_conflict(ref, uid, live.uid)
    had = list(live.meta.get("finalizers", ()))
    finalizers = [name for name in had if name not in (FOREGROUND, ORPHAN)]
    if propagation == "Foreground":
        finalizers.append(FOREGROUND)
    elif propagation == "Orphan":
        finalizers.append(ORPHAN)
    if not finalizers:
        store.drop(live, user)
    elif "deletionTimestamp" not in live.meta or finalizers != had:
        store.mark_deleted(live, finalizers, user)


def collect(store: Store) -> int:
    """Collect until nothing is left to do. Returns how many writes that took."""
    before = store.version
    while _collect_once(store):
        pass
    return store.version - before


def _collect_once(store: Store) -> bool:
    version = store.version
    for owner_uid in list(store.dependents):
        owner = store.find(store.uids[owner_uid]) if owner_uid in store.uids else None
        refs = store.dependents.get(owner_uid, set())
        if owner is not None and owner_uid not in store.deleting and _all_near(owner, refs):
            continue
        for ref in sorted(refs):
            dependent = store.find(ref)
            if dependent is None:
                continue
            if owner is not None and _waits(owner, ORPHAN):
                _disown(store, dependent, {owner_uid})
            else:
                _collect_dependent(store, dependent)
    for uid in sorted(store.deleting):
        owner = store.find(store.uids[uid]) if uid in store.uids else None
        if owner is not None:
            _finish(store, owner)
    return store.version != version


def _all_near(owner: Stored, refs: Iterable[Ref]) -> bool:
    """An owner counts in its own namespace alone, unless it has none."""
    return not owner.ref.namespace or all(ref.namespace == owner.ref.namespace for ref in refs)


def _waits(owner: Stored, finalizer: str) -> bool:
    return "deletionTimestamp" in owner.meta and finalizer in owner.meta.get("finalizers", ())


def _collect_dependent(store: Store, dependent: Stored) -> None:
    solid: set[str] = set()
    gone: set[str] = set()
    foreground = False
    for reference in dependent.meta.get("ownerReferences", ()):
        owner = _owner(store, dependent, reference)
        if owner is None:
            gone.add(reference["uid"])
        elif _waits(owner, FOREGROUND):
            gone.add(reference["uid"])
            foreground = True
        else:
            solid.add(reference["uid"])
    if solid:
        if gone:
            _disown(store, dependent, gone)
        return
    if "deletionTimestamp" in dependent.meta:
        return
    has_own = dependent.uid in store.dependents
    policy: Propagation = "Foreground" if foreground and has_own else "Background"
    delete(store, dependent.ref, uid=dependent.uid, propagation=policy, user=COLLECTOR)


def _owner(store: Store, dependent: Stored, reference: dict[str, Any]) -> Stored | None:
    """The owner, where it is still there: in the same namespace, or of a kind without namespaces."""
    ref = store.uids.get(reference["uid"])
    if ref is None or ref.namespace not in ("", dependent.ref.namespace):
        return None
    return store.find(ref)


def _disown(store: Store, dependent: Stored, uids: set[str]) -> None:
    left = [owner for owner in dependent.meta.get("ownerReferences", ()) if owner["uid"] not in uids]
    _set_metadata(store, dependent, "ownerReferences", left)


def _finish(store: Store, owner: Stored) -> None:
    """Take off the collector's finalizers when their work is done."""
    blocking = [ref for ref in store.dependents.get(owner.uid, ()) if _blocks(store, ref, owner.uid)]
    done = [
        name
        for name, busy in ((FOREGROUND, bool(blocking)), (ORPHAN, bool(store.dependents.get(owner.uid))))
        if _waits(owner, name) and not busy
    ]
    if done:
        left = [name for name in owner.meta["finalizers"] if name not in done]
        _set_metadata(store, owner, "finalizers", left)


def _blocks(store: Store, ref: Ref, uid: str) -> bool:
    dependent = store.find(ref)
    return dependent is not None and any(
        owner["uid"] == uid and owner.get("blockOwnerDeletion") for owner in dependent.meta.get("ownerReferences", ())
    )


def _set_metadata(store: Store, stored: Stored, name: str, value: list[Any]) -> None:
    content = {**stored.content, "metadata": {**stored.content.get("metadata", {}), name: value}}
    store.put(stored.ref, content, list(stored.meta.get("managedFields", ())), stored, user=COLLECTOR)
