"""The answer of `moectl plan` in words and columns. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from moe_cli.plan_answer import Answer
from moe_planner import report
from moe_planner.catalog import GIB
from moe_planner.plan import Plan
from moe_planner.profiles import Profile, Reproduced, assumptions, profiles, reproduced
from moe_planner.search import Found, Option, Place

MOST = 12
"""Rows of the front; --json has all of them."""
WIDTH = 60
_LINKS = {"nvlink": "the link between GPUs", "pcie": "PCIe", "nic": "the network"}
_SHADES = {"Weights": "█", "RedundantExperts": "▓", "Activations": "▒", "Overhead": "░", "KVCache": "▚", "Free": "·"}


def lines(answer: Answer, *, explain: bool = False) -> Iterator[str]:
    """Everything that a person asked for, best news first."""
    yield answer.verdict.message
    plan = answer.verdict.plan
    if plan is not None:
        yield ""
        yield from memory(plan)
    if answer.found is not None and answer.chosen is not None:
        yield ""
        yield from _choice(answer, answer.chosen)
        yield ""
        yield from _front(answer)
        yield ""
        yield from _launch(answer)
        yield ""
        yield from _cost(answer)
        yield from _wire(answer)
        yield from _mix(answer)
    elif answer.found is not None:
        yield ""
        yield "No speed and no cost: nothing that was tried could be predicted"
        yield from _rejected(answer.found, first=not explain)
    if explain and answer.chosen is not None:
        yield ""
        yield from _explain(answer)


def memory(plan: Plan) -> Iterator[str]:
    """A bar of one GPU's parts, each with its size: the fullest GPU, which all others are like."""
    total = plan.memory_per_gpu or 1
    yield f"Memory of one GPU of {plan.layout.gpus}, {total / GIB:.1f} GiB"
    bar = ""
    for row in plan.memory:
        bar += _SHADES.get(row.part, "?") * round(row.size.bytes / total * WIDTH)
    yield f"  {bar[:WIDTH]:·<{WIDTH}}"
    parts = (f"{_SHADES.get(row.part, '?')} {row.part} {row.size.bytes / GIB:.1f} GiB" for row in plan.memory)
    yield "  " + "   ".join(parts)


def _choice(answer: Answer, chosen: Option) -> Iterator[str]:
    s = chosen.speed
    kept = "keeps the SLO" if answer.keeps_slo else "misses the SLO least: nothing that was tried keeps it"
    yield (
        f"{chosen.place.gpus} × {chosen.place.accelerator.name}, {chosen.layout}, {chosen.concurrency} requests in"
        f" flight{_knobs(chosen)}: {kept}"
    )
    yield (
        f"  TTFT {s.ttft_s * 1000:,.0f} ms and ITL {s.itl_s * 1000:.1f} ms on the average"
        f" (SLO {_ms(answer.slo.ttft_s)} and {_ms(answer.slo.itl_s)} at the 95th percentile: leave room)"
    )
    yield (
        f"  {s.total_tokens_per_s:,.0f} tokens/s, {s.output_tokens_per_s:,.0f} of them output"
        f" ({s.low:,.0f} to {s.high:,.0f} by the calibration's held-out error); limited by {s.bound};"
        f" S-MBU {s.s_mbu:.0%}, S-MFU {s.s_mfu:.0%}"
    )
    if answer.traffic.tokens_per_s is not None:
        yield (
            f"  {answer.traffic.tokens_per_s:,.0f} tokens/s at {answer.traffic.utilisation:.0%} of capacity take"
            f" {chosen.replicas} replica{'s' if chosen.replicas > 1 else ''}, {chosen.gpus} GPUs"
        )


def _knobs(option: Option) -> str:
    gamma = "" if option.gamma is None else f", capacity factor {option.gamma:g}"
    return gamma + (f", {option.redundant} redundant experts" if option.redundant else "")


def _front(answer: Answer) -> Iterator[str]:
    if answer.found is None or not answer.found.front:
        return
    front = answer.found.front
    counted = f"{len(front)} of {len(answer.found.options)}"
    yield f"No other option is better in cost, throughput and latency at once ({counted})"
    shown = front if len(front) <= MOST else [front[round(i * (len(front) - 1) / (MOST - 1))] for i in range(MOST)]
    rows = [
        (
            o.place.accelerator.name,
            str(o.place.gpus),
            f"T{o.layout.tensor} D{o.layout.data} E{o.layout.expert}",
            str(o.concurrency),
            "-" if o.gamma is None else f"{o.gamma:g}",
            str(o.redundant),
            _usd(o.usd_per_m),
            f"{o.per_gpu:,.0f}",
            f"{o.speed.ttft_s * 1000:,.0f}",
            f"{o.speed.itl_s * 1000:.1f}",
            f"{o.request_s:.1f}",
            o.speed.bound,
        )
        for o in shown
    ]
    head = ("accelerator", "GPUs", "layout", "in flight", "γ", "spare", "$/1M", "tok/s/GPU", "TTFT ms", "ITL ms",
            "request s", "bound")  # fmt: skip
    yield from columns(head, rows)


def _launch(answer: Answer) -> Iterator[str]:
    launch = answer.launch
    if launch is None:
        return
    yield "Launch: write this into spec, or leave parallelism out and let the operator choose"
    best = None if answer.found is None else answer.found.best
    if best is not None and answer.chosen is not None and best.layout != answer.chosen.layout:
        yield (
            f"  Cheaper for this traffic by prediction: {best.layout}, {_usd(best.usd_per_m)} per 1M against"
            f" {_usd(answer.chosen.usd_per_m)}. Sizes that are written into spec.parallelism stand."
        )
    for line in yaml.safe_dump(dict(launch.spec), sort_keys=False, default_flow_style=None).rstrip().splitlines():
        yield f"  {line}"
    if launch.arguments is None:
        yield f"  the engine cannot be started so: {launch.why}"
    else:
        yield f"  {' '.join(launch.command())}"
    if answer.chosen is not None and answer.chosen.layout.gpus > 1 and answer.chosen.layout.expert == 1:
        yield "  Experts lie in slices on all ranks: load is even by itself, and capacity has nothing to balance."
    written = None if answer.as_written is None else answer.as_written.plan
    if written is not None and answer.chosen is not None and written.layout != answer.chosen.layout:
        yield f"  As it is written, the operator would launch {written.layout}."


def _cost(answer: Answer) -> Iterator[str]:
    chosen = answer.chosen
    if chosen is None:
        return
    rent = chosen.place.usd_per_gpu_hour
    if rent is None:
        yield f"Cost: no rent of {chosen.place.accelerator.name} is known: give --rent USD per GPU-hour"
        return
    figure = chosen.place.accelerator.figures.get("rent_usd_per_hour")
    source = "as given" if chosen.place.rent is not None or figure is None else figure.source
    yield f"Cost at ${rent:.2f} per GPU-hour ({source}): ${answer.monthly_usd:,.0f} a month for {chosen.gpus} GPUs"
    rows = []
    for row in answer.costs:
        w = row.workload
        rows.append(
            (
                w.name,
                f"{w.input_tokens:,.0f}:{w.output_tokens:,.0f}",
                f"{w.cached_share:.0%}",
                _usd(row.own.mean_usd_per_m),
                _usd(row.own.input_usd_per_m),
                _usd(row.own.output_usd_per_m),
                *(f"{_usd(b.api_usd_per_m)} → {_volume(b.tokens_per_month)}" for b in row.apis),
            )
        )
    names = [f"{tariff.name}: $/1M → from" for tariff in answer.apis]
    yield from columns(("workload", "in:out", "cached", "own $/1M", "input", "output", *names), rows)
    if answer.costs and answer.apis:
        cost, tariff = answer.costs[0], answer.apis[0]
        yield f"  Tokens a month from which own GPUs pay against {tariff.name}, and how that moves:"
        for move in report.moves(cost, tariff):
            low, high = (f"{value:.3g} → {_volume(tokens)}" for value, tokens in (move.low, move.high))
            yield f"    {move.input}, now {move.now:.3g}: {low}; {high}"


def _wire(answer: Answer) -> Iterator[str]:
    wire = answer.wire
    if wire is None or not wire.bytes_per_token:
        return
    links = [(wire.link_share, _LINKS.get(wire.link, wire.link))]
    if wire.link != "pcie":
        links.append((wire.pcie_share, "PCIe, were it the only link"))
    shares = [f"{share:.0%} of {name}" for share, name in links if share is not None]
    yield (
        f"Between GPUs: each sends {wire.bytes_per_token / 1e6:,.2f} MB a token of its data rank,"
        f" {wire.bytes_per_s / 1e9:,.1f} GB/s when full{': ' + ', '.join(shares) if shares else ''}"
    )


def _mix(answer: Answer) -> Iterator[str]:
    mixes = answer.mixes
    if mixes is None:
        return
    best, hours = mixes.best, mixes.seconds / 3600
    own = f"{best.replicas} own replica{'' if best.replicas == 1 else 's'}"
    yield (
        f"For the trace ({hours:.2f} h, windows of {mixes.window_s:g} s) the cheapest is {own} with"
        f" {answer.apis[0].name} for {best.api_token_share:.1%} of the tokens: ${best.usd:,.2f}; all own"
        f" ({mixes.all_own.replicas} replicas) ${mixes.all_own.usd:,.2f}, all API ${mixes.all_api.usd:,.2f}"
    )


def _explain(answer: Answer) -> Iterator[str]:
    chosen, found = answer.chosen, answer.found
    if chosen is not None and answer.keeps_slo:
        yield "Why this one: the cheapest that keeps the SLO; of equals, the one of fewest GPUs, uncapped, quickest."
        if found is not None and found.best != chosen:
            yield "  Its layout is the operator's own choice, which another must beat by the calibration's error."
    if chosen is not None:
        total = sum(chosen.speed.parts.values())
        told = [f"{name} {part * 1000:.2f} ms ({part / total:.0%})" for name, part in chosen.speed.parts.items()]
        yield f"  A decode step: {', '.join(told)}."
    if found is None:
        return
    for option in _others(answer):
        yield f"  {_place(option)}: {_lacks(option, chosen)}"
    yield from _rejected(found)


def _rejected(found: Found, *, first: bool = False) -> Iterator[str]:
    """What was rejected; with `first`, the first layout of each place alone."""
    seen: set[Place] = set()
    for row in found.rejected:
        if not first or row.place not in seen:
            layout = "" if row.layout is None else f", {row.layout}"
            yield f"  {row.place.gpus} × {row.place.accelerator.name}{layout}: {row.why}: {row.text}"
        seen.add(row.place)


def _others(answer: Answer) -> list[Option]:
    """The cheapest option of each other place and layout."""
    best: dict[tuple[str, str], Option] = {}
    for option in answer.found.options if answer.found is not None else ():
        key = (f"{option.place.gpus} × {option.place.accelerator.name}", str(option.layout))
        if key not in best or option.bounds < best[key].bounds:
            best[key] = option
    chosen = answer.chosen
    return [o for o in best.values() if chosen is None or (o.place, o.layout) != (chosen.place, chosen.layout)]


def _place(option: Option) -> str:
    return f"{option.place.gpus} × {option.place.accelerator.name}, {option.layout}"


def _lacks(option: Option, chosen: Option | None) -> str:
    """What an option has less of than the chosen one."""
    own = f"{_usd(option.usd_per_m)} per 1M at best, {option.per_gpu:,.0f} tokens/s a GPU"
    if chosen is None or chosen.usd_per_m is None or option.usd_per_m is None:
        return f"{own}; limited by {option.speed.bound}"
    return f"{own}: {option.usd_per_m / chosen.usd_per_m - 1:+.0%} in cost; limited by {option.speed.bound}"


def profile_lines() -> Iterator[str]:
    """Profiles A to D, and what the articles' break-evens need."""
    yield "Break-evens that articles state, from named inputs"
    yield from columns(
        ("stated", "workload", "in:out", "cached", "rent $/GPU-h", "API", "$/1M", "found", "off by"),
        [_reproduced(row) for row in reproduced()],
    )
    yield ""
    yield "What they need, where the article does not say: tokens of input for one of output"
    rows = [
        (
            n.stated.name,
            f"{n.usd_per_gpu_hour:.2f}",
            f"{n.usd_per_m:.2f}",
            n.api,
            f"{n.cached_share:.0%}",
            "no mix" if n.input_per_output is None else f"{n.input_per_output:.1f}",
        )
        for n in assumptions()
    ]
    yield from columns(("stated", "rent $/GPU-h", "$/1M", "API", "cached", "in per out"), rows)
    for profile in profiles():
        yield ""
        yield from _profile(profile)


def profiles_json() -> str:
    """The same as one document: tokens a month and USD as numbers, field names as in the planner's own types."""
    rows: dict[str, Sequence[Any]] = {"reproduced": reproduced(), "needed": assumptions(), "profiles": profiles()}
    return json.dumps(
        {name: [asdict(row) for row in found] for name, found in rows.items()},
        ensure_ascii=False,
        default=str,
        indent=2,
    )


def _reproduced(row: Reproduced) -> tuple[str, ...]:
    w = row.found.workload
    return (
        row.stated.name,
        w.name,
        f"{w.input_tokens:g}:{w.output_tokens:g}",
        f"{w.cached_share:.0%}",
        f"{row.found.own.usd_per_gpu_hour:.2f}",
        row.found.api,
        f"{row.found.api_usd_per_m:.2f}",
        _volume(row.found.unlimited),
        f"{row.error:+.1%}",
    )


def _profile(profile: Profile) -> Iterator[str]:
    own = profile.own
    yield f"Profile {profile.letter}: {profile.claim}"
    yield (
        f"  {profile.model} on {own.gpus} × {profile.accelerator} at ${own.usd_per_gpu_hour:.2f} per GPU-hour"
        f" (${own.usd_per_month:,.0f} a month), against {profile.tariff.name}"
    )
    rows = [
        (
            row.found.workload.name,
            _volume(row.tokens_per_month),
            f"${row.own_usd:,.0f}",
            f"${row.api_usd:,.0f}",
            _volume(row.found.tokens_per_month),
            row.cheaper,
        )
        for row in profile.rows
    ]
    yield from columns(("workload", "tokens a month", "own", "API", "break-even", "cheaper"), rows)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows under their heads: words to the left, numbers to the right."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    right = [all(row[i][:1] in "$0123456789+-" for row in rows) for i in range(len(head))]
    for row in table:
        cells = (
            cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right, strict=True)
        )
        yield ("  " + "  ".join(cells)).rstrip()


def _usd(value: float | None) -> str:
    return "-" if value is None else f"${value:,.2f}"


def _ms(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds * 1000:,.0f} ms"


def _volume(tokens: float | None) -> str:
    if tokens is None:
        return "never"
    return f"{tokens / 1e9:,.2f}B" if tokens >= 1e9 else f"{tokens / 1e6:,.0f}M"
