"""Many deployments in one tuner process: time of a tick, and memory.

    python -m benchmarks.tuner_scale [--deployments 100] [--seconds 120]

A child process plays a board, a gateway and a Prometheus for each deployment, over sockets of their own; this process
runs the tuner of production on all of them, with its journals, studies (SQLite) and signed changes. One deployment in
five meets a burst each minute, one in fifty has a board that is gone, one a board that never answers, and one entry of
the configuration is refused. A tick is what a deployment's tuner does each second: read, decide, act.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from moe_core.clock import SystemClock
from moe_core.http import session
from moe_core.log import configure, get_log
from moe_core.signing import Signer
from moe_core.wire import Ack, EngineDigest, GatewayDigest, Knobs, LayerDigest, ReplicaDigest, Signed, TargetDigest
from moe_tuner.deployment import Shared
from moe_tuner.exporter import Families
from moe_tuner.fleet import Fleet
from moe_tuner.settings import load
from moe_tuner.workers import Workers, share_evenly

WARM_UP_S = 5.0
BURST_EVERY_S, BURST_S = 60.0, 15.0
LAYERS = 8
GONE_PORT = 9  # discard: nothing listens
PAGE_MIB = resource.getpagesize() / 2**20
ANSWERS = (
    *(("timestamp(", 1.0), ("resets(", 0.0), ("gateway_itl", 0.02), ("histogram_quantile", 0.2)),
    *(("lost_gate_mass", 0.001), ("busy", 9.0), ('outcome="error"', 0.0)),
)
"""What a query that holds this text is answered."""


class Played:
    """Board and gateway of one deployment."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.envelope: Signed | None = None
        self.version = 0
        self.seq = 0
        self.began_s = time.monotonic()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/knobs", self.post),
            web.get("/v1/knobs", self.get),
            web.get("/v1/acks", self.acks),
            web.get("/v1/digests", self.digests),
            web.post("/gateway/v1/knobs", self.to_gateway),
            web.get("/gateway/v1/digest", self.digest),
        ]

    @property
    def burst(self) -> bool:
        since_s = time.monotonic() - self.began_s
        return self.index % 5 == 0 and since_s > WARM_UP_S and since_s % BURST_EVERY_S > BURST_EVERY_S - BURST_S

    async def post(self, request: web.Request) -> web.Response:
        self.envelope = Signed.model_validate_json(await request.read())
        self.version = Knobs.model_validate_json(self.envelope.payload).version
        return web.json_response({"version": self.version}, status=202)

    async def get(self, _: web.Request) -> web.Response:
        if self.index % 50 == 49:
            await asyncio.sleep(30)  # a board that takes the call and says nothing
        if self.envelope is None:
            return web.json_response({"error": "none"}, status=404)
        return web.json_response(self.envelope.to_json())

    async def acks(self, request: web.Request) -> web.Response:
        version = int(request.query["version"])
        acks = [Ack(replica="r0", rank=rank, version=version, applied_at_s=0.0).to_json() for rank in range(2)]
        expected = [{"replica": "r0", "ranks": 2}]
        return web.json_response({"version": version, "complete": True, "expected": expected, "acks": acks})

    async def digests(self, _: web.Request) -> web.Response:
        self.seq += 1
        counted, skew = 1000 * self.seq, 1.8 if self.burst else 1.1
        digest = ReplicaDigest(
            replica="r0",
            started_at_s=1.0,
            at_s=time.monotonic() - self.began_s,
            seq=self.seq,
            ranks=2,
            knobs_version=self.version,
            engine=EngineDigest(
                running=16 if self.burst else 2,
                waiting=20 if self.burst else 0,
                kv_usage=0.2,
                max_active_seqs=16,
                max_batched_tokens=2048,
                ceiling_active_seqs=64,
                ceiling_batched_tokens=2048,
                prompt_tokens_total=counted,
            ),
            layers=tuple(
                LayerDigest(
                    layer=layer,
                    hooked=True,
                    slots_total=4 * counted,
                    tokens_total=counted,
                    window_slots=4000,
                    rank_max_over_mean=skew,
                    demand_rank_max_over_mean=skew,
                )
                for layer in range(LAYERS)
            ),
        )
        return web.json_response([digest.to_json()])

    async def to_gateway(self, request: web.Request) -> web.Response:
        knobs = Knobs.model_validate_json(Signed.model_validate_json(await request.read()).payload)
        return web.json_response(Ack(replica="g0", rank=0, version=knobs.version, applied_at_s=0.0).to_json())

    async def digest(self, request: web.Request) -> web.Response:
        arrivals = 200 if self.burst else 50
        digest = GatewayDigest(
            gateway="g0",
            at_s=0.0,
            window_s=float(request.query["window"]),
            knobs_version=self.version,
            arrivals=arrivals,
            completed=arrivals,
            prompt_tokens=300 * arrivals,
            output_tokens=60 * arrivals,
            ttft_p95_s=2.0 if self.burst else 0.2,
            itl_p95_s=0.02,
            slo_attained=1.0,
            targets=(
                TargetDigest(name="local", local=True, requests=arrivals),
                TargetDigest(name="api", local=False),
            ),
        )
        return web.json_response(digest.to_json())


async def query(request: web.Request) -> web.Response:
    """Prometheus: one healthy answer to every query of the tuner's."""
    text = request.query["query"]
    value = next((value for part, value in ANSWERS if part in text), 100.0)
    result = [{"metric": {}, "value": [0, str(value)]}]
    return web.json_response({"status": "success", "data": {"resultType": "vector", "result": result}})


async def play(count: int) -> None:
    """The child: serve everything, print the ports, end when the parent does."""
    ports = []
    for routes in [[web.get("/api/v1/query", query)], *(Played(index).routes() for index in range(count))]:
        app = web.Application()
        app.router.add_routes(routes)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
    print(json.dumps(ports), flush=True)
    await asyncio.to_thread(sys.stdin.read)


def document(folder: Path, ports: list[int]) -> dict[str, Any]:
    """The configuration: one entry a port, and one that is refused."""
    prometheus, *boards = ports
    entries: list[dict[str, Any]] = [
        {
            "deployment": f"team-{index % 10}/model-{index}",
            "boardUrl": f"http://127.0.0.1:{GONE_PORT if index % 50 == 48 else port}",
            "gatewayAdminUrls": [f"http://127.0.0.1:{port}/gateway"],
            "decisionLog": str(folder / f"{index}.jsonl"),
            "storageUrl": f"sqlite:///{folder / f'{index}.db'}",
        }
        for index, port in enumerate(boards)
    ]
    common = {
        "prometheusUrl": f"http://127.0.0.1:{prometheus}",
        "signingKeyFile": str(folder / "key.pem"),
        "slo": {"ttftP95S": 0.8, "itlP95S": 0.05},
        "bounds": {"capacityFactorMin": "1", "capacityFactorMax": "2", "activeSeqsMin": 4, "activeSeqsMax": 64},
        "simulatorOnlyS": 0,
    }
    return {"deployments": [*entries, {"deployment": "team-0/refused", "tick": 1}], "common": common}


async def tune(folder: Path, ports: list[int], seconds: float) -> dict[str, Any]:
    """Run the fleet and read what it took."""
    path = folder / "tuners.json"
    path.write_text(json.dumps(document(folder, ports)))
    loaded = load(path)
    families, workers = Timed(), Workers()
    async with session(connect_s=1.0, read_s=5.0) as client:
        fleet = Fleet(Shared(client, SystemClock(), get_log("tuner"), workers, families))
        await fleet.follow(loaded)
        await asyncio.sleep(WARM_UP_S)
        families.seconds.clear()
        started, cpu = time.monotonic(), time.process_time()
        await asyncio.sleep(seconds)
        ticks, elapsed = sorted(families.seconds), time.monotonic() - started
        used = (time.process_time() - cpu) / elapsed
        rows, memory = fleet.summaries(), _rss_mib()
        await fleet.stop()
    workers.close()
    return {
        "n": len(loaded.configs),
        "tick_p99_ms": round(1000 * ticks[int(0.99 * len(ticks))], 1),
        "rss_mib": round(memory, 1),
        "tick_p50_ms": round(1000 * ticks[len(ticks) // 2], 1),
        "tick_max_ms": round(1000 * ticks[-1], 1),
        "ticks_per_s": round(len(ticks) / elapsed, 1),
        "cpu_cores": round(used, 2),
        "cpu_ms_per_tick": round(1000 * used * elapsed / len(ticks), 1),
        "tuned": sum(row.tuned for row in rows),
        "refused": len(loaded.refused),
        "decisions": _decisions(folder),
    }


def _decisions(folder: Path) -> int:
    return sum(len(log.read_text().splitlines()) for log in folder.glob("*.jsonl"))


class Timed(Families):
    """Keeps each tick's time beside the histogram, whose buckets are too wide for a percentile."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        family, seconds = self.ticks, self.seconds
        plain = family.labels

        def labels(*values: str) -> Any:
            child = plain(*values)

            class Both:
                def observe(self, taken: float) -> None:
                    seconds.append(taken)
                    child.observe(taken)

            return Both()

        family.labels = labels  # type: ignore[assignment]


def _rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_MIB


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuner_scale", description=__doc__)
    parser.add_argument("--deployments", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--play", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.play is not None:
        asyncio.run(play(chosen.play))
        return
    configure("CRITICAL")
    share_evenly()
    command = [sys.executable, "-m", "benchmarks.tuner_scale", "--play", str(chosen.deployments)]
    with (
        tempfile.TemporaryDirectory(prefix="tuner-scale-") as temporary,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
    ):
        try:
            assert child.stdout is not None
            folder = Path(temporary)
            Signer.generate().save(folder / "key.pem")
            found = asyncio.run(tune(folder, json.loads(child.stdout.readline()), chosen.seconds))
        finally:
            with contextlib.suppress(BrokenPipeError):
                assert child.stdin is not None
                child.stdin.close()
            child.wait(10)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
