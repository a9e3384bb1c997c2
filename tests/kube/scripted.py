"""An `Api` whose lists and watches are written down by the test, and a store of objects with compare-and-swap."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from moe_core.clock import FakeClock
from moe_kube.api import Page, WatchEvent
from moe_kube.errors import ApiError, Conflict, NotFound, Unreachable
from moe_kube.objects import CONFIG_MAP, Kind, Obj, Ref

KIND = CONFIG_MAP


def thing(name: str, version: int, *, namespace: str = "default", uid: str = "", value: str = "") -> Obj:
    meta = {"name": name, "namespace": namespace, "resourceVersion": str(version), "uid": uid or f"uid-{name}"}
    return {"metadata": meta, "data": {"value": value or f"v{version}"}}


def page(*items: Obj, at: int, token: str = "") -> Page:
    return Page(items, str(at), token)


def added(name: str, version: int, **more: str) -> WatchEvent:
    return WatchEvent("ADDED", thing(name, version, **more))


def modified(name: str, version: int, **more: str) -> WatchEvent:
    return WatchEvent("MODIFIED", thing(name, version, **more))


def deleted(name: str, version: int, **more: str) -> WatchEvent:
    return WatchEvent("DELETED", thing(name, version, **more))


def bookmark(version: int) -> WatchEvent:
    return WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": str(version)}})


class Hang:
    """In a watch's script: stay silent for so many seconds of the fake clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class ScriptedApi:
    """Lists and watches answer by their scripts, in order; without one they are silent until the client gives up."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.lists: list[Page | ApiError] = []
        self.watches: list[list[WatchEvent | ApiError | Hang]] = []
        self.listed: list[tuple[float, str]] = []
        self.watched: list[tuple[float, str]] = []
        self.open_watches = 0

    async def get(self, ref: Ref, *, timeout_s: float | None = None) -> Obj:
        raise NotImplementedError

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
        self.listed.append((self.clock.monotonic(), continue_token))
        if not self.lists:
            await self.clock.sleep(15)
            raise Unreachable("no answer in time")
        answer = self.lists.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        return answer

    async def watch(
        self,
        kind: Kind,
        *,
        resource_version: str,
        namespace: str | None = None,
        labels: str = "",
        timeout_s: float = 300.0,
    ) -> AsyncGenerator[WatchEvent, None]:
        self.watched.append((self.clock.monotonic(), resource_version))
        self.open_watches += 1
        try:
            if not self.watches:
                await self.clock.sleep(90)
                raise Unreachable("heard nothing for 90 s")
            for step in self.watches.pop(0):
                if isinstance(step, ApiError):
                    raise step
                if isinstance(step, Hang):
                    await self.clock.sleep(step.seconds)
                else:
                    yield step
        finally:
            self.open_watches -= 1


class CasStore:
    """Objects by reference with resourceVersion compare-and-swap; `before` and `after` a write may be disturbed."""

    def __init__(self) -> None:
        self.objects: dict[Ref, Obj] = {}
        self.writes: list[tuple[str, Ref, Obj]] = []
        self.version = 0
        self.before: Callable[[str], Awaitable[None]] | None = None
        self.after: Callable[[str], Awaitable[None]] | None = None
        self.timeouts: list[float | None] = []

    async def get(self, ref: Ref, *, timeout_s: float | None = None) -> Obj:
        if self.before is not None:
            await self.before("get")
        if ref not in self.objects:
            raise NotFound(f"{ref} not found")
        return copy.deepcopy(self.objects[ref])

    async def create(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        self.timeouts.append(timeout_s)
        if self.before is not None:
            await self.before("create")
        if ref in self.objects:
            raise Conflict(f"{ref} exists", status=409, reason="AlreadyExists")
        return await self._put("create", ref, body)

    async def replace(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        self.timeouts.append(timeout_s)
        if self.before is not None:
            await self.before("replace")
        if ref not in self.objects:
            raise NotFound(f"{ref} not found")
        if body["metadata"].get("resourceVersion") != self.objects[ref]["metadata"]["resourceVersion"]:
            raise Conflict(f"{ref} has changed", status=409, reason="Conflict")
        return await self._put("replace", ref, body)

    async def json_patch(
        self, ref: Ref, operations: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> Obj:
        if self.before is not None:
            await self.before("json_patch")
        if ref not in self.objects:
            raise NotFound(f"{ref} not found")
        body = copy.deepcopy(self.objects[ref])
        for operation in operations:
            body[operation["path"].strip("/")] = operation["value"]
        return await self._put("json_patch", ref, body)

    async def _put(self, verb: str, ref: Ref, body: Mapping[str, Any]) -> Obj:
        self.version += 1
        obj = copy.deepcopy(dict(body))
        obj["metadata"]["resourceVersion"] = str(self.version)
        self.objects[ref] = obj
        self.writes.append((verb, ref, copy.deepcopy(obj)))
        if self.after is not None:
            await self.after(verb)
        return copy.deepcopy(obj)
