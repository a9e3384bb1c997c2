"""A board, a gateway and a Prometheus on real sockets that lose, refuse and lie as told; a clock that never waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from moe_core.signing import SignatureRefused, Signer, Verifier
from moe_core.wire import (
    Ack,
    EngineDigest,
    GatewayDigest,
    Knobs,
    LayerDigest,
    ReplicaDigest,
    Signed,
    TargetDigest,
)

DEPLOYMENT = "default/qwen3"


class InstantClock:
    """Time passes only by sleeping, and sleeping takes no time."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return 1_700_000_000.0 + self.now

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += max(0.0, seconds)
        await asyncio.sleep(0)


@dataclass
class FakeBoard:
    """The board's HTTP side with two ranks that take what they are given."""

    signer: Signer
    ranks: int = 2
    envelope: Signed | None = None
    version: int = 0
    applied: list[Knobs] = field(default_factory=list)
    posts: int = 0
    lose_before: int = 0  # posts to fail before they take effect
    lose_after: int = 0  # posts that take effect and whose answer is lost
    lose_afterwards: int = 0  # posts to fail after such a one
    down: bool = False
    silent_rank: int | None = None
    refuse: str | None = None
    waiting: int = 0
    running: int = 2
    skew: float = 1.0
    started_at_s: float = 1.0
    seq: int = 0
    frozen: bool = False  # the engine is dead: its last digest stays

    @property
    def knobs(self) -> Knobs | None:
        return None if self.envelope is None else Knobs.model_validate_json(self.envelope.payload)

    def put(self, knobs: Knobs) -> None:
        """As if another writer had sent it."""
        self.envelope, self.version = self.signer.sign(knobs), knobs.version

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/knobs", self._post),
            web.get("/v1/knobs", self._get),
            web.get("/v1/acks", self._acks),
            web.get("/v1/digests", self._digests),
        ]

    async def _post(self, request: web.Request) -> web.Response:
        self.posts += 1
        if self.down:
            return _json({"error": "down"}, 503)
        if self.lose_before > 0:
            self.lose_before -= 1
            return _cut(request)
        envelope = Signed.model_validate_json(await request.read())
        try:
            knobs = Verifier([self.signer.public_pem()]).open(envelope, Knobs)
        except SignatureRefused as error:
            return _json({"error": str(error)}, 403)
        if knobs.version <= self.version:
            if self.envelope is not None and self.envelope.payload == envelope.payload:
                return _json({"version": self.version})
            return _json({"error": "older", "version": self.version}, 409)
        self.envelope, self.version = envelope, knobs.version
        self.applied.append(knobs)
        if self.lose_after > 0:
            self.lose_after -= 1
            self.lose_before = self.lose_afterwards
            return _cut(request)
        return _json({"version": self.version}, 202)

    async def _get(self, _: web.Request) -> web.Response:
        if self.down:
            return _json({"error": "down"}, 503)
        if self.envelope is None:
            return _json({"error": "none"}, 404)
        return _json(self.envelope.to_json())

    async def _acks(self, request: web.Request) -> web.Response:
        version = int(request.query["version"])
        acks = [
            Ack(replica="r0", rank=rank, version=version, applied_at_s=0.0, error=self.refuse)
            for rank in range(self.ranks)
            if rank != self.silent_rank
        ]
        complete = self.silent_rank is None and self.refuse is None
        expected = [{"replica": "r0", "ranks": self.ranks}]
        shown = [ack.to_json() for ack in acks]
        return _json({"version": version, "complete": complete, "expected": expected, "acks": shown})

    async def _digests(self, _: web.Request) -> web.Response:
        if self.down:
            return _json({"error": "down"}, 503)
        self.seq += 0 if self.frozen else 1
        knobs = self.knobs
        limit = 16 if knobs is None or knobs.engine.max_active_seqs is None else knobs.engine.max_active_seqs
        digest = replica_digest(
            seq=self.seq,
            running=self.running,
            waiting=self.waiting,
            limit=limit,
            skew=self.skew,
            started_at_s=self.started_at_s,
            version=self.version,
        )
        return _json([digest.to_json()])


@dataclass
class FakeGateway:
    """The gateway's admin port."""

    arrivals: int = 50
    ttft_p95_s: float | None = 0.2
    itl_p95_s: float | None = 0.02
    versions: list[int] = field(default_factory=list)
    refuse: int = 0
    closed_api: bool = True

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/knobs", self._post), web.get("/v1/digest", self._digest)]

    async def _post(self, request: web.Request) -> web.Response:
        if self.refuse > 0:
            self.refuse -= 1
            return _json({"error": "busy"}, 503)
        knobs = Knobs.model_validate_json(Signed.model_validate_json(await request.read()).payload)
        self.versions.append(knobs.version)
        return _json(Ack(replica="g0", rank=0, version=knobs.version, applied_at_s=0.0).to_json())

    async def _digest(self, request: web.Request) -> web.Response:
        digest = GatewayDigest(
            gateway="g0",
            at_s=0.0,
            window_s=float(request.query["window"]),
            knobs_version=max(self.versions, default=0),
            arrivals=self.arrivals,
            completed=self.arrivals,
            prompt_tokens=300 * self.arrivals,
            output_tokens=60 * self.arrivals,
            ttft_p95_s=self.ttft_p95_s,
            itl_p95_s=self.itl_p95_s,
            slo_attained=1.0,
            targets=(
                TargetDigest(name="local", local=True, requests=self.arrivals),
                *((TargetDigest(name="gpt", local=False),) if self.closed_api else ()),
            ),
        )
        return _json(digest.to_json())


@dataclass
class FakePrometheus:
    """Answers instant queries by the name of what they ask; `values` overrides, None is an empty vector."""

    answer: Callable[[str], object]
    queries: list[str] = field(default_factory=list)

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/api/v1/query", self._query)]

    async def _query(self, request: web.Request) -> web.Response:
        query = request.query["query"]
        self.queries.append(query)
        value = self.answer(query)
        if isinstance(value, web.Response):
            return value
        result = [] if value is None else [{"metric": {}, "value": [1_700_000_000, str(value)]}]
        return _json({"status": "success", "data": {"resultType": "vector", "result": result}})


@asynccontextmanager
async def served(routes: list[web.RouteDef], port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """Serve routes, on a free port unless one is named; yields the base URL."""
    app = web.Application()
    app.router.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield f"http://{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def replica_digest(
    *,
    seq: int = 1,
    replica: str = "r0",
    running: int = 2,
    waiting: int = 0,
    limit: int = 16,
    skew: float = 1.0,
    started_at_s: float = 1.0,
    version: int = 0,
    tokens: int | None = None,
    lost: float = 0.0,
    preemptions: int = 0,
) -> ReplicaDigest:
    counted = 1000 * seq if tokens is None else tokens
    return ReplicaDigest(
        replica=replica,
        started_at_s=started_at_s,
        at_s=float(seq),
        seq=seq,
        ranks=2,
        knobs_version=version,
        engine=EngineDigest(
            running=running,
            waiting=waiting,
            kv_usage=0.2,
            max_active_seqs=limit,
            max_batched_tokens=2048,
            ceiling_active_seqs=64,
            ceiling_batched_tokens=2048,
            prompt_tokens_total=counted,
            preemptions_total=preemptions,
        ),
        layers=(
            LayerDigest(
                layer=0,
                hooked=True,
                slots_total=4 * counted,
                tokens_total=counted,
                lost_gate_mass_total=lost,
                window_slots=4000,
                rank_max_over_mean=skew,
                demand_rank_max_over_mean=skew,
            ),
            LayerDigest(layer=1, hooked=False, slots_total=0, tokens_total=0),
        ),
    )


def _cut(request: web.Request) -> web.Response:
    """Drop the connection without an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(document), status=status, content_type="application/json")
