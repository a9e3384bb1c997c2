"""One call on the API server as data, and a base for what stands between a caller and the API: pace, fence, count."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from moe_kube.api import Api, Page, WatchEvent
from moe_kube.objects import Kind, Obj, Ref

Verb = Literal["get", "list", "watch", "create", "update", "patch", "delete"]
"""A verb of RBAC. Both server-side apply and JSON patch are `patch`; an apply that creates needs `create` as well."""

WRITES: frozenset[Verb] = frozenset({"create", "update", "patch", "delete"})


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked of the API server, without the body. `namespace` and `name` are empty where there is none."""

    verb: Verb
    kind: Kind
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def writes(self) -> bool:
        return self.verb in WRITES

    def __str__(self) -> str:
        where = "/".join(part for part in (self.namespace, self.name, self.subresource) if part)
        return f"{self.verb} {self.kind.kind} {where}".rstrip()


def _on(ref: Ref, verb: Verb, subresource: str = "") -> Call:
    return Call(verb, ref.kind, ref.namespace, ref.name, subresource)


class Gate:
    """An `Api` before another one: `before` runs ahead of each call, and may wait, shorten its time-out or refuse it.

    Gates compose: `Throttled(Fenced(client))` waits first and looks at the lease last.
    """

    def __init__(self, api: Api) -> None:
        self._api = api

    async def before(self, call: Call, timeout_s: float | None) -> float | None:
        """Return the time-out that the call gets; raise an ApiError to refuse it."""
        raise NotImplementedError

    async def get(self, ref: Ref, *, timeout_s: float | None = None) -> Obj:
        timeout_s = await self.before(_on(ref, "get"), timeout_s)
        return await self._api.get(ref, timeout_s=timeout_s)

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
        timeout_s = await self.before(Call("list", kind, namespace or ""), timeout_s)
        return await self._api.list(
            kind,
            namespace=namespace,
            labels=labels,
            limit=limit,
            continue_token=continue_token,
            resource_version=resource_version,
            timeout_s=timeout_s,
        )

    async def watch(
        self,
        kind: Kind,
        *,
        resource_version: str,
        namespace: str | None = None,
        labels: str = "",
        timeout_s: float = 300.0,
    ) -> AsyncGenerator[WatchEvent, None]:
        limit_s = await self.before(Call("watch", kind, namespace or ""), timeout_s)
        events = self._api.watch(
            kind,
            resource_version=resource_version,
            namespace=namespace,
            labels=labels,
            timeout_s=timeout_s if limit_s is None else limit_s,
        )
        async with aclosing(events):
            async for event in events:
                yield event

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
        timeout_s = await self.before(_on(ref, "patch", subresource), timeout_s)
        return await self._api.apply(
            ref, body, manager=manager, force=force, subresource=subresource, timeout_s=timeout_s
        )

    async def create(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        timeout_s = await self.before(_on(ref, "create"), timeout_s)
        return await self._api.create(ref, body, timeout_s=timeout_s)

    async def replace(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        timeout_s = await self.before(_on(ref, "update"), timeout_s)
        return await self._api.replace(ref, body, timeout_s=timeout_s)

    async def json_patch(
        self, ref: Ref, operations: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> Obj:
        timeout_s = await self.before(_on(ref, "patch"), timeout_s)
        return await self._api.json_patch(ref, operations, timeout_s=timeout_s)

    async def delete(
        self,
        ref: Ref,
        *,
        uid: str = "",
        propagation: Literal["Background", "Foreground", "Orphan"] = "Background",
        timeout_s: float | None = None,
    ) -> None:
        timeout_s = await self.before(_on(ref, "delete"), timeout_s)
        await self._api.delete(ref, uid=uid, propagation=propagation, timeout_s=timeout_s)
