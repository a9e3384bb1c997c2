"""What a load run comes to: counts, percentiles, rates, SLO attainment. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from pydantic import Field

from moe_api.base import Model
from moe_cli.stream import OK, Outcome

QUANTILES = (0.50, 0.90, 0.95, 0.99)


class Spread(Model):
    """Percentiles of one measure, seconds."""

    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class TargetCount(Model):
    """Requests that one target answered."""

    count: int
    ok: int
    ttft_p95_s: float | None = None


class LoadReport(Model):
    """The result of a load run. Latency is that of requests that went well; failed ones are misses of the SLO."""

    planned: int
    sent: int
    ok: int
    failed: dict[str, int]
    interrupted: bool
    seconds: float
    offered_rps: float
    completed_rps: float
    ttft: Spread | None = None
    itl: Spread | None = None
    e2e: Spread | None = None
    longest_gap_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    output_tokens_per_s: float = 0.0
    late_p99_s: float = 0.0
    slo_attained: float | None = None
    targets: dict[str, TargetCount] = Field(default_factory=dict)
    first_failure: str = ""


def percentile(values: Sequence[float], q: float) -> float:
    """Quantile by linear interpolation between the two nearest of the sorted values. Raises ValueError on none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    p50, p90, p95, p99 = (percentile(values, q) for q in QUANTILES)
    return Spread(p50=p50, p90=p90, p95=p95, p99=p99, max=max(values))


def summarise(
    outcomes: Sequence[Outcome],
    *,
    planned: int,
    seconds: float,
    ttft_slo_s: float | None = None,
    itl_slo_s: float | None = None,
    interrupted: bool = False,
) -> LoadReport:
    """Everything about a run of `seconds` in which `planned` requests were meant to be sent."""
    good = [outcome for outcome in outcomes if outcome.kind == OK]
    bad = [outcome for outcome in outcomes if outcome.kind != OK]
    by_target: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_target[outcome.target].append(outcome)
    span = max(seconds, 1e-9)
    output_tokens = sum(outcome.output_tokens for outcome in outcomes)
    attained = None
    if (ttft_slo_s is not None or itl_slo_s is not None) and outcomes:
        attained = sum(_within(outcome, ttft_slo_s, itl_slo_s) for outcome in outcomes) / len(outcomes)
    return LoadReport(
        planned=planned,
        sent=len(outcomes),
        ok=len(good),
        failed=dict(Counter(outcome.kind for outcome in bad).most_common()),
        interrupted=interrupted,
        seconds=seconds,
        offered_rps=len(outcomes) / span,
        completed_rps=len(good) / span,
        ttft=spread(_present(outcome.ttft_s for outcome in good)),
        itl=spread(_present(outcome.itl_s for outcome in good)),
        e2e=spread([outcome.e2e_s for outcome in good]),
        longest_gap_s=max((outcome.longest_gap_s for outcome in outcomes), default=0.0),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in outcomes),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / span,
        late_p99_s=percentile([o.sent_s - o.due_s for o in outcomes], 0.99) if outcomes else 0.0,
        slo_attained=attained,
        targets={name: _target(rows) for name, rows in sorted(by_target.items()) if name},
        first_failure=f"{bad[0].kind}: {bad[0].detail}".rstrip(": ") if bad else "",
    )


def _within(outcome: Outcome, ttft_slo_s: float | None, itl_slo_s: float | None) -> bool:
    """A request keeps the SLO where it went well and each measure it has is inside. One token has no ITL."""
    if outcome.kind != OK:
        return False
    ttft_ok = ttft_slo_s is None or (outcome.ttft_s is not None and outcome.ttft_s <= ttft_slo_s)
    return ttft_ok and (itl_slo_s is None or outcome.itl_s is None or outcome.itl_s <= itl_slo_s)


def _target(rows: Sequence[Outcome]) -> TargetCount:
    good = [row for row in rows if row.kind == OK]
    times = _present(row.ttft_s for row in good)
    return TargetCount(count=len(rows), ok=len(good), ttft_p95_s=percentile(times, 0.95) if times else None)


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
