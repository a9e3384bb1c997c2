"""A server under test, and what the cases of the conformance suite share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from moe_kube.api import Api, WatchEvent
from moe_kube.errors import NotFound
from moe_kube.objects import (
    CONFIG_MAP,
    Kind,
    Obj,
    Ref,
)

WATCH_S = 3.0
OPERATOR, TUNER, PERSON = "moestack-operator", "moestack-tuner", "kubectl"


@dataclass(frozen=True)
class Server:
    """A server under test. `api` is a client that may do everything; `namespace` is empty and its own."""

    api: Api
    namespace: str
    let_pass: Callable[[float], Awaitable[None]]
    """Let so many seconds pass for the server."""
    forget: Callable[[str], Awaitable[str]]
    """Forget the past. Given a continue token, one of the same place whose version is forgotten."""
    collect: Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
    """Let the garbage collector work until the condition holds; AssertionError where it never does."""
    kinds: frozenset[Kind]
    """Kinds that are installed."""

    def ref(self, kind: Kind, name: str = "x") -> Ref:
        return Ref(kind, self.namespace, name)


Case = Callable[[Server], Awaitable[None]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


async def config(server: Server, name: str = "x", **data: str) -> Obj:
    return await server.api.apply(server.ref(CONFIG_MAP, name), {"data": data}, manager=OPERATOR)


def version(obj: Obj) -> str:
    return str(obj["metadata"]["resourceVersion"])


async def gone(server: Server, ref: Ref) -> bool:
    try:
        await server.api.get(ref)
    except NotFound:
        return True
    return False


async def seen(server: Server, kind: Kind, since: str, *, labels: str = "") -> list[WatchEvent]:
    """All changes that a watch brings until it ends; versions never go back."""
    events = server.api.watch(
        kind, resource_version=since, namespace=server.namespace, labels=labels, timeout_s=WATCH_S
    )
    async with aclosing(events):
        found = [event async for event in events]
    versions = [int(version(event.object)) for event in found]
    assert versions == sorted(versions)
    return [event for event in found if event.type != "BOOKMARK"]
