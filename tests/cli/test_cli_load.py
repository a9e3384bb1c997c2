"""The load generator: arrivals, an open loop on a fake clock, real streams, and the statistics."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from moe_cli.arrivals import Arrival, Lengths, gamma_arrivals, parse_lengths, prompt, read_trace
from moe_cli.load import clip, offer
from moe_cli.load_run import LoadOptions, run
from moe_cli.load_stats import percentile, summarise
from moe_cli.outcome import Exit, Refusal
from moe_cli.say import Say
from moe_cli.stream import OK, Outcome, chat
from moe_core.clock import FakeClock, SystemClock
from moe_core.http import session

SAME = Lengths(10, 10)


def outcome(kind: str = OK, *, due: float = 0.0, first: float = 0.1, last: float = 0.5, **more: Any) -> Outcome:
    values: dict[str, Any] = {"sent_s": due, "end_s": due + last, "output_tokens": 5, "target": "local", **more}
    return Outcome(kind=kind, due_s=due, first_s=due + first, last_s=due + last, **values)


# Arrivals


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gamma_arrivals_have_the_rate_and_the_burstiness_asked_for(shape: float) -> None:
    rng = random.Random(1)
    times = [a.at_s for a in gamma_arrivals(rng, rps=10, shape=shape, seconds=4000, inputs=SAME, outputs=SAME)]
    gaps = [b - a for a, b in pairwise(times)]
    assert len(times) == pytest.approx(40_000, rel=0.03)
    # A Gamma distribution's coefficient of variation is 1/√shape.
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(shape**-0.5, rel=0.05)
    assert times == sorted(times)


def test_the_same_seed_gives_the_same_load() -> None:
    lengths = Lengths(100, 400)
    runs = [
        list(gamma_arrivals(random.Random(7), rps=5, shape=0.3, seconds=20, inputs=lengths, outputs=lengths))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_lengths_have_the_median_and_the_tail_asked_for() -> None:
    rng = random.Random(2)
    drawn = [Lengths(128, 512).draw(rng) for _ in range(40_000)]
    assert median(drawn) == pytest.approx(128, rel=0.03)
    assert percentile(drawn, 0.99) == pytest.approx(512, rel=0.06)
    assert {SAME.draw(rng) for _ in range(5)} == {10}


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "5,2", "1,2,3", "1.5"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Refusal, match="--input-tokens"):
        parse_lengths(text, "--input-tokens")


def write_trace(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_a_trace_is_read_in_order_from_its_first_request(tmp_path: Path) -> None:
    rows = "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:06.9799600,5,1\n"
    path = write_trace(tmp_path, HEAD + rows)
    assert read_trace(path) == [
        Arrival(0.0, 4808, 10),
        Arrival(pytest.approx(0.052, abs=1e-6), 3180, 8),
        Arrival(pytest.approx(3.0, abs=1e-6), 5, 1),
    ]
    assert [a.at_s for a in read_trace(path, speed=3)][-1] == pytest.approx(1.0, abs=1e-6)
    assert len(read_trace(path, seconds=2)) == 2


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("other columns", "a,b\n1,2\n", "has the columns a,b"),
        ("empty", "", "has the columns none"),
        ("no rows", HEAD, "has no requests"),
        ("no number", HEAD + "2023-11-16 18:17:03,x,1\n", "line 2"),
        ("no time", HEAD + "1,1,1\nsoon,1,1\n", "line 3"),
        ("a short row", HEAD + "1,1\n", "line 2"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(name: str, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=said):
        read_trace(write_trace(tmp_path, text))


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="No such file"):
        read_trace(tmp_path / "none.csv")


@given(st.integers(1, 2000), st.floats(0.5, 6), st.integers(0, 10))
def test_prompts_have_the_length_asked_for(tokens: int, chars: float, seed: int) -> None:
    text = prompt(random.Random(seed), tokens, chars)
    assert len(text.encode()) == max(1, round(tokens * chars))


@given(st.integers(2, 8192), st.integers(1, 20_000), st.integers(1, 20_000))
def test_cut_requests_fit_the_context(context: int, inputs: int, outputs: int) -> None:
    (fitted,), cut = clip([Arrival(0, inputs, outputs)], context, room=0)
    assert fitted.input_tokens + fitted.output_tokens <= context
    assert cut == int((fitted.input_tokens, fitted.output_tokens) != (inputs, outputs))
    if inputs + outputs <= context and outputs <= context // 2:
        assert cut == 0


# The open loop


async def offered(times: Sequence[float], service_s: float, limit: int | None) -> tuple[list[Outcome], list[float]]:
    """Outcomes of an upstream with a fixed service time, and when each request was sent, on a fake clock."""
    clock = FakeClock()
    sent: list[float] = []
    outcomes: list[Outcome] = []

    async def send(number: int, arrival: Arrival, due_s: float) -> Outcome:
        sent.append(clock.monotonic())
        await clock.sleep(service_s)
        return Outcome(OK, due_s=due_s, sent_s=sent[number], end_s=clock.monotonic())

    offering = asyncio.create_task(
        offer([Arrival(t, 1, 1) for t in times], send, clock, limit=limit, outcomes=outcomes)
    )
    while not offering.done():
        await clock.advance(0.5)
    await offering
    return outcomes, sent


async def test_a_slow_upstream_does_not_slow_arrivals() -> None:
    times = [0.0, 1.0, 1.0, 2.5]
    outcomes, sent = await offered(times, service_s=100.0, limit=None)
    assert sent == times
    assert [o.e2e_s for o in outcomes] == [100.0] * 4


async def test_waiting_for_a_place_counts_as_latency() -> None:
    outcomes, sent = await offered([0.0, 0.0, 0.0], service_s=2.0, limit=1)
    assert sent == [0.0, 2.0, 4.0]
    assert [o.e2e_s for o in outcomes] == [2.0, 4.0, 6.0]


async def test_an_interrupted_run_keeps_what_was_finished() -> None:
    clock = FakeClock()
    outcomes: list[Outcome] = []
    cancelled: list[int] = []

    async def send(number: int, arrival: Arrival, due_s: float) -> Outcome:
        try:
            await clock.sleep(1.0 if number == 0 else 100.0)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return Outcome(OK, due_s, due_s, clock.monotonic())

    arrivals = [Arrival(t, 1, 1) for t in (0.0, 0.5, 50.0)]
    offering = asyncio.create_task(offer(arrivals, send, clock, outcomes=outcomes))
    await clock.advance(10.0)
    offering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await offering
    assert (len(outcomes), cancelled) == (1, [1])


# Statistics


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_percentiles_lie_inside_and_rise(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert min(values) <= percentile(values, low) <= percentile(values, high) * (1 + 1e-12) <= max(values) * (1 + 1e-9)
    assert (percentile(values, 0), percentile(values, 1)) == (min(values), max(values))


def test_percentiles_interpolate() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile(list(range(101)), 0.95) == 95
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_a_report_counts_everything_once() -> None:
    rows = [
        outcome(),
        outcome(due=1.0, first=0.3, target="gpt"),
        outcome("http 529", first=9.0, output_tokens=0),
        outcome("http 529", output_tokens=0, detail="full"),
        outcome("cut", output_tokens=2, longest_gap_s=1.5),
    ]
    report = summarise(rows, planned=8, seconds=10.0, ttft_slo_s=0.2, itl_slo_s=0.2, interrupted=True)
    assert (report.planned, report.sent, report.ok) == (8, 5, 2)
    assert report.failed == {"http 529": 2, "cut": 1}
    assert (report.offered_rps, report.completed_rps, report.output_tokens_per_s) == (0.5, 0.2, 1.2)
    assert report.ttft is not None
    assert (report.ttft.p50, report.ttft.max) == (pytest.approx(0.2), pytest.approx(0.3))
    assert report.itl is not None
    assert report.itl.p50 == pytest.approx((0.4 / 4 + 0.2 / 4) / 2)
    assert report.slo_attained == 0.2, "one in five: one was late, three failed"
    assert report.longest_gap_s == 1.5
    assert {name: (row.count, row.ok) for name, row in report.targets.items()} == {"gpt": (1, 1), "local": (4, 1)}
    assert report.first_failure == "http 529"


def test_nothing_sent_is_a_report_too() -> None:
    report = summarise([], planned=3, seconds=0.0, ttft_slo_s=1.0, interrupted=True)
    assert (report.sent, report.ttft, report.slo_attained) == (0, None, None)


# Real streams


@asynccontextmanager
async def upstream(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A server whose chat endpoint is `answer`; gives the base of its API."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def load_options(*, tmp: Path, **changes: Any) -> LoadOptions:
    values: dict[str, Any] = {
        **dict.fromkeys(("trace", "rps", "seconds", "url", "concurrency_limit", "context", "ttft_ms", "itl_ms")),
        "model": "m",
        "burstiness": 1.0,
        "input_tokens": "5",
        "output_tokens": "5",
        "seed": 0,
        "speed": 1.0,
        "chars_per_token": 1.0,
        "ignore_eos": False,
        "as_json": True,
        "state_dir": tmp,
    }
    return LoadOptions(**{**values, **changes})


def events(*rows: object) -> bytes:
    return b"".join(b"data: " + (r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n\n" for r in rows)


def token(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
ERROR = {"error": {"message": "out of KV cache"}}
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}


@pytest.mark.parametrize(
    ("name", "status", "body", "kind", "tokens"),
    [
        ("whole", 200, events(ROLE, token("a"), token("b"), USAGE, b"[DONE]"), OK, 3),
        ("without usage, chunks count", 200, events(ROLE, token("a"), token("b"), b"[DONE]"), OK, 2),
        ("cut", 200, events(ROLE, token("a")), "cut", 1),
        ("an error in band", 200, events(token("a"), ERROR, b"[DONE]"), "error in stream", 1),
        ("no JSON", 200, events(b"{oops", b"[DONE]"), "error in stream", 0),
        ("shed", 529, b'{"error": {"message": "full"}}', "http 529", 0),
    ],
)  # fmt: skip
async def test_how_a_stream_went(name: str, status: int, body: bytes, kind: str, tokens: int) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        sent = await request.json()
        assert sent["stream"]
        headers = {"x-moestack-target": "local"} if request.headers.get("x-moestack-explain") == "1" else {}
        return web.Response(status=status, body=body, headers={"Content-Type": "text/event-stream", **headers})

    async with upstream(answer) as url, session() as client:
        found = await chat(client, url, {"model": "m"}, SystemClock(), keep_text=True)
    assert (found.kind, found.output_tokens, found.target) == (kind, tokens, "local")
    assert (found.first_s is not None) == (tokens > 0), "a role is no token"


async def test_ctrl_c_prints_what_was_finished(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answered = asyncio.Event()

    async def answer(_: web.Request) -> web.StreamResponse:
        if answered.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        answered.set()
        return web.Response(body=events(token("a"), b"[DONE]"), headers={"Content-Type": "text/event-stream"})

    async with upstream(answer) as url:
        trace = write_trace(tmp_path, HEAD + "0,5,5\n0.2,5,5\n500,5,5\n")
        code = await run(load_options(trace=trace, url=url, tmp=tmp_path), Say())
    report = json.loads(capsys.readouterr().out)
    assert code == Exit.INTERRUPTED
    assert (report["planned"], report["sent"], report["ok"], report["interrupted"]) == (3, 1, 1, True)


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("nothing to send", {"rps": 1.0}, "--trace"),
        ("no rate", {"rps": 0.0, "seconds": 1.0}, "--rps"),
        ("no shape", {"rps": 1.0, "seconds": 1.0, "burstiness": -1.0}, "--burstiness"),
        ("a rate beside a trace", {"trace": Path("t.csv"), "rps": 1.0}, "--rps"),
        ("no stack", {"rps": 1.0, "seconds": 1.0}, "--url"),
        ("nobody there", {"rps": 1.0, "seconds": 1.0, "url": "http://127.0.0.1:1/v1", "model": None}, "--url"),
    ],
)
async def test_options_that_cannot_be_run(name: str, options: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        await run(load_options(tmp=tmp_path, **options), Say())
    assert [problem.field for problem in refused.value.problems] == [field]


async def test_nobody_there() -> None:
    async with session() as client:
        found = await chat(client, "http://127.0.0.1:1/v1", {"model": "m"}, SystemClock())
    assert found.kind == "connect"
