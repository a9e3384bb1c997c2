"""The port to a Kubernetes API server: what the real client and the in-memory fake do, to one conformance suite."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from moe_kube.objects import Kind, Obj, Ref


@dataclass(frozen=True, slots=True)
class Page:
    """One answer to a list. `continue_token` is empty on the last page."""

    items: tuple[Obj, ...]
    resource_version: str
    continue_token: str = ""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change. BOOKMARK carries no object but its `metadata.resourceVersion`."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: Obj


class Api(Protocol):
    """Calls on the API server. Each raises an `ApiError` (moe_kube.errors); none retries.

    `timeout_s` bounds one call, at the caller and at the server; None is the client's own limit.
    """

    async def get(self, ref: Ref, *, timeout_s: float | None = None) -> Obj: ...

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
        """One page. `resource_version` "" reads the newest; "0" whatever a cache has. Raises Gone for an old token."""
        ...

    def watch(
        self,
        kind: Kind,
        *,
        resource_version: str,
        namespace: str | None = None,
        labels: str = "",
        timeout_s: float = 300.0,
    ) -> AsyncGenerator[WatchEvent, None]:
        """Changes after `resource_version`, with bookmarks, until the server ends the watch (about `timeout_s`).

        Raises Gone for a version that is too old, Unreachable where nothing was heard for longer than a bookmark takes.
        """
        ...

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
        """Server-side apply: `body` is everything that `manager` wants, and nothing else of it stays.

        With `metadata.uid` in the body, an object of another uid (or none) is a Conflict; with
        `metadata.resourceVersion`, another version is. Without `force`, a field of another manager is a Conflict.
        """
        ...

    async def create(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        """Create; Conflict (reason AlreadyExists) where the name is taken."""
        ...

    async def replace(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        """Update (PUT) with the `metadata.resourceVersion` of the body; Conflict where it is not the newest."""
        ...

    async def json_patch(
        self, ref: Ref, operations: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> Obj:
        """RFC 6902; a failed `test` operation is Invalid."""
        ...

    async def delete(
        self,
        ref: Ref,
        *,
        uid: str = "",
        propagation: Literal["Background", "Foreground", "Orphan"] = "Background",
        timeout_s: float | None = None,
    ) -> None:
        """Delete; NotFound where it is gone, Conflict where `uid` is another's."""
        ...
