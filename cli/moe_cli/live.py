"""What people see of a stack: a live screen on a terminal, plain lines elsewhere. Pure: state in, text out."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_cli.documents import PartState, Phase, StackState, Stage
from moe_cli.load_stats import LoadReport, Spread
from moe_cli.status import Figures, Report

_MARKS = {
    Phase.WAITING: ("·", "dim"),
    Phase.STARTING: ("…", "yellow"),
    Phase.UP: ("●", "green"),
    Phase.DONE: ("✓", "green"),
    Phase.STOPPING: ("…", "yellow"),
    Phase.STOPPED: ("○", "dim"),
    Phase.FAILED: ("✗", "red"),
}


def screen(state: StackState, figures: Figures | None, now_s: float, page: str | None = None) -> RenderableType:
    """The whole live view."""
    title = Text.assemble((state.deployment, "bold"), f"  {state.model}  {state.ranks} EP ranks  ", state.phase.value)
    blocks: list[RenderableType] = [title, stages(state, now_s)]
    if figures is not None and state.phase is Phase.UP:
        blocks += [figures_table(figures), *(Text(line, style="dim") for line in places(state, page))]
        blocks.append(Text("Ctrl-C stops everything.", style="dim"))
    return Group(*blocks)


def stages(state: StackState, now_s: float) -> Table:
    """Parts and their own stages with elapsed time."""
    table = Table.grid(padding=(0, 2))
    for part in state.parts:
        mark, style = _MARKS[part.phase]
        end = part.ready_s if part.ready_s is not None else now_s
        spent = "" if part.since_s is None else seconds(end - part.since_s)
        table.add_row(Text(mark, style=style), part.title, Text(spent, style="dim"), Text(_doing(part), style="dim"))
        for stage in part.stages if part.phase is Phase.STARTING else ():
            spent = seconds((stage.done_s or now_s) - stage.since_s)
            mark = "✓" if stage.state == "done" else "…"
            table.add_row("", f"  {mark} {stage.name}", Text(spent, style="dim"), Text(stage.detail, style="dim"))
    return table


def _doing(part: PartState) -> str:
    if part.phase is Phase.WAITING:
        return "waits for the parts before it"
    return f"pid {part.proc.pid}" if part.proc is not None and part.phase is Phase.UP else ""


def figures_table(figures: Figures) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in figure_rows(figures):
        table.add_row(Text(name, style="cyan"), value)
    return table


def figure_rows(figures: Figures) -> list[tuple[str, str]]:
    """Live numbers with their units; a dash where there is none."""
    f = figures
    rows = [
        ("traffic", f"{_number(f.rps)} req/s, {_number(f.in_flight)} in flight, {_number(f.failed)} failed"),
        ("TTFT", f"p50 {_ms(f.ttft_p50_s)}, p95 {_ms(f.ttft_p95_s)}"),
        ("ITL", f"p95 {_ms(f.itl_p95_s)}"),
        ("SLO", f"{_share(f.slo_attained)} of requests within"),
        ("imbalance", f"{_number(f.imbalance)} by rank, {_number(f.expert_imbalance)} by expert (max/mean)"),
        ("capacity", f"γ {f.capacity_factor or '–'}, overflow {f.overflow or '–'}"),
        ("engine", f"{_number(f.running)} running, {_number(f.waiting)} waiting, at most {_number(f.max_active_seqs)}"),
        ("spill", f"{_share(f.spill_share)} of requests"),
        ("knobs", f"version {_number(f.knobs_version)}"),
    ]
    if f.forecast_brier is not None:
        skill = "" if f.forecast_skill is None else f", skill {f.forecast_skill:.2f}"
        rows.append(("forecast", f"Brier {f.forecast_brier:.3f}{skill} (of what was not spilled)"))
    if f.would_have_spilled is not None:
        usd = f.would_have_cost_usd or 0
        rows.append(("shadow", f"{f.would_have_spilled} requests would have spilled, for ${usd:.2f}; nothing leaves"))
    if f.exploring:
        rows.append(("tuner", f.exploring))
    rows += [("decided", text) for text in f.decisions]
    return rows


def figures_line(figures: Figures) -> str:
    """The same in one line, for logs."""
    return "; ".join(f"{name}: {value}" for name, value in figure_rows(figures))


def places(state: StackState, page: str | None = None) -> list[str]:
    """Where everything is; `page`: the console, with its token."""
    rows = [("OpenAI API", state.gateway_url), ("board", state.fact("serving", "boardUrl"))]
    for label, part, fact in (("gateway admin", "gateway", "adminPort"), ("tuner", "tuner", "port")):
        port = state.fact(part, fact)
        rows.append((label, None if port is None else f"http://127.0.0.1:{port}"))
    rows.append(("console", page))
    rows.append(("Prometheus", state.fact("prometheus", "url")))
    lines = [f"{label + ':':15}{url}" for label, url in rows if url is not None]
    log = state.part("serving")
    if log is not None and log.log:
        lines.append(f"{'logs:':15}{log.log.rsplit('/', 1)[0]}")
    return lines


def example(state: StackState) -> str:
    """A request that anyone can paste."""
    body = f'{{"model": "{state.model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 16}}'
    return f"curl {state.gateway_url}/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def events(old: StackState | None, new: StackState) -> list[str]:
    """What happened between two states, one line each: the live view for logs and pipes."""
    lines = []
    for part in new.parts:
        before = old.part(part.name) if old is not None else None
        lines += _stage_events(part, before)
        if before is not None and before.phase is part.phase:
            continue
        match part.phase:
            case Phase.STARTING:
                lines.append(f"{part.title}: starts")
            case Phase.UP | Phase.DONE:
                word = "is ready" if part.phase is Phase.UP else "is done"
                spent = (part.ready_s or 0.0) - (part.since_s or 0.0)
                lines.append(f"{part.title}: {word} after {seconds(spent)}")
            case Phase.FAILED | Phase.STOPPED if before is not None:
                lines.append(f"{part.title}: {part.phase.value}")
    return lines


def _stage_events(part: PartState, before: PartState | None) -> list[str]:
    known: dict[str, Stage] = {stage.name: stage for stage in before.stages} if before is not None else {}
    lines = []
    for stage in part.stages:
        seen = known.get(stage.name)
        if seen is not None and seen.state == stage.state:
            continue
        detail = f" ({stage.detail})" if stage.detail else ""
        spent = seconds((stage.done_s or stage.since_s) - stage.since_s)
        ending = f"done after {spent}" if stage.state == "done" else f"starts{detail}"
        lines.append(f"{part.title}: {stage.name} {ending}")
    return lines


def report_lines(report: Report) -> list[str]:
    """`moectl status` for people."""
    if not report.running:
        return [f"nothing is running (state folder {report.state_dir})"]
    lines = [f"{report.deployment}  {report.model}  {report.phase}", f"API: {report.url or 'not yet'}"]
    if not report.supervised:
        lines.append("its supervisor is gone: `moectl down` ends what is left")
    for part in report.parts:
        health = "answers" if part.answers else "alive" if part.alive and part.answers is None else "does not answer"
        pid, health = f"pid {part.pid}" if part.pid else "", health if part.alive else "not running"
        lines.append(f"  {part.name:12}{pid:12}{health:18}{part.url or ''}")
    return lines + [f"  {name:12}{value}" for name, value in figure_rows(report.figures)]


def load_table(report: LoadReport) -> Table:
    """The result of a load run."""
    table = Table(title=None, show_edge=False)
    for name in ("", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right" if name else "left")
    for name, spread in (("TTFT", report.ttft), ("ITL", report.itl), ("E2E", report.e2e)):
        table.add_row(name, *_spread_cells(spread))
    return table


def load_lines(report: LoadReport) -> list[str]:
    """What stands around the table."""
    lines = [f"sent {report.sent} of {report.planned}, ok {report.ok}, failed {report.sent - report.ok}"]
    if report.interrupted:
        lines[0] += " (interrupted: a partial result)"
    lines += [f"  {kind}: {count}" for kind, count in report.failed.items()]
    if report.first_failure:
        lines.append(f"  first failure: {report.first_failure}")
    lines.append(
        f"{report.seconds:.1f} s, offered {report.offered_rps:.2f} req/s, completed {report.completed_rps:.2f} req/s,"
        f" {report.output_tokens_per_s:.1f} output tokens/s"
    )
    lines.append(
        f"longest gap between tokens {_ms(report.longest_gap_s)}, requests sent late p99 {_ms(report.late_p99_s)}"
    )
    if report.slo_attained is not None:
        lines.append(f"SLO attained by {_share(report.slo_attained)} of requests (failed ones are misses)")
    for name, row in report.targets.items():
        lines.append(f"target {name}: {row.count} requests, {row.ok} ok, TTFT p95 {_ms(row.ttft_p95_s)}")
    return lines


def seconds(value: float) -> str:
    """0.8 s, 42 s, 3 min 05 s."""
    if value < 10:
        return f"{max(0.0, value):.1f} s"
    whole = round(value)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def _spread_cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["–"] * 5
    return [_ms(value) for value in (spread.p50, spread.p90, spread.p95, spread.p99, spread.max)]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
