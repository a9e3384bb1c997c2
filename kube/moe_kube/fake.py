"""An API server in memory, so that a controller meets a real one's rules in microseconds.

`FakeCluster` is the server, `FakeApi` one client of it. The suite in tests/kube/conformance.py holds both this and the
real API server to the same answers.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson

from moe_core.clock import Clock, FakeClock
from moe_kube import fake_gc, fake_write
from moe_kube.api import Page, WatchEvent
from moe_kube.errors import Invalid
from moe_kube.fake_gc import Propagation
from moe_kube.fake_kinds import ALL
from moe_kube.fake_select import Matcher, selector
from moe_kube.fake_store import Event, Store, Stored, Write, expired
from moe_kube.objects import Kind, Obj, Ref

BOOKMARK_EVERY_S = 60.0
LAST_BOOKMARK_S = 2.0
"""How long before its end a watch sends its last bookmark."""


class FakeCluster:
    """The server. Its own methods are plain calls, for tests and for simulated controllers; they copy what they return.

    `collect_at_once` runs the garbage collector after each deletion, otherwise `collect_garbage` does it.
    """

    def __init__(
        self, *, clock: Clock | None = None, kinds: Iterable[Kind] = ALL, collect_at_once: bool = False
    ) -> None:
        self.clock: Clock = clock or FakeClock()
        self.store = Store(self.clock, kinds)
        self.collect_at_once = collect_at_once
        self._first_write = len(self.store.writes)

    def client(self, user: str = "tester", *, lag_writes: int = 0) -> FakeApi:
        """A client: `user` owns what it creates, replaces or patches."""
        return FakeApi(self, user=user, lag_writes=lag_writes)

    # What is installed

    def install(self, kind: Kind) -> None:
        self.store.install(kind)

    def remove(self, kind: Kind) -> None:
        """Remove a kind, with its objects; calls on it then answer 404 and its watches end."""
        self.store.uninstall(kind)

    # Objects

    def get(self, ref: Ref) -> Obj:
        return self.store.get(ref).copy()

    def find(self, ref: Ref) -> Obj | None:
        """A copy, or None."""
        stored = self.store.find(ref)
        return stored.copy() if stored else None

    def peek(self, kind: Kind, namespace: str | None = None) -> list[Obj]:
        """Every object of a kind, shared: read only."""
        return [item.obj for item in self.store.all(kind) if namespace in (None, item.ref.namespace)]

    def refs(self, kind: Kind) -> list[Ref]:
        return [item.ref for item in self.store.all(kind)]

    def apply(
        self,
        ref: Ref,
        body: Mapping[str, Any],
        *,
        manager: str,
        force: bool = True,
        subresource: str = "",
        user: str = "",
    ) -> Obj:
        stored = fake_write.apply(
            self.store, ref, body, manager=manager, force=force, subresource=subresource, user=user or manager
        )
        return self._done(stored)

    def create(self, ref: Ref, body: Mapping[str, Any], *, user: str = "tester") -> Obj:
        return self._done(fake_write.create(self.store, ref, body, user=user))

    def replace(self, ref: Ref, body: Mapping[str, Any], *, user: str = "tester", subresource: str = "") -> Obj:
        return self._done(fake_write.replace(self.store, ref, body, user=user, subresource=subresource))

    def json_patch(self, ref: Ref, operations: Sequence[Mapping[str, Any]], *, user: str = "tester") -> Obj:
        return self._done(fake_write.json_patch(self.store, ref, operations, user=user))

    def edit(self, ref: Ref, change: Callable[[Obj], None], *, user: str = "tester", subresource: str = "") -> Obj:
        """Read, change in place and replace, as `kubectl edit` does."""
        body = self.get(ref)
        change(body)
        return self.replace(ref, body, user=user, subresource=subresource)

    def set_status(self, ref: Ref, status: Mapping[str, Any], *, user: str) -> Obj:
        """Replace the status, as a controller of that kind does."""
        live = self.store.get(ref)
        if live.obj.get("status") == status:
            return live.copy()
        body = {"metadata": {"resourceVersion": live.meta["resourceVersion"]}, "status": status}
        return self.replace(ref, body, user=user, subresource="status")

    def delete(self, ref: Ref, *, uid: str = "", propagation: Propagation = "Background", user: str = "tester") -> None:
        fake_gc.delete(self.store, ref, uid=uid, propagation=propagation, user=user)
        if self.collect_at_once:
            self.collect_garbage()

    def collect_garbage(self) -> int:
        """What the controller manager's garbage collector does, until it rests. Returns the number of writes."""
        return fake_gc.collect(self.store)

    def _done(self, stored: Stored) -> Obj:
        if self.collect_at_once and "deletionTimestamp" in stored.meta:
            self.collect_garbage()
        return stored.copy()

    # The past, and what was done

    @property
    def version(self) -> int:
        return self.store.version

    def compact(self, version: int | None = None) -> None:
        """Forget the past: lists and watches from an older version answer 410."""
        self.store.compact(version)

    @property
    def writes(self) -> list[Write]:
        """Every committed write since the start, by anyone."""
        return self.store.writes[self._first_write :]

    def counts(self, *users: str) -> Counter[tuple[str, str]]:
        """Committed writes as {(ADDED | MODIFIED | DELETED, kind): n}, of some users or of all."""
        return Counter((write.type, write.ref.kind.kind) for write in self.writes if not users or write.user in users)


class FakeApi:
    """One client; an `Api`. No call waits for anything, but an idle watch.

    `lag_writes` is how many writes its lists from a cache (version "0") and its watches are behind.
    """

    def __init__(self, cluster: FakeCluster, *, user: str = "tester", lag_writes: int = 0) -> None:
        self.cluster = cluster
        self.user = user
        self._store = cluster.store
        self._lag = lag_writes

    @property
    def lag_writes(self) -> int:
        return self._lag

    @lag_writes.setter
    def lag_writes(self, writes: int) -> None:
        self._lag = writes
        self._store.wake()

    def _visible(self) -> int:
        return max(self._store.compacted, self._store.version - self._lag)

    async def get(self, ref: Ref, *, timeout_s: float | None = None) -> Obj:
        return self.cluster.get(ref)

    async def list(
        self,
        kind: Kind,
        *,
        namespace: str | None = None,
        labels: str = "",
        limit: int = 500,
        continue_token: str = "",
        resource_version: str = "",
        timeout_s: float | None = None,
    ) -> Page:
        self._store.traits(kind)
        after = ("", "")
        if continue_token:
            version, after = _read_token(continue_token)
            if version < self._store.compacted:
                raise expired()
        elif resource_version == "0":
            version = self._visible()
        else:
            version = max(self._store.version, int(resource_version or 0))
        match = selector(labels)
        found = [
            item
            for item in self._store.all_at(kind, version)
            if (item.ref.namespace, item.ref.name) > after
            and namespace in (None, item.ref.namespace)
            and match(item.labels)
        ]
        page = found[:limit] if limit else found
        token = ""
        if len(page) < len(found):
            last = page[-1].ref
            token = base64.urlsafe_b64encode(orjson.dumps([version, last.namespace, last.name])).decode()
        return Page(tuple(item.copy() for item in page), str(version), token)

    async def watch(
        self,
        kind: Kind,
        *,
        resource_version: str,
        namespace: str | None = None,
        labels: str = "",
        timeout_s: float = 300.0,
    ) -> AsyncGenerator[WatchEvent, None]:
        store, clock = self._store, self.cluster.clock
        store.traits(kind)
        match = selector(labels)
        generation = store.generation_of(kind)
        seen = int(resource_version or 0)
        if seen == 0:
            seen = self._visible()
            for item in store.all_at(kind, seen):
                if namespace in (None, item.ref.namespace) and match(item.labels):
                    yield WatchEvent("ADDED", item.copy())
        if seen < store.compacted:
            raise expired()
        start, idle = seen, False
        alarm = _Alarm(clock)
        end_s = clock.monotonic() + timeout_s
        bookmark_s = _next_bookmark(clock.monotonic(), end_s)
        try:
            while True:
                visible = self._visible()
                event = store.next_event(kind, seen, visible)
                if event is not None:
                    seen = event.version
                    start = start if idle else seen
                    told = _told(event, namespace, match)
                    if told is not None:
                        yield told
                    continue
                idle, seen = True, max(seen, visible)
                now_s = clock.monotonic()
                if store.generation_of(kind) != generation or now_s >= end_s:
                    return
                if now_s >= bookmark_s:
                    bookmark_s = _next_bookmark(now_s, end_s)
                    if seen > start:  # A version that the caller has told us itself is no news.
                        yield _bookmark(kind, seen)
                    continue
                waiter = store.waiter(kind, every_write=self._lag > 0)
                alarm.set(min(bookmark_s, end_s), waiter)
                await waiter
        finally:
            alarm.stop()

    async def apply(
        self,
        ref: Ref,
        body: Mapping[str, Any],
        *,
        manager: str,
        force: bool = True,
        subresource: str = "",
        timeout_s: float | None = None,
    ) -> Obj:
        return self.cluster.apply(ref, body, manager=manager, force=force, subresource=subresource, user=self.user)

    async def create(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        return self.cluster.create(ref, body, user=self.user)

    async def replace(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        return self.cluster.replace(ref, body, user=self.user)

    async def json_patch(
        self, ref: Ref, operations: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> Obj:
        return self.cluster.json_patch(ref, operations, user=self.user)

    async def delete(
        self, ref: Ref, *, uid: str = "", propagation: Propagation = "Background", timeout_s: float | None = None
    ) -> None:
        self.cluster.delete(ref, uid=uid, propagation=propagation, user=self.user)


class _Alarm:
    """Wakes a waiting watch at a time; one sleeper for as long as the time stays the same."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._at_s = -1.0
        self._task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def set(self, at_s: float, waiter: asyncio.Future[None]) -> None:
        self._waiter = waiter
        if self._task is not None and not self._task.done() and at_s == self._at_s:
            return
        self.stop()
        self._at_s = at_s
        self._task = asyncio.create_task(self._ring(at_s))

    async def _ring(self, at_s: float) -> None:
        await self._clock.sleep(at_s - self._clock.monotonic())
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()


def _next_bookmark(now_s: float, end_s: float) -> float:
    last_s = end_s - LAST_BOOKMARK_S
    return min(now_s + BOOKMARK_EVERY_S, last_s if last_s > now_s else end_s)


def _bookmark(kind: Kind, version: int) -> WatchEvent:
    meta = {"resourceVersion": str(version)}
    return WatchEvent("BOOKMARK", {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": meta})


def _told(event: Event, namespace: str | None, match: Matcher) -> WatchEvent | None:
    """The event as a watch with a selector sees it: an object that leaves the selection is DELETED."""
    if namespace not in (None, event.new.ref.namespace):
        return None
    before = event.old is not None and match(event.old.labels)
    after = event.type != "DELETED" and match(event.new.labels)
    if after:
        return WatchEvent("MODIFIED" if before else "ADDED", event.new.copy())
    if not before:
        return None
    if event.type == "DELETED" or event.old is None:
        return WatchEvent("DELETED", event.new.copy())
    gone = event.old.copy()
    gone["metadata"]["resourceVersion"] = str(event.version)
    return WatchEvent("DELETED", gone)


def _read_token(token: str) -> tuple[int, tuple[str, str]]:
    try:
        version, namespace, name = orjson.loads(base64.urlsafe_b64decode(token))
    except (ValueError, binascii.Error):
        raise Invalid("continue key is not valid", status=400, reason="BadRequest") from None
    return version, (namespace, name)
