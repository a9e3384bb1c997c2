"""What the workers of all pods tell one another, so that each sees the load that all of them have sent.

Each worker knows its own requests at once, and of others' only what an engine reports a second later: in a burst eight
of them then send eight times what fits. So each tells the others, by one UDP datagram at most every 10 ms, how many
prompt tokens wait at each revision, what it has just measured there, and what keys with limits took. What is lost is
made up for by the next; ages stand in place of times, so that clocks need not agree; a worker that has been silent for
a second counts no more.
Without any of this a worker decides by its own ledger and the reports. docs/adr/0031-ledgers-by-datagram.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from moe_core.clock import Clock
from moe_core.config import SiblingsConfig
from moe_core.latency import Ended, First
from moe_gateway.key_shares import TOLD_MOST, KeyShares, Total

if TYPE_CHECKING:
    from moe_gateway.state import Gateway

TELL_EVERY_S = 0.01
HEARTBEAT_S = 0.25
SILENT_S = 1.0
RESOLVE_EVERY_S = 5.0
MAC_BYTES = 16
LEARN_MOST = 64
"""Measurements in a datagram at most, so that it stays within 8 KiB; what is over is the sender's alone."""


class Counts(BaseModel):
    """A worker's ledger of one revision. Ages are seconds."""

    waiting: int = Field(ge=0)
    tokens: float = Field(ge=0, allow_inf_nan=False)
    running: int = Field(ge=0)
    head_tokens: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    head_age_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    progress_age_s: float = Field(default=1e9, ge=0, allow_inf_nan=False)


class Told(BaseModel):
    """One datagram."""

    deployment: str
    worker: str
    number: int
    counts: dict[str, Counts]
    firsts: list[tuple[str, First]] = Field(default=[], max_length=LEARN_MOST)
    ended: list[tuple[str, Ended]] = Field(default=[], max_length=LEARN_MOST)
    keys: dict[str, Total] = Field(default={}, max_length=TOLD_MOST)


_TOLD = TypeAdapter(Told)


@dataclass
class _Peer:
    number: int = -1
    heard_s: float = -math.inf
    counts: dict[str, Counts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class View:
    """Load of a revision that all workers together know of; `head_s`: time at most spent on the oldest prompt."""

    waiting: int
    tokens: float
    running: int
    head_tokens: float
    head_s: float


class Siblings:
    """What the others told, and what is to be told next. Without a configuration it only knows the own ledger."""

    def __init__(self, deployment: str, clock: Clock, shares: KeyShares | None = None) -> None:
        self._deployment, self._clock = deployment, clock
        self.shares = KeyShares() if shares is None else shares
        self._peers: dict[str, _Peer] = {}
        self.unsaid: list[tuple[str, First | Ended]] = []
        self.listening = False
        self._number = 0

    def view(self, name: str, own: tuple[int, float, int], head: tuple[float, float], progress_s: float) -> View:
        """Own counts and those of every worker heard of within a second."""
        now_s = self._clock.monotonic()
        waiting, tokens, running = own
        since_s, head_tokens = head
        for peer in self._peers.values():
            age_s = now_s - peer.heard_s
            counts = peer.counts.get(name)
            if counts is None or age_s > SILENT_S:
                continue
            waiting, tokens, running = waiting + counts.waiting, tokens + counts.tokens, running + counts.running
            progress_s = max(progress_s, peer.heard_s - counts.progress_age_s)
            if counts.waiting and peer.heard_s - counts.head_age_s < since_s:
                since_s, head_tokens = peer.heard_s - counts.head_age_s, counts.head_tokens
        head_s = max(0.0, now_s - max(since_s, progress_s)) if math.isfinite(since_s) else 0.0
        return View(waiting, tokens, running, head_tokens, head_s)

    def note(self, name: str, seen: First | Ended) -> None:
        """Something was measured that the others should learn."""
        if self.listening and len(self.unsaid) < LEARN_MOST:
            self.unsaid.append((name, seen))

    def datagram(self, worker: str, counts: dict[str, Counts], key: bytes) -> bytes:
        """What to tell now."""
        self._number += 1
        firsts = [(name, seen) for name, seen in self.unsaid if isinstance(seen, First)]
        ended = [(name, seen) for name, seen in self.unsaid if isinstance(seen, Ended)]
        self.unsaid = []
        told = {
            "deployment": self._deployment,
            "worker": worker,
            "number": self._number,
            "counts": {name: each.model_dump() for name, each in counts.items()},
            "firsts": firsts,
            "ended": ended,
            "keys": self.shares.tell(),
        }
        body = orjson.dumps(told)
        return _mac(key, body) + body

    def hear(self, datagram: bytes, worker: str, key: bytes) -> Iterable[tuple[str, First | Ended]]:
        """Remember what another worker said; what it measured. Nothing for what is not signed, ours or new."""
        body = datagram[MAC_BYTES:]
        if not hmac.compare_digest(datagram[:MAC_BYTES], _mac(key, body)):
            return ()
        try:
            told = _TOLD.validate_json(body)
        except ValidationError:
            return ()
        if told.deployment != self._deployment or told.worker == worker:
            return ()
        peer = self._peers.setdefault(told.worker, _Peer())
        now_s = self._clock.monotonic()
        if told.number <= peer.number and now_s - peer.heard_s < SILENT_S:
            return ()
        peer.number, peer.heard_s, peer.counts = told.number, now_s, told.counts
        self.shares.hear(told.worker, told.keys, now_s)
        for name in [name for name, each in self._peers.items() if now_s - each.heard_s > 60 * SILENT_S]:
            del self._peers[name]
        return [*told.firsts, *told.ended]


def _mac(key: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(body, key=key[:64], digest_size=MAC_BYTES).digest()


class Telling(asyncio.DatagramProtocol):
    """The socket: hears the others, and tells them on every change, 10 ms apart at least."""

    def __init__(
        self, gateway: Gateway, config: SiblingsConfig, sock: socket.socket | None = None, key: bytes | None = None
    ) -> None:
        """`sock` and `key`: given by the parent of a pod's workers; else bound and read here."""
        self._gateway, self._config, self._sock = gateway, config, sock
        self._key = key or (b"" if config.key_file is None else Path(config.key_file).read_bytes().strip())
        self._known: dict[str, frozenset[str]] = {}
        self._to: list[tuple[str, int]] = []
        self._transport: asyncio.DatagramTransport | None = None
        self._last: dict[str, tuple[int, float, int]] = {}

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        gateway = self._gateway
        now_s, itl_slo_s = gateway.clock.monotonic(), gateway.config.slo.itl_p95_s
        for name, seen in gateway.siblings.hear(data, gateway.name, self._key):
            upstream = gateway.upstreams.get(name)
            if upstream is not None:
                upstream.learn(seen, now_s, itl_slo_s)

    async def run(self) -> None:
        """Tell and hear until cancelled. A port that is taken is another worker's of this pod: the next is tried."""
        loop, gateway = asyncio.get_running_loop(), self._gateway
        own = await self._bind(loop)
        gateway.siblings.listening = gateway.siblings.shares.telling = True
        told_s = -math.inf
        finding = asyncio.create_task(self._find(loop, own), name="find siblings")
        try:
            while True:
                now_s = gateway.clock.monotonic()
                news = gateway.siblings.unsaid or gateway.siblings.shares.pending()
                if self._changed(now_s) or news or now_s - told_s >= HEARTBEAT_S:
                    told_s = now_s
                    self._tell(now_s)
                await gateway.clock.sleep(TELL_EVERY_S)
        finally:
            gateway.siblings.listening = gateway.siblings.shares.telling = False
            finding.cancel()
            if self._transport is not None:
                self._transport.close()

    async def _bind(self, loop: asyncio.AbstractEventLoop) -> int:
        config = self._config
        if self._sock is not None:
            self._transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=self._sock)
            port: int = self._sock.getsockname()[1]
            return port
        for port in range(config.port, config.port + config.workers):
            try:
                self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(config.host, port))
            except OSError:
                continue
            return port
        raise OSError(f"siblings.port: no free port of {config.port} to {config.port + config.workers - 1}")

    async def _find(self, loop: asyncio.AbstractEventLoop, own: int) -> None:
        """Look for the others again and again, beside the telling: a name server may take its time."""
        while True:
            self._to = await self._resolve(loop, own)
            await self._gateway.clock.sleep(RESOLVE_EVERY_S)

    async def _resolve(self, loop: asyncio.AbstractEventLoop, own: int) -> list[tuple[str, int]]:
        """Every worker of every pod: all addresses of each name, all ports of each address. A name that cannot be
        looked up now keeps the addresses that it had."""
        config = self._config
        ports = range(config.port, config.port + config.workers)
        found = {("127.0.0.1", port) for port in ports if port != own}
        for name in config.peers:
            try:
                infos = await loop.getaddrinfo(name, None, family=socket.AF_INET, type=socket.SOCK_DGRAM)
                self._known[name] = frozenset(str(info[4][0]) for info in infos)
            except OSError:
                pass
            found |= {(address, port) for address in self._known.get(name, ()) for port in ports}
        return sorted(found)

    def _changed(self, now_s: float) -> bool:
        counts = {upstream.name: upstream.ledger.counts(now_s) for upstream in self._gateway.fleet.revisions}
        changed = counts != self._last
        self._last = counts
        return changed

    def _tell(self, now_s: float) -> None:
        counts = {}
        for upstream in self._gateway.fleet.revisions:
            waiting, tokens, running = self._last.get(upstream.name, (0, 0.0, 0))
            since_s, head_tokens = upstream.ledger.head()
            counts[upstream.name] = Counts(
                waiting=waiting,
                tokens=max(0.0, tokens),
                running=running,
                head_tokens=head_tokens,
                head_age_s=max(0.0, now_s - since_s) if math.isfinite(since_s) else 0.0,
                progress_age_s=max(0.0, now_s - upstream.ledger.progress_s),
            )
        data = self._gateway.siblings.datagram(self._gateway.name, counts, self._key)
        if self._transport is not None:
            for address in self._to:
                self._transport.sendto(data, address)
