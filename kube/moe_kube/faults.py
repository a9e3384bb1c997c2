"""Faults on the way to an API server, as data: which calls, how often, what happens; moe_kube.faulty acts on them.

A journal keeps every call, so that a run with a fault can be compared with a run without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moe_kube.errors import ApiError, from_status
from moe_kube.objects import Kind, Obj, Ref

Verb = Literal["get", "list", "watch", "apply", "create", "replace", "json_patch", "delete"]
WRITES: frozenset[Verb] = frozenset({"apply", "create", "replace", "json_patch", "delete"})


class Crash(BaseException):
    """The process died here. No `except Exception` of the code under test may catch it."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `index` counts all calls of a journal from 0, `write` the writes alone (-1 for a read).

    `result` is `ok`, the class of the error, or `Crash`; `committed` says that the server took a write, whatever the
    caller saw.
    """

    index: int
    write: int
    verb: Verb
    kind: Kind
    ref: Ref | None = None
    subresource: str = ""
    manager: str = ""
    client: str = ""
    body: Any = field(default=None, compare=False, repr=False)
    result: str = ""
    committed: bool = False
    created: bool = False

    def __str__(self) -> str:
        where = str(self.ref or self.kind.kind) + (f"/{self.subresource}" if self.subresource else "")
        return f"#{self.index} {self.verb} {where}: {self.result}"


Hook = Callable[[Call], Awaitable[None] | None]
Step = Literal["error", "reset", "timeout", "timeout_after", "crash_before", "crash_after", "before", "after"]


@dataclass(frozen=True, slots=True)
class Action:
    """What happens to a call. `before` and `after` run a hook (another writer, a lost lease) and let the call go on."""

    step: Step
    error: ApiError | None = None
    hook: Hook | None = None


def answer(status: int, *, retry_after_s: float | None = None, reason: str = "", kind_missing: bool = False) -> Action:
    """An HTTP error, and nothing is done."""
    message = f"injected {status}"
    error = from_status(
        status,
        message,
        reason=reason or _REASONS.get(status, ""),
        retry_after_s=retry_after_s,
        kind_missing=kind_missing,
    )
    return Action("error", error)


_REASONS = {
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}
RESET = Action("reset")
"""The connection is reset before the server reads the call."""
TIMEOUT = Action("timeout")
"""No answer, and nothing is done."""
TIMEOUT_AFTER_COMMIT = Action("timeout_after")
"""No answer, and the write is done."""
CRASH_BEFORE = Action("crash_before")
CRASH_AFTER = Action("crash_after")
API_ERRORS: dict[str, Action] = {
    "403": answer(403),
    "404": answer(404),
    "409": answer(409),
    "422": answer(422),
    "429": answer(429, retry_after_s=7.0),
    "500": answer(500),
    "503": answer(503),
    "reset": RESET,
    "time-out before": TIMEOUT,
    "time-out after commit": TIMEOUT_AFTER_COMMIT,
}
"""Every way for a call to fail, by name: one table for the tests."""


def before(hook: Hook) -> Action:
    """Run a hook, then let the call go on."""
    return Action("before", hook=hook)


def after(hook: Hook) -> Action:
    """Let the call go on, then run a hook before its caller goes on."""
    return Action("after", hook=hook)


@dataclass(slots=True)
class Rule:
    """Which calls an action meets: all that are given must fit. The first `skip` of them pass, then `times` are met."""

    action: Action
    verbs: frozenset[str] | None = None
    kinds: frozenset[Kind] | None = None
    call: int | None = None
    write: int | None = None
    when: Callable[[Call], bool] | None = None
    skip: int = 0
    times: int | None = 1
    met: int = 0
    """How many calls it has met."""

    def fits(self, call: Call) -> bool:
        """Whether it acts on this call; counts."""
        if self.times is not None and self.met >= self.times:
            return False
        if (
            (self.verbs is not None and call.verb not in self.verbs)
            or (self.kinds is not None and call.kind not in self.kinds)
            or (self.call is not None and call.index != self.call)
            or (self.write is not None and call.write != self.write)
            or (self.when is not None and not self.when(call))
        ):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.met += 1
        return True


WatchStep = Literal["drop", "end", "gone", "duplicate", "miss_delete", "miss", "silent"]


@dataclass(slots=True)
class WatchRule:
    """A fault of a watch, after `after` events of it (bookmarks count).

    drop: the connection breaks. end: the server ends it cleanly. gone: 410. duplicate: the next event comes twice.
    miss_delete, miss: the next deletion, or event, never comes. silent: half open, nothing comes any more, and after
    `silent_s` the caller's own time-out says so.
    """

    step: WatchStep
    kind: Kind | None = None
    after: int = 0
    times: int | None = 1
    silent_s: float = 90.0
    met: int = 0

    def fits(self, kind: Kind, seen: int) -> bool:
        """Whether it acts now; the caller counts what it meets."""
        left = self.times is None or self.met < self.times
        return left and seen >= self.after and self.kind in (None, kind)


class Journal:
    """Every call of one or of several clients, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._writes = 0
        self._known: set[str] = set()

    def begin(self, call: Call) -> Call:
        """Number a call and note it."""
        number = -1
        if call.verb in WRITES:
            number = self._writes
            self._writes += 1
        call = replace(call, index=len(self.calls), write=number)
        self.calls.append(call)
        return call

    def end(self, call: Call, result: str, *, committed: bool = False, answer: Obj | None = None) -> None:
        """Note how it ended. An apply or create counts as a creation where its uid was not seen in a write before."""
        created = False
        if committed and answer is not None:
            uid = answer.get("metadata", {}).get("uid", "")
            created = call.verb in ("apply", "create") and not call.subresource and uid not in self._known
            self._known.add(uid)
        self.calls[call.index] = replace(call, result=result, committed=committed, created=created)

    @property
    def writes(self) -> list[Call]:
        return [call for call in self.calls if call.verb in WRITES]

    def creates(self) -> Counter[str]:
        """Objects created, by kind."""
        return Counter(call.kind.kind for call in self.calls if call.created)

    def deletes(self) -> Counter[str]:
        """Deletions that the server took, by kind."""
        return Counter(call.kind.kind for call in self.calls if call.verb == "delete" and call.committed)

    def committed(self) -> Counter[tuple[str, str]]:
        """Writes that the server took, by (verb, kind)."""
        return Counter((call.verb, call.kind.kind) for call in self.calls if call.committed)

    def clear(self) -> None:
        """Forget the calls; what was created stays known."""
        self.calls.clear()
        self._writes = 0
