"""What a key may take: token buckets of requests and tokens, and requests in flight. Pure but for the book at the end.

A bucket holds a minute's allowance and fills evenly (https://en.wikipedia.org/wiki/Token_bucket). Tokens are taken by
estimate when a request comes and put right when it has ended, so a bucket may stand below zero: its key then waits.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from moe_core.config import KeyLimits

MINUTE_S = 60.0
KEYS_MAX = 50_000
"""Most keys whose use is remembered; the ones idle for longest are forgotten, and start full."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """`level` of `capacity` units at monotonic second `at_s`."""

    capacity: int
    level: float
    at_s: float

    def now(self, now_s: float) -> Bucket:
        filled = self.level + max(0.0, now_s - self.at_s) * self.capacity / MINUTE_S
        return Bucket(self.capacity, min(float(self.capacity), filled), max(now_s, self.at_s))

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` may be taken; what is more than a minute's allowance needs a full bucket."""
        return max(0.0, min(amount, self.capacity) - self.level) * MINUTE_S / self.capacity

    def less(self, amount: float) -> Bucket:
        return Bucket(self.capacity, min(float(self.capacity), self.level - amount), self.at_s)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a key has taken. A bucket is None where its limit is."""

    limits: KeyLimits
    requests: Bucket | None = None
    tokens: Bucket | None = None
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Exceeded:
    """Which limit a request would break, and how long to wait."""

    what: str
    limit: int
    wait_s: float


def begun(limits: KeyLimits, now_s: float) -> Usage:
    def full(limit: int | None) -> Bucket | None:
        return None if limit is None else Bucket(limit, float(limit), now_s)

    return Usage(limits, full(limits.requests_per_minute), full(limits.tokens_per_minute))


def under(usage: Usage, limits: KeyLimits, now_s: float) -> Usage:
    """The usage under other limits: what was taken stays taken."""
    if usage.limits is limits or usage.limits == limits:
        return usage
    fresh = begun(limits, now_s)

    def moved(old: Bucket | None, new: Bucket | None) -> Bucket | None:
        if old is None or new is None:
            return new
        old = old.now(now_s)
        return new.less(old.capacity - old.level)

    return Usage(limits, moved(usage.requests, fresh.requests), moved(usage.tokens, fresh.tokens), usage.in_flight)


def admit(usage: Usage, now_s: float, elsewhere: int = 0) -> tuple[Usage, Exceeded | None]:
    """Take one request, or say why not. What is refused takes nothing. `elsewhere`: in flight at other workers."""
    limits = usage.limits
    if limits.concurrent is not None and usage.in_flight + elsewhere >= limits.concurrent:
        return usage, Exceeded("concurrent requests", limits.concurrent, 1.0)
    requests = None if usage.requests is None else usage.requests.now(now_s)
    tokens = None if usage.tokens is None else usage.tokens.now(now_s)
    if requests is not None and (wait_s := requests.wait_s(1)) > 0:
        return usage, Exceeded("requests per minute", requests.capacity, wait_s)
    if tokens is not None and (wait_s := tokens.wait_s(1)) > 0:
        return usage, Exceeded("tokens per minute", tokens.capacity, wait_s)
    taken = None if requests is None else requests.less(1)
    return Usage(limits, taken, tokens, usage.in_flight + 1), None


def charge(usage: Usage, tokens: int, now_s: float) -> tuple[Usage, Exceeded | None]:
    """Take the tokens that a request is expected to use."""
    if usage.tokens is None:
        return usage, None
    bucket = usage.tokens.now(now_s)
    if (wait_s := bucket.wait_s(tokens)) > 0:
        return usage, Exceeded("tokens per minute", bucket.capacity, wait_s)
    return Usage(usage.limits, usage.requests, bucket.less(tokens), usage.in_flight), None


def ended(usage: Usage, charged: int, used: int, now_s: float) -> Usage:
    """The request is over: its tokens are put right by what it used."""
    bucket = usage.tokens
    if bucket is not None:
        bucket = bucket.now(now_s).less(used - charged)
    return Usage(usage.limits, usage.requests, bucket, max(0, usage.in_flight - 1))


def taken(usage: Usage, requests: int, tokens: int, at_s: float) -> Usage:
    """The same key took so much elsewhere, at a moment that may be past."""

    def less(bucket: Bucket | None, amount: int) -> Bucket | None:
        return None if bucket is None else bucket.now(at_s).less(amount)

    return Usage(usage.limits, less(usage.requests, requests), less(usage.tokens, tokens), usage.in_flight)


def headers(usage: Usage, now_s: float) -> list[tuple[bytes, str]]:
    """What OpenAI's clients read of their limits."""
    found: list[tuple[bytes, str]] = []
    for name, kept in (("requests", usage.requests), ("tokens", usage.tokens)):
        if kept is not None:
            bucket = kept.now(now_s)
            found += [
                (f"x-ratelimit-limit-{name}".encode(), str(bucket.capacity)),
                (f"x-ratelimit-remaining-{name}".encode(), str(max(0, int(bucket.level)))),
                (f"x-ratelimit-reset-{name}".encode(), _duration(bucket.wait_s(bucket.capacity))),
            ]
    return found


class Book:
    """The usage of each key, in this process."""

    def __init__(self) -> None:
        self._usage: OrderedDict[str, Usage] = OrderedDict()

    def of(self, key_id: str, limits: KeyLimits, now_s: float, since_s: float | None = None) -> Usage:
        """What the key has taken; a key that was never here starts full, at `since_s` where that is given."""
        usage = self._usage.get(key_id)
        return begun(limits, now_s if since_s is None else since_s) if usage is None else under(usage, limits, now_s)

    def known(self, key_id: str) -> Usage | None:
        return self._usage.get(key_id)

    def keep(self, key_id: str, usage: Usage) -> None:
        self._usage[key_id] = usage
        self._usage.move_to_end(key_id)
        while len(self._usage) > KEYS_MAX:
            oldest, idle = next(iter(self._usage.items()))
            if idle.in_flight:
                self._usage.move_to_end(oldest)
                break
            del self._usage[oldest]


def _duration(seconds: float) -> str:
    """Seconds as OpenAI writes them: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{int(rest)}s" if minutes else f"{rest:g}s"
