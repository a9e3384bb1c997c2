"""State of the in-memory API server: objects, one version counter, the log that lists and watches of the past read."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal

import orjson

from moe_core.clock import Clock
from moe_kube.errors import Gone, NotFound, ServerError
from moe_kube.fake_kinds import ALL, CUSTOM, Traits, traits_of
from moe_kube.objects import CUSTOM_RESOURCE_DEFINITION, Kind, Obj, Ref

META_KEPT = ("labels", "annotations", "ownerReferences", "finalizers")
"""Metadata that callers own; the server sets the rest."""
EventType = Literal["ADDED", "MODIFIED", "DELETED"]


class Stored:
    """One version of an object. `obj` is shared and never changed; `copy()` is the caller's own."""

    __slots__ = ("_content", "_raw", "obj", "ref", "uid", "version")

    def __init__(self, ref: Ref, obj: Obj) -> None:
        self.ref = ref
        self.obj = obj
        meta = obj["metadata"]
        self.uid: str = meta["uid"]
        self.version = int(meta["resourceVersion"])
        self._raw: bytes | None = None
        self._content: Obj | None = None

    def copy(self) -> Obj:
        if self._raw is None:
            self._raw = orjson.dumps(self.obj)
        copied: Obj = orjson.loads(self._raw)
        return copied

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.obj["metadata"].get("labels") or {}
        return labels

    @property
    def meta(self) -> Obj:
        meta: Obj = self.obj["metadata"]
        return meta

    @property
    def content(self) -> Obj:
        """What writers own: all but the identity and what the server sets."""
        if self._content is None:
            self._content = content_of(self.obj)
        return self._content


def content_of(obj: Obj) -> Obj:
    """The part of an object that field managers own."""
    out = {name: value for name, value in obj.items() if name not in ("apiVersion", "kind", "metadata")}
    meta = {name: obj["metadata"][name] for name in META_KEPT if obj.get("metadata", {}).get(name)}
    return {**out, "metadata": meta} if meta else out


@dataclass(frozen=True, slots=True)
class Event:
    """One committed write of one object."""

    version: int
    type: EventType
    new: Stored
    old: Stored | None


@dataclass(frozen=True, slots=True)
class Write:
    """One committed write, for tests that count. `user` is who made it."""

    version: int
    type: EventType
    ref: Ref
    user: str
    subresource: str


class Store:
    """What the server holds. Every write goes through `put` or `drop`."""

    def __init__(self, clock: Clock, kinds: Iterable[Kind] = ALL, *, first_version: int = 100) -> None:
        self.clock = clock
        self.version = first_version
        self.compacted = first_version
        self.writes: list[Write] = []
        self.uids: dict[str, Ref] = {}
        self.dependents: dict[str, set[Ref]] = {}
        self.deleting: set[str] = set()
        """Uids of objects that are marked for deletion."""
        self.applied: dict[tuple[Ref, str, str], tuple[int, bytes]] = {}
        """The version and body of the last apply of each manager: the same again is no write."""
        self._objects: dict[Kind, dict[tuple[str, str], Stored]] = {}
        self._log: dict[Kind, list[Event]] = {}
        self._dropped: dict[Kind, int] = {}
        self._generations: dict[Kind, int] = {}
        self._waiters: dict[Kind, list[asyncio.Future[None]]] = {}
        self._made = 0
        for kind in (CUSTOM_RESOURCE_DEFINITION, *kinds):
            self.install(kind)

    # Kinds

    def install(self, kind: Kind) -> None:
        """Serve a kind; a custom one gets its CustomResourceDefinition."""
        if kind in self._objects:
            return
        self._objects[kind] = {}
        self._log[kind] = []
        self._generations[kind] = self._generations.get(kind, 0) + 1
        if kind in CUSTOM or kind.group.count(".") > 1:
            ref = Ref(CUSTOM_RESOURCE_DEFINITION, "", f"{kind.plural}.{kind.group}")
            self.put(ref, _definition(kind), [], None, user="installer")

    def uninstall(self, kind: Kind) -> None:
        """Stop serving a kind: its objects go, finalizers or not, and its watches end."""
        for stored in list(self._objects[kind].values()):
            self.drop(stored, user="uninstaller")
        definition = self.find(Ref(CUSTOM_RESOURCE_DEFINITION, "", f"{kind.plural}.{kind.group}"))
        if definition is not None:
            self.drop(definition, user="uninstaller")
        del self._objects[kind]
        self._generations[kind] += 1
        self.wake(kind)

    def generation_of(self, kind: Kind) -> int:
        """Changes when a kind goes or comes back: a watch of another generation has ended."""
        return self._generations.get(kind, 0)

    def traits(self, kind: Kind) -> Traits:
        """Raises NotFound where the kind is not installed."""
        if kind not in self._objects:
            raise NotFound("the server could not find the requested resource", kind_missing=True)
        return traits_of(kind)

    # Reading

    def find(self, ref: Ref) -> Stored | None:
        return self._objects.get(ref.kind, {}).get((ref.namespace, ref.name))

    def get(self, ref: Ref) -> Stored:
        """Raises NotFound."""
        self.traits(ref.kind)
        stored = self.find(ref)
        if stored is None:
            raise NotFound(f'{resource(ref.kind)} "{ref.name}" not found')
        return stored

    def all(self, kind: Kind) -> list[Stored]:
        """Every object of a kind, by namespace and name."""
        items = self._objects.get(kind, {})
        return [items[key] for key in sorted(items)]

    def everything(self) -> Iterator[Stored]:
        for items in self._objects.values():
            yield from list(items.values())

    def all_at(self, kind: Kind, version: int) -> list[Stored]:
        """Every object of a kind as it was at a version. Raises Gone, or ServerError for a version to come."""
        if version >= self.version:
            if version > self.version:
                raise ServerError(f"Too large resource version: {version}, current: {self.version}", status=504)
            return self.all(kind)
        if version < self.compacted:
            raise expired()
        items = dict(self._objects.get(kind, {}))
        for event in reversed(self._log[kind]):
            if event.version <= version:
                break
            key = (event.new.ref.namespace, event.new.ref.name)
            if event.old is None:
                items.pop(key, None)
            else:
                items[key] = event.old
        return [items[key] for key in sorted(items)]

    def next_event(self, kind: Kind, after: int, upto: int) -> Event | None:
        """The first event after a version. Raises Gone where events between were compacted away."""
        if after < self._dropped.get(kind, 0):
            raise expired()
        log = self._log.get(kind, [])
        at = bisect.bisect_right(log, after, key=_version_of)
        return log[at] if at < len(log) and log[at].version <= upto else None

    # Writing

    def put(
        self, ref: Ref, content: Obj, managers: list[Obj], old: Stored | None, *, user: str, subresource: str = ""
    ) -> Stored:
        """Commit new content. The caller has checked it; here it gets version, generation and identity."""
        self.version += 1
        meta: Obj = {"name": ref.name}
        if ref.namespace:
            meta["namespace"] = ref.namespace
        if old is None:
            self._made += 1
            meta["uid"] = f"{self._made:08x}-0000-4000-8000-{self.version:012x}"
            meta["creationTimestamp"] = timestamp(self.clock.time())
        else:
            for name in ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"):
                if name in old.meta:
                    meta[name] = old.meta[name]
        meta["resourceVersion"] = str(self.version)
        if traits_of(ref.kind).generation:
            before = old.meta.get("generation", 0) if old else 0
            meta["generation"] = before + 1 if old is None or _spec_differs(old.content, content) else before
        for name, value in content.get("metadata", {}).items():
            if value:
                meta[name] = value
        if managers:
            meta["managedFields"] = managers
        body = {name: value for name, value in content.items() if name != "metadata"}
        obj = {"apiVersion": ref.kind.api_version, "kind": ref.kind.kind, "metadata": meta, **body}
        stored = Stored(ref, obj)
        if old is not None and "deletionTimestamp" in meta and not meta.get("finalizers"):
            self._unlink(stored)
            self._record("DELETED", stored, old, user, subresource)
            return stored
        self._link(stored, old)
        self._record("ADDED" if old is None else "MODIFIED", stored, old, user, subresource)
        return stored

    def mark_deleted(self, old: Stored, finalizers: list[str], user: str) -> Stored:
        """Begin a deletion that waits for finalizers."""
        self.version += 1
        meta = {**old.meta, "resourceVersion": str(self.version)}
        meta.pop("finalizers", None)
        if finalizers:
            meta["finalizers"] = finalizers
        if "deletionTimestamp" not in meta:
            meta |= {"deletionTimestamp": timestamp(self.clock.time()), "deletionGracePeriodSeconds": 0}
            if "generation" in meta:
                meta["generation"] += 1
        stored = Stored(old.ref, {**old.obj, "metadata": meta})
        self._link(stored, old)
        self._record("MODIFIED", stored, old, user, "")
        return stored

    def drop(self, old: Stored, user: str) -> None:
        """Remove an object now."""
        self.version += 1
        last = Stored(old.ref, {**old.obj, "metadata": {**old.meta, "resourceVersion": str(self.version)}})
        self._unlink(last)
        self._record("DELETED", last, old, user, "")

    def _link(self, stored: Stored, old: Stored | None) -> None:
        ref = stored.ref
        self._objects[ref.kind][ref.namespace, ref.name] = stored
        self.uids[stored.uid] = ref
        if "deletionTimestamp" in stored.meta:
            self.deleting.add(stored.uid)
        owners = stored.meta.get("ownerReferences")
        if old is None or owners is not old.meta.get("ownerReferences"):
            self._forget_owners(old)
            for owner in owners or ():
                self.dependents.setdefault(owner["uid"], set()).add(ref)

    def _unlink(self, stored: Stored) -> None:
        ref = stored.ref
        current = self._objects[ref.kind].pop((ref.namespace, ref.name), None)
        self.uids.pop(stored.uid, None)
        self.deleting.discard(stored.uid)
        self._forget_owners(current)

    def _forget_owners(self, stored: Stored | None) -> None:
        for owner in stored.meta.get("ownerReferences", ()) if stored else ():
            refs = self.dependents.get(owner["uid"])
            if refs is not None and stored is not None:
                refs.discard(stored.ref)
                if not refs:
                    del self.dependents[owner["uid"]]

    def _record(self, kind: EventType, new: Stored, old: Stored | None, user: str, subresource: str) -> None:
        ref = new.ref
        self._log[ref.kind].append(Event(self.version, kind, new, old))
        self.writes.append(Write(self.version, kind, ref, user, subresource))
        self.wake(ref.kind)

    # The past

    def compact(self, version: int | None = None) -> None:
        """Forget the log up to a version (by default all of it)."""
        self.compacted = max(self.compacted, self.version if version is None else version)
        for kind, log in self._log.items():
            at = bisect.bisect_right(log, self.compacted, key=_version_of)
            if at:
                self._dropped[kind] = log[at - 1].version
                del log[:at]

    # Waiting

    def waiter(self, kind: Kind, *, every_write: bool) -> asyncio.Future[None]:
        """Done at the next write of the kind, or of any kind."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(_ANY if every_write else kind, []).append(future)
        return future

    def wake(self, kind: Kind | None = None) -> None:
        """Wake the watches of a kind, or all of them."""
        for each in list(self._waiters) if kind is None else (kind, _ANY):
            for future in self._waiters.pop(each, ()):
                if not future.done():
                    future.set_result(None)


_ANY = Kind("", "", "*", "*")


def _version_of(event: Event) -> int:
    return event.version


def expired() -> Gone:
    """410."""
    message = "The provided resource version is too old: list again without it"
    return Gone(message, status=410, reason="Expired")


def resource(kind: Kind) -> str:
    """`rayservices.ray.io`, as messages of the API server name a kind."""
    return f"{kind.plural}.{kind.group}" if kind.group else kind.plural


@lru_cache(maxsize=1024)
def _timestamp(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def timestamp(unix_s: float) -> str:
    """RFC 3339 in whole seconds, as metadata has it."""
    return _timestamp(int(unix_s))


def _spec_differs(old: Obj, new: Obj) -> bool:
    for name in {**old, **new}:
        if name in ("metadata", "status"):
            continue
        before, after = old.get(name), new.get(name)
        if before is not after and before != after:
            return True
    return False


def _definition(kind: Kind) -> Obj:
    return {
        "spec": {
            "group": kind.group,
            "names": {"kind": kind.kind, "listKind": f"{kind.kind}List", "plural": kind.plural},
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "versions": [{"name": kind.version, "served": True, "storage": True}],
        },
        "status": {"conditions": [{"type": "Established", "status": "True"}]},
    }
