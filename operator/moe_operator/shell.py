"""The shell around the pure reconcile: performs each request that it yields, and raises the API's errors into it.

Nothing is decided here. `run` drives one reconcile; a test that stops it before or after a request wraps `perform`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from moe_api.annotations import OPERATOR_MANAGER
from moe_kube.api import Api
from moe_kube.errors import ApiError, Conflict, NotFound
from moe_kube.objects import Obj, Ref
from moe_operator.children import Key
from moe_operator.reconcile import Steps, status_document
from moe_operator.requests import (
    Apply,
    AskGateways,
    Gateways,
    Get,
    Look,
    Observed,
    Outcome,
    Patch,
    Remove,
    Request,
    SendWeights,
    Tell,
    WriteStatus,
)

Perform = Callable[[Request], Awaitable[Any]]


class Caches(Protocol):
    """What is known without asking the API server."""

    def look(self, key: Key) -> Observed: ...

    def learn(self, ref: Ref, obj: Obj) -> None:
        """The answer to a write of ours: nobody needs to wait for the watch to bring it."""
        ...

    def forget(self, ref: Ref, uid: str) -> None:
        """The server says that there is none of that uid any more."""
        ...


class Fleet(Protocol):
    """The gateways and boards of deployments. Neither call raises: who does not answer is counted."""

    async def ask(self, request: AskGateways) -> Gateways: ...

    async def send(self, request: SendWeights) -> int: ...


class Teller(Protocol):
    """Where Events go. Never raises and does not wait for the API server: an Event is worth no delay."""

    def tell(self, tell: Tell) -> None: ...


class Performer:
    """Carries requests out against one API server."""

    def __init__(self, api: Api, *, caches: Caches, fleet: Fleet, teller: Teller) -> None:
        self._api = api
        self._caches = caches
        self._fleet = fleet
        self._teller = teller

    async def perform(self, request: Request) -> Any:
        """The answer that moe_operator.requests promises. Raises ApiError."""
        match request:
            case Look(key):
                return self._caches.look(key)
            case Get(ref):
                return await self._get(ref)
            case Apply():
                return self._learnt(request.rendered.ref, await self._apply(request))
            case Remove(ref, uid):
                return await self._remove(ref, uid)
            case Patch(ref, operations):
                return self._learnt(ref, await self._api.json_patch(ref, operations))
            case WriteStatus(ref):
                return self._learnt(ref, await self._write_status(request))
            case AskGateways():
                return await self._fleet.ask(request)
            case SendWeights():
                return await self._fleet.send(request)
            case Tell():
                return self._teller.tell(request)

    def _learnt(self, ref: Ref, obj: Obj) -> Obj:
        self._caches.learn(ref, obj)
        return obj

    async def _get(self, ref: Ref) -> Obj | None:
        try:
            return await self._api.get(ref)
        except NotFound as error:
            if error.kind_missing:
                raise
            return None

    async def _apply(self, request: Apply) -> Obj:
        """Take a field of ours back from whoever took it, but only on the object that was looked at."""
        body = request.rendered.body
        if request.uid:
            body = {**body, "metadata": {**body["metadata"], "uid": request.uid}}
        ref, uid = request.rendered.ref, request.uid
        try:
            return await self._api.apply(ref, body, manager=OPERATOR_MANAGER, force=bool(uid))
        except Conflict:
            if uid:
                await self._is_gone(ref, uid)  # then the next try makes it anew
            raise

    async def _remove(self, ref: Ref, uid: str) -> None:
        try:
            await self._api.delete(ref, uid=uid)
        except NotFound:
            self._caches.forget(ref, uid)  # gone, and be it with its kind
        except Conflict:
            # Usually another object has the name by now, and ours is gone; anything else is an error.
            if not await self._is_gone(ref, uid):
                raise

    async def _is_gone(self, ref: Ref, uid: str) -> bool:
        """Asks the server whether there is none of that uid, and sees to it that the cache knows as well."""
        found = await self._get(ref)
        gone = found is None or found["metadata"].get("uid") != uid
        if gone:
            self._caches.forget(ref, uid)
        return gone

    async def _write_status(self, request: WriteStatus) -> Obj:
        document = status_document(request.ref, dict(request.status), request.resource_version)
        return await self._api.apply(request.ref, document, manager=OPERATOR_MANAGER, subresource="status")


async def run(steps: Steps, perform: Perform) -> Outcome:
    """Drive one reconcile to its end. Raises the ApiError that it did not handle, and whatever `perform` raises else.

    However it ends, cancelled or by an error, the generator is closed: it asks for nothing more.
    """
    try:
        request = next(steps)
        while True:
            try:
                answer = await perform(request)
            except ApiError as error:
                request = steps.throw(error)
            else:
                request = steps.send(answer)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
    finally:
        steps.close()
