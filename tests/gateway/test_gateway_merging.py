"""What several workers say, as one: sums that never go back, quantiles of all requests, no word before all have it."""

from __future__ import annotations

from decimal import Decimal

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moe_core import metrics
from moe_core.wire import Ack, GatewayDigest, TargetDigest
from moe_gateway.merging import SAMPLES_MAX, Window, acks, digests, expositions, quantile, retired, rule, thinned
from moe_gateway.pod_admin import PodAdmin

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=4)


def told(
    requests: float, version: float = 1, in_flight: float = 0, rent: float = 0, ttft_s: float | None = None
) -> bytes:
    """A worker's text of metrics."""
    registry = CollectorRegistry()
    metrics.counter(metrics.GATEWAY_REQUESTS, registry).labels("d", "r0", "a b", "ok").inc(requests)
    metrics.gauge(metrics.GATEWAY_KNOBS_VERSION, registry).labels("d").set(version)
    metrics.gauge(metrics.GATEWAY_IN_FLIGHT, registry).labels("d", "r0").set(in_flight)
    metrics.counter(metrics.LOCAL_RENT, registry).labels("d", "r0", "idle").inc(rent)
    histogram = metrics.histogram(metrics.GATEWAY_TTFT, registry).labels("d", "r0")
    if ttft_s is not None:
        histogram.observe(ttft_s)
    return bytes(generate_latest(registry))


def values(text: bytes) -> dict[str, float]:
    """Sample → value, of those without buckets."""
    families = text_string_to_metric_families(text.decode())
    return {sample.name: sample.value for family in families for sample in family.samples if "le" not in sample.labels}


def test_counters_are_summed_and_gauges_rightly() -> None:
    found = values(expositions([told(3, 7, 2, 1.5, 0.2), told(4, 6, 1, 1.5, 0.4)]))
    assert found[metrics.GATEWAY_REQUESTS.name] == 7
    assert found[metrics.GATEWAY_IN_FLIGHT.name] == 3
    assert found[metrics.GATEWAY_KNOBS_VERSION.name] == 6, "in force is what the last worker has"
    assert found[metrics.LOCAL_RENT.name] == 1.5, "each tells the engines' rent whole"
    assert found[metrics.GATEWAY_TTFT.name + "_count"] == 2
    assert found[metrics.GATEWAY_TTFT.name + "_sum"] == pytest.approx(0.6)


def test_one_worker_says_what_it_said() -> None:
    text = told(3, 7, 2, 1.5, 0.2)
    assert expositions([text]) == text


@settings(max_examples=25)
@given(COUNTS, COUNTS)
def test_no_counter_goes_back_when_workers_end(ended: list[int], live: list[int]) -> None:
    kept = b""
    before = values(expositions([told(count, ttft_s=0.1) for count in (*ended, *live)]))
    for count in ended:
        kept = retired(kept, told(count, version=9, in_flight=5, ttft_s=0.1))
    after = values(expositions([told(count, ttft_s=0.1) for count in live], kept))
    for name in (metrics.GATEWAY_REQUESTS.name, metrics.GATEWAY_TTFT.name + "_count"):
        assert after[name] == before[name]
    assert after[metrics.GATEWAY_IN_FLIGHT.name] == 0, "what an ended worker had in flight is no more"
    assert after[metrics.GATEWAY_KNOBS_VERSION.name] == 1


def test_every_gauge_of_the_gateway_has_a_rule() -> None:
    gauges = [row for row in metrics.ALL if row.kind == "gauge" and row.name.startswith("moestack_gateway_")]
    assert {row.name: rule(row.name, row.kind) for row in gauges} == {
        metrics.GATEWAY_IN_FLIGHT.name: "sum",
        metrics.GATEWAY_BREAKER_OPEN.name: "max",
        metrics.GATEWAY_KNOBS_VERSION.name: "min",
        metrics.GATEWAY_WEIGHTS_VERSION.name: "min",
        metrics.GATEWAY_CONFIG_LOADED.name: "min",
        metrics.GATEWAY_FORECAST_BRIER.name: "mean",
    }


def window(name: str, *ttft_s: float, **more: object) -> Window:
    target = TargetDigest(name="r0", local=True, requests=len(ttft_s), in_flight=1, usd=Decimal("0.1"))
    digest = GatewayDigest.model_validate(
        {"gateway": name, "at_s": 1.0, "window_s": 10.0, "arrivals": len(ttft_s), "targets": (target,), **more}
    )
    return Window(digest=digest, judged=len(ttft_s), ttft_count=len(ttft_s), ttft_s=tuple(sorted(ttft_s)))


def test_a_digest_counts_all_and_is_in_force_where_all_have_it() -> None:
    one = window("a", 0.1, 0.2, 0.3, weights_version=4, weights={"r0": 50}, config_hash="x", slo_attained=1.0)
    other = window("b", 0.9, weights_version=3, weights={"r0": 100}, config_hash="y", slo_attained=0.0)
    found = digests([one, other], "pod")
    assert (found.gateway, found.arrivals, found.ttft_p50_s, found.ttft_p95_s) == ("pod", 4, 0.3, 0.9)
    assert (found.weights_version, found.weights, found.config_hash) == (3, {"r0": 100}, "")
    assert found.slo_attained == 0.75
    (target,) = found.targets
    assert (target.requests, target.in_flight, target.usd) == (4, 2, Decimal("0.2"))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.floats(0, 0.999), st.integers(1, 5))
def test_a_quantile_over_workers_is_that_of_all_requests(samples: list[float], q: float, workers: int) -> None:
    parts = [(sorted(samples[index::workers]), len(samples[index::workers])) for index in range(workers)]
    ordered = sorted(samples)
    found = quantile(parts, q)
    near = {ordered[min(len(ordered) - 1, max(0, int(q * len(ordered)) + step))] for step in (-1, 0, 1)}
    assert found in near


def test_of_very_many_samples_a_part_is_told() -> None:
    many = [float(value) for value in range(10 * SAMPLES_MAX)]
    part = thinned(many)
    assert len(part) == SAMPLES_MAX
    assert quantile([(part, len(many))], 0.95) == pytest.approx(0.95 * len(many), rel=0.001)


def test_an_acknowledgement_is_of_the_last_worker() -> None:
    found = acks([Ack(replica="a", rank=0, version=3, applied_at_s=at_s) for at_s in (5.0, 7.0, 6.0)], "pod")
    assert (found.replica, found.version, found.applied_at_s) == ("pod", 3, 7.0)


class _Pod:
    """A pod of one worker that takes commands and one that answers as told."""

    name, ready = "pod", None

    def __init__(self, urls: list[str], client: aiohttp.ClientSession) -> None:
        self.urls, self.client = urls, client

    async def metrics(self) -> bytes:
        return b""


@pytest.mark.parametrize(("second", "wanted"), [(200, 200), (409, 409), (None, 503)])
async def test_a_command_is_acknowledged_once_every_worker_has_it(second: int | None, wanted: int) -> None:
    got: list[bytes] = []

    async def serve(status: int) -> TestServer:
        async def take(request: web.Request) -> web.Response:
            got.append(await request.read())
            ack = Ack(replica="w", rank=0, version=2, applied_at_s=1.0)
            return web.json_response(ack.to_json() if status == 200 else {"error": "no"}, status=status)

        app = web.Application()
        app.router.add_post("/v1/knobs", take)
        server = TestServer(app)
        await server.start_server()
        return server

    good, other = await serve(200), await serve(second or 200)
    urls = [str(server.make_url("")).rstrip("/") for server in (good, other)]
    if second is None:
        await other.close()
    async with aiohttp.ClientSession() as client:
        admin = PodAdmin(_Pod(urls, client))
        front = TestServer(admin.application())
        await front.start_server()
        async with client.post(front.make_url("/v1/knobs"), data=b"signed") as response:
            assert response.status == wanted
            assert ("error" in await response.json()) == (wanted != 200)
        got.clear()
        await admin.replay(urls[0])
        assert got == [b"signed"], "one worker took it, so one that begins gets it too"
        await front.close()
    await good.close()
    await other.close()
