"""What every process really exports, run here and asked: gateways under traffic, a board, a tuner, an operator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moe_api.enums import MetricsDialect
from moe_core.clock import SystemClock
from moe_core.foreign import DIALECTS, Names
from moe_core.wire import (
    EngineDigest,
    ExpertKnobs,
    LayerDigest,
    Overflow,
    ReplicaDigest,
    Utilisation,
)
from moe_kube import objects as k
from moe_kube.calls import Call
from moe_operator import exporter as operator_exporter
from moe_serving import board_metrics
from moe_tuner.explore import End
from moe_tuner.exporter import Exporter, Families
from tests.controller.operators import Bench, get
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import Client, chat, config, running, until
from tests.gateway.test_gateway_shadow import late, shadowed

DEPLOYMENT = "default/tiny"
STREAM = chat(stream_options={"include_usage": True})
OK, FAILS = Behaviour(tokens=5), Behaviour(status=500)


@dataclass(frozen=True)
class Sample:
    """One line of an exposition."""

    name: str
    kind: str
    labels: tuple[tuple[str, str], ...]
    value: float


async def everything(folder: Path) -> list[Sample]:
    """Every sample, with the label `instance` that a scrape gives it."""
    texts = [await source(folder) for source in GATEWAYS]
    texts += [board(), tuner(), await operator(), calls()]
    return [sample for number, text in enumerate(texts) for sample in samples(text, f"process-{number}")]


def samples(text: str, instance: str) -> list[Sample]:
    return [
        Sample(sample.name, family.type, tuple(sorted({**sample.labels, "instance": instance}.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


async def _told(client: Client) -> str:
    return (await client.admin("GET", "/metrics")).body.decode()


async def paid(folder: Path) -> str:
    """A gateway whose replica answers, then fails, until its breaker opens: a closed API takes over and is paid."""
    settings = {"price": ("1", "2"), "stateDir": str(folder / "paid"), "spill": {"usdPerDay": "1"}}
    async with FakeUpstream(OK) as local, FakeUpstream(OK) as api, running(config(local, api, **settings)) as client:
        for _ in range(3):
            assert (await client.post(STREAM)).status == 200
        local.default = FAILS
        for _ in range(6):
            assert (await client.post(STREAM)).status == 200
        return await _told(client)


async def shed(_: Path) -> str:
    async with FakeUpstream(Behaviour(status=429)) as local, running(config(local)) as client:
        assert (await client.post(chat())).status == 529
        return await _told(client)


async def missed(_: Path) -> str:
    """A replica whose first token comes too late."""
    slo = {"ttftP95S": 0.02, "itlP95S": 1.0}
    async with FakeUpstream(Behaviour(first_s=0.1)) as local, running(config(local, slo=slo)) as client:
        assert (await client.post(STREAM)).status == 200
        return await _told(client)


async def broken(_: Path) -> str:
    rest = Behaviour(words=("w2 ", "w3 "))
    async with FakeUpstream(rest) as local, running(config(local, midStream={"mode": "Continue"})) as client:
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        assert (await client.post(chat())).events[-1] == "[DONE]"
        return await _told(client)


async def shadow(folder: Path) -> str:
    async with (
        FakeUpstream(OK) as local,
        FakeUpstream() as api,
        running(shadowed(local, api, folder / "shadow")) as client,
    ):
        late(client)
        assert (await client.post(STREAM)).status == 200
        return await _told(client)


async def rented(_: Path) -> str:
    async with FakeUpstream() as local:
        local.digests = [digest().to_json()]
        async with running(config(local, gpuUsdPerHour=3.0)) as client:
            await until(lambda: client.server.gateway.upstreams["r0"].replicas)
            return await _told(client)


async def external(_: Path) -> str:
    """Before an engine that is not ours and tells of itself by vLLM's own names."""
    async with FakeUpstream(OK) as local, foreign(_foreign(DIALECTS[MetricsDialect.VLLM])) as url:
        revision = {"name": "r0", "url": local.url, "metrics": {"url": url, "dialect": "VLLM"}}
        async with running(config(local, revisions=[revision])) as client:
            for _ in range(300):
                if "moestack_engine_itl_seconds" in (text := await _told(client)):
                    return text
                await SystemClock().sleep(0.05)
            raise AssertionError("the engine's numbers did not appear")


@asynccontextmanager
async def foreign(text: str) -> AsyncIterator[str]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=text)

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
    finally:
        await runner.cleanup()


def _foreign(names: Names) -> str:
    lines = [f"{name[0]} 7" for name in (names.running, names.waiting, names.prompt_tokens, names.generation_tokens)]
    lines.append(f"{names.kv_usage[0]} 0.5")
    for histogram in (names.ttft[0], names.itl[0]):
        lines += [
            f"# TYPE {histogram} histogram",
            f'{histogram}_bucket{{le="0.1"}} 6',
            f'{histogram}_bucket{{le="+Inf"}} 8',
        ]
        lines += [f"{histogram}_sum 0.7", f"{histogram}_count 8"]
    return "\n".join(lines) + "\n"


def digest() -> ReplicaDigest:
    """Of a busy replica with two ranks, two layers that are counted and one that is not."""
    engine = EngineDigest(
        **{"running": 4, "waiting": 2, "kv_usage": 0.5, "max_active_seqs": 16, "max_batched_tokens": 512},
        **{"ceiling_active_seqs": 16, "ceiling_batched_tokens": 512, "prompt_tokens_total": 9000},
        **{"generation_tokens_total": 3000, "preemptions_total": 3, "steps_total": 700, "busy_s_total": 90.0},
        rank_moe_s_total=(30.0, 20.0),
    )
    use = Utilisation(
        **{"decode_steps_total": 500, "decode_busy_s_total": 60.0, "decode_bytes_total": 1e12, "flops_total": 1e13},
        **{"experts_touched": 9.5, "bytes_s": 1e10, "flops_s": 1e11, "s_mbu": 0.4, "s_mfu": 0.2},
    )
    layers = tuple(
        LayerDigest(
            **{"layer": number, "hooked": True, "slots_total": 8000, "dropped_total": 40, "rerouted_total": 400},
            **{"overflow_kept_total": 10, "lost_gate_mass_total": 12.0, "tokens_total": 4000, "window_slots": 80},
            **{"expert_max_over_mean": 3.0, "expert_cv": 0.8, "rank_max_over_mean": 1.2, "max_prefill_load": 12},
            rank_slots=(50, 30),
            demand_rank_max_over_mean=1.6,
            hottest=((3, 900), (5, 700)),
        )
        for number in (0, 1)
    )
    return ReplicaDigest(
        **{"replica": "a", "started_at_s": 1.0, "at_s": 100.0, "seq": 9, "ranks": 2, "knobs_version": 4},
        knobs=ExpertKnobs(
            overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal("1.5"), capacity_factor_decode=Decimal(2)
        ),
        engine=engine,
        utilisation=use,
        layers=(*layers, LayerDigest(layer=2, hooked=False, slots_total=0)),
    )


def board() -> str:
    return generate_latest(board_metrics.registry(DEPLOYMENT, "r0", lambda: [digest()])).decode()


def tuner() -> str:
    families = Families()
    exporter = Exporter(DEPLOYMENT, families)
    exporter.exploring(True)
    exporter.version(4)
    for loop, action in (("fast", "Move"), ("fast", "Undo"), ("slow", "Try"), ("slow", "RollBack")):
        exporter.decided(loop, action)
    exporter.trial_ended(End.ROLLED_BACK)
    exporter.acknowledged(0.3)
    exporter.ticked(0.004)
    return families.exposition().decode()


async def operator() -> str:
    bench = Bench()
    bench.put("moe")
    async with bench.operator() as one:
        await bench.pass_time(5.0)
        return (await get(one, "/metrics"))[1]


def calls() -> str:
    """What the operator's client counts; the API server in memory is not asked over HTTP."""
    exporter = operator_exporter.Exporter()
    exporter.called(Call("get", k.SERVICE, namespace="default", name="a"), 200, 0.01)
    return exporter.exposition().decode()


GATEWAYS: tuple[Callable[[Path], Awaitable[str]], ...] = (paid, shed, missed, broken, shadow, rented, external)
