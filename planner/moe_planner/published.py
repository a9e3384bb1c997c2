"""Published runs: a table's rows as cases that can be predicted, each with what was assumed, or why it cannot be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moe_planner import layouts, memory, speed, table
from moe_planner.calibration import Factors
from moe_planner.catalog import Accelerator, Catalog, ModelFacts, Precision
from moe_planner.memory import Ask
from moe_planner.speed import Load, Prepared, SpeedUnknown
from moe_planner.weights import Layout

WIDE = 32
FIRST_UTILIZATION = 0.9
"""vLLM's default of gpu_memory_utilization up to 0.13, which the rows that tell of a full context ran
(https://docs.gpustack.ai/latest/performance-lab/deepseek-v3.2/h200; read 2026-11-23)."""


@dataclass(frozen=True)
class Skipped:
    """A row that is not predicted, and why."""

    row: Mapping[str, str]
    why: str


@dataclass(frozen=True)
class Case:
    """A row that can be predicted. `options`: its layout, or those to choose the fastest from where none is given."""

    row: Mapping[str, str]
    value: float
    metric: str  # "output", "total", "input": tokens/s of all GPUs; "decode": of a decode pool; "ttft", "itl": seconds
    model: ModelFacts
    precision: Precision
    accelerator: Accelerator
    engine: str
    gpus: int
    options: tuple[Prepared, ...]
    requests: float | None = None  # sent at once; None: a steady load
    spread: bool = False  # output lengths as in recorded conversations
    cold: bool = False  # kernels are compiled while the first requests wait
    itl_limit_s: float | None = None  # the load is the largest that keeps this
    assumed: tuple[str, ...] = ()

    @property
    def throughput(self) -> bool:
        return self.metric not in ("ttft", "itl")

    @property
    def source(self) -> str:
        return self.row.get("source", "") or "not named"


@dataclass(frozen=True)
class FitCase:
    """A row that tells whether a model fits, with the planner's own answer."""

    row: Mapping[str, str]
    seen: bool
    told: bool

    @property
    def right(self) -> bool:
        return self.seen == self.told


def cases(rows: Iterable[Mapping[str, str]], catalog: Catalog) -> list[Case | FitCase | Skipped]:
    """Each row as a case, a judged fit, or skipped."""
    found: list[Case | FitCase | Skipped] = []
    for row in rows:
        try:
            found.append(_case(row, catalog))
        except table.Unpredicted as reason:
            found.append(Skipped(row, str(reason)))
        except SpeedUnknown as reason:
            found.append(Skipped(row, str(reason)))
    return found


def _case(row: Mapping[str, str], catalog: Catalog) -> Case | FitCase:
    metric = row["metric"].lower()
    what = table.METRICS.get(metric) or next(
        (kind for head, kind in table.LATENCIES.items() if metric.startswith(head)), None
    )
    if what is None:
        raise table.Unpredicted(
            f"metric: {row['metric'] or 'blank'} is not known: one of {', '.join(table.METRICS)}, ttft_ms, tpot_ms"
        )
    kind, scale = what
    try:
        value = float(row["value"].replace(",", ""))
    except ValueError:
        raise table.Unpredicted(f"value: {row['value'] or 'blank'} is no number") from None
    model, named = table.model(row["model"], catalog)
    precision = table.precision(row["precision"], named, catalog)
    accelerator = table.accelerator(row["hardware"], catalog)
    gpus = table.count(row["gpus"])
    if gpus is None or not 1 <= gpus <= 4096:
        raise table.Unpredicted(f"gpus: {row['gpus'] or 'blank'} is no count of GPUs")
    engine = table.engine(row["engine"])
    precision = table.scaled(row, engine, precision, model)
    ep = table.count(row.get("ep", "")) or 1
    ask = Ask(
        model,
        precision,
        accelerator,
        fp8_cache=table.fp8_cache(row, engine, precision, model, accelerator),
        active_seqs=table.active_seqs(engine, accelerator, catalog),
        # Wide expert parallelism runs with spare experts, and where experts do not divide it needs them.
        redundant=ep if ep >= WIDE else -model.experts % ep,
    )
    if kind == "fits":
        return FitCase(row, value >= 0.5, _fits(row, ask, gpus, catalog))
    if not 0 < value < math.inf:
        raise table.Unpredicted(f"value: {row['value']} must be a number above zero")
    note = row.get("note", "")
    if re.search(r"\bMTP\b|EAGLE|speculative", note, re.IGNORECASE) and not re.search(r"no (MTP|spec)", note, re.I):
        raise table.Unpredicted("note: speculative decoding, whose acceptance is not known")
    pooled = row.get("disaggregated(yes/no)", row.get("disaggregated", "")).lower() == "yes"
    if pooled and kind not in ("output", "input"):
        raise table.Unpredicted("disaggregated: how the GPUs are shared between prefill and decode is not given")
    if kind == "output" and (pooled or re.search(r"decode.only", note, re.IGNORECASE)):
        kind = "decode"
    load, requests, assumed = table.load(row, kind, gpus)
    itl = table.itl_limit(row, kind)
    options, more = _options(row, ask, gpus, load, catalog)
    return Case(
        row=row,
        value=value * (gpus if scale == "per_gpu" else 1.0) * (1e-3 if scale == "ms" else 1.0),
        metric=kind,
        model=model,
        precision=precision,
        accelerator=accelerator,
        engine=engine,
        gpus=gpus,
        options=options,
        requests=requests,
        spread="sharegpt" in f"{row['input_tokens']} {row['output_tokens']} {note}".lower()
        and "sharegpt" in row["input_tokens"].lower(),
        itl_limit_s=itl,
        cold=table.cold(row, engine, model, precision, accelerator),
        assumed=assumed + more,
    )


def _options(
    row: Mapping[str, str], ask: Ask, gpus: int, load: Load, catalog: Catalog
) -> tuple[tuple[Prepared, ...], tuple[str, ...]]:
    given = table.layout(row, gpus)
    found: list[Prepared] = []
    why: SpeedUnknown | None = None
    tried = (given,) if given else _every_layout(ask, gpus)
    if given and given.data == 1 and given.tensor > 1:
        spread = Layout(1, given.tensor, given.tensor, given.pipeline)
        tried = {"all": (spread,), "some": (given, spread)}.get(table.attention_dp(row), tried)
    for layout in tried:
        replicas = gpus // layout.gpus
        share = Load(load.input_tokens, load.output_tokens, max(1, load.concurrency // replicas), load.cached_share)
        try:
            told = speed.prepare(ask, layout, share, catalog, *table.admission(row, table.engine(row["engine"])))
            found.append(replace(told, graphs=table.graphs(row)))
        except SpeedUnknown as error:
            why = error
    if not found:
        raise why or table.Unpredicted(f"gpus: no layout of {ask.model.key} for {gpus}")
    return tuple(found), () if len(tried) == 1 else ("the fastest layout",)


def _every_layout(ask: Ask, gpus: int) -> tuple[Layout, ...]:
    """Layouts of replicas that share the GPUs evenly, inside one NVLink domain and without pipeline stages."""
    found = []
    for size in layouts.divisors(gpus):
        if size > min(72, ask.accelerator.domain_gpus):
            continue
        for tensor in layouts.divisors(size):
            for expert in sorted({1, size}):
                at = Layout(tensor, size // tensor, expert)
                if layouts.problem(at, ask.model, ask.precision, 0) is None:
                    found.append(at)
    return tuple(found)


def _fits(row: Mapping[str, str], ask: Ask, gpus: int, catalog: Catalog) -> bool:
    """Whether some layout of the GPUs, or the row's own, holds one sequence of the context that its note names.

    Where the note says that the context was the model's own, nothing was lowered to fit: step and share of the GPU are
    the engine's defaults. Elsewhere any step that the engine takes may have been set.
    """
    note = row.get("note", "")
    said = re.search(r"full (\d{4,7}) context|caps max-model-len (\d{4,7})|^max-model-len (\d{4,7})", note)
    context = int(next(filter(None, said.groups()))) if said else catalog.engine.shortest_context
    seqs = re.search(r"max-num-seqs (\d+)", note)
    given = table.layout(row, gpus)
    tried = [given] if given else [Layout(gpus), Layout(gpus, expert=gpus), Layout(1, gpus, gpus)]
    large = ask.accelerator.memory_bytes >= catalog.engine.large_gpu_bytes
    untouched = said is not None and said.group(1) is not None
    step = (max if untouched and large else min)(catalog.engine.batched_tokens)
    share = re.search(r"gpu-memory-utilization (0?\.\d+)", note)
    wanted = Ask(
        ask.model,
        ask.precision,
        ask.accelerator,
        ask.fp8_cache,
        active_seqs=int(seqs.group(1)) if seqs else None,
        utilization=float(share.group(1)) if share else FIRST_UTILIZATION if untouched else None,
    )
    return any(
        memory.place(wanted, layout, step, catalog.engine).cache >= memory.sequence_bytes(wanted, layout, context, step)
        for layout in tried
    )


def predict(case: Case, factors: Factors) -> float:
    """What the row's metric would be: tokens/s of all its GPUs, or seconds. Of several options the fastest."""
    known = factors.of_engine(case.engine)
    told = [_predict(case, option, known) for option in case.options]
    return max(told) if case.throughput else min(told)


def _predict(case: Case, at: Prepared, factors: Factors) -> float:
    replicas = case.gpus / at.layout.gpus
    load = at.load
    per_request = {"output": load.output_tokens, "total": load.input_tokens + load.output_tokens}
    if case.requests is not None:
        return _burst(case, at, factors, case.requests / replicas, per_request, replicas)
    if case.itl_limit_s is not None:
        at = _within(at, factors, case.itl_limit_s)
    found = speed.finish(at, factors)
    match case.metric:
        case "output":
            return found.output_tokens_per_s * replicas
        case "total":
            return found.total_tokens_per_s * replicas
        case "input":
            return found.prefill_tokens_per_s * replicas / max(1e-3, 1.0 - load.cached_share)
        case "decode":
            return found.running / found.step_s * replicas
        case "ttft":
            return found.ttft_s
    return found.itl_s


def _burst(
    case: Case, at: Prepared, factors: Factors, requests: float, per_request: Mapping[str, float], replicas: float
) -> float:
    total_s = speed.burst_s(at, factors, requests, spread=case.spread) + (factors.cold_s if case.cold else 0.0)
    if case.metric in per_request:
        return requests * per_request[case.metric] / total_s * replicas
    found = speed.finish(at, factors)
    if case.metric == "ttft":  # the median waits for half of the prompts, and for half of the waves before it
        before = requests / 2.0
        return before / at.layout.data * at.load.new_tokens / found.prefill_tokens_per_s * at.layout.data + max(
            0.0, total_s * (1.0 - at.running / requests) / 2.0
        )
    return found.itl_s


def _within(at: Prepared, factors: Factors, itl_s: float) -> Prepared:
    """The same with as many sequences as keep the time between tokens; its largest share of the room by bisection."""
    if speed.finish(at, factors).itl_s <= itl_s:
        return at
    low, high = 1.0, at.running
    for _ in range(24):
        middle = (low + high) / 2.0
        if speed.finish(replace(at, running=middle), factors).itl_s <= itl_s:
            low = middle
        else:
            high = middle
    return replace(at, running=low)
