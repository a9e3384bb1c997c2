"""What a request leaves behind: a span and its children, gen_ai metrics, one line; no prompt and no key in any."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moe_core.config import TracingConfig
from moe_core.log import JsonFormatter
from moe_gateway.telemetry import sampled
from moe_gateway.tracing import ATTRIBUTES, Tracing
from tests.gateway import reference
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import Client, chat, config, running

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01"
TRACING = {"endpoint": "http://127.0.0.1:9/v1/traces"}
SECRET = "the launch code is swordfish"


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """Lines of the log as the process writes them."""
    found: list[dict[str, Any]] = []
    handler, formatter = logging.Handler(), JsonFormatter()
    handler.emit = lambda record: found.append(json.loads(formatter.format(record)))  # type: ignore[method-assign]
    logger = logging.getLogger("moestack")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def traced(client: Client) -> InMemorySpanExporter:
    """Spans of a running gateway, kept here in place of being sent."""
    spans = InMemorySpanExporter()
    client.server.gateway.tracing = Tracing(TracingConfig.model_validate(TRACING), "default/tiny", spans)
    return spans


async def test_a_request_is_a_span_and_each_attempt_a_child_of_it() -> None:
    async with (
        FakeUpstream(Behaviour(status=500)) as local,
        FakeUpstream() as target,
        running(config(local, target)) as client,
    ):
        spans = traced(client)
        assert (await client.post(chat(), traceparent=GIVEN, x_request_id="r-1")).status == 200
        first, second, whole = spans.get_finished_spans()
        assert f"{whole.context.trace_id:032x}" == TRACE
        assert whole.parent is not None
        assert f"{whole.parent.span_id:016x}" == PARENT
        assert [child.parent and child.parent.span_id for child in (first, second)] == [whole.context.span_id] * 2
        assert (whole.name, first.name, second.name) == ("chat tiny", "chat tiny", "chat closed-0")
        assert (first.attributes or {})["error.type"] == "status"
        told = dict(whole.attributes or {})
        assert told["gen_ai.provider.name"] == "openai-compatible"
        assert told["moestack.reason"] == "local_failed"
        assert (told["moestack.request_id"], told["moestack.attempts"], told["moestack.target"]) == ("r-1", 2, "t0")
        assert told["gen_ai.usage.output_tokens"] == 3
        assert local.headers[0]["traceparent"] == f"00-{TRACE}-{first.context.span_id:016x}-01"
        assert "traceparent" not in target.headers[0], "a closed API learns nothing of our traces"
        for span in (first, second, whole):
            assert (span.attributes or {}).keys() <= ATTRIBUTES.keys()


@pytest.mark.parametrize(
    ("how", "status", "error"),
    [
        (Behaviour(status=429), 529, "overloaded: HTTP 429"),
        (Behaviour(status=400), 400, None),
        (Behaviour(cut_after=1), 200, "the connection to the model was lost"),
    ],
    ids=["shed", "the client's mistake", "cut"],
)
async def test_a_span_says_how_it_ended(how: Behaviour, status: int, error: str | None) -> None:
    async with FakeUpstream(how) as local, running(config(local)) as client:
        spans = traced(client)
        assert (await client.post(chat())).status == status
        whole = spans.get_finished_spans()[-1]
        assert whole.status.is_ok is (error is None)
        assert (whole.attributes or {}).get("error.type") == error
        assert (whole.attributes or {})["http.response.status_code"] == status


async def test_without_traces_a_clients_traceparent_passes_to_our_engine_alone() -> None:
    async with FakeUpstream() as local, FakeUpstream() as target, running(config(local, target)) as client:
        await client.post(chat(), traceparent=GIVEN)
        await client.post(chat(), traceparent="nonsense")
        assert [headers.get("traceparent") for headers in local.headers] == [GIVEN, None]
        await local.close()
        await client.post(chat(), traceparent=GIVEN)
        assert "traceparent" not in target.headers[0]


async def test_spans_go_out_by_otlp_and_a_dead_collector_harms_nobody(lines: list[dict[str, Any]]) -> None:
    got: list[bytes] = []

    async def collect(request: web.Request) -> web.Response:
        got.append(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/traces"
    async with FakeUpstream() as local:
        async with running(config(local, tracing={"endpoint": endpoint})) as client:
            assert (await client.post(chat(messages=[{"role": "user", "content": SECRET}]))).status == 200
        assert b"moestack.outcome" in b"".join(got), "what was left is sent at the end"
        assert SECRET.encode() not in b"".join(got)
        await runner.cleanup()
        async with running(config(local, tracing={"endpoint": endpoint})) as client:
            assert (await client.post(chat())).status == 200
    assert "stopped" in [line["msg"] for line in lines]


def test_without_traces_nothing_of_opentelemetry_is_imported() -> None:
    program = "import sys, moe_gateway.server; print([n for n in sys.modules if n.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_latencies_are_told_by_gen_ais_names_without_doubling_the_series() -> None:
    async with FakeUpstream() as local, FakeUpstream() as target, running(config(local, target)) as client:
        for _ in range(3):
            await client.post(chat())
        await local.close()
        await client.post(chat())
        for ours, theirs in (
            ("moestack_gateway_request_seconds", "gen_ai_server_request_duration_seconds"),
            ("moestack_gateway_ttft_seconds", "gen_ai_server_time_to_first_token_seconds"),
            ("moestack_gateway_itl_seconds", "gen_ai_server_time_per_output_token_seconds"),
        ):
            assert await client.metric(theirs + "_count", gen_ai_provider_name="moestack") == 3
            assert await client.metric(theirs + "_count", gen_ai_request_model="closed-0") == 1
            assert await client.metric(theirs + "_sum") == pytest.approx(await client.metric(ours + "_sum"))
            scrape = (await client.admin("GET", "/metrics")).body.decode().splitlines()
            counted = [sum(line.startswith(name) for line in scrape) for name in (ours, theirs)]
            assert counted[1] <= counted[0] / 2


async def test_each_request_leaves_one_line_without_its_prompt(lines: list[dict[str, Any]]) -> None:
    asked = chat(messages=[{"role": "user", "content": SECRET}])
    async with FakeUpstream() as local, running(config(local)) as client:
        await client.post(asked, x_moestack_tenant="acme", x_request_id="r-7")
        await client.post({"model": "other"})
        good, bad = [line for line in lines if line["msg"] == "request"]
        assert {"tenant": "acme", "tier": "default", "model": "tiny", "target": "r0"}.items() <= good.items()
        assert {"request_id": "r-7", "reason": "within_slo", "spilled": False, "outcome": "ok"}.items() <= good.items()
        assert good.keys() >= {"ttft_s", "itl_s", "prompt_tokens", "output_tokens", "duration_s", "p_miss", "attempts"}
        assert (bad["outcome"], bad["status"], bad["error"]) == ("client_error", 404, "model_not_found")
        assert SECRET not in json.dumps(lines)


async def test_prompts_are_logged_only_where_that_is_asked_for_and_without_keys(lines: list[dict[str, Any]]) -> None:
    asked = chat(messages=[{"role": "user", "content": f"{SECRET}, and my key is sk-abcdefgh12345678"}])
    async with FakeUpstream() as local, running(config(local, logPrompts=True)) as client:
        await client.post(asked)
    shown = json.dumps(lines)
    assert SECRET in shown
    assert "sk-abcdefgh" not in shown


async def test_lines_of_requests_that_went_well_may_be_a_sample(lines: list[dict[str, Any]]) -> None:
    async with FakeUpstream() as local, running(config(local, logOkShare=0.0)) as client:
        await client.post(chat())
        await client.post({"model": "other"})
    assert [line["outcome"] for line in lines if line["msg"] == "request"] == ["client_error"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 1.0])
def test_a_sample_has_its_share(share: float) -> None:
    shown = sum(sampled(number, share) for number in range(1, 10_001))
    assert shown == pytest.approx(share * 10_000, abs=3)


def test_the_references_tables_are_made_from_the_code() -> None:
    text = reference.DOCS.read_text()
    assert reference.written(text) == text, "write them anew: python -m tests.gateway.reference"


async def test_a_stream_gone_on_with_is_one_line_and_one_trace_of_two_attempts(lines: list[dict[str, Any]]) -> None:
    rest = Behaviour(words=("w2 ", "w3 "))
    async with FakeUpstream(rest) as local, running(config(local, midStream={"mode": "Continue"})) as client:
        spans = traced(client)
        local.behaviours = [Behaviour(cut_after=2, tokens=5)]
        assert (await client.post(chat())).events[-1] == "[DONE]"
    (broke,) = [line for line in lines if line["msg"] == "stream broke"]
    assert (broke["target"], broke["broke"], broke["takeover"], broke["to"]) == ("r0", "lost", "continue", "r0")
    (line,) = [line for line in lines if line["msg"] == "request"]
    told = {"outcome": "ok", "attempts": 2, "takeover": "continue", "broke_at": ["r0"], "tokens_before": 2}
    assert told.items() <= line.items()
    assert (line["output_tokens"], "error" in line) == (4, False)
    first, second, request = spans.get_finished_spans()
    assert first.parent is not None
    assert second.parent is not None
    assert first.parent.span_id == second.parent.span_id == request.context.span_id
    assert [span.status.status_code.name for span in (first, second, request)] == ["ERROR", "UNSET", "UNSET"]
    assert {"moestack.takeover": "continue", "moestack.attempts": 2}.items() <= dict(request.attributes or {}).items()
