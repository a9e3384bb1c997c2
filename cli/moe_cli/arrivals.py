"""When requests arrive and how long they are: from a trace, or drawn. Pure but for reading the trace."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_cli.outcome import Problem, Refusal
from moe_core import trace

Z99 = 2.3263478740408408
"""99th percentile of the standard normal distribution."""


@dataclass(frozen=True)
class Arrival:
    """One request to come: seconds from the start, and its lengths in tokens."""

    at_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Log-normal token counts by median and 99th percentile; equal ones make every request the same."""

    median: int
    p99: int

    def draw(self, rng: random.Random) -> int:
        sigma = math.log(self.p99 / self.median) / Z99
        return max(1, round(self.median * math.exp(rng.gauss(0.0, sigma)))) if sigma else self.median


def parse_lengths(text: str, option: str) -> Lengths:
    """`128` or `128,512` (median, 99th percentile). Raises Refusal naming the option."""
    parts = text.split(",")
    try:
        values = [int(part) for part in parts]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not 1 <= values[0] <= values[-1]:
        remedy = "write MEDIAN or MEDIAN,P99 in whole tokens, such as 128,512"
        raise Refusal(Problem(field=option, message=f"{text!r} is no token count", remedy=remedy))
    return Lengths(values[0], values[-1])


def gamma_arrivals(
    rng: random.Random, *, rps: float, shape: float, seconds: float, inputs: Lengths, outputs: Lengths
) -> Iterator[Arrival]:
    """Arrivals with Gamma-distributed gaps of mean 1/rps. Shape 1 is Poisson; below 1 they come in bursts."""
    now = 0.0
    while True:
        now += rng.gammavariate(shape, 1.0 / (rps * shape))
        if now >= seconds:
            return
        yield Arrival(now, inputs.draw(rng), outputs.draw(rng))


def read_trace(path: Path, *, speed: float = 1.0, seconds: float | None = None) -> list[Arrival]:
    """A trace in the form of the Azure LLM inference traces (CSV: TIMESTAMP,ContextTokens,GeneratedTokens).

    `speed` 2 replays it twice as fast; `seconds` ends it after that much replayed time. Raises Refusal.
    """

    try:
        recorded = trace.read(path)
    except trace.TraceInvalid as error:
        raise Refusal(Problem(field="--trace", message=error.message, remedy=error.remedy)) from None
    arrivals = [Arrival(one.at_s / speed, one.input_tokens, one.output_tokens) for one in recorded]
    return [a for a in arrivals if seconds is None or a.at_s < seconds]


def prompt(rng: random.Random, tokens: int, chars_per_token: float) -> str:
    """Random words of about that many tokens; each prompt differs from its first word on, so that no cache helps."""
    length = max(1, round(tokens * chars_per_token))
    words: list[str] = []
    size = 0
    while size <= length:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        words.append(word)
        size += len(word) + 1
    return " ".join(words)[:length]
