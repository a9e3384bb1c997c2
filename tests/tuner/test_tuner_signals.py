"""Prometheus as a source: values typed, lies and gaps known as missing, a real server understood."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from moe_core import metrics
from moe_tuner.measure import Measurement, Unmeasured
from moe_tuner.signals import Prometheus, public_url, queries, selector
from tests.tuner.fakes import DEPLOYMENT, FakePrometheus, served

HEALTHY: dict[str, object] = {
    "age_s": 1.0,
    "resets": 0,
    "requests": 100,
    "failed": 2,
    "spilled": 5,
    "prompt_tokens": 30_000,
    "output_tokens": 6_000,
    "engine_tokens": 36_000,
    "busy_s": 9.0,
    "ttft_p95_s": 0.4,
    "itl_p95_s": 0.03,
    "request_p95_s": 2.5,
    "decode_busy_s": 4.0,
    "decode_steps": 400,
    "engine_prompt_tokens": 30_000,
    "engine_output_tokens": 6_000,
    "lost_gate_mass": 0.001,
    "imbalance": 1.3,
}


def answering(**changes: object) -> Callable[[str], object]:
    """An answer for each query of a 10 s window, and of the health check."""
    values = {**HEALTHY, **changes}
    by_query = {text: values[name] for name, text in queries(DEPLOYMENT, 10.0).items()}
    return by_query.__getitem__


async def measure(**changes: object) -> Measurement | Unmeasured:
    async with served(FakePrometheus(answering(**changes)).routes()) as url:
        source = Prometheus(url, DEPLOYMENT)
        try:
            return await source.measure(10.0)
        finally:
            source.close()


async def test_a_window_is_measured() -> None:
    window = await measure()
    assert isinstance(window, Measurement)
    assert window.requests_per_s == 10.0
    assert window.busy_s_per_ktoken == pytest.approx(0.25)
    assert (window.prompt_tokens, window.output_tokens) == (300.0, 60.0)
    assert (window.decode_step_s, window.decode_batch) == (0.01, 15.0)
    assert window.prefill_s_per_token == pytest.approx(5.0 / 30_000)
    assert window.request_p95_s == 2.5
    assert (window.failed_share, window.spill_share, window.lost_gate_mass) == (0.02, 0.05, 0.001)


MISSING = [
    pytest.param({"ttft_p95_s": "NaN"}, "no samples of moestack_gateway_ttft_seconds", False, id="NaN"),
    pytest.param({"ttft_p95_s": "+Inf"}, "no samples of moestack_gateway_ttft_seconds", False, id="infinite"),
    pytest.param({"ttft_p95_s": None}, "no samples of moestack_gateway_ttft_seconds", False, id="absent"),
    pytest.param({"busy_s": -3}, "no engine time counted", False, id="a counter that runs back"),
    pytest.param({"busy_s": 0}, "no engine time counted", False, id="a counter that stands still"),
    pytest.param({"requests": None}, "no series of moestack_gateway_requests_total", False, id="no traffic series"),
    pytest.param({"requests": 4}, "too little traffic: 4 requests", False, id="too little traffic"),
    pytest.param({"resets": 1}, "counters were reset", False, id="counter reset"),
    pytest.param({"age_s": 60}, "is stale: its newest sample is 60 s old", True, id="stale"),
    pytest.param({"age_s": None}, "has no present sample of moestack_engine_running_requests", True, id="gone dark"),
    pytest.param({"busy_s": web.Response(status=503)}, "answers with an error", True, id="error status"),
    pytest.param({"busy_s": web.Response(text="<html>")}, "answers with an error", True, id="no JSON"),
    pytest.param({"busy_s": "many"}, "cannot be read", True, id="no number"),
]


@pytest.mark.parametrize(("changes", "reason", "down"), MISSING)
async def test_what_is_missing_is_known_as_missing(changes: dict[str, object], reason: str, down: bool) -> None:
    window = await measure(**changes)
    assert isinstance(window, Unmeasured)
    assert reason in window.reason
    assert window.source_down is down


@pytest.mark.parametrize("name", ["itl_p95_s", "lost_gate_mass", "imbalance", "prompt_tokens"])
async def test_optional_signals_may_be_missing(name: str) -> None:
    window = await measure(**{name: "NaN"})
    assert isinstance(window, Measurement)
    assert getattr(window, name) is None


async def test_a_server_that_is_gone_is_named_without_its_password() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = Prometheus(f"http://tuner:hunter2@127.0.0.1:{port}", DEPLOYMENT)
    problem = await source.health()
    source.close()
    assert problem is not None
    assert problem.reason == f"Prometheus at http://127.0.0.1:{port} does not answer"
    assert public_url("https://u:p@h:1/x?token=1") == "https://h:1/x"


def test_label_values_are_escaped_and_labels_checked() -> None:
    assert selector(metrics.ENGINE_BUSY, 'a"b\\c') == 'moestack_engine_busy_seconds_total{deployment="a\\"b\\\\c"}'
    with pytest.raises(ValueError, match="has no label tier"):
        selector(metrics.ENGINE_BUSY, "a", tier="gold")


def test_every_query_reads_only_metrics_of_the_table() -> None:
    known = {metric.name for metric in metrics.ALL}
    known |= {f"{metric.name}_bucket" for metric in metrics.ALL if metric.kind == "histogram"}
    for query in queries(DEPLOYMENT, 10.0).values():
        assert set(re.findall(r"moestack_\w+", query)) <= known


LIES = (
    ("NaN", "no engine time counted"),
    ("reset", "an engine's counters were reset in the window"),
    ("gap", "has no present sample of moestack_engine_running_requests"),
)
"""What a target may do, and what the tuner says of a window that saw it."""


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus")
async def test_a_real_prometheus_understands_every_query(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    replica, layer = (DEPLOYMENT, "local", "r0"), (DEPLOYMENT, "local", "r0", "0")
    running = metrics.gauge(metrics.ENGINE_RUNNING, registry).labels(*replica)
    counters = {
        row: metrics.counter(row, registry).labels(*replica)
        for row in (
            *(metrics.ENGINE_STEPS, metrics.ENGINE_BUSY),
            *(metrics.ENGINE_PROMPT_TOKENS, metrics.ENGINE_OUTPUT_TOKENS),
        )
    }
    lost = metrics.counter(metrics.EXPERT_LOST_GATE_MASS, registry).labels(*layer)
    tokens = metrics.counter(metrics.EXPERT_TOKENS, registry).labels(*layer)
    metrics.gauge(metrics.EXPERT_IMBALANCE, registry).labels(*layer, "rank_demand").set(1.5)
    ok = metrics.counter(metrics.GATEWAY_REQUESTS, registry).labels(DEPLOYMENT, "local", "default", "ok")
    prompt = metrics.counter(metrics.GATEWAY_PROMPT_TOKENS, registry).labels(DEPLOYMENT, "local")
    output = metrics.counter(metrics.GATEWAY_OUTPUT_TOKENS, registry).labels(DEPLOYMENT, "local")
    ttft = metrics.histogram(metrics.GATEWAY_TTFT, registry).labels(DEPLOYMENT, "local")
    itl = metrics.histogram(metrics.GATEWAY_ITL, registry).labels(DEPLOYMENT, "local")

    told = {"lie": ""}

    async def scrape(_: web.Request) -> web.Response:
        if told["lie"] == "gap":
            return web.Response(status=500)
        running.set(3)
        counters[metrics.ENGINE_BUSY].inc(0.2)
        counters[metrics.ENGINE_STEPS].inc(10)
        counters[metrics.ENGINE_PROMPT_TOKENS].inc(900)
        counters[metrics.ENGINE_OUTPUT_TOKENS].inc(100)
        tokens.inc(1000)
        lost.inc(10)
        ok.inc(10)
        prompt.inc(900)
        output.inc(100)
        for _ in range(10):
            ttft.observe(0.22)
            itl.observe(0.011)
        body = generate_latest(registry)
        if told["lie"] == "reset":
            body = re.sub(rb"(?m)^(moestack_engine_steps_total.*) [0-9.e+]+$", rb"\1 1.0", body)
        if told["lie"] == "NaN":
            body = re.sub(rb"(?m)^(moestack_engine_busy_seconds_total.*) [0-9.e+]+$", rb"\1 NaN", body)
        return web.Response(body=body)

    async with served([web.get("/metrics", scrape)]) as target:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = tmp_path / "prometheus.yml"
        host = target.removeprefix("http://")
        config.write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
            f"scrape_configs: [{{job_name: test, static_configs: [{{targets: ['{host}']}}]}}]\n"
        )
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stderr=asyncio.subprocess.DEVNULL,
        )
        source = Prometheus(f"http://127.0.0.1:{port}", DEPLOYMENT)
        try:
            window: Measurement | Unmeasured = Unmeasured(reason="not asked")
            for _ in range(60):
                await asyncio.sleep(0.5)
                window = await source.measure(5.0)
                if isinstance(window, Measurement) and window.requests >= 35:
                    break
            assert isinstance(window, Measurement), window
            assert window.busy_s_per_ktoken == pytest.approx(0.2, rel=0.01)
            assert window.lost_gate_mass == pytest.approx(0.01, rel=0.01)
            assert 0.2 < window.ttft_p95_s <= 0.3
            assert window.itl_p95_s is not None
            assert 0.01 < window.itl_p95_s <= 0.02
            assert window.imbalance == pytest.approx(1.5)
            assert (window.failed_share, window.spill_share) == (0.0, 0.0)
            assert await source.health() is None
            for told["lie"], words in LIES:
                reason = ""
                for _ in range(60):
                    await asyncio.sleep(0.25)
                    window = await source.measure(3.0)
                    reason = window.reason if isinstance(window, Unmeasured) else ""
                    if words in reason:
                        break
                assert words in reason
        finally:
            source.close()
            process.send_signal(signal.SIGTERM)
            await process.wait()
