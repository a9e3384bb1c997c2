"""The port to the API server over HTTP: one aiohttp session, JSON by orjson, errors by what can be done about them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import aiohttp
import orjson
from yarl import URL

from moe_core.clock import Clock, SystemClock
from moe_core.log import redact
from moe_kube.access import Credentials
from moe_kube.api import Page, WatchEvent
from moe_kube.calls import Call
from moe_kube.errors import ApiError, Invalid, Unreachable, from_status
from moe_kube.objects import Kind, Obj, Ref

Observer = Callable[[Call, int, float], None]
"""Told of each call when it has ended (a watch: when it has begun): HTTP status (0: no answer) and seconds."""

MAX_MESSAGE_CHARS = 1000
SILENCE_S = 90.0
"""A watch that brought nothing for this long is given up: API servers that send bookmarks do so about once a minute."""

_NO_LIMITS = aiohttp.ClientTimeout()
_JSON = "application/json"
_APPLY = "application/apply-patch+yaml"
_JSON_PATCH = "application/json-patch+json"


class KubeApi:
    """An `Api` (moe_kube.api) on a real API server. Make it with `moe_kube.connect.connect`."""

    def __init__(
        self,
        credentials: Credentials,
        session: aiohttp.ClientSession,
        *,
        observers: tuple[Observer, ...] = (),
        timeout_s: float = 15.0,
        silence_s: float = SILENCE_S,
        clock: Clock | None = None,
    ) -> None:
        self._credentials = credentials
        self._session = session
        self._observers = observers
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._clock = clock or SystemClock()

    async def __aenter__(self) -> KubeApi:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def get(self, ref: Ref, *, timeout_s: float | None = None) -> Obj:
        return await self._call(_on("get", ref), "GET", timeout_s=timeout_s)

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
        query = {"limit": str(limit), "labelSelector": labels, "continue": continue_token}
        # A continued list is at the version of its first page, and naming another is an error.
        query["resourceVersion"] = "" if continue_token else resource_version
        raw = await self._call(Call("list", kind, namespace or ""), "GET", query=query, timeout_s=timeout_s)
        items = raw.get("items") or ()
        for item in items:  # Lists of built-in kinds leave it out of their items.
            item.setdefault("apiVersion", kind.api_version)
            item.setdefault("kind", kind.kind)
        meta = raw.get("metadata", {})
        return Page(tuple(items), str(meta.get("resourceVersion", "")), meta.get("continue") or "")

    async def watch(
        self,
        kind: Kind,
        *,
        resource_version: str,
        namespace: str | None = None,
        labels: str = "",
        timeout_s: float = 300.0,
    ) -> AsyncGenerator[WatchEvent, None]:
        call = Call("watch", kind, namespace or "")
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "labelSelector": labels,
            "timeoutSeconds": str(max(1, int(timeout_s))),
        }
        limits = aiohttp.ClientTimeout(
            total=timeout_s + self._silence_s, sock_connect=self._timeout_s, sock_read=self._silence_s
        )
        start_s, status = self._clock.monotonic(), 0
        try:
            request = await self._request(call, "GET", query=query, limits=limits)
            try:
                async with request as response:
                    status = response.status
                    self._observe(call, status, start_s)
                    if status >= 300:
                        raise self._refusal(response, await response.read())
                    rest = b""
                    async for chunk in response.content.iter_any():
                        *lines, rest = (rest + chunk).split(b"\n")
                        for line in lines:
                            if line.strip():
                                yield _event(line)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _unreachable(call, error) from None
        finally:
            if status == 0:
                self._observe(call, 0, start_s)

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
        return await self._call(
            _on("patch", ref, subresource),
            "PATCH",
            query={"fieldManager": manager, "force": "true" if force else "false"},
            body=_named(ref, body),
            content_type=_APPLY,
            timeout_s=timeout_s,
        )

    async def create(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        return await self._call(_on("create", ref), "POST", body=_named(ref, body), timeout_s=timeout_s)

    async def replace(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        return await self._call(_on("update", ref), "PUT", body=_named(ref, body), timeout_s=timeout_s)

    async def json_patch(
        self, ref: Ref, operations: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> Obj:
        return await self._call(
            _on("patch", ref), "PATCH", body=list(operations), content_type=_JSON_PATCH, timeout_s=timeout_s
        )

    async def delete(
        self,
        ref: Ref,
        *,
        uid: str = "",
        propagation: Literal["Background", "Foreground", "Orphan"] = "Background",
        timeout_s: float | None = None,
    ) -> None:
        options: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        if uid:
            options["preconditions"] = {"uid": uid}
        await self._call(_on("delete", ref), "DELETE", body=options, timeout_s=timeout_s)

    async def _call(
        self,
        call: Call,
        method: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = _JSON,
        timeout_s: float | None,
    ) -> Obj:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        # The server is told as well: it then gives up a write that we no longer wait for.
        asked = {**(query or {}), "timeout": f"{max(1, int(limit_s * 1000))}ms"}
        start_s, status = self._clock.monotonic(), 0
        try:
            # Not aiohttp's own limit: that rounds up to whole seconds, and a fenced write must not outlive its lease.
            async with asyncio.timeout(limit_s):
                request = await self._request(call, method, query=asked, body=body, content_type=content_type)
                async with request as response:
                    status = response.status
                    raw = await response.read()
                    if status >= 300:
                        raise self._refusal(response, raw)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(call, error) from None
        finally:
            self._observe(call, status, start_s)
        try:
            answer = orjson.loads(raw)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise Unreachable(f"{call}: the answer is not a JSON object: is this an API server?")
        return answer

    async def _request(
        self,
        call: Call,
        method: str,
        *,
        query: Mapping[str, str],
        body: object = None,
        content_type: str = _JSON,
        limits: aiohttp.ClientTimeout = _NO_LIMITS,
    ) -> Any:
        access = await self._credentials.current()
        # Compressing lists costs the server more than the cluster's network costs us.
        headers = {"Accept": _JSON, "Accept-Encoding": "identity", "User-Agent": "moestack"}
        if access.authorization:
            headers["Authorization"] = access.authorization
        if body is not None:
            headers["Content-Type"] = content_type
        return self._session.request(
            method,
            URL(access.host + _path(call)).with_query({key: value for key, value in query.items() if value}),
            data=None if body is None else orjson.dumps(body),
            headers=headers,
            timeout=limits,
            allow_redirects=False,
            ssl=self._credentials.tls,
            server_hostname=access.server_name,
            proxy=access.proxy,
        )

    def _refusal(self, response: aiohttp.ClientResponse, raw: bytes) -> ApiError:
        if response.status == 401:
            self._credentials.refused()
        return refusal(response.status, raw, response.headers.get("Retry-After", ""))

    def _observe(self, call: Call, status: int, start_s: float) -> None:
        seconds = self._clock.monotonic() - start_s
        for observer in self._observers:
            observer(call, status, seconds)


def refusal(status: int, raw: bytes, retry_after: str = "") -> ApiError:
    """The error of an answer that is none: from a Status object where there is one, else from the text."""
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError:
        document = None
    if isinstance(document, dict) and document.get("kind") == "Status":
        return _from_document(status, document, retry_after)
    text = raw[:MAX_MESSAGE_CHARS].decode("utf-8", "replace").strip()
    # The words of the API server itself. A proxy's own 404 must not make us believe that a kind is gone.
    missing = status == 404 and text == "404 page not found"
    return from_status(
        status, redact(text) or f"HTTP {status}", retry_after_s=_seconds(retry_after), kind_missing=missing
    )


def _from_document(status: int, document: Mapping[str, Any], retry_after: str = "") -> ApiError:
    details = document.get("details") or {}
    if status == 422 and any(cause.get("field") == "metadata.uid" for cause in details.get("causes") or ()):
        status = 409  # To the server another uid is an immutable field; to us it is another object of that name.
    return from_status(
        status,
        redact(str(document.get("message") or f"HTTP {status}"))[:MAX_MESSAGE_CHARS],
        reason=document.get("reason") or "",
        retry_after_s=_seconds(retry_after or str(details.get("retryAfterSeconds") or "")),
        kind_missing=status == 404 and not details.get("name"),
    )


def _seconds(text: str) -> float | None:
    return float(text) if text.isdecimal() else None


def _event(line: bytes) -> WatchEvent:
    try:
        event = orjson.loads(line)
        kind, body = event["type"], event["object"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise Unreachable("a line of the watch is not an event: the stream was cut") from None
    if kind == "ERROR":
        raise _from_document(int(body.get("code") or 500), body)
    return WatchEvent(kind, body)


def _on(verb: Literal["get", "create", "update", "patch", "delete"], ref: Ref, subresource: str = "") -> Call:
    return Call(verb, ref.kind, ref.namespace, ref.name, subresource)


def _path(call: Call) -> str:
    for part in (call.namespace, call.name):
        if part in (".", "..") or not part.isascii() or any(mark in part for mark in "/%?#\\ \r\n"):
            raise Invalid(f"{part!r} cannot be the name of an object or a namespace", status=400)
    name = None if call.verb in ("list", "watch", "create") else call.name
    return call.kind.path(call.namespace or None, name, call.subresource)


def _named(ref: Ref, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the identity that the reference gives it."""
    meta: dict[str, Any] = {"name": ref.name, **({"namespace": ref.namespace} if ref.namespace else {})}
    return {
        "apiVersion": ref.kind.api_version,
        "kind": ref.kind.kind,
        **body,
        "metadata": {**meta, **body.get("metadata", {})},
    }


def _unreachable(call: Call, error: Exception) -> Unreachable:
    """Without the address of a proxy, which may carry a password."""
    if isinstance(error, TimeoutError):
        return Unreachable(f"{call}: no answer in time")
    if isinstance(error, aiohttp.ClientResponseError):
        return Unreachable(f"{call}: {type(error).__name__} (HTTP {error.status})")
    return Unreachable(f"{call}: {redact(str(error)) or type(error).__name__}")
