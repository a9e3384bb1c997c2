"""What the operator knows of the cluster without asking: every MoEDeployment, and a projection of every child.

One reflector follows each kind in each namespace that is looked after. What changes materially wakes the MoEDeployment
that it belongs to; a heartbeat that moves nothing but a version wakes nobody.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson

from moe_api.annotations import MANAGED_SELECTOR
from moe_core.clock import Clock
from moe_core.config import OperatorConfig
from moe_core.log import get_log
from moe_kube.api import Api
from moe_kube.errors import ApiError
from moe_kube.objects import MOE_DEPLOYMENT, Kind, Obj, Ref
from moe_kube.reflector import Reflector
from moe_operator.children import WATCHED, Child, Key, keys_of, project
from moe_operator.requests import Observed

RELIST_S = 3600.0
"""How often each kind is listed anew, about: a watch that lost a change for good is put right by nothing else."""

PAGE = 100
"""Objects in one answer to a list: an object is large until it is projected."""
PAGES = 2
"""Answers to lists that are in memory at once, of all kinds: one that hangs does not keep the others waiting."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A MoEDeployment, packed as JSON: thousands of them as dictionaries would be most of the memory."""

    raw: bytes
    conditions: tuple[tuple[str, str], ...]
    """(type, status) of each condition."""

    def unpack(self) -> Obj:
        obj: Obj = orjson.loads(self.raw)
        return obj


def keep(obj: Obj) -> Kept:
    """The projection of a MoEDeployment."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return Kept(
        orjson.dumps(obj),
        tuple((sys.intern(str(c.get("type", ""))), sys.intern(str(c.get("status", "")))) for c in conditions),
    )


@dataclass(frozen=True, slots=True)
class Behind:
    """Why a cache may not be used, or may be behind."""

    kind: Kind
    namespace: str
    """Empty: the whole cluster."""
    reason: str
    blocks: bool
    """Whether nothing can be done before it is cured; else what is known may be old."""


class Caches:
    """The reflectors of one operator. `wake` is called with each key to look at again, from the event loop."""

    def __init__(
        self,
        api: Api,
        config: OperatorConfig,
        *,
        clock: Clock,
        wake: Callable[[Key], None],
        rng: random.Random | None = None,
    ) -> None:
        self._clock = clock
        self._wake = wake
        self._learning = False
        self._log = get_log("operator.caches")
        self.conditions: Counter[tuple[str, str]] = Counter()
        """How many MoEDeployments have each (type, status)."""
        draw = rng or random.Random()
        pages = asyncio.Semaphore(PAGES)
        self._scopes: dict[str, dict[Kind, Reflector[Any]]] = {}
        for scope in config.namespaces or ("",):
            namespace = scope or None
            of_kind: dict[Kind, Reflector[Any]] = {
                MOE_DEPLOYMENT: Reflector(
                    api,
                    MOE_DEPLOYMENT,
                    project=keep,
                    clock=clock,
                    on_change=self._on_resource,
                    namespace=namespace,
                    relist_every_s=RELIST_S,
                    page=PAGE,
                    pages=pages,
                    rng=draw,
                )
            }
            for kind in WATCHED:
                of_kind[kind] = Reflector(
                    api,
                    kind,
                    project=partial(project, kind),
                    clock=clock,
                    on_change=self._on_child,
                    on_absent=partial(self._on_absent, scope, kind),
                    index=keys_of,
                    namespace=namespace,
                    labels=MANAGED_SELECTOR,
                    relist_every_s=RELIST_S,
                    page=PAGE,
                    pages=pages,
                    rng=draw,
                )
            self._scopes[scope] = of_kind

    async def run(self) -> None:
        """Follow the cluster until cancelled."""
        async with asyncio.TaskGroup() as group:
            for reflector in self.reflectors():
                group.create_task(reflector.run(), name=f"follow {reflector.kind.kind}")

    def reflectors(self) -> Iterator[Reflector[Any]]:
        for of_kind in self._scopes.values():
            yield from of_kind.values()

    @property
    def synced(self) -> bool:
        """Whether every cache has been filled once, or its kind is known to be absent."""
        return all(reflector.synced for reflector in self.reflectors())

    async def wait_synced(self) -> None:
        for reflector in self.reflectors():
            await reflector.wait_synced()

    def behind(self) -> list[Behind]:
        """Caches that are not filled yet or may be old, and MoEDeployments whose CRD is missing."""
        found = []
        for scope, of_kind in self._scopes.items():
            for kind, reflector in of_kind.items():
                error: ApiError | None = reflector.trouble
                if kind == MOE_DEPLOYMENT and reflector.absent:
                    found.append(Behind(kind, scope, "its CRD is not installed", blocks=True))
                elif error is not None:
                    found.append(Behind(kind, scope, str(error), blocks=not reflector.synced))
                elif not reflector.synced:
                    found.append(Behind(kind, scope, "not listed yet", blocks=True))
        return found

    def keys(self) -> list[Key]:
        """Every MoEDeployment that is known."""
        return [key for scope in self._scopes for key in self._keys(scope)]

    def __len__(self) -> int:
        return sum(len(of_kind[MOE_DEPLOYMENT]) for of_kind in self._scopes.values())

    def knows(self, key: Key) -> bool:
        of_kind = self._of(key[0])
        return of_kind is not None and of_kind[MOE_DEPLOYMENT].get(Ref(MOE_DEPLOYMENT, *key)) is not None

    def look(self, key: Key) -> Observed:
        """What belongs to one key, now."""
        of_kind = self._of(key[0]) or {}
        kept = of_kind[MOE_DEPLOYMENT].get(Ref(MOE_DEPLOYMENT, *key)) if of_kind else None
        children = [child for kind in WATCHED if of_kind for _, child in of_kind[kind].by(key)]
        return Observed(
            resource=kept.unpack() if kept is not None else None,
            children=tuple(children),
            absent=frozenset(kind for kind in WATCHED if of_kind and of_kind[kind].absent),
            now=self._clock.time(),
        )

    def learn(self, ref: Ref, obj: Obj) -> None:
        """Take the answer to a write of ours for what the watch will bring: it wakes nobody."""
        of_kind = self._of(ref.namespace)
        if of_kind is None or ref.kind not in of_kind:
            return
        self._learning = True
        try:
            of_kind[ref.kind].learn(obj)
        finally:
            self._learning = False

    def forget(self, ref: Ref, uid: str) -> None:
        """The server has said that this child of ours is no more: it wakes nobody."""
        of_kind = self._of(ref.namespace)
        if of_kind is None or ref.kind not in of_kind or ref.kind == MOE_DEPLOYMENT:
            return
        child: Child | None = of_kind[ref.kind].get(ref)
        if child is None or child.uid != uid:
            return
        self._learning = True
        try:
            of_kind[ref.kind].forget(ref)
        finally:
            self._learning = False

    def _of(self, namespace: str) -> dict[Kind, Reflector[Any]] | None:
        return self._scopes.get(namespace) or self._scopes.get("")

    def _keys(self, scope: str) -> list[Key]:
        return [(ref.namespace, ref.name) for ref, _ in self._scopes[scope][MOE_DEPLOYMENT].items()]

    def _on_resource(self, ref: Ref, old: Kept | None, new: Kept | None) -> None:
        if old is not None:
            self.conditions.subtract(old.conditions)
        if new is not None:
            self.conditions.update(new.conditions)
        if not self._learning:
            self._wake((ref.namespace, ref.name))

    def _on_child(self, ref: Ref, old: Child | None, new: Child | None) -> None:
        if self._learning or (old is not None and new is not None and same(old, new)):
            return
        for key in {child.key for child in (old, new) if child is not None and child.deployment}:
            self._wake(key)

    def _on_absent(self, scope: str, kind: Kind, absent: bool) -> None:
        keys = self._keys(scope)
        if keys:
            self._log.info("looking at every MoEDeployment again", kind=kind.kind, absent=absent)
        for key in keys:
            self._wake(key)


def same(old: Child, new: Child) -> bool:
    """Whether two states of a child tell a decision the same."""
    return replace(old, resource_version=new.resource_version) == new
