"""An engine that is not ours behind the gateway: its metrics move decisions, appear under our names, and never hinder.

The texts are written by hand in the form of SGLang's documentation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from moe_core.foreign import DIALECTS
from moe_core.wire import EngineKnobs, ExpertKnobs, Knobs
from moe_gateway.external import ExternalPoller
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.harness import KEYS, SIGNER, Client, chat, config, running

TEXT = """\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} %d
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{model_name="m"} %d
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m"} 0.28
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{model_name="m"} 7557572
# TYPE sglang:time_to_first_token_seconds histogram
sglang:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 6.0
sglang:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 27.0
sglang:time_to_first_token_seconds_sum{model_name="m"} 12.5
sglang:time_to_first_token_seconds_count{model_name="m"} 27.0
"""


class Metrics:
    """The metrics endpoint of an engine."""

    def __init__(self) -> None:
        self.status, self.text, self.url = 200, TEXT % (8, 50), ""

    async def answer(self, _: web.Request) -> web.Response:
        return web.Response(status=self.status, text=self.text, headers={"Location": "/elsewhere"})


@asynccontextmanager
async def engine() -> AsyncIterator[Metrics]:
    metrics, app = Metrics(), web.Application()
    app.router.add_get("/metrics", metrics.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    metrics.url = f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
    try:
        yield metrics
    finally:
        await runner.cleanup()


def external(local: FakeUpstream, metrics: Metrics, *targets: FakeUpstream, **more: Any) -> Any:
    """A configuration with one external engine of SGLang's dialect."""
    revisions = [{"name": "r0", "url": local.url, "metrics": {"url": metrics.url, "dialect": "SGLang"}}]
    return config(local, *targets, revisions=revisions, **more)


async def polled(client: Client, times: int = 1) -> ExternalPoller:
    poller = ExternalPoller(client.server.gateway)
    for _ in range(times):
        for one in poller.engines:
            await poller.poll(one)
    return poller


async def test_what_the_engine_says_moves_the_decision() -> None:
    async with FakeUpstream() as local, FakeUpstream() as target, engine() as metrics:
        settings = external(local, metrics, target)
        async with running(settings) as client:
            await polled(client, 4)
            report = client.server.gateway.upstreams["r0"].report
            assert report is not None
            assert (report.running, report.waiting, report.active_limit, report.kv_usage) == (8, 50, 8, 0.28)
            assert report.foreign_waiting == 50
            answer = await client.post(chat(), x_moestack_explain="1")
            assert (answer.headers["x-moestack-target"], answer.headers["x-moestack-reason"]) == ("t0", "slo_predicted")


async def test_its_numbers_appear_under_our_names() -> None:
    async with FakeUpstream() as local, engine() as metrics, running(external(local, metrics)) as client:
        for _ in range(300):
            text = (await client.call("GET", client.admin_url + "/metrics")).body.decode()
            if "moestack_engine_waiting_requests" in text:
                break
        samples = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("replica") == "external" and sample.labels.get("le", "+Inf") == "+Inf"
        }
        assert samples == {
            "moestack_engine_running_requests": 8,
            "moestack_engine_waiting_requests": 50,
            "moestack_engine_kv_cache_usage_ratio": 0.28,
            "moestack_engine_generation_tokens_total": 7557572,
            "moestack_engine_ttft_seconds_bucket": 27,
            "moestack_engine_ttft_seconds_count": 27,
            "moestack_engine_ttft_seconds_sum": 12.5,
        }


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("no metrics", 404, "Not Found"),
        ("elsewhere", 302, TEXT % (1, 1)),
        ("another dialect", 200, "vllm:num_requests_running 3\n"),
        ("nonsense", 200, "<html>"),
    ],
)
async def test_an_engine_that_cannot_be_read_stops_nothing(name: str, status: int, text: str) -> None:
    async with FakeUpstream() as local, engine() as metrics:
        metrics.status, metrics.text = status, text
        settings = external(local, metrics)
        async with running(settings) as client:
            poller = await polled(client)
            assert client.server.gateway.upstreams["r0"].report is None
            assert poller.loads() == {}
            assert (await client.post(chat())).status == 200


async def test_an_engine_that_tells_no_queue_leaves_the_ledger_alone() -> None:
    async with FakeUpstream() as local, engine() as metrics:
        metrics.text = "sglang:token_usage 0.5\n"
        async with running(external(local, metrics)) as client:
            poller = await polled(client)
            assert client.server.gateway.upstreams["r0"].report is None
            assert poller.loads()["r0"].missing == ("running", "waiting")


async def test_knobs_that_it_lacks_are_acknowledged_as_unsupported() -> None:
    command = Knobs(
        deployment="default/tiny",
        version=3,
        experts=ExpertKnobs.model_validate({"overflow": "Reroute", "capacityFactorPrefill": "1.25"}),
        engine=EngineKnobs(max_active_seqs=8),
    )
    body = SIGNER.sign(command).model_dump_json(by_alias=True).encode()
    async with FakeUpstream() as local, engine() as metrics:
        async with running(external(local, metrics, trusted_keys=KEYS)) as client:
            ack = (await client.call("POST", client.admin_url + "/v1/knobs", body)).json
            assert ack["unsupported"] == ["experts.overflow", "experts.capacityFactor.prefill", "engine.maxActiveSeqs"]
            assert ack["version"] == 3
        async with running(config(local, trusted_keys=KEYS)) as client:
            ack = (await client.call("POST", client.admin_url + "/v1/knobs", body)).json
            assert "unsupported" not in ack, "engines of ours have them all"


def test_every_dialect_names_what_the_forecast_needs() -> None:
    for names in DIALECTS.values():
        assert names.running
        assert names.waiting
        assert names.kv_usage
