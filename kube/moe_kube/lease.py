"""One leader at a time, by a Lease object of coordination.k8s.io and compare-and-swap on its version.

No clock is ever compared with another one's. A follower takes a lease over when its record has not changed for the
whole lease duration on the follower's own monotonic clock. A leader counts from before it *sent* the renewal that
succeeded, and only up to the renew deadline, which is shorter than the duration: what it may still do ends before
anybody else may begin, with the difference as a reserve for a write on its way.
"""

from __future__ import annotations

import asyncio
import datetime
import random
import socket
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from moe_core.clock import Clock
from moe_core.log import get_log
from moe_kube.api import Api
from moe_kube.errors import ApiError, Conflict, NotFound, Unreachable
from moe_kube.objects import Obj, Ref
from moe_kube.waits import INSTANT_S, at_most

T = TypeVar("T")
Callback = Callable[[], Awaitable[None]]


def own_identity() -> str:
    """A name for this process that no other one has, not even its own successor in the same pod."""
    return f"{socket.gethostname()}_{uuid.uuid4().hex[:12]}"


async def _nothing() -> None:
    return None


class Election:
    """Takes part in the election until told to stop: `run` it as a task, on the bare client, past fence and throttle.

    `on_started` is awaited when leadership begins and should return soon. `on_stopped` is awaited when it has ended or
    is being given up; writes are refused by then (`held_for_s` is 0), and it should return when none is under way: only
    then is the lease released to another one.
    """

    def __init__(
        self,
        api: Api,
        ref: Ref,
        *,
        clock: Clock,
        identity: str | None = None,
        duration_s: int = 15,
        renew_deadline_s: float = 10.0,
        retry_s: float = 2.0,
        on_started: Callback = _nothing,
        on_stopped: Callback = _nothing,
        rng: random.Random | None = None,
    ) -> None:
        if not 0 < retry_s < renew_deadline_s < duration_s:
            raise ValueError("an election needs 0 < retry_s < renew_deadline_s < duration_s")
        self.identity = identity or own_identity()
        self.holder = ""
        """Who leads, as far as the record tells."""
        self._api = api
        self._ref = ref
        self._clock = clock
        self._duration_s = duration_s
        self._renew_deadline_s = renew_deadline_s
        self._retry_s = retry_s
        self._on_started = on_started
        self._on_stopped = on_stopped
        self._rng = rng or random.Random()
        self._held_until = float("-inf")
        self._leading = False
        self._stopping = asyncio.Event()
        self._record: Obj | None = None
        self._changed_at = float("-inf")
        self._log = get_log("kube.lease", lease=str(ref), identity=self.identity)

    @property
    def leading(self) -> bool:
        return self.held_for_s() > 0

    def held_for_s(self) -> float:
        """Seconds for which this process may certainly write; 0 for a follower."""
        return max(0.0, self._held_until - self._clock.monotonic())

    async def run(self) -> None:
        """Be a candidate, lead, and be a candidate again, until `stop`."""
        try:
            while not self._stopping.is_set():
                await self._turn()
        finally:
            await self._end("stopped")
            await self._release()

    def stop(self) -> None:
        """Give the leadership up; `run` returns when the lease is released."""
        self._stopping.set()

    async def _turn(self) -> None:
        """One attempt to acquire or renew, and the wait until the next one."""
        left_s = self.held_for_s() if self._leading else self._renew_deadline_s
        attempt = self._within(self._attempt(), left_s) if left_s > 0 else None
        try:
            if attempt is not None:
                await attempt
        except ApiError as error:
            self._log.warning("the lease could not be read or written", reason=str(error), status=error.status)
        if self._leading and not self.leading:
            await self._end("not renewed in time")
        elif not self._leading and self.leading:
            self._leading = True
            self._log.info("leading")
            await self._on_started()
        wait_s = self._retry_s * (1.0 if self._leading else self._rng.uniform(1.0, 2.0))
        if self._leading:
            wait_s = max(INSTANT_S, min(wait_s, self.held_for_s()))
        await at_most(self._clock, self._stopping.wait(), wait_s)

    async def _attempt(self) -> None:
        if self._record is None or not self._leading:
            await self._read()
        if self._record is None:
            # Deleted under a living leader, it is left alone for as long as that one may believe in it.
            if self._leading or self._clock.monotonic() >= self._changed_at + self._duration_s:
                await self._write()
            return
        spec = self._record.get("spec") or {}
        holder = self._heed()
        if holder in ("", self.identity):
            await self._write()
        elif self._clock.monotonic() >= self._changed_at + float(spec.get("leaseDurationSeconds") or self._duration_s):
            self._log.info("the leader has not renewed its lease: taking it", holder=holder)
            await self._write()

    def _heed(self) -> str:
        """Who holds the lease by the record; if that is another one, it is not we."""
        spec = (self._record or {}).get("spec") or {}
        self.holder = spec.get("holderIdentity") or ""
        if self.holder not in ("", self.identity):
            self._held_until = float("-inf")
        return self.holder

    async def _read(self) -> None:
        """Look at the record, and note when it last changed on our own clock."""
        try:
            record = await self._api.get(self._ref)
        except NotFound as error:
            if error.kind_missing:
                raise
            self._record = None
            return
        if self._record is None or record["metadata"].get("resourceVersion") != self._version(self._record):
            self._changed_at = self._clock.monotonic()
        self._record = record

    async def _write(self) -> None:
        """Create or replace the record in our name; on success the lease is held from before the call."""
        sent_at = self._clock.monotonic()
        body = self._body(self.identity, self._duration_s)
        try:
            if self._record is None:
                answer = await self._api.create(self._ref, body)
            else:
                answer = await self._api.replace(self._ref, body)
        except (Conflict, NotFound) as error:
            if self._record is None and isinstance(error, NotFound):
                raise  # The namespace is missing.
            # Another candidate, or an earlier write of ours whose answer was lost: the record tells which.
            self._record = None
            await self._read()
            self._heed()
            return
        self._record = answer
        self._changed_at = self._clock.monotonic()
        self.holder = self.identity
        self._held_until = sent_at + self._renew_deadline_s

    def _body(self, holder: str, duration_s: int) -> dict[str, Any]:
        now = micro_time(self._clock.time())
        record = self._record or {}
        spec = dict(record.get("spec") or {})
        before = spec.pop("holderIdentity", None) or ""
        if holder and before != holder:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + (1 if record else 0)
        spec |= {"leaseDurationSeconds": duration_s, "renewTime": now}
        if holder:
            spec["holderIdentity"] = holder
        meta = {key: value for key, value in record.get("metadata", {}).items() if key != "managedFields"}
        return {
            "apiVersion": self._ref.kind.api_version,
            "kind": self._ref.kind.kind,
            "metadata": {"name": self._ref.name, "namespace": self._ref.namespace, **meta},
            "spec": spec,
        }

    async def _end(self, why: str) -> None:
        self._held_until = float("-inf")
        if not self._leading:
            return
        self._leading = False
        self._log.warning("no longer leading", why=why)
        await self._on_stopped()

    async def _release(self) -> None:
        """Let the next one begin at once. What fails here costs only time: the lease runs out by itself."""
        if self._record is None or (self._record.get("spec") or {}).get("holderIdentity") != self.identity:
            return
        try:
            await self._within(self._api.replace(self._ref, self._body("", 1)), self._renew_deadline_s)
        except ApiError as error:
            self._log.warning("the lease could not be released", reason=str(error), status=error.status)
        self._record = None

    @staticmethod
    def _version(record: Obj) -> object:
        return record["metadata"].get("resourceVersion")

    async def _within(self, call: Awaitable[T], seconds: float) -> T:
        """The call's result; Unreachable if it takes longer on our clock."""
        task = asyncio.ensure_future(call)
        try:
            await at_most(self._clock, asyncio.shield(task), seconds)
            if task.done():
                return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        raise Unreachable(f"{self._ref}: no answer in {seconds:.1f} s")


def micro_time(unix_s: float) -> str:
    """MicroTime of the Kubernetes API: RFC 3339 in UTC with six digits of a second."""
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
