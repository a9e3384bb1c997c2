"""A cache of one kind that follows the API server: list, watch, and whatever goes wrong between the two.

What may go wrong and what then happens: the watch ends or is silent → watch on from the last version; the version is
too old (410) → list again; a list is older than what was seen → refused, asked again; an event comes twice → ignored;
a delete was missed → the next list finds it; the kind is not served (no CRD) → the cache is empty and `absent`, until
it is. Nothing hammers the server: every way back waits, longer each time, with jitter.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import aclosing
from typing import Generic, TypeVar

from moe_core.clock import Clock
from moe_core.log import get_log
from moe_core.retry import Backoff
from moe_kube.api import Api, WatchEvent
from moe_kube.errors import ApiError, Gone, NotFound, Stale, Unreachable
from moe_kube.objects import Kind, Obj, Ref, ref_of

T = TypeVar("T")
Version = int | str
"""A resourceVersion: comparable where it is a number, as Kubernetes promises for its own kinds and for CRDs."""

WATCH_S = 300.0
"""A watch is asked for 1 to 2 times this, so that those of many kinds do not end together."""
LIVED_S = 5.0
"""A watch that ended sooner is counted as a failure: the next one waits."""
RESTORED_S = 300.0
"""Lists that stay older than what was seen for this long mean that the server's store was restored from a backup."""


class Reflector(Generic[T]):
    """Keeps a projection of every object of one kind. `run` it as a task; read it from the same event loop.

    `project` makes of an object what is kept of it; it must not fail. `on_change(ref, old, new)` is called in the order
    of versions after the store has changed; old is None for a new object, new is None for one that is gone. An object
    deleted and made anew between two lists is one change: whoever cares keeps its uid. `index` names the keys under
    which `by` finds an object. Reflectors that share `pages` hold so many pages of whole objects at once, all together.
    """

    def __init__(
        self,
        api: Api,
        kind: Kind,
        *,
        project: Callable[[Obj], T],
        clock: Clock,
        on_change: Callable[[Ref, T | None, T | None], None] | None = None,
        on_absent: Callable[[bool], None] | None = None,
        index: Callable[[T], Iterable[Hashable]] | None = None,
        namespace: str | None = None,
        labels: str = "",
        backoff: Backoff = Backoff(initial_s=0.5, max_s=30.0),  # noqa: B008 - frozen
        absent_s: float = 30.0,
        relist_every_s: float | None = None,
        page: int = 500,
        pages: asyncio.Semaphore | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.kind = kind
        self._api = api
        self._project = project
        self._clock = clock
        self._on_change = on_change
        self._on_absent = on_absent
        self._index = index
        self._namespace = namespace
        self._labels = labels
        self._backoff = backoff
        self._absent_s = absent_s
        self._relist_every_s = relist_every_s
        self._page = page
        self._pages = pages or asyncio.Semaphore()
        self._rng = rng or random.Random()
        self._store: dict[Ref, tuple[Version, T]] = {}
        self._keys: dict[Hashable, dict[Ref, None]] = {}
        self._version = ""
        self._seen: Version = 0
        self._stale_since: float | None = None
        self._relist_at = float("inf")
        self._heard = False
        self._synced = asyncio.Event()
        self._log = get_log("kube.reflector", kind=kind.kind)
        self.absent = False
        """Whether the server does not serve this kind."""
        self._trouble: ApiError | None = None
        self._watching_since = float("inf")
        self.lists_total = 0
        self.watches_total = 0

    @property
    def synced(self) -> bool:
        """Whether the store has been filled once, or the kind is known to be absent."""
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        await self._synced.wait()

    @property
    def trouble(self) -> ApiError | None:
        """Why the store may be behind; None while list and watch succeed. A watch says nothing until a change comes:
        one that has not failed for a while has succeeded."""
        watching = self._clock.monotonic() - self._watching_since >= LIVED_S
        return None if watching else self._trouble

    @property
    def resource_version(self) -> str:
        """The version that the store is at; empty before the first list and while the kind is absent."""
        return self._version

    def __len__(self) -> int:
        return len(self._store)

    def get(self, ref: Ref) -> T | None:
        entry = self._store.get(ref)
        return None if entry is None else entry[1]

    def items(self) -> Iterator[tuple[Ref, T]]:
        """Every object. Do not await while iterating: the store may change."""
        return ((ref, entry[1]) for ref, entry in self._store.items())

    def by(self, key: Hashable) -> list[tuple[Ref, T]]:
        """The objects that `index` puts under this key."""
        return [(ref, self._store[ref][1]) for ref in self._keys.get(key, ())]

    def learn(self, obj: Obj) -> None:
        """Take the answer to a write of our own, ahead of the watch, which then brings nothing new.

        An answer that is not newer than what the watch has brought is left alone: what was deleted stays deleted.
        """
        version = _version(obj)
        known = self.synced and not self.absent
        if known and isinstance(version, int) and isinstance(self._seen, int) and version > self._seen:
            self._read(obj, version)

    def forget(self, ref: Ref) -> None:
        """Take the server's word that it is gone, ahead of the watch, or in its place where the watch missed it."""
        if ref in self._store:
            self._drop(ref)

    async def run(self) -> None:
        """Follow the server until cancelled."""
        failures = 0
        while True:
            began = self._clock.monotonic()
            floor_s = 0.0
            good = False
            self._heard = False
            try:
                if not self._version or began >= self._relist_at:
                    await self._list()
                await self._watch()
                self._recover()
            except Gone as error:
                self._log.info("the version is too old: listing again", reason=str(error))
                self._version = ""
            except ApiError as error:
                if isinstance(error, NotFound) and error.kind_missing:
                    self._vanish()
                    failures = 0
                    await self._clock.sleep(self._absent_s * self._rng.uniform(0.5, 1.5))
                    continue
                lived = self._clock.monotonic() - began >= LIVED_S
                if not (lived and isinstance(error, Unreachable)):  # A silent watch is no trouble.
                    self._fail(error)
                    floor_s = error.retry_after_s or 0.0
            good = self._heard or self._clock.monotonic() - began >= LIVED_S
            failures = 1 if good else failures + 1
            await self._clock.sleep(max(floor_s, self._rng.uniform(0.0, self._backoff.bound_s(failures))))

    async def _list(self) -> None:
        self.lists_total += 1
        if self._relist_every_s is not None:
            self._relist_at = self._clock.monotonic() + self._relist_every_s * self._rng.uniform(0.8, 1.2)
        found: dict[Ref, tuple[Version, T]] = {}
        # Later pages are of the same version, or newer where the server lost it: then events only repeat.
        version, token = await self._page_into(found, "")
        while token:
            _, token = await self._page_into(found, token)
        listed = _number(version)
        for ref in [ref for ref, entry in self._store.items() if ref not in found and not _older(listed, entry[0])]:
            self._drop(ref)
        for ref, (at, value) in found.items():
            self._put(ref, at, value)
        self._version, self._seen = version, listed
        self._recover()
        self._synced.set()

    async def _page_into(self, found: dict[Ref, tuple[Version, T]], token: str) -> tuple[str, str]:
        """Read one page; its version, and the token of the next one."""
        async with self._pages:
            page = await self._api.list(
                self.kind, namespace=self._namespace, labels=self._labels, limit=self._page, continue_token=token
            )
            if not token:
                self._refuse_older(page.resource_version)
            for obj in page.items:
                found[ref_of(self.kind, obj)] = (_version(obj), self._project(obj))
            return page.resource_version, page.continue_token

    def _refuse_older(self, version: str) -> None:
        """A server that lags behind what we have seen may not take us back; one restored from a backup must."""
        if not _older(_number(version), self._seen):
            self._stale_since = None
            return
        now = self._clock.monotonic()
        self._stale_since = now if self._stale_since is None else self._stale_since
        if now - self._stale_since < RESTORED_S:
            raise Stale(f"the list is at version {version}, and {self._seen} was already seen")
        self._log.warning("lists stay older than what was seen: the store was restored", version=version)
        self._stale_since = None
        self._store = {ref: (0, value) for ref, (_, value) in self._store.items()}

    async def _watch(self) -> None:
        self.watches_total += 1
        left_s = self._relist_at - self._clock.monotonic()
        events = self._api.watch(
            self.kind,
            resource_version=self._version,
            namespace=self._namespace,
            labels=self._labels,
            timeout_s=max(1.0, min(left_s, WATCH_S * self._rng.uniform(1.0, 2.0))),
        )
        self._watching_since = self._clock.monotonic()
        try:
            async with aclosing(events):
                async for event in events:
                    self._heard = True
                    self._recover()
                    self._take(event)
                    if self._clock.monotonic() >= self._relist_at:
                        return
        finally:
            self._watching_since = float("inf")

    def _take(self, event: WatchEvent) -> None:
        version = _version(event.object)
        old = not _newer(version, self._seen)
        if event.type == "DELETED":
            ref = ref_of(self.kind, event.object)
            entry = self._store.get(ref)
            if entry is not None and not _older(version, entry[0]):
                self._drop(ref)
        elif event.type != "BOOKMARK" and not old:
            self._read(event.object, version)
        if not old:
            self._version, self._seen = str(version), version

    def _read(self, obj: Obj, version: Version) -> None:
        """Put an object into the store, unless that knows it: then it is not even projected."""
        ref = ref_of(self.kind, obj)
        entry = self._store.get(ref)
        if entry is None or _newer(version, entry[0]):
            self._put(ref, version, self._project(obj))

    def _put(self, ref: Ref, version: Version, value: T) -> None:
        entry = self._store.get(ref)
        if entry is not None:
            if not _newer(version, entry[0]):
                return
            self._unindex(ref, entry[1])
        self._store[ref] = (version, value)
        if self._index is not None:
            for key in self._index(value):
                self._keys.setdefault(key, {})[ref] = None
        if self._on_change is not None:
            self._on_change(ref, None if entry is None else entry[1], value)

    def _drop(self, ref: Ref) -> None:
        _, value = self._store.pop(ref)
        self._unindex(ref, value)
        if self._on_change is not None:
            self._on_change(ref, value, None)

    def _unindex(self, ref: Ref, value: T) -> None:
        if self._index is None:
            return
        for key in self._index(value):
            refs = self._keys.get(key)
            if refs is not None:
                refs.pop(ref, None)
                if not refs:
                    del self._keys[key]

    def _vanish(self) -> None:
        """The kind is not served: whatever there was of it is gone with its CRD."""
        self._version = ""
        self._trouble = None
        for ref in list(self._store):
            self._drop(ref)
        self._turn(absent=True)
        self._synced.set()

    def _recover(self) -> None:
        self._trouble = None
        self._turn(absent=False)

    def _turn(self, *, absent: bool) -> None:
        if absent == self.absent:
            return
        self.absent = absent
        self._log.info("the kind is not served" if absent else "the kind is served")
        if self._on_absent is not None:
            self._on_absent(absent)

    def _fail(self, error: ApiError) -> None:
        if self._trouble is None:
            self._log.warning("the cache may be behind", reason=str(error), status=error.status)
        self._trouble = error
        if error.status == 504:
            self._version = ""  # So a server answers a version from its future, after its store was restored.


def _version(obj: Obj) -> Version:
    return _number(str(obj["metadata"].get("resourceVersion", "")))


def _number(text: str) -> Version:
    return int(text) if text.isdecimal() else text


def _older(one: Version, other: Version) -> bool:
    """Whether it is certain that `one` is older: versions that are no numbers can only be told apart."""
    return isinstance(one, int) and isinstance(other, int) and one < other


def _newer(one: Version, other: Version) -> bool:
    return one > other if isinstance(one, int) and isinstance(other, int) else one != other
