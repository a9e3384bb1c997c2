"""What keys with limits have taken at the other workers of all pods, so that a limit is one however many there are.

Each worker tells totals of what its keys took, not steps: what a lost datagram had is in the next. Keys go by a digest
of their id. What others took of a key that this worker has not met is kept for a minute, which is as long as a bucket
remembers. Between the moment of a request and its telling, some 10 ms, others do not know of it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from moe_gateway.limits import KEYS_MAX, MINUTE_S

TOLD_MOST = 24
"""Keys in a datagram; the others are in the next."""
TOLD_TIMES = 3
"""How often what changed is told: one of three datagrams comes."""
SILENT_S = 1.0
"""A worker silent for longer has nothing in flight."""
FORGET_S = 60.0
_DIGEST_BYTES = 9

Count = Annotated[int, Field(ge=0)]
Total = tuple[Count, int, Count, Count, int]
"""Of a key: requests and tokens taken since its worker began, requests in flight, and how many of those requests and
tokens were taken since it was last told: all that counts for who has not heard of it before."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken of a key elsewhere at monotonic second `at_s`. Tokens may be given back."""

    at_s: float
    requests: int
    tokens: int


@dataclass(slots=True)
class _Own:
    requests: int = 0
    tokens: int = 0
    in_flight: int = 0
    to_tell: int = 0
    told: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class _Peer:
    heard_s: float
    totals: dict[str, Total] = field(default_factory=dict)


def tag_of(key_id: str) -> str:
    """The name that a key has between workers."""
    return hashlib.blake2b(key_id.encode(), digest_size=_DIGEST_BYTES).hexdigest()


class KeyShares:
    """Totals of this worker to be told, and what the others told."""

    def __init__(self) -> None:
        self.telling = False
        """Whether there are others to tell: nothing is kept for nobody."""
        self._own: OrderedDict[str, _Own] = OrderedDict()
        self._queue: OrderedDict[str, _Own] = OrderedDict()
        self._fresh = 0
        self._peers: dict[str, _Peer] = {}
        self._elsewhere: OrderedDict[str, list[Taken]] = OrderedDict()

    def took(self, key_id: str, requests: int, tokens: int, in_flight: int) -> None:
        """This worker took so much more of a key, and has `in_flight` of its requests now."""
        if not self.telling:
            return
        tag = tag_of(key_id)
        own = self._own.setdefault(tag, _Own())
        own.requests, own.tokens, own.in_flight = own.requests + requests, own.tokens + tokens, in_flight
        self._fresh += own.to_tell != TOLD_TIMES
        own.to_tell = TOLD_TIMES
        self._queue.setdefault(tag, own)
        self._own.move_to_end(tag)
        if len(self._own) > KEYS_MAX:
            oldest, gone = self._own.popitem(last=False)
            self._fresh -= gone.to_tell == TOLD_TIMES
            self._queue.pop(oldest, None)

    def pending(self) -> bool:
        """Whether something was not told at all yet."""
        return self._fresh > 0

    def tell(self) -> dict[str, Total]:
        """What the next datagram says, and is told again in the next ones."""
        told: dict[str, Total] = {}
        for _ in range(min(TOLD_MOST, len(self._queue))):
            tag, own = self._queue.popitem(last=False)
            told[tag] = (
                own.requests,
                own.tokens,
                own.in_flight,
                own.requests - own.told[0],
                own.tokens - own.told[1],
            )
            own.told = (own.requests, own.tokens)
            self._fresh -= own.to_tell == TOLD_TIMES
            own.to_tell -= 1
        for tag in told:
            if self._own[tag].to_tell:
                self._queue[tag] = self._own[tag]
        return told

    def hear(self, worker: str, totals: dict[str, Total], now_s: float) -> None:
        """Another worker told its totals."""
        for name in [name for name, peer in self._peers.items() if now_s - peer.heard_s > FORGET_S]:
            del self._peers[name]
        peer = self._peers.setdefault(worker, _Peer(now_s))
        peer.heard_s = now_s
        for tag, total in totals.items():
            before = peer.totals.get(tag)
            peer.totals[tag] = total
            if before is None or total[0] < before[0]:  # unheard of until now, or begun anew
                requests, tokens = total[3], total[4]
            else:
                requests, tokens = total[0] - before[0], total[1] - before[1]
            if requests or tokens:
                self._elsewhere.setdefault(tag, []).append(Taken(now_s, requests, tokens))
                self._elsewhere.move_to_end(tag)
        self._forget(now_s)

    def elsewhere(self, key_id: str, now_s: float) -> Iterator[Taken]:
        """What others took of a key since this was last asked, a minute back at most, oldest first."""
        if not self._elsewhere:
            return iter(())
        taken = self._elsewhere.pop(tag_of(key_id), [])
        return (one for one in taken if now_s - one.at_s <= MINUTE_S)

    def knows(self, key_id: str) -> bool:
        """Whether others took something of a key that was not asked for yet."""
        return tag_of(key_id) in self._elsewhere

    def in_flight(self, key_id: str, now_s: float) -> int:
        """Requests of a key that the others have open."""
        if not self._peers:
            return 0
        tag = tag_of(key_id)
        alive = (peer for peer in self._peers.values() if now_s - peer.heard_s <= SILENT_S)
        return sum(peer.totals[tag][2] for peer in alive if tag in peer.totals)

    def _forget(self, now_s: float) -> None:
        while self._elsewhere:
            tag, taken = next(iter(self._elsewhere.items()))
            if now_s - taken[-1].at_s <= MINUTE_S and len(self._elsewhere) <= KEYS_MAX:
                break
            del self._elsewhere[tag]
