"""Client-side pace: a token bucket before the API server, so that a large cluster's restart does not flood it."""

from __future__ import annotations

from moe_core.clock import Clock
from moe_kube.api import Api
from moe_kube.calls import Call, Gate


class TokenBucket:
    """`qps` tokens a second, at most `burst` of them saved up. Whoever finds none is told when its token will be there.

    Tokens are promised in the order asked, so nobody is overtaken.
    """

    def __init__(self, qps: float, burst: int, clock: Clock) -> None:
        if qps <= 0 or burst < 1:
            raise ValueError("a token bucket needs qps > 0 and burst >= 1")
        self._qps = qps
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._at = clock.monotonic()

    def take(self) -> float:
        """Take one token; seconds until it may be used (0: now)."""
        self._refill()
        self._tokens -= 1.0
        return max(0.0, -self._tokens / self._qps)

    def try_take(self) -> bool:
        """Take one token if there is one now."""
        self._refill()
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _refill(self) -> None:
        now = self._clock.monotonic()
        self._tokens = min(float(self._burst), self._tokens + (now - self._at) * self._qps)
        self._at = now


class Throttled(Gate):
    """An `Api` at which each call takes a token first; a watch takes one when it begins.

    The lease is renewed beside it, never through it: a backlog of writes must not cost the leadership.
    """

    def __init__(self, api: Api, *, qps: float, burst: int, clock: Clock) -> None:
        super().__init__(api)
        self._bucket = TokenBucket(qps, burst, clock)
        self._clock = clock
        self.waited_s_total = 0.0

    async def before(self, call: Call, timeout_s: float | None) -> float | None:
        wait_s = self._bucket.take()
        if wait_s > 0:
            self.waited_s_total += wait_s
            await self._clock.sleep(wait_s)
        return timeout_s
