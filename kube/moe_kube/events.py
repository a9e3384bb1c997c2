"""Events for what a person should notice: repeats become one series, and no reconcile ever waits for them or fails."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_core.clock import Clock
from moe_core.log import get_log, redact
from moe_kube.api import Api
from moe_kube.errors import ApiError, Busy, Conflict, NotFound, ServerError, Unreachable
from moe_kube.lease import micro_time
from moe_kube.objects import EVENT, Ref
from moe_kube.throttle import TokenBucket
from moe_kube.waits import INSTANT_S, at_most

NOTE_BYTES = 1024
NAME_CHARS = 128
"""Limits of events.k8s.io/v1: the note in bytes of UTF-8, reason, action and reporting instance in characters."""
SERIES_ENDS_S = 360.0
"""A repeat after a longer pause is a new event."""
SERIES_EVERY_S = 60.0
"""A running series is written this often at most."""
ATTEMPTS = 3
RETRY_S = 5.0


@dataclass
class _Series:
    """One event and its repeats. `written` is the count that the server knows, 0 before the event exists."""

    ref: Ref
    body: dict[str, Any]
    last_s: float
    last_time: str
    count: int = 1
    written: int = 0
    due_s: float = 0.0
    attempts: int = 0
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:16])


class Recorder:
    """`record` at any time; `run` as a task writes them. What cannot be written is dropped and counted.

    `controller` is who reports, as `moestack.dev/operator`, and `instance` which of its processes. An object may cause
    `burst` events at once and then one each `refill_s`; repeats of one event are free. At most `limit` series are
    remembered.
    """

    def __init__(
        self,
        api: Api,
        clock: Clock,
        *,
        controller: str,
        instance: str,
        burst: int = 25,
        refill_s: float = 60.0,
        qps: float = 5.0,
        limit: int = 1000,
        on_dropped: Callable[[int], None] | None = None,
    ) -> None:
        self._api = api
        self._clock = clock
        self._controller = controller
        self._instance = instance[:NAME_CHARS]
        self._burst = burst
        self._refill_s = refill_s
        self._pace = TokenBucket(qps, max(1, int(qps * 10)), clock)
        self._limit = limit
        self._on_dropped = on_dropped
        self._series: OrderedDict[tuple[object, ...], _Series] = OrderedDict()
        self._objects: OrderedDict[tuple[Ref, str], TokenBucket] = OrderedDict()
        self._new = asyncio.Event()
        self._log = get_log("kube.events")
        self.dropped_total = 0

    def record(
        self,
        regarding: Ref,
        uid: str,
        *,
        reason: str,
        note: str,
        action: str = "Reconcile",
        type: Literal["Normal", "Warning"] = "Normal",
    ) -> None:
        """Note that something happened to an object: `reason` in CamelCase for machines, `note` for a person."""
        text = _cut(str(redact(note)), NOTE_BYTES)
        key = (regarding, uid, type, reason, action, text)
        now = self._clock.monotonic()
        series = self._series.get(key)
        if series is not None and now - series.last_s <= SERIES_ENDS_S:
            series.count += 1
            series.last_s, series.last_time = now, micro_time(self._clock.time())
            self._series.move_to_end(key)
            self._new.set()
            return
        if not self._allowed(regarding, uid) or not self._room():
            self._drop(1)
            return
        self._series[key] = self._begin(regarding, uid, type, reason, action, text)
        self._series.move_to_end(key)
        self._new.set()

    async def run(self) -> None:
        """Write what is recorded until cancelled."""
        while True:
            self._new.clear()
            await self.flush()
            pending = [series.due_s for series in self._series.values() if series.written < series.count]
            wait_s = min(pending, default=float("inf")) - self._clock.monotonic()
            if wait_s == float("inf"):
                await self._new.wait()
            elif wait_s > INSTANT_S:
                await at_most(self._clock, self._new.wait(), wait_s)

    async def flush(self) -> None:
        """Write everything that is due now, once."""
        now = self._clock.monotonic() + INSTANT_S
        for key, series in list(self._series.items()):
            if series.written < series.count and series.due_s <= now:
                await self._write(key, series)

    async def _write(self, key: tuple[object, ...], series: _Series) -> None:
        wait_s = self._pace.take()
        if wait_s > 0:
            await self._clock.sleep(wait_s)
        count = series.count
        ref = Ref(EVENT, series.ref.namespace or "default", f"{series.ref.name[:200]}.{series.name}")
        try:
            await self._send(ref, series, count)
        except (Busy, ServerError, Unreachable) as error:
            series.attempts += 1
            series.due_s = self._clock.monotonic() + max(RETRY_S * series.attempts, error.retry_after_s or 0.0)
            if series.attempts >= ATTEMPTS:
                self._give_up(key, series, error)
            return
        except ApiError as error:
            self._give_up(key, series, error)
            return
        series.written, series.attempts = max(series.written, count), 0
        series.due_s = self._clock.monotonic() + SERIES_EVERY_S

    async def _send(self, ref: Ref, series: _Series, count: int) -> None:
        repeats = {"count": count, "lastObservedTime": series.last_time}
        if series.written:
            try:
                await self._api.json_patch(ref, [{"op": "add", "path": "/series", "value": repeats}])
                return
            except NotFound:  # Events live an hour: this one has been cleared away.
                series.name = uuid.uuid4().hex[:16]
                ref = Ref(EVENT, ref.namespace, f"{series.ref.name[:200]}.{series.name}")
        body = {**series.body, "metadata": {"name": ref.name, "namespace": ref.namespace}}
        if count > 1:
            body["series"] = repeats
        try:
            await self._api.create(ref, body)
        except Conflict:
            return  # An attempt before, whose answer was lost.

    def _begin(self, ref: Ref, uid: str, type_: str, reason: str, action: str, note: str) -> _Series:
        stamp = micro_time(self._clock.time())
        regarding = {"apiVersion": ref.kind.api_version, "kind": ref.kind.kind, "name": ref.name, "uid": uid}
        if ref.namespace:
            regarding["namespace"] = ref.namespace
        body = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "eventTime": stamp,
            "reportingController": self._controller,
            "reportingInstance": self._instance,
            "action": action[:NAME_CHARS],
            "reason": reason[:NAME_CHARS],
            "regarding": regarding,
            "note": note,
            "type": type_,
        }
        return _Series(ref, body, self._clock.monotonic(), stamp)

    def _allowed(self, ref: Ref, uid: str) -> bool:
        bucket = self._objects.get((ref, uid))
        if bucket is None:
            bucket = self._objects[ref, uid] = TokenBucket(1 / self._refill_s, self._burst, self._clock)
        self._objects.move_to_end((ref, uid))
        if len(self._objects) > self._limit:
            self._objects.popitem(last=False)
        return bucket.try_take()

    def _room(self) -> bool:
        """Forget the series that has rested longest, if it is written."""
        if len(self._series) < self._limit:
            return True
        key = next((key for key, series in self._series.items() if series.written == series.count), None)
        if key is None:
            return False
        del self._series[key]
        return True

    def _give_up(self, key: tuple[object, ...], series: _Series, error: ApiError) -> None:
        self._log.warning("an event was dropped", regarding=str(series.ref), reason=str(error), status=error.status)
        self._series.pop(key, None)
        self._drop(series.count - series.written)

    def _drop(self, count: int) -> None:
        self.dropped_total += count
        if self._on_dropped is not None:
            self._on_dropped(count)


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, with a mark where something was left out."""
    raw = text.encode()
    if len(raw) <= limit:
        return text
    return raw[: limit - 3].decode("utf-8", "ignore") + "…"
