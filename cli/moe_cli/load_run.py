"""`moectl load`: options to arrivals, real requests with a progress bar, and the result as a table or JSON."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_cli import live
from moe_cli.arrivals import Arrival, gamma_arrivals, parse_lengths, prompt, read_trace
from moe_cli.documents import read_state
from moe_cli.load import Send, clip, offer, request_body
from moe_cli.load_stats import LoadReport, summarise
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_cli.stream import OK, Outcome, chat
from moe_core.clock import SystemClock
from moe_core.http import HttpError, call_json, session

READ_S = 300.0


@dataclass(frozen=True)
class LoadOptions:
    """`moectl load` as it was asked for."""

    trace: Path | None
    rps: float | None
    burstiness: float
    seconds: float | None
    url: str | None
    model: str | None
    input_tokens: str
    output_tokens: str
    seed: int
    concurrency_limit: int | None
    speed: float
    chars_per_token: float
    context: int | None
    ignore_eos: bool
    ttft_ms: float | None
    itl_ms: float | None
    as_json: bool
    state_dir: Path


async def run(options: LoadOptions, say: Say) -> Exit:
    """Send the load and print its result; after Ctrl-C, that of what was sent. Raises Refusal."""
    arrivals = plan_arrivals(options)
    async with session(read_s=READ_S) as client:
        url, context = _where(options)
        model = options.model or await _first_model(client, url)
        arrivals, cut = clip(arrivals, context)
        if cut:
            say.aside(f"{cut} of {len(arrivals)} requests are cut to the context of {context} tokens")
        outcomes: list[Outcome] = []
        clock = SystemClock()
        started_s = clock.monotonic()

        async def send(number: int, arrival: Arrival, due_s: float) -> Outcome:
            # A generator of its own for each request: its prompt does not hang on the order in which tasks run.
            text = prompt(random.Random(f"{options.seed}/{number}"), arrival.input_tokens, options.chars_per_token)
            body = request_body(model, text, arrival.output_tokens, options.ignore_eos)
            return await chat(client, url, body, clock, due_s=due_s)

        interrupted = await _until_signal(_offer(arrivals, send, options, outcomes, say))
        seconds = clock.monotonic() - started_s
    report = summarise(
        outcomes,
        planned=len(arrivals),
        seconds=seconds,
        ttft_slo_s=None if options.ttft_ms is None else options.ttft_ms / 1000,
        itl_slo_s=None if options.itl_ms is None else options.itl_ms / 1000,
        interrupted=interrupted,
    )
    _print(report, options, say)
    return Exit.INTERRUPTED if interrupted else Exit.OK


def plan_arrivals(options: LoadOptions) -> list[Arrival]:
    """What is to be sent. Raises Refusal for options that do not go together."""

    def refuse(where: str, message: str, remedy: str) -> Refusal:
        return Refusal(Problem(field=where, message=message, remedy=remedy))

    for where, value in (("--rps", options.rps), ("--burstiness", options.burstiness), ("--seconds", options.seconds),
                         ("--speed", options.speed), ("--chars-per-token", options.chars_per_token)):  # fmt: skip
        if value is not None and not 0 < value < float("inf"):
            raise refuse(where, f"{value:g} is not above 0", "give a number above 0")
    if options.trace is not None:
        if options.rps is not None:
            raise refuse("--rps", "a trace has its own rate", "leave it out, or use --speed")
        return read_trace(options.trace, speed=options.speed, seconds=options.seconds)
    if options.rps is None or options.seconds is None:
        raise refuse("--trace", "nothing says what to send", "give --trace FILE, or --rps and --seconds")
    drawn = gamma_arrivals(
        random.Random(options.seed),
        rps=options.rps,
        shape=options.burstiness,
        seconds=options.seconds,
        inputs=parse_lengths(options.input_tokens, "--input-tokens"),
        outputs=parse_lengths(options.output_tokens, "--output-tokens"),
    )
    return list(drawn)


def _where(options: LoadOptions) -> tuple[str, int | None]:
    """API and longest context: those given, or the local stack's."""
    if options.url is not None:
        return options.url.rstrip("/"), options.context
    state = read_state(options.state_dir)
    if state is None or state.ended or state.gateway_url is None:
        message = f"no stack runs here (state folder {options.state_dir})"
        remedy = "start one with `moectl up`, or name an API with --url"
        raise Refusal(Problem(field="--url", message=message, remedy=remedy), code=Exit.COULD_NOT_START)
    return state.gateway_url, options.context or state.context


async def _first_model(client: aiohttp.ClientSession, url: str) -> str:
    try:
        answer = await call_json(client, "GET", f"{url}/models")
        return str(answer["data"][0]["id"])
    except (HttpError, LookupError, TypeError) as error:
        message = f"{url} names no model: {error}"
        problem = Problem(field="--url", message=message, remedy="check the address, or give --model")
        raise Refusal(problem, code=Exit.COULD_NOT_START) from None


async def _offer(arrivals: list[Arrival], send: Send, options: LoadOptions, outcomes: list[Outcome], say: Say) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=say.err, disable=not say.err.is_terminal, transient=True) as progress:
        bar = progress.add_task("load", total=len(arrivals))
        in_flight = failed = 0

        def describe(change: int, outcome: Outcome | None = None) -> None:
            nonlocal in_flight, failed
            in_flight += change
            failed += outcome is not None and outcome.kind != OK
            progress.update(bar, advance=outcome is not None, description=f"{in_flight} in flight, {failed} failed")

        await offer(
            arrivals,
            send,
            SystemClock(),
            limit=options.concurrency_limit,
            on_sent=lambda: describe(1),
            on_done=lambda outcome: describe(-1, outcome),
            outcomes=outcomes,
        )


async def _until_signal(work: Coroutine[Any, Any, None]) -> bool:
    """Run to the end, or until Ctrl-C or SIGTERM; True for the latter."""
    task = asyncio.create_task(work)
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return stopped


def _print(report: LoadReport, options: LoadOptions, say: Say) -> None:
    if options.as_json:
        say.line(report.model_dump_json(by_alias=True))
        return
    for line in live.load_lines(report):
        say.line(line)
    say.show(live.load_table(report))
