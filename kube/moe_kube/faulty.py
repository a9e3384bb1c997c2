"""A client that loses, refuses and ends calls as its rules say: any `Api` wrapped in the faults of moe_kube.faults."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence, Set
from typing import Any, Literal, TypeVar

from moe_core.clock import Clock, SystemClock
from moe_kube.api import Api, Page, WatchEvent
from moe_kube.errors import ApiError, Gone, Unreachable, from_status
from moe_kube.faults import WRITES, Action, Call, Crash, Journal, Rule, Verb, WatchRule, WatchStep
from moe_kube.objects import Kind, Obj, Ref

T = TypeVar("T")


class FaultyApi:
    """An `Api` around another. `rules` and `watch_rules` may be changed at any time; the first that fits acts.

    `stale_lists` is how many of the next lists answer with what the same list answered before, where it did.
    """

    def __init__(
        self,
        inner: Api,
        *,
        journal: Journal | None = None,
        rules: Sequence[Rule] = (),
        watch_rules: Sequence[WatchRule] = (),
        clock: Clock | None = None,
        client: str = "",
    ) -> None:
        self.inner = inner
        self.journal = journal if journal is not None else Journal()
        self.rules = list(rules)
        self.watch_rules = list(watch_rules)
        self.stale_lists = 0
        self._clock = clock or SystemClock()
        self._client = client
        self._lists: dict[tuple[Any, ...], Page] = {}

    def add(self, action: Action, **fits: Any) -> Rule:
        """Add a rule; see `Rule` for the keywords. Returns it, for its count."""
        rule = Rule(action, **fits)
        self.rules.append(rule)
        return rule

    def add_watch(self, step: WatchStep, **fits: Any) -> WatchRule:
        """Add a fault of watches; see `WatchRule`."""
        rule = WatchRule(step, **fits)
        self.watch_rules.append(rule)
        return rule

    def calm(self) -> None:
        """No faults from now on."""
        self.rules.clear()
        self.watch_rules.clear()
        self.stale_lists = 0

    async def get(self, ref: Ref, *, timeout_s: float | None = None) -> Obj:
        call = self._begin("get", ref.kind, ref)
        return await self._run(call, lambda: self.inner.get(ref, timeout_s=timeout_s))

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
        call = self._begin("list", kind, None)
        asked = (kind, namespace, labels, limit)
        known = self._lists.get(asked)

        async def read() -> Page:
            if self.stale_lists > 0 and known is not None and not continue_token:
                self.stale_lists -= 1
                return known
            page = await self.inner.list(
                kind,
                namespace=namespace,
                labels=labels,
                limit=limit,
                continue_token=continue_token,
                resource_version=resource_version,
                timeout_s=timeout_s,
            )
            if not continue_token:
                self._lists[asked] = page
            return page

        return await self._run(call, read)

    async def watch(
        self,
        kind: Kind,
        *,
        resource_version: str,
        namespace: str | None = None,
        labels: str = "",
        timeout_s: float = 300.0,
    ) -> AsyncGenerator[WatchEvent, None]:
        call = self._begin("watch", kind, None)

        async def start() -> AsyncGenerator[WatchEvent, None]:
            return self.inner.watch(
                kind, resource_version=resource_version, namespace=namespace, labels=labels, timeout_s=timeout_s
            )

        events = await self._run(call, start)
        seen = 0
        try:
            if await self._broken(kind, seen):
                return
            async for event in events:
                rule = self._rule_for(kind, seen, event)
                seen += 1
                if rule is None or rule.step == "duplicate":
                    yield event
                if rule is not None and rule.step == "duplicate":
                    yield event
                if await self._broken(kind, seen):
                    return
        finally:
            await events.aclose()

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
        call = self._begin("apply", ref.kind, ref, subresource=subresource, manager=manager, body=body)
        return await self._run(
            call,
            lambda: self.inner.apply(
                ref, body, manager=manager, force=force, subresource=subresource, timeout_s=timeout_s
            ),
        )

    async def create(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        call = self._begin("create", ref.kind, ref, body=body)
        return await self._run(call, lambda: self.inner.create(ref, body, timeout_s=timeout_s))

    async def replace(self, ref: Ref, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Obj:
        call = self._begin("replace", ref.kind, ref, body=body)
        return await self._run(call, lambda: self.inner.replace(ref, body, timeout_s=timeout_s))

    async def json_patch(
        self, ref: Ref, operations: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> Obj:
        call = self._begin("json_patch", ref.kind, ref, body=operations)
        return await self._run(call, lambda: self.inner.json_patch(ref, operations, timeout_s=timeout_s))

    async def delete(
        self,
        ref: Ref,
        *,
        uid: str = "",
        propagation: Literal["Background", "Foreground", "Orphan"] = "Background",
        timeout_s: float | None = None,
    ) -> None:
        call = self._begin("delete", ref.kind, ref)
        await self._run(call, lambda: self.inner.delete(ref, uid=uid, propagation=propagation, timeout_s=timeout_s))

    def _begin(self, verb: Verb, kind: Kind, ref: Ref | None, **more: Any) -> Call:
        return self.journal.begin(Call(-1, -1, verb, kind, ref, client=self._client, **more))

    async def _run(self, call: Call, go: Callable[[], Awaitable[T]]) -> T:
        """The call, with the first rule that fits it."""
        rule = next((rule for rule in self.rules if rule.fits(call)), None)
        action = rule.action if rule else None
        step = action.step if action else None
        if step == "crash_before":
            self.journal.end(call, "Crash")
            raise Crash(f"before {call}")
        lost = _lost(action) if action else None
        if lost is not None:
            self.journal.end(call, type(lost).__name__)
            raise lost
        if action is not None and step == "before":
            await _hook(action, call)
        try:
            result = await go()
        except BaseException as error:
            self.journal.end(call, type(error).__name__)
            raise
        committed = call.verb in WRITES
        told = result if isinstance(result, dict) else None
        if step == "crash_after":
            self.journal.end(call, "Crash", committed=committed, answer=told)
            raise Crash(f"after {call}")
        if step == "timeout_after":
            self.journal.end(call, "Unreachable", committed=committed, answer=told)
            raise Unreachable("injected: no answer in time")
        self.journal.end(call, "ok", committed=committed, answer=told)
        if action is not None and step == "after":
            await _hook(action, call)
        return result

    def _rule_for(self, kind: Kind, seen: int, event: WatchEvent) -> WatchRule | None:
        """The fault of this event: it comes twice, or never."""
        steps = {"duplicate", "miss", *(("miss_delete",) if event.type == "DELETED" else ())}
        if event.type == "BOOKMARK":
            return None
        return self._met(kind, seen, steps)

    async def _broken(self, kind: Kind, seen: int) -> bool:
        """Act on a fault of the watch itself. Returns whether the watch has ended."""
        rule = self._met(kind, seen, {"drop", "end", "gone", "silent"})
        if rule is None:
            return False
        if rule.step == "gone":
            raise Gone("injected: too old resource version", status=410, reason="Expired")
        if rule.step == "silent":
            await self._clock.sleep(rule.silent_s)
            raise Unreachable("injected: nothing was heard of the watch for too long")
        if rule.step == "drop":
            raise Unreachable("injected: the connection of the watch broke")
        return True

    def _met(self, kind: Kind, seen: int, steps: Set[str]) -> WatchRule | None:
        rule = next((rule for rule in self.watch_rules if rule.step in steps and rule.fits(kind, seen)), None)
        if rule is not None:
            rule.met += 1
        return rule


def _lost(action: Action) -> ApiError | None:
    """The error of an action that keeps the call from the server."""
    if action.error is not None:
        error = action.error
        return from_status(
            error.status,
            str(error),
            reason=error.reason,
            retry_after_s=error.retry_after_s,
            kind_missing=getattr(error, "kind_missing", False),
        )
    if action.step == "reset":
        return Unreachable("injected: connection reset by peer")
    if action.step == "timeout":
        return Unreachable("injected: timed out before the server read it")
    return None


async def _hook(action: Action, call: Call) -> None:
    if action.hook is not None:
        outcome = action.hook(call)
        if inspect.isawaitable(outcome):
            await outcome
