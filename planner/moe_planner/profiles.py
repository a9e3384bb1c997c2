"""The four profiles of public articles (A to D), recomputed: every input has a name, and where an article is silent the
assumption that its figure needs is solved for and shown. Pure.

An article's break-even B and rent R say what it took a million tokens from the API to cost: R/B. Set against price
lists, that is a share of output among the tokens (breakeven.output_share). Two figures for one rent, 1.2 thousand
million tokens of chat and 600 million of completion, say that a completion token costs twice a chat token: at one price
list that is possible only where chats have less output, or are read from a cache. The workloads here are the roundest
such pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_planner.breakeven import BreakEven, Own, Tariffed, break_even, implied_usd_per_m, output_share
from moe_planner.cost import HOURS_PER_MONTH, MILLION, Tariff, Workload

GPT = Tariffed("gpt-5.5", 5.0, 30.0, 0.5)
OPUS = Tariffed("claude-opus-4.7", 5.0, 25.0, 0.5)
OPEN_MODEL = Tariffed("deepseek-v4-pro-2026-05", 1.74, 3.48)
"""The prices that the articles state, under the names that the catalog has them by."""
ARTICLE_RENTS = (2.0, 3.0)
"""USD per H100-hour, the articles' range."""
RENT = 2.25
"""USD per H100-hour at which the two workloads below meet both stated figures."""
V4_RENT = 25_000 / 8 / HOURS_PER_MONTH
"""USD per GPU-hour: the articles' $25,000 a month for eight."""

CHAT = Workload("chat", 1800, 200, cached_share=0.5)
"""Nine tokens of input for one of output, half of the input from the cache: earlier turns of a conversation."""
COMPLETION = Workload("completion", 1500, 500)
"""Three for one, nothing cached: the mix that price comparisons blend at (findllm.org/blog/llm-pricing-explained)."""
PLAIN_CHAT = Workload("chat, nothing cached", 2000, 200)
PLAIN_COMPLETION = Workload("completion, more output", 1500, 1000)
"""The pair that needs no cache, at the upper end of the rents."""


@dataclass(frozen=True)
class Stated:
    """A break-even as an article gives it, without its inputs."""

    name: str
    tokens_per_month: tuple[float, float]
    gpus: int

    def implied(self) -> tuple[float, float]:
        """Dollars for a million tokens that it takes for granted, over the range of rents."""
        return (
            implied_usd_per_m(self.gpus * ARTICLE_RENTS[0] * HOURS_PER_MONTH, self.tokens_per_month[0]),
            implied_usd_per_m(self.gpus * ARTICLE_RENTS[1] * HOURS_PER_MONTH, self.tokens_per_month[1]),
        )


STATED_CHAT = Stated("about 1.2 thousand million tokens of chat on 4×H100", (1.2e9, 1.2e9), 4)
STATED_COMPLETION = Stated("about 600 million tokens of completion on 4×H100", (0.6e9, 0.6e9), 4)
STATED_OPEN = Stated("2.7 to 4 thousand million tokens against an open model's own API", (2.7e9, 4e9), 4)


@dataclass(frozen=True)
class Needed:
    """What a stated break-even needs at one rent and price list. `input_per_output` None: no mix of tokens does it."""

    stated: Stated
    usd_per_gpu_hour: float
    usd_per_m: float
    api: str
    cached_share: float
    input_per_output: float | None


def needed(stated: Stated, tariff: Tariff, usd_per_gpu_hour: float, cached_share: float = 0.0) -> Needed:
    """The mix of input and output at which the first stated figure holds."""
    price = implied_usd_per_m(stated.gpus * usd_per_gpu_hour * HOURS_PER_MONTH, stated.tokens_per_month[0])
    found = output_share(tariff, price, cached_share)
    ratio = None if not found else (1 - found) / found
    return Needed(stated, usd_per_gpu_hour, price, tariff.name, cached_share, ratio)


def assumptions() -> tuple[Needed, ...]:
    """Both stated figures against both closed price lists, at the ends of the rents, uncached and half cached."""
    return tuple(
        needed(stated, tariff, rent, cached)
        for stated in (STATED_CHAT, STATED_COMPLETION)
        for tariff in (GPT, OPUS)
        for rent in (ARTICLE_RENTS[0], RENT, ARTICLE_RENTS[1])
        for cached in (0.0, 0.5)
    )


@dataclass(frozen=True)
class Reproduced:
    """A stated figure, and what named inputs give. `error`: relative, against the nearest end of what was stated."""

    stated: Stated
    found: BreakEven
    error: float


def _reproduced(stated: Stated, rent: float, tariff: Tariff, workload: Workload) -> Reproduced:
    found = break_even(Own(stated.gpus, rent), tariff, workload)
    low, high = stated.tokens_per_month
    nearest = min(max(found.unlimited, low), high)
    return Reproduced(stated, found, found.unlimited / nearest - 1)


def reproduced() -> tuple[Reproduced, ...]:
    """The articles' figures from named inputs: half cached at one rent, uncached at the highest, and the open model."""
    top = ARTICLE_RENTS[1]
    return (
        _reproduced(STATED_CHAT, RENT, GPT, CHAT),
        _reproduced(STATED_COMPLETION, RENT, GPT, COMPLETION),
        _reproduced(STATED_CHAT, top, GPT, PLAIN_CHAT),
        _reproduced(STATED_COMPLETION, top, GPT, PLAIN_COMPLETION),
        *(_reproduced(STATED_OPEN, rent, OPEN_MODEL, COMPLETION) for rent in ARTICLE_RENTS),
    )


Cheaper = Literal["API", "own", "neither decides"]


@dataclass(frozen=True)
class Row:
    """One workload of a profile at one volume: dollars a month either way."""

    tokens_per_month: float
    found: BreakEven
    own_usd: float
    api_usd: float

    @property
    def cheaper(self) -> Cheaper:
        """Within 2 % the choice is not the money's."""
        if abs(self.own_usd - self.api_usd) <= 0.02 * max(self.own_usd, self.api_usd):
            return "neither decides"
        return "own" if self.own_usd < self.api_usd else "API"


@dataclass(frozen=True)
class Profile:
    """A volume, what serves it, and what each way costs at both ends of the volume."""

    letter: str
    claim: str
    model: str
    accelerator: str
    own: Own
    tariff: Tariff
    rows: tuple[Row, ...]


def _profile(
    letter: str,
    claim: str,
    model: str,
    accelerator: str,
    own: Own,
    tariff: Tariff,
    workloads: tuple[Workload, ...],
    volumes: tuple[float, ...],
) -> Profile:
    rows = []
    for workload in workloads:
        found = break_even(own, tariff, workload)
        rows += [Row(v, found, own.usd(v), v / MILLION * found.api_usd_per_m) for v in volumes]
    return Profile(letter, claim, model, accelerator, own, tariff, tuple(rows))


def profiles(v4: Own | None = None, box: Own | None = None) -> tuple[Profile, ...]:
    """The four profiles. `v4`: GPUs that hold DeepSeek V4-Pro; `box`: those of the one box; by default at the articles'
    own rents. Rows compare one replica, whose speed is not limited unless it is given."""
    qwen = "Qwen/Qwen3-235B-A22B-FP8"
    h100 = Own(4, RENT)
    both = (CHAT, COMPLETION)
    return (
        _profile(
            "A", "under 600 million tokens a month: closed API", qwen, "nvidia-h100", h100, GPT, both, (0.1e9, 0.5e9)
        ),
        _profile(
            "B",
            "1 to 5 thousand million: Qwen3 or Llama 4 on 4×H100",
            qwen,
            "nvidia-h100",
            h100,
            GPT,
            both,
            (1e9, 1.2e9, 5e9),
        ),
        _profile(
            "C",
            "above 5 thousand million: V4-Pro with fallback",
            "deepseek-ai/DeepSeek-V4-Pro",
            "nvidia-h200",  # 8×H100, as claimed, do not hold it: docs/claims.md
            v4 or Own(8, V4_RENT),
            GPT,
            both,
            (5e9, 10e9),
        ),
        _profile(
            "D",
            "one box: Mixtral",
            "TheBloke/Mixtral-8x7B-Instruct-v0.1-AWQ",
            "nvidia-h100",
            box or Own(1, RENT),
            GPT,
            both,
            (0.1e9, 0.3e9),
        ),
    )
